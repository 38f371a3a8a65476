// The int8 kernels for AVX-512 with instructions that multiply four bytes, or two int16, and add to int32.

#include "intrinsics.h"
#include "conv.h"

#if defined(BEGIN_TARGET) && !defined(WITHOUT_AVX512)
#define INSTRUCTIONS "instructions_avx512.h"
#define DOT_QUADS
#define LANES 16
#define PANEL_VECTORS 2  // as in avx2.cpp
#define TILE_ROWS 8
#define ACCUMULATORS 16
#define F32_BANDS_IN_TURNS 1
BEGIN_TARGET(TARGET_AVX512_VNNI)
namespace {
#include "vectors.h"
#include "gemm.h"
#include "gemv.h"
#include "int8.h"
#include "int8_quads.h"
#include "kernel_table.h"
constexpr Kernels int8 = kernels<Int8Pairs, Int8Columns>(4, gemv_int8);
}  // namespace
END_TARGET

const KernelSet* avx512_vnni_kernels() {
    static const KernelSet* avx512 = avx512_kernels();
    if (!avx512 || !processor_has(AVX512_VNNI)) return nullptr;
    static const KernelSet set = [] {
        KernelSet all = *avx512;
        all.int8 = &int8, all.int8_quads = &int8_quads, all.quads_saturate = false;
        return all;
    }();
    return &set;
}
#else
const KernelSet* avx512_vnni_kernels() { return nullptr; }
#endif
