// The kernels for what every processor of an architecture has, SSE2 or NEON; loops on others, and for compilers without vectors.

#include "intrinsics.h"
#include "conv.h"
#include "gradients.h"

#if defined(HAS_VECTORS)
#define INSTRUCTIONS "instructions_plain.h"
#define LANES 4
#define ACCUMULATORS 8  // as in avx2.cpp
#define F32_BANDS_IN_TURNS 1
#if defined(__aarch64__)
#define PANEL_VECTORS 4
#define TILE_ROWS 4
#else
#define PANEL_VECTORS 2
#define TILE_ROWS 6
#endif
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
#else
#include "loops.h"
#endif

const KernelSet* plain_kernels() { return &set; }
