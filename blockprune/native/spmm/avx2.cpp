// AVX2 with FMA: floats, and bfloat16 widened to them.

#include "spmm.h"

#if defined(BEGIN_TARGET)
#define INSTRUCTIONS "instructions_avx2.h"
#define LANES 8
#define WIDE 2
#define TALL 6
#define ACROSS 8
BEGIN_TARGET("avx2,fma")
namespace {
#include "vectors.h"
#include "tiles.h"
#include "few.h"
#include "kinds.h"
const Kernels f32 = kernels<Float, Float, FloatWords>(), bf16 = kernels<Widened, Widened, HalfWords<WidenedDot>>();
const Kind kind = {&f32, &bf16};
}  // namespace
END_TARGET

const Kind* avx2_kernels() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kind : nullptr; }
#else
const Kind* avx2_kernels() { return nullptr; }
#endif
