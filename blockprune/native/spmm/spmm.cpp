// The block-sparse product: which kernels run, and how the work is divided. spmm.h says how W is stored.

#include "spmm.h"

#include <new>

#include "scratch.h"

const KernelSet* kernels_of(int32_t isa) {
    static const KernelSet* const sets[ISA_COUNT] = {plain_kernels(), avx2_kernels(), avx_vnni_kernels(), avx512_kernels(), avx512_vnni_kernels(), avx512_bf16_kernels(), amx_kernels()};
    if (isa != BEST) return isa >= 0 && isa < ISA_COUNT ? sets[isa] : nullptr;
    for (int32_t best = ISA_COUNT - 1; best > PLAIN; best--)
        if (sets[best]) return sets[best];
    return sets[PLAIN];
}

namespace {

// Up to how many rows of x a gemv is faster than packing them.
int64_t max_gemv_inputs(const Product& p, const Kernels& kernels) {
    if (kernels.max_gemv_inputs < 4) return kernels.max_gemv_inputs;
    if (p.weight_scale) return p.height % kernels.gemv_rows == 0 || p.height >= 8 ? 4 : 0;
    if (p.height >= 8) return p.width == 1 && p.height < 16 ? 2 : 4;
    return p.height == 6 || (p.height > 1 && p.height % kernels.gemv_rows) ? 0 : p.width == 1 ? 1 : p.height == 1 ? 4 : 2;
}

// Cuts the rows of x into panels, the last of them as narrow as they fit, or into a last gemv.
std::vector<Slice> slices_of(const Product& p, const Kernels& kernels, int64_t max_panel) {
    std::vector<Slice> slices;
    if (!max_panel) slices.push_back({0, p.n, 0});
    for (int64_t first = 0, panel = max_panel; max_panel && first < p.n;) {
        const int64_t left = p.n - first;
        if (left <= max_gemv_inputs(p, kernels)) {
            slices.push_back({first, left, 0});
            break;
        }
        while (panel > kernels.min_panel && (panel > 16 ? left <= panel * 3 / 4 : left <= panel / 2)) panel /= 2;
        slices.push_back({first, std::min(left, panel), panel});
        first += panel;
    }
    return slices;
}

// The work of bands, in multiplications by one row of x: kept weights, and something for each row of the result.
struct Work {
    const Product& p;
    int64_t before(int64_t band) const { return (p.crow[band] * p.width + 4 * band) * p.height; }
    int64_t total() const { return before(p.bands()); }
    int64_t largest() const {
        int64_t largest = 1;
        for (int64_t band = 0; band < p.bands(); band++) largest = std::max(largest, before(band + 1) - before(band));
        return largest;
    }
    // the first band of share i of n, which have about the same work
    int64_t share(int64_t i, int64_t n) const {
        const int64_t target = (int64_t)((double)total() * i / n);
        int64_t low = 0, high = p.bands();
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (before(middle) < target) low = middle + 1;
            else high = middle;
        }
        return i == n ? p.bands() : low;
    }
};

const int64_t SUMS_BYTES = 131072;    // of the sums of a group of bands
const int64_t MIN_COLUMNS = 128;      // at a time
const int64_t PACKED_BYTES = 4194304; // of panels that are packed before they are multiplied

struct Runner {
    const Product& p;
    const Kernels& kernels;
    Team team;
    Work work{p};
    const int64_t threads = team.useful;

    const int64_t packed_bytes = kernels.packed_bytes[p.width == 1];

    int64_t panel_bytes(const Slice& slice) const { return round_up(p.cols, 32) * slice.panel * packed_bytes; }

    // Multiplies panels with some bands. The sums of a group of bands are added up, some columns at a time: so these columns of all panels
    // stay in the cache for the whole group, and the weights are read once for all panels.
    void multiply_panels(Panel* panels, int64_t count, int64_t begin, int64_t end) const {
        int64_t width = 0;  // of all panels together
        for (int64_t i = 0; i < count; i++) width += panels[i].slice.panel;
        const int64_t bands = std::max<int64_t>(1, SUMS_BYTES / (4 * width * p.height)), rows = std::min(bands, end - begin) * p.height;
        // more columns where few are kept, so that a band keeps enough of them to be worth a start
        const double density = (double)p.crow[p.bands()] * p.height * p.width / ((double)p.rows * p.cols), factor = 0.5 / (density + 1e-9);
        const int64_t all = (int64_t)(std::min(4.0, std::max(1.0, factor)) * (double)(kernels.panels_bytes / (packed_bytes * width)));
        const int64_t columns = std::max<int64_t>(MIN_COLUMNS, all / 64 * 64);
        ScratchBuffer sums((rows + 24) * width * 4), scratch(gemm_scratch(p));
        float* next = (float*)sums.get();
        for (int64_t i = 0; i < count; i++) panels[i].sums = next, next += (rows + 24) * panels[i].slice.panel;
        for (int64_t band = begin; band < end; band += bands)
            for (int64_t column = 0; column < p.cols; column += columns)
                kernels.gemm(p, panels, count, {band, std::min(end, band + bands)}, {column, column + columns}, scratch.get());
    }
    void multiply_rows(const Slice& slice, int64_t begin, int64_t end) const {
        ScratchBuffer scratch(gemv_scratch(p) * (int64_t)sizeof(float));
        kernels.gemv(p, slice, (float*)scratch.get(), begin, end);
    }

    // Some slices on all threads: their panels are packed, then bands are shared out, and panels too where there are few bands.
    void run_together(const Slice* slices, int64_t count, int64_t at_once) const {
        std::vector<int64_t> offsets(count + 1, 0);
        for (int64_t i = 0; i < count; i++) offsets[i + 1] = offsets[i] + panel_bytes(slices[i]);
        ScratchBuffer packed(offsets[count]);
        const auto address = [&](int64_t i) { return (char*)packed.get() + offsets[i]; };
        const int64_t parts = (p.cols + 511) / 512, groups = (count + at_once - 1) / at_once;
        const int64_t shares = threads == 1 ? 1 : (4 * threads + groups - 1) / groups;
        if (offsets[count])
            for_each_task(team, count * parts, [&](int64_t i) {
                const int64_t begin = i % parts * 512, end = std::min(p.cols, begin + 512);
                if (slices[i / parts].panel) kernels.pack(p, slices[i / parts], begin, end, address(i / parts));
            });
        for_each_task(team, groups * shares, [&](int64_t i) {
            const int64_t begin = work.share(i % shares, shares), end = work.share(i % shares + 1, shares);
            if (begin == end) return;
            std::vector<Panel> panels;
            for (int64_t k = i / shares * at_once; k < std::min(count, (i / shares + 1) * at_once); k++) {
                if (slices[k].panel) panels.push_back({slices[k], address(k), nullptr});
                else multiply_rows(slices[k], begin, end);
            }
            if (!panels.empty()) multiply_panels(panels.data(), (int64_t)panels.size(), begin, end);
        });
    }

    void run() const {
        int64_t max_panel = kernels.max_panel;
        // a band is multiplied by one thread: where a few bands hold most of the blocks, threads need more slices
        const int64_t spread = threads > 1 ? work.total() / work.largest() : 0;
        while (threads > 1 && max_panel > kernels.min_panel && (p.n + max_panel - 1) / max_panel * spread < 2 * threads) max_panel /= 2;
        const std::vector<Slice> slices = slices_of(p, kernels, max_panel);
        const int64_t count = (int64_t)slices.size(), most = std::max<int64_t>(1, kernels.max_inputs / std::max<int64_t>(1, max_panel));
        const int64_t at_once = threads == 1 ? most : std::max<int64_t>(1, std::min(most, count * spread / (2 * threads)));
        const int64_t together = std::max(at_once, PACKED_BYTES / std::max<int64_t>(1, panel_bytes(slices[0])) / at_once * at_once);
        for (int64_t i = 0; i < count; i += together) run_together(slices.data() + i, std::min(together, count - i), at_once);
    }
};

int64_t useful_threads(const Product& p, int64_t threads, bool is_bf16) {
    const double kept = (double)p.crow[p.bands()] * p.height * p.width, cost = is_bf16 ? 0.5 : 1;
    const double nanoseconds = kept * std::max(0.15, 0.01 * (double)p.n) * cost + 0.5 * (double)p.n * (double)(p.rows + p.cols);
    return threads_for(threads, nanoseconds);
}

}  // namespace

// Whether this processor has an instruction set of isa.h.
EXPORT int32_t has_isa(int32_t isa) { return kernels_of(isa) != nullptr; }

// Runs body(p), p with the places at which the values of each band start.
template <class Body> static int32_t with_starts(Product p, Body body) {
    if (p.height < 1 || p.width < 1 || (p.width > 1 && p.width % 2)) return 1;
    if (!p.n || !p.rows) return 0;
    try {
        std::vector<int64_t> starts;
        if (p.cols % p.width) {  // else crow says it
            starts = p.Layer::band_starts();
            p.starts = starts.data();
        }
        body(p);
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}

// Whether there are kernels for tiles, blocks are whole tiles, and x has enough rows for them.
static bool fills_tiles(const Product& p, const Kernels* tiles) {
    const bool is_whole = p.height == 16 && p.rows % 16 == 0 && p.width % 16 == 0 && p.cols % p.width == 0;
    return tiles && is_whole && p.n > tiles->max_gemv_inputs;
}

// y [n, rows] = x [n, cols] W^T + bias, all of one type and contiguous. The caller has checked the stored weight. Returns 0, 1 for an
// instruction set that is not there, or 2 if memory ran out.
EXPORT int32_t spmm(const void* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t cols, int64_t height, int64_t width,
                    int32_t is_bf16, const void* x, int64_t n, const void* bias, void* y, int64_t threads, int32_t isa) {
    const KernelSet* kernels = kernels_of(isa);
    if (!kernels) return 1;
    return with_starts({{values, col, crow, rows, cols, height, width}, x, n, bias, y, nullptr}, [&](const Product& p) {
        const Kernels* bf16 = fills_tiles(p, kernels->bf16_tiles) ? kernels->bf16_tiles : kernels->bf16;
        Runner{p, is_bf16 ? *bf16 : *kernels->f32, {threads, useful_threads(p, threads, is_bf16)}}.run();
    });
}

static const int64_t MIN_SATURATING_INPUTS = 48;  // rows of x from which on quads that may saturate are faster than pairs

// Whether at most one of twenty neighbouring pairs of int8 weights, of a sample, has a sum beyond -128 to 128, which leaves a remainder.
// Trained weights have few such pairs, uniformly distributed ones one in four.
static bool has_few_remainders(const Product& p) {
    const int64_t last = p.bands() - 1, pairs = last < 0 ? 0 : (p.start(last) + p.kept_columns(last) * p.height_of(last)) / 2;
    const int64_t step = std::max<int64_t>(1, pairs / 256);
    int64_t count = 0, remainders = 0;
    for (int64_t pair = 0; pair < pairs; pair += step, count++) {
        const int8_t* weights = (const int8_t*)p.values + 2 * pair;
        remainders += std::abs(weights[0] + weights[1]) > 128;
    }
    return 20 * remainders <= count;
}

// The same with W in int8, of which each row has a scale, and x in int8 too, after each row has got a scale from its largest magnitude.
// x and y are float32 or bfloat16, bias is float32. Sums are int32, which hold 2^31 / 127^2 products; the caller has checked that `cols` is not more.
EXPORT int32_t spmm_int8(const int8_t* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t cols, int64_t height,
                         int64_t width, int32_t is_bf16, const void* x, int64_t n, const void* bias, void* y, const float* scale,
                         int64_t threads, int32_t isa) {
    const KernelSet* kernels = kernels_of(isa);
    if (!kernels) return 1;
    Product whole{{values, col, crow, rows, cols, height, width}, x, n, bias, y, nullptr};
    whole.weight_scale = scale, whole.is_bf16 = is_bf16;
    return with_starts(whole, [&](Product p) {
        const bool pays = !kernels->quads_saturate || (n >= MIN_SATURATING_INPUTS && has_few_remainders(p));
        const Kernels* quads = p.width % 4 == 0 && p.height >= 4 && pays ? kernels->int8_quads : nullptr;
        p.uses_tiles = fills_tiles(p, kernels->int8_tiles);
        const Kernels& chosen = p.uses_tiles ? *kernels->int8_tiles : quads ? *quads : *kernels->int8;
        const int64_t bytes = is_bf16 ? 2 : 4, most = std::min(n, std::max<int64_t>(chosen.max_inputs, PACKED_BYTES / cols));
        ScratchBuffer quantized(most * cols), scales(most * (int64_t)sizeof(float));
        for (int64_t first = 0; first < n; first += most) {
            p.n = std::min(most, n - first);
            p.x = quantized.get(), p.y = (char*)y + first * rows * bytes, p.input_scale = (const float*)scales.get();
            const Team team = {threads, useful_threads(p, threads, true)};
            for_each_task(team, (p.n + 7) / 8, [&](int64_t i) {
                for (int64_t row = 8 * i; row < std::min(p.n, 8 * i + 8); row++)
                    kernels->quantize((const char*)x + (first + row) * cols * bytes, is_bf16, cols, (int8_t*)quantized.get() + row * cols,
                                      (float*)scales.get() + row);
            });
            Runner{p, chosen, team}.run();
        }
    });
}
