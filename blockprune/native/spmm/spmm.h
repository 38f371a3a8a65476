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
#include <type_traits>
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
    int64_t kept_columns(int64_t band) const {  // the last block may reach beyond W
        const int64_t begin = crow[band], end = crow[band + 1];
        return (end - begin) * width - (begin < end ? std::max<int64_t>(0, (col[end - 1] + 1) * width - cols) : 0);
    }
    std::vector<int64_t> band_starts() const {  // [bands] where the values of each band start
        std::vector<int64_t> all;
        for (int64_t band = 0, start = 0; band < bands(); start += kept_columns(band) * height_of(band), band++) all.push_back(start);
        return all;
    }
};

// The first of `count` items, each of `per_item` blocks of columns, that starts at a column or after it.
static inline int64_t first_after(const int32_t* col, int64_t per_item, int64_t count, int64_t width, int64_t column) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (col[per_item * middle] * width < column) low = middle + 1;
        else high = middle;
    }
    return low;
}

struct Product : Layer {
    const void* x;
    int64_t n;
    const void* bias;  // or null
    void* y;
    const int64_t* starts;  // [bands] where the values of each band start, or null where crow says it
    const float *input_scale = nullptr, *weight_scale = nullptr;  // [n] and [rows], where weights are int8: they make sums floats
    bool is_bf16 = false;  // the type of y where weights are int8; their bias is float32
    bool uses_tiles = false;  // the kernels are those of KernelSet::int8_tiles

    int64_t start(int64_t band) const { return starts ? starts[band] : crow[band] * width * height; }
};

// Rows [first, first + count) of x, which are multiplied together: packed into a panel of `panel` rows, or as they are where that is 0.
struct Slice {
    int64_t first, count, panel;
};
struct Panel {
    Slice slice;
    void* packed;
    float* sums;  // [rows of some bands and LANES more][panel]: floats, or int32 where numbers are int8
};
struct Range {
    int64_t begin, end;
};

// The kernels for one type of number on one instruction set.
struct Kernels {
    int64_t max_panel, min_panel;  // rows of a panel, powers of two; 0 where `gemv` does everything
    int64_t packed_bytes[2];       // of one number of x in a panel, for blocks and for single columns
    int64_t gemv_rows;             // rows of W in the smallest vector of `gemv`
    // Packs columns [begin, end) of a slice of x into its panel; begin is a multiple of 32.
    void (*pack)(const Product&, const Slice&, int64_t begin, int64_t end, void* panel);
    // Adds the product of some bands, their kept blocks that start in some columns, to the sums of panels, and stores them in y after the
    // last columns. `scratch` holds gemm_scratch(...) bytes.
    void (*gemm)(const Product&, const Panel*, int64_t count, const Range& bands, const Range& columns, void* scratch);
    // Multiplies a slice of 1 to 4 rows of x with bands [begin, end); `scratch` holds gemv_scratch(...) floats.
    void (*gemv)(const Product&, const Slice&, float* scratch, int64_t begin, int64_t end);
    int64_t max_inputs = 128;       // rows of x that bands are multiplied with before the next rows
    int64_t panels_bytes = 196608;  // of these rows as they are packed, that bands are multiplied with before the next columns
    int64_t max_gemv_inputs = 4;    // up to how many rows of x `gemv` may be used
};

static const int64_t CACHED_BYTES = 8192;       // of weights that stay in the cache while several tiles and panels read them
static const int64_t PREFETCH_DISTANCE = 8192;  // bytes
static const float SMALLEST_INPUT = 1e-36f;     // rows of x without larger numbers are zero in int8: 127 / x must be finite

// Bytes for weights of int8 as they are multiplied, at most four each, and what is added to the sums of each row.
static inline int64_t gemm_scratch(const Product& p) {
    const int64_t cached = 64 + 4 * round_up(p.height, 16) + 4 * std::max(CACHED_BYTES, p.height * round_up(p.width, 4));
    return p.weight_scale ? std::max(cached, p.uses_tiles ? p.height * p.cols : 0) : 0;
}
static inline int64_t gemv_scratch(const Product& p) { return 4 * (p.height + p.cols + 32); }

struct ConvKernels;     // of conv.h
struct GradientKernels;  // of gradients.h

struct KernelSet {
    const Kernels *f32, *bf16, *int8;
    const Kernels* int8_quads;  // for blocks a multiple of four wide and at least four high, or null
    bool quads_saturate;        // so that large weights leave remainders, and quads pay for many rows of x alone
    // A row of x, of float32 or bfloat16, in int8, and its scale: NaN where it is not finite.
    void (*quantize)(const void* x, bool is_bf16, int64_t cols, int8_t* out, float* scale);
    const ConvKernels *conv_f32, *conv_bf16;  // null where there are none
    const GradientKernels *gradient_f32, *gradient_bf16;
    const GradientKernels* gradient_pairs = nullptr;  // of bfloat16
    const Kernels *bf16_tiles = nullptr, *int8_tiles = nullptr;  // for many rows of x, where blocks are whole tiles
};

const KernelSet* kernels_of(int32_t isa);  // null where the processor lacks it

const KernelSet* plain_kernels();
const KernelSet* avx2_kernels();  // null where the compiler or the processor lacks the instruction set, as below
const KernelSet* avx_vnni_kernels();
const KernelSet* avx512_kernels();
const KernelSet* avx512_vnni_kernels();
const KernelSet* avx512_bf16_kernels();
const KernelSet* amx_kernels();

// The threads that torch uses, and how many of them get at least some microseconds of work each.
struct Team {
    int64_t all, useful;
};

// Runs body(data, task) for each task of [0, count) on the threads of a team, the calling one included, or on fewer where the system refuses
// them. Throws what a task has thrown.
void run_tasks(const Team& team, int64_t count, void (*body)(void*, int64_t), void* data);
template <class Body> static void for_each_task(const Team& team, int64_t count, Body body) {
    run_tasks(team, count, [](void* data, int64_t i) { (*(Body*)data)(i); }, &body);
}

// As many threads as get at least 8 microseconds of work each.
static inline int64_t threads_for(int64_t threads, double nanoseconds) {
    return std::max<int64_t>(1, std::min<int64_t>(threads, (int64_t)(nanoseconds / 8000)));
}
