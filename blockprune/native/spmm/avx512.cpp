// The kernels for AVX-512: floats, and bfloat16 as floats.

#include "intrinsics.h"
#include "conv.h"
#include "gradients.h"

#if defined(BEGIN_TARGET) && !defined(WITHOUT_AVX512)
#define INSTRUCTIONS "instructions_avx512.h"
#define LANES 16
#define PANEL_VECTORS 2  // as in avx2.cpp
#define TILE_ROWS 8
#define ACCUMULATORS 16
#define F32_BANDS_IN_TURNS 1
BEGIN_TARGET(TARGET_AVX512)
namespace {
#include "vectors.h"
#include "gemm.h"
#include "gemv.h"
#include "int8.h"
#include "kernel_table.h"
#include "conv_kernels.h"
#include "gradient_kernels.h"
constexpr Kernels f32 = float_kernels<F32, F32, F32Words>(), bf16 = float_kernels<Bf16AsF32, Bf16AsF32, Bf16Words<DotAsF32>>();
constexpr Kernels int8 = kernels<Int8Pairs, Int8Columns>(4, gemv_int8);
constexpr ConvKernels conv_f32 = conv_kernels<F32>(), conv_bf16 = conv_kernels<Bf16AsF32>();
constexpr GradientKernels gradient_f32 = gradient_kernels<float>(), gradient_bf16 = gradient_kernels<uint16_t>();
constexpr KernelSet set = {&f32, &bf16, &int8, nullptr, false, quantize, &conv_f32, &conv_bf16, &gradient_f32, &gradient_bf16};
}  // namespace
END_TARGET

const KernelSet* avx512_kernels() { return processor_has(AVX512) ? &set : nullptr; }
#else
const KernelSet* avx512_kernels() { return nullptr; }
#endif
