// Sums over the blocks of a matrix.

#include "kernels.h"

#include <new>

template <class T>
static void pool(PoolKernel<T> kernel, const T* x, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out, int64_t threads) {
    const int64_t block_rows = (rows + r - 1) / r, block_cols = (cols + c - 1) / c;
    std::vector<float> partial(threads * block_cols);
    std::vector<double> total(threads * block_cols);
    if (block_rows >= block_cols || block_rows >= threads) {
        parallel(block_rows, threads, [&](int64_t i, int64_t j, int64_t thread) {
            kernel(x + i * r * cols, cols, std::min(rows, j * r) - i * r, cols, r, c, out + i * block_cols, block_cols,
                   &partial[thread * block_cols], &total[thread * block_cols]);
        });
    } else {  // a few tall blocks: threads share out the columns
        parallel(block_cols, threads, [&](int64_t i, int64_t j, int64_t thread) {
            kernel(x + i * c, cols, rows, std::min(cols, j * c) - i * c, r, c, out + i, block_cols, &partial[thread * block_cols],
                   &total[thread * block_cols]);
        });
    }
}

// Whether this processor has an instruction set of isa.h.
EXPORT int32_t has_isa(int32_t isa) { return kernels_of(isa) != nullptr; }

// x [rows, cols] -> out [ceil(rows / r), ceil(cols / c)]: sums of a term over blocks of r x c, ragged at the ends. Returns 0, 1 for an
// argument or an instruction set that is not there, or 2 if memory ran out.
EXPORT int32_t pool_sum(const void* x, int32_t is_bf16, int32_t term, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out,
                        int64_t threads, int32_t isa) {
    const Kernels* kernels = kernels_of(isa);
    if (!kernels || term < 0 || term >= TERM_COUNT || rows < 1 || cols < 1 || r < 1 || c < 1 || threads < 1) return 1;
    advise_large_pages(out, ((rows + r - 1) / r) * ((cols + c - 1) / c) * sizeof(float));
    try {
        if (is_bf16) pool(kernels->pool_bf16[term], (const bf16*)x, rows, cols, r, c, out, threads);
        else pool(kernels->pool_f32[term], (const float*)x, rows, cols, r, c, out, threads);
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
