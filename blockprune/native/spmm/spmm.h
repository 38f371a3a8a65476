// The block-sparse product y [n, rows] = x [n, cols] W^T + bias: what its files share.
//
// W is cut into blocks of `height` rows and `width` columns, and only kept blocks are stored. A band is one row of blocks. The kept columns
// of a band, in order, are a dense matrix, which is stored pair of columns after pair of columns, row after row within a pair:
// [columns / 2][height][2]; an odd last column follows as [height]. This one format serves instructions that multiply two bfloat16 at a
// time, broadcasts of single weights, and streaming: every kernel reads a band from start to end.
//
// A few rows of x are multiplied as they are (gemv.h). Many rows of x are packed first and multiplied in tiles (gemm.h).

#pragma once

#include <cstring>
#include <utility>

#include "../common.h"
#include "../isa.h"

struct Layer {
    const void* values;
    const int32_t* col;   // [blocks] the column of blocks of each kept block; within a band they rise
    const int64_t* crow;  // [bands + 1] where the kept blocks of each band start
    int64_t rows, cols, height, width;  // width is 1 or even

    int64_t bands() const { return (rows + height - 1) / height; }
    int64_t height_of(int64_t band) const { return std::min(height, rows - band * height); }
};

struct Product : Layer {
    const void* x;
    int64_t n;
    const void* bias;  // or null
    void* y;
    const int64_t* starts;  // [bands] where the values of each band start, or null where crow says it

    int64_t start(int64_t band) const { return starts ? starts[band] : crow[band] * width * height; }
};

// Rows [first, first + count) of x, which are multiplied together: packed into a panel of `panel` rows, or as they are where that is 0.
struct Slice {
    int64_t first, count, panel;
};

// The kernels for one type of number on one instruction set.
struct Kernels {
    int64_t max_panel, min_panel;  // rows of a panel, powers of two; 0 where `gemv` does everything
    int64_t packed_bytes;          // of one number of x in a panel
    int64_t gemv_rows;             // rows of W in the smallest vector of `gemv`
    // Packs columns [begin, end) of a slice of x into its panel; begin is a multiple of 32.
    void (*pack)(const Product&, const Slice&, int64_t begin, int64_t end, void* panel);
    // Multiplies a panel with bands [begin, end); `scratch` holds gemm_scratch(...) floats.
    void (*gemm)(const Product&, const Slice&, const void* panel, float* scratch, int64_t begin, int64_t end);
    // Multiplies a slice of 1 to 4 rows of x with bands [begin, end); `scratch` holds gemv_scratch(...) floats.
    void (*gemv)(const Product&, const Slice&, float* scratch, int64_t begin, int64_t end);
};

static const int64_t OUTPUT_ROWS = 64;          // rows of the result that are gathered before they are transposed and stored
static const int64_t CACHED_BYTES = 49152;      // of weights that stay in the cache while several tiles read them
static const int64_t PREFETCH_DISTANCE = 8192;  // bytes

static inline int64_t gemm_scratch(const Product& p, int64_t panel) { return (OUTPUT_ROWS + p.height + 24) * panel; }
static inline int64_t gemv_scratch(const Product& p) { return 4 * (p.height + p.cols + 32); }

struct ConvKernels;  // of conv.h

struct KernelSet {
    const Kernels *f32, *bf16;
    const ConvKernels *conv_f32, *conv_bf16;  // null where there are none
};

const KernelSet* kernels_of(int32_t isa);  // null where the processor lacks it

const KernelSet* plain_kernels();
const KernelSet* avx2_kernels();  // null where the compiler or the processor lacks the instruction set, as below
const KernelSet* avx512_kernels();
const KernelSet* avx512_bf16_kernels();

// The threads that torch uses, and how many of them get at least some microseconds of work each.
struct Team {
    int64_t all, useful;
};

// Runs body(data, task) for each task of [0, count) on the threads of a team, the calling one included, or on fewer where the system refuses
// them. Throws what a task has thrown.
void run_tasks(const Team& team, int64_t count, void (*body)(void*, int64_t), void* data);
