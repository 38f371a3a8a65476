// The kernels of this extension module, which are compiled once for each instruction set, and the table that holds them.

#pragma once

#include "common.h"
#include "isa.h"

// A bfloat16 number is the upper half of a float.
struct bf16 {
    uint16_t bits;
};

// What is summed over the elements of a block.
enum Term { IDENTITY, ABS, SQUARE, TERM_COUNT };

// Block sums of a part of a matrix: `rows` x `cols` elements at x, whose rows are `stride` elements apart, in blocks of r x c, to `out`,
// whose rows are `out_stride` elements apart. The scratch buffers hold one number of each block in a row of blocks.
template <class T>
using PoolKernel = void (*)(const T* x, int64_t stride, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out, int64_t out_stride,
                            float* partial, double* total);

// A band is one row of blocks: m rows of weights, cut into blocks of n inputs.
struct BandShape {
    int64_t k, m, n;  // inputs, rows, and inputs of a block
    int64_t stop;     // how many blocks are removed; the others only get scores
    const std::atomic<int32_t>* interrupted;  // not 0 once the caller wants the sweep to end early, with results that it does not use
    int64_t blocks() const { return k / n; }
};

template <class T> struct Band {
    const T* weights;  // [k][m], the rows transposed
    const T* inverse;  // [k][k] the inverse Hessian
    T* errors;         // [blocks] what each removal adds to the error, in the order of removal; then the scores of the other blocks
    int64_t* order;    // [blocks] the blocks in that order
};

// Scratch buffers of a sweep over a band; obs_kernels.h says what they hold.
enum SweepBuffer { INVERSE, ROWS_OF_V, PACKED_V, BLOCKS, FACTOR, TRIAL, SCORES, BUFFER_COUNT };
struct SweepSizes {
    int64_t numbers[BUFFER_COUNT], indices;
};
template <class T> struct SweepScratch {
    T* buffers[BUFFER_COUNT];
    int64_t* ids;
};

template <class T> struct Sweep {
    SweepSizes (*sizes)(const BandShape& shape);
    // Returns false if a block of the inverse is not positive definite in this precision.
    bool (*run)(const BandShape& shape, const Band<T>& band, const SweepScratch<T>& scratch);
};

struct Kernels {
    PoolKernel<float> pool_f32[TERM_COUNT];
    PoolKernel<bf16> pool_bf16[TERM_COUNT];
    Sweep<float> sweep_f32;
    Sweep<double> sweep_f64;
};

const Kernels* plain_kernels();
const Kernels* avx2_kernels();  // null where the compiler or the processor lacks it
const Kernels* avx512_kernels();

// The kernels for an instruction set, or null. They do not multiply pairs of bfloat16.
static inline const Kernels* kernels_of(int32_t isa) {
    switch (isa) {
        case PLAIN: return plain_kernels();
        case AVX2: return avx2_kernels();
        case AVX_VNNI: return processor_has(AVX_VNNI) ? avx2_kernels() : nullptr;
        case AVX512: return avx512_kernels();
        case AVX512_VNNI:
        case AVX512_BF16:
        case AMX: return processor_has((Isa)isa) ? avx512_kernels() : nullptr;
        case BEST: break;
        default: return nullptr;
    }
    if (const Kernels* kernels = avx512_kernels()) return kernels;
    if (const Kernels* kernels = avx2_kernels()) return kernels;
    return plain_kernels();
}
