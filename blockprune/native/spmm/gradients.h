// The gradients of y = x W^T: dx = dy W, and dW = dy^T x where blocks of W are kept, a sampled dense-dense matrix product.
//
// Some rows of x and dy are packed at a time, column by column, so that the numbers of a column lie next to each other, `pitch` words from
// those of the next one. A word is a float, or a pair of bfloat16 numbers that one instruction multiplies with another pair: two rows of x and
// of dy for dW, two columns of dy and two rows of W for dx. Zeros fill the last pair.
//
// dx: a kept column of a band adds its weights times the columns of dy to a column of dx; some columns of dx stay in the cache for all bands.
// dW: rows of a band lie across the vector lanes and meet a few kept columns of x at a time, whose sums stay in registers.

#pragma once

#include "spmm.h"

struct Gradient : Layer {
    const void *x, *dy;     // [n, cols], which dx does not need, and [n, rows]
    int64_t n;
    void* out;              // dx [n, cols], or dW as `values`
    const int64_t* starts;  // [bands] where the values of each band start
    int64_t number_bytes;   // of x, dy and the weights
};

// A matrix [n, width] of which some rows are packed.
struct Matrix {
    const void* numbers;
    int64_t width;
};

// Some rows of a band.
struct RowTile {
    int64_t band, first, rows, lanes;  // `first` is counted from the first row of the band
};

typedef uint32_t Word;  // the bits of a float, or a pair of bfloat16 numbers

struct GradientKernels {
    int64_t per_word;  // numbers
    int64_t inputs;    // the packed rows are a multiple of it
    // Rows [first, first + count) of a matrix, some of its columns: the first of them at `to`. Zeros follow up to a multiple of `inputs`.
    // A word has numbers of neighbouring rows in pack_x, of neighbouring columns in pack_dy.
    void (*pack_x)(const Matrix&, int64_t first, int64_t count, const Range& columns, Word* to, int64_t pitch);
    void (*pack_dy)(const Matrix&, int64_t first, int64_t count, const Range& columns, Word* to, int64_t pitch);
    // Sums of dx to rows of `to` [n, width], and those of dW to numbers of x's type.
    void (*unpack_columns)(const float* from, int64_t pitch, int64_t first, int64_t count, const Range& columns, void* to, int64_t width);
    void (*round)(const float* from, const Range& numbers, void* to);
    // The rows of a tile of dy as [count / per_word][lanes].
    void (*pack_rows)(const Gradient&, int64_t first, int64_t count, const RowTile&, Word* to);
    // Some columns of weights of a band as words: where they are, or in `scratch`. A word has numbers of neighbouring rows.
    const Word* (*pack_weights)(const void* values, int64_t columns, int64_t height, Word* scratch);
    // Adds `height` packed columns of dy, times weights, to columns of dx. The weights of an odd last column are `step` apart.
    void (*add_to_inputs)(float* const* columns, int64_t count, const Word* weights, int64_t step, const Word* dy, int64_t height,
                          int64_t pitch, int64_t n);
    // Sums of dW for `count` columns of x and a tile, over n packed words; `out` is where those of the first column belong.
    void (*add_to_weights)(const Word* const* columns, int64_t count, const Word* dy, int64_t n, const RowTile&, int64_t height, float* out,
                           bool add);
};
static const int64_t TALLEST_TILE = 16;  // rows
