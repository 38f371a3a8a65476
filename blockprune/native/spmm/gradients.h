// The gradients of y = x W^T: dx = dy W, and dW = dy^T x where blocks of W are kept, a sampled dense-dense matrix product.
//
// Some rows of x and dy are packed at a time, column by column, so that the numbers of a column lie next to each other, `pitch` numbers from
// those of the next one.
//
// dx: a kept column of a band adds its weights times the columns of dy to a column of dx; some columns of dx stay in the cache for all bands.
// dW: rows of a band lie across the vector lanes and meet a few kept columns of x at a time, whose sums stay in registers.

#pragma once

#include "spmm.h"

struct Gradient : Layer {
    const void *x, *dy;     // [n, cols], which dx does not need, and [n, rows]
    int64_t n;
    void* out;              // dx [n, cols], or dW as `values` but always float32
    const int64_t* starts;  // [bands] where the values of each band start
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

struct GradientKernels {
    int64_t inputs;  // the packed rows are a multiple of it
    // Rows [first, first + count) of a matrix, some of its columns: the first of them at `to`. Zeros follow up to a multiple of `inputs`.
    void (*pack_columns)(const Matrix&, int64_t first, int64_t count, const Range& columns, float* to, int64_t pitch);
    // The same way back, to rows of `to` [n, width].
    void (*unpack_columns)(const float* from, int64_t pitch, int64_t first, int64_t count, const Range& columns, void* to, int64_t width);
    // The rows of a tile of dy as [count][lanes].
    void (*pack_rows)(const Gradient&, int64_t first, int64_t count, const RowTile&, float* to);
    // `count` weights as floats: where they are, or in `scratch`.
    const float* (*widen)(const void* values, int64_t first, int64_t count, float* scratch);
    // Adds `height` packed rows of dy, times weights, to columns of dx. The weights of an odd last column are `step` apart.
    void (*add_to_inputs)(float* const* columns, int64_t count, const float* weights, int64_t step, const float* dy, int64_t height,
                          int64_t pitch, int64_t n);
    // Sums of dW for `count` columns of x and a tile; `out` is where those of the first column belong.
    void (*add_to_weights)(const float* const* columns, int64_t count, const float* dy, int64_t n, const RowTile&, int64_t height, float* out,
                           bool add);
};
static const int64_t TALLEST_TILE = 16;  // rows
