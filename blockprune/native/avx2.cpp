// The kernels for AVX2 with FMA.

#include "kernels.h"

#include <cmath>
#include <limits>

#if defined(BEGIN_TARGET)
#define VECTOR_BYTES 32
#define TILE_VECTORS 3   // vectors in a row of a tile of accumulators, of which 16 registers hold 4 x 3
#define DOWNDATE_ROWS 4  // rows of a tile of a downdate; they divide TILE_VECTORS vectors
BEGIN_TARGET(TARGET_AVX2)
namespace avx2 {
namespace {
#include "obs_kernels.h"
#include "pool_kernels.h"
#include "kernel_table.h"
}  // namespace
}  // namespace avx2
END_TARGET
#undef VECTOR_BYTES
#undef TILE_VECTORS
#undef DOWNDATE_ROWS

const Kernels* avx2_kernels() { return processor_has(AVX2) ? &avx2::kernels : nullptr; }
#else
const Kernels* avx2_kernels() { return nullptr; }
#endif
