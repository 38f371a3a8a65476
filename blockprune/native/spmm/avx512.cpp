// AVX-512: floats, and bfloat16 widened to them.

#include "spmm.h"

#if defined(BEGIN_TARGET)
#define INSTRUCTIONS "instructions_avx512.h"
#define LANES 16
#define WIDE 2
#define TALL 8
#define ACROSS 16
BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace {
#include "vectors.h"
#include "tiles.h"
#include "few.h"
#include "kinds.h"
const Kernels f32 = kernels<Float, Float, FloatWords>(), bf16 = kernels<Widened, Widened, HalfWords<WidenedDot>>();
const Kind kind = {&f32, &bf16};
}  // namespace
END_TARGET

const Kind* avx512_kernels() {
    const bool can = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
    return can ? &kind : nullptr;
}
#else
const Kind* avx512_kernels() { return nullptr; }
#endif
