// The int8 kernels for AVX2 with instructions that multiply four bytes and add to int32.

#include "intrinsics.h"
#include "conv.h"

#if defined(BEGIN_TARGET) && defined(TARGET_AVX_VNNI)
#define INSTRUCTIONS "instructions_avx2.h"
#define DOT_QUADS
#define LANES 8
#define PANEL_VECTORS 2  // as in avx2.cpp
#define TILE_ROWS 6
#define ACCUMULATORS 8
#define F32_BANDS_IN_TURNS 2
BEGIN_TARGET(TARGET_AVX_VNNI)
namespace {
#include "vectors.h"
#include "gemm.h"
#include "gemv.h"
#include "int8.h"
#include "int8_quads.h"
#include "kernel_table.h"
}  // namespace
END_TARGET

const KernelSet* avx_vnni_kernels() {
    static const KernelSet* avx2 = avx2_kernels();
    if (!avx2 || !processor_has(AVX_VNNI)) return nullptr;
    static const KernelSet set = [] {
        KernelSet all = *avx2;
        all.int8_quads = &int8_quads, all.quads_saturate = false;
        return all;
    }();
    return &set;
}
#else
const KernelSet* avx_vnni_kernels() { return nullptr; }
#endif
