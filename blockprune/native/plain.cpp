// The kernels for what every processor of an architecture has, such as SSE2 or NEON, and for compilers without vectors.

#include "kernels.h"

#include <cmath>
#include <limits>

#if defined(HAS_VECTORS)
#define VECTOR_BYTES 16
#else
#define VECTOR_BYTES 0
#endif
#if defined(HAS_VECTORS) && !defined(__aarch64__)
#define TILE_VECTORS 2   // as in avx2.cpp
#else
#define TILE_VECTORS 4
#endif
#define DOWNDATE_ROWS 4
namespace plain {
namespace {
#include "obs_kernels.h"
#include "pool_kernels.h"
#include "kernel_table.h"
}  // namespace
}  // namespace plain
#undef VECTOR_BYTES
#undef TILE_VECTORS
#undef DOWNDATE_ROWS

const Kernels* plain_kernels() { return &plain::kernels; }
