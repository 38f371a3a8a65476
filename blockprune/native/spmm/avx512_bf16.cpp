// The kernels for AVX-512 with instructions that multiply pairs of bfloat16, subnormal ones as zero, and add to floats; or pairs of int16.

#include "intrinsics.h"
#include "conv.h"

#if defined(BEGIN_TARGET) && !defined(WITHOUT_AVX512)
#define INSTRUCTIONS "instructions_avx512.h"
#define DOT_PAIRS
#define LANES 16
#define PANEL_VECTORS 2  // as in avx2.cpp
#define TILE_ROWS 8
#define ACCUMULATORS 16
BEGIN_TARGET(TARGET_AVX512_BF16)
namespace {
#include "vectors.h"
#include "gemm.h"
#include "gemv.h"
#include "int8.h"
#include "kernel_table.h"
#include "conv_kernels.h"
const Kernels bf16 = float_kernels<Bf16Pairs, Bf16Columns, Bf16Words<DotPairs>>();
const Kernels int8 = kernels<Int8Pairs, Int8Columns>(4, gemv_int8);
const ConvKernels conv_bf16 = conv_kernels<Bf16Columns>();
}  // namespace
END_TARGET

const KernelSet* avx512_bf16_kernels() {
    static const KernelSet* avx512 = avx512_kernels();
    if (!avx512 || !processor_has(AVX512_BF16)) return nullptr;
    static const KernelSet set = {avx512->f32, &bf16, &int8, quantize, avx512->conv_f32, &conv_bf16, avx512->gradient_f32, avx512->gradient_bf16};
    return &set;
}
#else
const KernelSet* avx512_bf16_kernels() { return nullptr; }
#endif
