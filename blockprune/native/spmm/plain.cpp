// What every processor of a kind has: SSE2 on x86, NEON on ARM; elsewhere, and for other compilers, loops.

#include "spmm.h"

#if defined(HAS_VECTORS)
#define INSTRUCTIONS "instructions_plain.h"
#define LANES 4
#define ACROSS 8
#if defined(__aarch64__)
#include <arm_neon.h>
#define WIDE 4
#define TALL 4
#else
#define WIDE 2
#define TALL 6
#endif
namespace {
#include "vectors.h"
#include "tiles.h"
#include "few.h"
#include "kinds.h"
const Kernels f32 = kernels<Float, Float, FloatWords>(), bf16 = kernels<Widened, Widened, HalfWords<WidenedDot>>();
const Kind kind = {&f32, &bf16};
}  // namespace
#else
#include "loops.h"
#endif

const Kind* plain_kernels() { return &kind; }
