// The kernels for AVX-512.

#include "kernels.h"

#include <cmath>
#include <limits>

#if defined(BEGIN_TARGET) && !defined(WITHOUT_AVX512)
#define VECTOR_BYTES 64
#define TILE_VECTORS 3   // as in avx2.cpp; 32 registers hold 8 x 3 accumulators
#define DOWNDATE_ROWS 8
BEGIN_TARGET(TARGET_AVX512)
namespace avx512 {
namespace {
#include "obs_kernels.h"
#include "pool_kernels.h"
#include "kernel_table.h"
}  // namespace
}  // namespace avx512
END_TARGET
#undef VECTOR_BYTES
#undef TILE_VECTORS
#undef DOWNDATE_ROWS

const Kernels* avx512_kernels() { return processor_has(AVX512) ? &avx512::kernels : nullptr; }
#else
const Kernels* avx512_kernels() { return nullptr; }
#endif
