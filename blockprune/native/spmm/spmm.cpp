// The block-sparse product: which kernels run, and how the work is divided. spmm.h says how W is stored.

#include "spmm.h"

#include <new>

#include "scratch.h"

const KernelSet* kernels_of(int32_t isa) {
    static const KernelSet* const sets[ISA_COUNT] = {plain_kernels(), avx2_kernels(), avx512_kernels(), avx512_bf16_kernels()};
    if (isa != BEST) return isa >= 0 && isa < ISA_COUNT ? sets[isa] : nullptr;
    for (int32_t best = ISA_COUNT - 1; best > PLAIN; best--)
        if (sets[best]) return sets[best];
    return sets[PLAIN];
}

namespace {

// Up to how many rows of x a gemv is faster than packing them.
int64_t max_gemv_inputs(const Product& p, const Kernels& kernels) {
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

template <class Body> void for_each_task(const Team& team, int64_t count, Body body) {
    run_tasks(team, count, [](void* data, int64_t i) { (*(Body*)data)(i); }, &body);
}

struct Runner {
    const Product& p;
    const Kernels& kernels;
    Team team;
    Work work{p};
    const int64_t threads = team.useful;

    void multiply(const Slice& slice, const void* panel, int64_t begin, int64_t end) const {
        ScratchBuffer scratch((slice.panel ? gemm_scratch(p, slice.panel) : gemv_scratch(p)) * (int64_t)sizeof(float));
        if (slice.panel) kernels.gemm(p, slice, panel, (float*)scratch.get(), begin, end);
        else kernels.gemv(p, slice, (float*)scratch.get(), begin, end);
    }
    int64_t panel_bytes(const Slice& slice) const { return round_up(p.cols, 32) * slice.panel * kernels.packed_bytes; }

    // one slice, all of it on the thread that calls
    void run_slice(const Slice& slice) const {
        ScratchBuffer panel(panel_bytes(slice));
        if (slice.panel) kernels.pack(p, slice, 0, p.cols, panel.get());
        multiply(slice, panel.get(), 0, p.bands());
    }

    // some slices on all threads: their panels are packed, then their bands are shared out
    void run_together(const Slice* slices, int64_t count) const {
        std::vector<int64_t> offsets(count + 1, 0);
        for (int64_t i = 0; i < count; i++) offsets[i + 1] = offsets[i] + panel_bytes(slices[i]);
        ScratchBuffer panels(offsets[count]);
        const int64_t parts = (p.cols + 511) / 512, shares = std::max<int64_t>(1, (4 * threads + count - 1) / count);
        if (offsets[count])
            for_each_task(team, count * parts, [&](int64_t i) {
                const Slice& slice = slices[i / parts];
                const int64_t begin = i % parts * 512, end = std::min(p.cols, begin + 512);
                if (slice.panel) kernels.pack(p, slice, begin, end, (char*)panels.get() + offsets[i / parts]);
            });
        for_each_task(team, count * shares, [&](int64_t i) {
            const int64_t begin = work.share(i % shares, shares), end = work.share(i % shares + 1, shares);
            if (begin < end) multiply(slices[i / shares], (char*)panels.get() + offsets[i / shares], begin, end);
        });
    }

    void run() const {
        int64_t max_panel = kernels.max_panel;
        // a band is multiplied by one thread: where a few bands hold most of the blocks, threads need more slices
        const int64_t spread = threads > 1 ? work.total() / work.largest() : 0;
        while (threads > 1 && max_panel > kernels.min_panel && (p.n + max_panel - 1) / max_panel * spread < 2 * threads) max_panel /= 2;
        const std::vector<Slice> slices = slices_of(p, kernels, max_panel);
        const int64_t count = (int64_t)slices.size(), together = 4 * threads;
        if (threads == 1 || count >= together) {
            for_each_task(team, count, [&](int64_t i) { run_slice(slices[i]); });
        } else {
            run_together(slices.data(), count);
        }
    }
};

// Threads that get at least some microseconds of work each.
int64_t useful_threads(const Product& p, int64_t threads, bool is_bf16) {
    const double kept = (double)p.crow[p.bands()] * p.height * p.width, cost = is_bf16 ? 0.5 : 1;
    const double nanoseconds = kept * std::max(0.15, 0.01 * (double)p.n) * cost + 0.5 * (double)p.n * (double)(p.rows + p.cols);
    return std::max<int64_t>(1, std::min<int64_t>(threads, (int64_t)(nanoseconds / 8000)));
}

}  // namespace

// Whether this processor has an instruction set of isa.h.
EXPORT int32_t has_isa(int32_t isa) { return kernels_of(isa) != nullptr; }

// y [n, rows] = x [n, cols] W^T + bias, all of one type and contiguous. The caller has checked the stored weight. Returns 0, 1 for an
// instruction set that is not there, or 2 if memory ran out.
EXPORT int32_t spmm(const void* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t cols, int64_t height, int64_t width,
                    int32_t is_bf16, const void* x, int64_t n, const void* bias, void* y, int64_t threads, int32_t isa) {
    const KernelSet* kernels = kernels_of(isa);
    if (!kernels || height < 1 || width < 1 || (width > 1 && width % 2)) return 1;
    if (!n || !rows) return 0;
    try {
        Product p{{values, col, crow, rows, cols, height, width}, x, n, bias, y, nullptr};
        std::vector<int64_t> starts;
        if (cols % width) {  // a band that keeps a block of the ragged last column of blocks has fewer weights
            const int64_t last = cols / width;
            int64_t start = 0;
            for (int64_t band = 0; band < p.bands(); band++) {
                starts.push_back(start);
                const int64_t blocks = crow[band + 1] - crow[band], ragged = blocks && col[crow[band + 1] - 1] == last;
                start += p.height_of(band) * (blocks * width - ragged * (width - cols % width));
            }
            p.starts = starts.data();
        }
        Runner{p, is_bf16 ? *kernels->bf16 : *kernels->f32, {threads, useful_threads(p, threads, is_bf16)}}.run();
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
