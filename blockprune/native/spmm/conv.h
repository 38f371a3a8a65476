// The block-sparse convolution y = conv(x, W) + bias without a matrix of patches: what its files share.
//
// A column of W is a channel and a tap of the kernel. The image is copied once, with its padding, into planes in which outputs next to each
// other read numbers next to each other: where the kernel moves in strides, a channel has a plane for each remainder of the rows and columns
// that taps read. So the outputs of a panel, which lie next to each other, meet a column of W at numbers next to each other, and where they
// begin is a number of the column alone, its offset. Outputs are counted along the rows of a plane; those beyond the end of an output row
// are computed and not stored. An image that is such a plane already is read where it is.

#pragma once

#include <vector>

#include "spmm.h"

struct Geometry {  // as Python passes it
    int64_t images, channels, image_height, image_width;  // of x
    int64_t kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, pad_top, pad_left;
    int64_t out_height, out_width;
    int64_t channels_last_x, channels_last_y;  // whether channels, not columns, lie next to each other
};

struct ConvTile {  // some rows of W that keep the same columns
    const char *w, *last;             // the weights of all pairs of columns, and of an odd last column
    int64_t row_stride, pair_stride;  // between weights of a pair
    int64_t last_stride;              // between weights of the last column
    int64_t columns, offsets;         // how many, and where in Convolution::offsets theirs begin
    int64_t rows, first_row;          // how many, and where in Convolution::tile_rows their numbers begin
};

struct ConvGroup {  // rows of W [first, end) and their tiles; no tile has the rows that keep nothing
    int64_t first, end, first_tile, end_tile;
};

struct Strip {  // some output rows of an image
    int64_t image, top, rows;
};

struct Convolution : Layer, Geometry {
    const void* x;
    void* y;
    std::vector<int64_t> remainders_y, remainders_x;
    int64_t pitch, shared;  // numbers from row to row of a plane; and of a row's last ones, zeros that are also the next row's first ones
    int64_t plane, slot;    // numbers of a plane, and of all planes of a channel
    bool in_place;          // the planes are x
    std::vector<Strip> strips;
    std::vector<char> used;  // [channels]
    std::vector<ConvTile> tiles;
    std::vector<ConvGroup> groups;
    std::vector<int32_t> offsets, tile_rows;
    std::vector<float> bias;  // [rows]

    // whether the rows of x follow each other as those of a plane do
    bool rows_follow() const {
        return stride_y == 1 && stride_x == 1 && !pad_top && !pad_left && pitch == image_width && plane_rows(out_height) == image_height;
    }
    int64_t plane_rows(int64_t output_rows) const { return output_rows + (kernel_y - 1) * dilation_y / stride_y; }
    int64_t positions(int64_t output_rows) const { return (output_rows - 1) * pitch + out_width; }
    const int32_t* rows_of(const ConvTile& tile) const { return tile_rows.data() + tile.first_row; }
};

static const int64_t STRIP_BYTES = 1 << 18;    // of the planes that a strip reads, so that they stay in a cache
static const int64_t GROUP_KEPT_ROWS = 32;     // of a group, unless it has GROUP_ROWS
static const int64_t GROUP_ROWS = 256;

// The kernels for one type of number on one instruction set.
struct ConvKernels {
    int64_t lanes, panel;  // numbers of a vector and of the widest panel
    int64_t tile_rows;     // most rows of a tile
    int64_t packed_bytes;  // of a number in a plane
    // Copies channels [begin, end) of what a strip reads into its planes.
    void (*copy)(const Convolution&, const Strip&, int64_t begin, int64_t end, void* planes);
    // Computes and stores groups [begin, end) of a strip; `scratch` holds a panel for each row of a group,
    // and `lanes + 1` more.
    void (*multiply)(const Convolution&, const Strip&, const void* planes, float* scratch, int64_t begin, int64_t end);
};
