// AVX-512 with instructions that multiply pairs of bfloat16 (denormal ones as zero) and add to float.

#include "spmm.h"

#if defined(BEGIN_TARGET)
#define INSTRUCTIONS "instructions_avx512.h"
#define DOT_PAIRS
#define LANES 16
#define WIDE 2
#define TALL 8
#define ACROSS 16
BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16")
namespace {
#include "vectors.h"
#include "tiles.h"
#include "few.h"
#include "kinds.h"
const Kernels bf16 = kernels<Pairs, Singles, HalfWords<PairsDot>>();
}  // namespace
END_TARGET

const Kind* avx512_bf16_kernels() {
    static const Kind* base = avx512_kernels();
    static const Kind kind = {base ? base->f32 : nullptr, &bf16};
    return base && __builtin_cpu_supports("avx512bf16") ? &kind : nullptr;
}
#else
const Kind* avx512_bf16_kernels() { return nullptr; }
#endif
