// The gradients of the block-sparse product: how the work is divided. gradients.h says how numbers are packed.

#include "gradients.h"

#include <new>

#include "scratch.h"

namespace {

const int64_t INPUTS = 256;            // rows of x and dy that are packed at a time
const int64_t COLUMNS_BYTES = 262144;  // of packed columns that stay in the cache while all bands meet them

std::vector<RowTile> tiles_of(const Layer& w) {
    std::vector<RowTile> tiles;
    for (int64_t band = 0; band < w.bands(); band++) {
        if (w.crow[band] == w.crow[band + 1]) continue;
        const int64_t height = w.height_of(band);
        for (int64_t first = 0; first < height; first += TALLEST_TILE) {
            const int64_t rows = std::min(TALLEST_TILE, height - first);
            tiles.push_back({band, first, rows, rows <= 4 ? 4 : rows <= 8 ? 8 : 16});
        }
    }
    return tiles;
}

// How many kept columns of a band lie before a column, which is a multiple of the width of a block or the last.
int64_t kept_before(const Layer& w, int64_t band, int64_t column) {
    if (column >= w.cols) return w.kept_columns(band);
    const int32_t *begin = w.col + w.crow[band], *end = w.col + w.crow[band + 1];
    return (std::lower_bound(begin, end, column / w.width, [](int32_t a, int64_t b) { return a < b; }) - begin) * w.width;
}

// What both gradients share: how many rows are packed at a time, and how many columns stay in the cache.
struct Division {
    int64_t inputs, pitch, columns, parts;
    Division(const Gradient& g, const GradientKernels& kernels, int64_t inputs_per_word)
        : inputs(std::min(round_up(g.n, kernels.inputs), INPUTS)), pitch(inputs / inputs_per_word + 16),
          columns(round_up(std::max<int64_t>(64, COLUMNS_BYTES / (4 * pitch)), g.width)), parts((g.cols + columns - 1) / columns) {}
    Range range(const Gradient& g, int64_t part) const { return {part * columns, std::min(g.cols, (part + 1) * columns)}; }
};

// The packed kept columns of a band, from its `begin`-th to its `end`-th.
template <class Pointer>
void point_at(std::vector<Pointer>& pointers, const Layer& w, int64_t band, int64_t begin, int64_t end, Pointer first, int64_t pitch) {
    pointers.clear();
    for (int64_t k = begin; k < end; k++) pointers.push_back(first + (w.col[w.crow[band] + k / w.width] * w.width + k % w.width) * pitch);
}

// All columns of a matrix, of which a word has some.
template <class Pack>
void pack_all(const Matrix& matrix, Pack pack, int64_t columns, const Team& team, int64_t first, int64_t count, Word* to, int64_t pitch) {
    for_each_task(team, (matrix.width + 63) / 64, [&](int64_t i) {
        pack(matrix, first, count, Range{64 * i, std::min(matrix.width, 64 * i + 64)}, to + 64 / columns * i * pitch, pitch);
    });
}

void add_up_inputs(const Gradient& g, const GradientKernels& kernels, const Team& team) {
    const Division d(g, kernels, 1);
    const int64_t per_word = kernels.per_word;  // 2 only where all bands but the last are of an even height
    ScratchBuffer packed((g.rows + 1) / per_word * d.pitch * (int64_t)sizeof(Word));
    Word* const dy = (Word*)packed.get();
    for (int64_t first = 0; first < g.n; first += d.inputs) {
        const int64_t rows = std::min(d.inputs, g.n - first);
        pack_all({g.dy, g.rows}, kernels.pack_dy, per_word, team, first, rows, dy, d.pitch);
        for_each_task(team, d.parts, [&](int64_t part) {
            const Range columns = d.range(g, part);
            ScratchBuffer sums(d.columns * d.pitch * (int64_t)sizeof(float)), weights(g.height * (d.columns + 2) * (int64_t)sizeof(Word));
            float* const dx = (float*)sums.get();
            std::memset(dx, 0, (columns.end - columns.begin) * d.pitch * sizeof(float));
            std::vector<float*> pointers;
            for (int64_t band = 0; band < g.bands(); band++) {
                const int64_t height = g.height_of(band), words = (height + per_word - 1) / per_word, kept = g.kept_columns(band);
                const int64_t begin = kept_before(g, band, columns.begin), end = kept_before(g, band, columns.end);
                if (begin == end) continue;
                point_at(pointers, g, band, begin, end, dx - columns.begin * d.pitch, d.pitch);
                const int64_t first_pair = begin / 2 * 2, last_pair = std::min(kept, round_up(end, 2));  // pairs may lie in two parts
                const char* values = (const char*)g.values + (g.starts[band] + first_pair * height) * g.number_bytes;
                const Word* w = kernels.pack_weights(values, last_pair - first_pair, height, (Word*)weights.get());
                const auto add = [&](int64_t k, int64_t count, int64_t step) {
                    kernels.add_to_inputs(pointers.data() + k - begin, count, w + (k / 2 * 2 - first_pair) * words + k % 2, step,
                                          dy + band * g.height / per_word * d.pitch, words, d.pitch, round_up(rows, kernels.inputs));
                };
                const int64_t inner = round_up(begin, 2), inner_end = end == kept ? end : end / 2 * 2;
                if (begin < inner) add(begin, 1, 2);
                if (inner < inner_end) add(inner, inner_end - inner, 1);
                if (std::max(inner, inner_end) < end) add(inner_end, 1, 2);
            }
            kernels.unpack_columns(dx, d.pitch, first, rows, columns, g.out, g.cols);
        });
    }
}

// With `rounds`, sums are floats elsewhere before they are rounded to `out`.
void add_up_weights(const Gradient& g, const GradientKernels& kernels, const Team& team, bool rounds) {
    const int64_t per_word = kernels.per_word;
    const Division d(g, kernels, per_word);
    const std::vector<RowTile> tiles = tiles_of(g);
    const int64_t tile_count = (int64_t)tiles.size(), shares = team.useful == 1 ? 1 : (4 * team.useful + d.parts - 1) / d.parts;
    std::vector<int64_t> offsets(tile_count + 1, 0);  // of packed rows
    for (int64_t t = 0; t < tile_count; t++) offsets[t + 1] = offsets[t] + tiles[t].lanes * d.inputs / per_word;
    ScratchBuffer packed_x(g.cols * d.pitch * (int64_t)sizeof(Word)), packed_dy(offsets[tile_count] * (int64_t)sizeof(Word));
    Word *const x = (Word*)packed_x.get(), *const dy = (Word*)packed_dy.get();
    const int64_t last = g.bands() - 1, kept = last < 0 ? 0 : g.starts[last] + g.kept_columns(last) * g.height_of(last);
    ScratchBuffer floats(rounds ? kept * (int64_t)sizeof(float) : 0);
    float* const sums = rounds ? (float*)floats.get() : (float*)g.out;
    for (int64_t first = 0; first < g.n; first += d.inputs) {
        const int64_t count = std::min(d.inputs, g.n - first);
        pack_all({g.x, g.cols}, kernels.pack_x, 1, team, first, count, x, d.pitch);
        for_each_task(team, tile_count, [&](int64_t t) { kernels.pack_rows(g, first, count, tiles[t], dy + offsets[t]); });
        for_each_task(team, d.parts * shares, [&](int64_t i) {
            const int64_t part = i / shares, share = i % shares;
            const Range columns = d.range(g, part);
            std::vector<const Word*> pointers;
            for (int64_t t = tile_count * share / shares; t < tile_count * (share + 1) / shares; t++) {
                const RowTile& tile = tiles[t];
                const int64_t height = g.height_of(tile.band), kept = g.kept_columns(tile.band);
                const int64_t begin = std::min(kept, round_up(kept_before(g, tile.band, columns.begin), 2));  // no pair is parted
                const int64_t end = std::min(kept, round_up(kept_before(g, tile.band, columns.end), 2));
                if (begin == end) continue;
                point_at(pointers, g, tile.band, begin, end, (const Word*)x, d.pitch);
                kernels.add_to_weights(pointers.data(), end - begin, dy + offsets[t], (count + per_word - 1) / per_word, tile, height,
                                       sums + g.starts[tile.band] + begin * height, first > 0);
            }
        });
    }
    const int64_t part = 1 << 16;
    if (rounds)
        for_each_task(team, (kept + part - 1) / part, [&](int64_t i) {
            kernels.round(sums, {i * part, std::min(kept, (i + 1) * part)}, g.out);
        });
}

}  // namespace

// The gradient of y = x W^T for x, `out` [n, cols], if x is null, and else that of the kept weights, `out` in the order in which they are
// stored. x [n, cols] and dy [n, rows] are contiguous. All are bfloat16 or all are float32, but with `is_float` the gradient of bfloat16
// weights is float32. Returns 0, 1 for an instruction set that is not there, or 2 if memory ran out.
EXPORT int32_t gradient(const void* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t cols, int64_t height, int64_t width,
                        int32_t is_bf16, const void* x, int64_t n, const void* dy, void* out, int32_t is_float, int64_t threads, int32_t isa) {
    const KernelSet* kernels = kernels_of(isa);
    if (!kernels || height < 1 || width < 1 || (width > 1 && width % 2)) return 1;
    try {
        Gradient g{{values, col, crow, rows, cols, height, width}, x, dy, n, out, nullptr, is_bf16 ? 2 : 4};
        const std::vector<int64_t> starts = g.Layer::band_starts();
        g.starts = starts.data();
        const double kept = (double)crow[g.bands()] * (double)(height * width), size = (double)n * (double)(rows + cols);
        const Team team = {threads, threads_for(threads, 0.02 * kept * (double)n + 0.5 * size)};
        const bool has_pairs = kernels->gradient_pairs && (x || height % 2 == 0);  // of rows, which dx needs in each band
        const GradientKernels& chosen = !is_bf16 ? *kernels->gradient_f32 : has_pairs ? *kernels->gradient_pairs : *kernels->gradient_bf16;
        if (x) add_up_weights(g, chosen, team, is_bf16 && !is_float);
        else add_up_inputs(g, chosen, team);
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
