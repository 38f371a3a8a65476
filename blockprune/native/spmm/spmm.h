// The block-sparse product y [n, rows] = x [n, cols] W^T + bias: what its files share.
//
// W is cut into bands of `height` rows, and a band into blocks of `width` columns; only kept blocks are stored. A band's kept columns,
// in order, are a dense matrix, stored pair of columns after pair of columns, row after row within a pair: [columns / 2][height][2], and
// an odd last column as [height]. One storage serves multiplications that take two bfloat16 at a time, broadcasts of single weights,
// and streaming: whoever reads a band reads it from start to end.

#pragma once

#include "../common.h"

#include <cstring>
#include <utility>

struct Layer {
    const void* values;
    const int32_t* col;   // [blocks]: the column of blocks of each kept one, rising within a band
    const int64_t* crow;  // [bands + 1]: where each band's kept blocks start
    int64_t rows, cols, height, width;  // width is 1 or even
};

struct Product : Layer {
    const void* x;
    int64_t n;
    const void* bias;  // or null
    void* y;
    const int64_t* starts;  // [bands] where each band's values start, or null where crow says it

    int64_t bands() const { return (rows + height - 1) / height; }
    int64_t height_of(int64_t band) const { return std::min(height, rows - band * height); }
    int64_t start(int64_t band) const { return starts ? starts[band] : crow[band] * width * height; }
};

// rows [first, first + count) of x, that go together: packed in a panel of `width` rows, or, where that is 0, few as they are
struct Part {
    int64_t first, count, width;
};

// one type on one instruction set
struct Kernels {
    int64_t widest, narrowest;  // panels: powers of two; 0 where `few` does everything
    int64_t column_bytes;       // of one row of x in a panel
    int64_t lane_rows;          // rows of W in the smallest vector of `few`
    // columns [begin, end) of a part of x -> its panel; begin is a multiple of 32
    void (*pack)(const Product&, const Part&, int64_t begin, int64_t end, void* panel);
    // the product of a panel with bands [begin, end); `room` has space for panel_room(...) floats
    void (*panel)(const Product&, const Part&, const void* panel, float* room, int64_t begin, int64_t end);
    // the product of 1 to 4 rows of x with bands [begin, end); `room` has space for few_room(...) floats
    void (*few)(const Product&, const Part&, float* room, int64_t begin, int64_t end);
};

static const int64_t GATHERED = 64;      // rows of results that are gathered before they are turned around and stored
static const int64_t NEAR = 49152;       // bytes of weights that stay close while several tiles read them
static const int64_t FAR = 8192;         // bytes ahead that weights are fetched

static inline int64_t panel_room(const Product& p, int64_t width) { return (GATHERED + p.height + 24) * width; }
static inline int64_t few_room(const Product& p) { return 4 * (p.height + p.cols + 32); }

struct Kind { const Kernels *f32, *bf16; };

const Kind* plain_kernels();
const Kind* avx2_kernels();         // null where the compiler or the processor lacks it, as below
const Kind* avx512_kernels();
const Kind* avx512_bf16_kernels();

#if (defined(__x86_64__) || defined(__aarch64__)) && (defined(__GNUC__) || defined(__clang__)) && !defined(WITHOUT_VECTORS)
#define HAS_VECTORS
#endif
#if defined(__x86_64__) && defined(HAS_VECTORS)
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#include <immintrin.h>
#define BEGIN_TARGET(NAMES) PRAGMA(clang attribute push(__attribute__((target(NAMES))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
PRAGMA(GCC diagnostic push)
PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized")  // gcc 12 warns of its own undefined vectors
#include <immintrin.h>
PRAGMA(GCC diagnostic pop)
#define BEGIN_TARGET(NAMES) PRAGMA(GCC push_options) PRAGMA(GCC target(NAMES))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#endif

// body(data, task) for each task of [0, count), on some threads, the calling one included
void run_tasks(int64_t threads, int64_t count, void (*body)(void*, int64_t), void* data);
