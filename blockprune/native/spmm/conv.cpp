// The block-sparse convolution: how W and the work are divided. conv.h says how the image is laid out.

#include "conv.h"

#include <new>

#include "scratch.h"

namespace {

std::vector<int64_t> remainders(int64_t taps, int64_t dilation, int64_t stride) {
    std::vector<int64_t> all;
    for (int64_t k = 0; k < taps; k++)
        if (std::find(all.begin(), all.end(), k * dilation % stride) == all.end()) all.push_back(k * dilation % stride);
    return all;
}

int64_t index_of(const std::vector<int64_t>& all, int64_t x) { return std::find(all.begin(), all.end(), x) - all.begin(); }

// Where the numbers that a tap meets begin, in the planes of a channel.
int64_t offset_of(const Convolution& c, int64_t tap) {
    const int64_t y = tap / c.kernel_x * c.dilation_y, x = tap % c.kernel_x * c.dilation_x;
    const int64_t row = index_of(c.remainders_y, y % c.stride_y), column = index_of(c.remainders_x, x % c.stride_x);
    return (row * (int64_t)c.remainders_x.size() + column) * c.plane + y / c.stride_y * c.pitch + x / c.stride_x;
}

// Which channels any weight meets.
void mark_used(Convolution& c) {
    const int64_t taps = c.kernel_y * c.kernel_x;
    std::vector<char> blocks((c.cols + c.width - 1) / c.width, 0);
    for (int64_t j = 0; j < c.crow[c.bands()]; j++) blocks[c.col[j]] = 1;
    c.used.assign(c.channels, 0);
    for (int64_t k = 0; k < c.cols; k++) c.used[k / taps] |= blocks[k / c.width];
}

// Output rows [begin, end), counted over all images, in strips of about `most` rows.
std::vector<Strip> strips_of(const Convolution& c, int64_t most, int64_t begin, int64_t end) {
    std::vector<Strip> strips;
    const int64_t count = (c.out_height + most - 1) / most;
    for (int64_t image = begin / c.out_height; image * c.out_height < end; image++)
        for (int64_t s = 0; s < count; s++) {
            const int64_t first = image * c.out_height, top = std::max(c.out_height * s / count, begin - first);
            const int64_t bottom = std::min(c.out_height * (s + 1) / count, end - first);
            if (top < bottom) strips.push_back({image, top, bottom - top});
        }
    return strips;
}

// Decides how output rows [begin, end) are computed and how the image is laid out for them. Returns false where it is too large.
bool lay_out(Convolution& c, const ConvKernels& kernels, bool same_numbers, int64_t begin, int64_t end) {
    c.remainders_y = remainders(c.kernel_y, c.dilation_y, c.stride_y), c.remainders_x = remainders(c.kernel_x, c.dilation_x, c.stride_x);
    const int64_t reads = c.out_width + (c.kernel_x - 1) * c.dilation_x / c.stride_x;  // numbers of a plane's row
    const int64_t planes = (int64_t)(c.remainders_y.size() * c.remainders_x.size());
    // at most so many that a row of outputs is no longer than a row of a plane
    const int64_t sharable = std::min(reads - c.out_width, std::min(c.pad_left, reads - c.image_width - c.pad_left));
    c.shared = c.stride_x == 1 ? std::max<int64_t>(0, sharable) : 0;
    c.pitch = reads - c.shared;
    const int64_t row_bytes = std::count(c.used.begin(), c.used.end(), 1) * planes * c.pitch * kernels.packed_bytes;
    const int64_t fit = std::max<int64_t>(4, STRIP_BYTES / std::max<int64_t>(1, row_bytes) - (c.plane_rows(1) - 1));
    c.strips = strips_of(c, fit, begin, end);
    c.in_place = same_numbers && !c.channels_last_x && c.rows_follow();
    int64_t most = 0;
    for (const Strip& strip : c.strips) {
        c.in_place = c.in_place && c.positions(strip.rows) >= kernels.panel;  // no panel ends beyond x
        most = std::max(most, strip.rows);
    }
    c.plane = c.plane_rows(most) * c.pitch + c.shared;
    c.slot = round_up(planes * c.plane + kernels.lanes, 16);
    if (c.slot / 16 % 2 == 0) c.slot += 16;  // channels that are a multiple of a page apart would displace each other from the cache
    if (c.in_place) c.slot = c.image_height * c.image_width;
    return c.slot * c.channels < INT32_MAX;
}

// Cuts W into tiles, and tiles into groups.
void cut_rows(Convolution& c, int64_t tile_limit, int64_t element_bytes) {
    const int64_t taps = c.kernel_y * c.kernel_x;
    std::vector<int32_t> all(c.cols);
    for (int64_t k = 0; k < c.cols; k++) all[k] = (int32_t)(k < taps ? offset_of(c, k) : all[k - taps] + c.slot);
    const char* w = (const char*)c.values;
    int64_t kept_rows = 0, newest = -1;  // the last band with kept columns
    for (int64_t band = 0; band < c.bands(); band++) {
        const int64_t top = band * c.height, height = c.height_of(band), begin = c.crow[band], end = c.crow[band + 1];
        if (c.groups.empty() || kept_rows >= GROUP_KEPT_ROWS || top - c.groups.back().first >= GROUP_ROWS) {
            c.groups.push_back({top, top, (int64_t)c.tiles.size(), (int64_t)c.tiles.size()});
            kept_rows = 0;
        }
        c.groups.back().end = top + height;
        if (begin == end) continue;
        const bool same = newest >= 0 && c.crow[newest + 1] - c.crow[newest] == end - begin &&
                          std::equal(c.col + begin, c.col + end, c.col + c.crow[newest]);
        const int64_t offsets = same ? c.tiles.back().offsets : (int64_t)c.offsets.size();
        if (!same)
            for (int64_t j = begin; j < end; j++)
                c.offsets.insert(c.offsets.end(), all.begin() + c.col[j] * c.width,
                                 all.begin() + std::min(c.cols, (c.col[j] + 1) * c.width));
        newest = band, kept_rows += height;
        const int64_t columns = same ? c.tiles.back().columns : (int64_t)c.offsets.size() - offsets;
        const int64_t pairs_bytes = columns / 2 * 2 * height * element_bytes;
        if (c.height == 1 && same && c.groups.back().first_tile < (int64_t)c.tiles.size() && c.tiles.back().rows < tile_limit) {
            c.tiles.back().rows++;  // the row lies behind the one before
            c.tile_rows.push_back((int32_t)top);
        } else {
            const int64_t count = (height + tile_limit - 1) / tile_limit;
            for (int64_t t = 0; t < count; t++) {
                const int64_t first = height * t / count, rows = height * (t + 1) / count - first;
                const char *pairs = w + 2 * first * element_bytes, *last = w + pairs_bytes + first * element_bytes;
                c.tiles.push_back({pairs, last, height == 1 ? columns : 2, 2 * height, height == 1 ? columns : 1, columns, offsets, rows,
                                   (int64_t)c.tile_rows.size()});
                for (int64_t m = 0; m < rows; m++) c.tile_rows.push_back((int32_t)(top + first + m));
            }
        }
        c.groups.back().end_tile = (int64_t)c.tiles.size();
        w += columns * height * element_bytes;
    }
}

void run(const Convolution& c, const ConvKernels& kernels, const Team& team) {
    int64_t tallest = 0;
    for (const ConvGroup& group : c.groups) tallest = std::max(tallest, group.end - group.first);
    const int64_t scratch_bytes = (tallest + kernels.lanes + 1) * kernels.panel * (int64_t)sizeof(float);
    const int64_t planes_bytes = c.in_place ? 0 : c.channels * c.slot * kernels.packed_bytes, count = (int64_t)c.strips.size();
    const int64_t groups = (int64_t)c.groups.size();
    const auto planes_of = [&](const Strip& strip, const ScratchBuffer& copies, int64_t i) {
        const int64_t at = strip.image * c.channels * c.slot + strip.top * c.pitch;
        return c.in_place ? (const char*)c.x + at * kernels.packed_bytes : (const char*)copies.get() + i * planes_bytes;
    };
    const int64_t shares = team.useful == 1 ? 1 : std::min(groups, (4 * team.useful + count - 1) / count);
    if (shares == 1) {
        for_each_task(team, count, [&](int64_t i) {
            ScratchBuffer copies(planes_bytes), scratch(scratch_bytes);
            if (!c.in_place) kernels.copy(c, c.strips[i], 0, c.channels, copies.get());
            kernels.multiply(c, c.strips[i], planes_of(c.strips[i], copies, 0), (float*)scratch.get(), 0, groups);
        });
        return;
    }
    ScratchBuffer copies(count * planes_bytes);
    const int64_t parts = (c.channels + 31) / 32;
    if (!c.in_place)
        for_each_task(team, count * parts, [&](int64_t i) {
            const int64_t first = i % parts * 32;
            char* planes = (char*)copies.get() + i / parts * planes_bytes;
            kernels.copy(c, c.strips[i / parts], first, std::min(c.channels, first + 32), planes);
        });
    for_each_task(team, count * shares, [&](int64_t i) {
        ScratchBuffer scratch(scratch_bytes);
        const Strip& strip = c.strips[i / shares];
        const int64_t share = i % shares;
        kernels.multiply(c, strip, planes_of(strip, copies, i / shares), (float*)scratch.get(), groups * share / shares,
                         groups * (share + 1) / shares);
    });
}

}  // namespace

// y = conv(x, W) + bias for output rows [begin, end), counted over all images; `values`, `col` and `crow` are W as a matrix of
// channels * kernel_y * kernel_x columns. All arrays are of one type and contiguous. Returns 0, 1 for what no kernel supports, or 2 if
// memory ran out.
EXPORT int32_t conv2d(const void* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t height, int64_t width,
                      int32_t is_bf16, const Geometry* geometry, const void* x, const void* bias, void* y, int64_t begin, int64_t end,
                      int64_t threads, int32_t isa) {
    const KernelSet* set = kernels_of(isa);
    const ConvKernels* kernels = set ? is_bf16 ? set->conv_bf16 : set->conv_f32 : nullptr;
    if (!kernels || height < 1 || width < 1 || (width > 1 && width % 2)) return 1;
    if (begin >= end || !rows) return 0;
    try {
        const int64_t cols = geometry->channels * geometry->kernel_y * geometry->kernel_x, element_bytes = is_bf16 ? 2 : 4;
        Convolution c{};
        (Layer&)c = {values, col, crow, rows, cols, height, width};
        (Geometry&)c = *geometry;
        c.x = x, c.y = y;
        c.bias.assign(rows, 0.0f);
        for (int64_t r = 0; bias && r < rows; r++) {
            if (is_bf16) {
                const uint32_t bits = (uint32_t)((const uint16_t*)bias)[r] << 16;
                std::memcpy(&c.bias[r], &bits, 4);
            } else {
                c.bias[r] = ((const float*)bias)[r];
            }
        }
        mark_used(c);
        if (!lay_out(c, *kernels, kernels->packed_bytes == element_bytes, begin, end)) return 1;
        cut_rows(c, kernels->tile_rows, element_bytes);
        const double kept = (double)crow[c.bands()] * (double)(height * width), outputs = (double)((end - begin) * c.out_width);
        const double nanoseconds = 0.01 * kept * outputs + 0.5 * outputs * (double)rows;
        const Team team = {threads, threads_for(threads, nanoseconds)};
        run(c, *kernels, team);
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
