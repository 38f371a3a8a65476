// The kernels for AVX-512 with instructions that multiply pairs of bfloat16, subnormal ones as zero, and add to floats.

#include "intrinsics.h"
#include "conv.h"
#include "gradients.h"

#if defined(BEGIN_TARGET) && !defined(WITHOUT_AVX512)
#define INSTRUCTIONS "instructions_avx512.h"
#define DOT_PAIRS
#define LANES 16
#define PANEL_VECTORS 2  // as in avx2.cpp
#define TILE_ROWS 8
#define ACCUMULATORS 16
#define F32_BANDS_IN_TURNS 1
BEGIN_TARGET(TARGET_AVX512_BF16)
namespace {
#include "vectors.h"
#include "gemm.h"
#include "gemv.h"
#include "kernel_table.h"
#include "conv_kernels.h"
#include "gradient_kernels.h"
constexpr Kernels bf16 = float_kernels<Bf16Pairs, Bf16Columns, Bf16Words<DotPairs>>();
constexpr ConvKernels conv_bf16 = conv_kernels<Bf16Columns>();
}  // namespace
END_TARGET

const KernelSet* avx512_bf16_kernels() {
    static const KernelSet* vnni = avx512_vnni_kernels();
    if (!vnni || !processor_has(AVX512_BF16)) return nullptr;
    static const KernelSet set = [] {
        KernelSet all = *vnni;
        all.bf16 = &bf16, all.conv_bf16 = &conv_bf16, all.gradient_pairs = &gradient_pairs;
        return all;
    }();
    return &set;
}
#else
const KernelSet* avx512_bf16_kernels() { return nullptr; }
#endif
