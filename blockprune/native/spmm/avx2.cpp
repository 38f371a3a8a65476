// The kernels for AVX2 with FMA: floats, and bfloat16 as floats.

#include "intrinsics.h"
#include "conv.h"
#include "gradients.h"

#if defined(BEGIN_TARGET)
#define INSTRUCTIONS "instructions_avx2.h"
#define DOT_QUADS
#define SATURATING
#define LANES 8
#define PANEL_VECTORS 2  // vectors of the widest panel
#define TILE_ROWS 6      // most rows of W in a tile several vectors wide
#define ACCUMULATORS 8   // most rows of W in a tile one vector wide, and most vectors of sums in a gemv
#define F32_BANDS_IN_TURNS 2  // bands that take turns in a gemv
BEGIN_TARGET(TARGET_AVX2)
namespace {
#include "vectors.h"
#include "gemm.h"
#include "gemv.h"
#include "int8.h"
#include "int8_quads.h"
#include "kernel_table.h"
#include "conv_kernels.h"
#include "gradient_kernels.h"
constexpr Kernels f32 = float_kernels<F32, F32, F32Words>(), bf16 = float_kernels<Bf16AsF32, Bf16AsF32, Bf16Words<DotAsF32>>();
constexpr Kernels int8 = kernels<Int8Pairs, Int8Columns>(4, gemv_int8);
constexpr ConvKernels conv_f32 = conv_kernels<F32>(), conv_bf16 = conv_kernels<Bf16AsF32>();
constexpr GradientKernels gradient_f32 = gradient_kernels<float>(), gradient_bf16 = gradient_kernels<uint16_t>();
constexpr KernelSet set = {&f32, &bf16, &int8, &int8_quads, true, quantize, &conv_f32, &conv_bf16, &gradient_f32, &gradient_bf16};
}  // namespace
END_TARGET

const KernelSet* avx2_kernels() { return processor_has(AVX2) ? &set : nullptr; }
#else
const KernelSet* avx2_kernels() { return nullptr; }
#endif
