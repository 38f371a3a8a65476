// The block-sparse product: which kernels run, and how the work is shared out. spmm.h says how W is stored.

#include "spmm.h"

#include <new>

#include "room.h"

namespace {

enum Best { BEST = -1 };
const Kind* kind_of(int32_t choice) {
    static const Kind* const every[] = {plain_kernels(), avx2_kernels(), avx512_kernels(), avx512_bf16_kernels()};
    if (choice >= 0) return choice < 4 ? every[choice] : nullptr;
    for (int i = 3; i > 0; i--)
        if (every[i]) return every[i];
    return every[0];
}

// up to how many rows of x go faster as they are
int64_t few_rows(const Product& p, const Kernels& kernels) {
    if (p.height >= 8) return p.width == 1 && p.height < 16 ? 2 : 4;
    return p.height == 6 || (p.height > 1 && p.height % kernels.lane_rows) ? 0 : p.width == 1 ? 1 : p.height == 1 ? 4 : 2;
}

std::vector<Part> parts_of(const Product& p, const Kernels& kernels, int64_t widest) {
    std::vector<Part> parts;
    if (!widest) parts.push_back({0, p.n, 0});
    for (int64_t first = 0, width = widest; widest && first < p.n;) {
        const int64_t left = p.n - first;
        if (left <= few_rows(p, kernels)) {
            parts.push_back({first, left, 0});
            break;
        }
        while (width > kernels.narrowest && (width > 16 ? left <= width * 3 / 4 : left <= width / 2)) width /= 2;
        parts.push_back({first, std::min(left, width), width});
        first += width;
    }
    return parts;
}

// The work before a band, in multiplications by one row of x: what is kept, and something for each row of the result.
struct Work {
    const Product& p;
    int64_t before(int64_t band) const { return (p.crow[band] * p.width + 4 * band) * p.height; }
    int64_t total() const { return before(p.bands()); }
    int64_t largest() const {
        int64_t most = 1;
        for (int64_t b = 0; b < p.bands(); b++) most = std::max(most, before(b + 1) - before(b));
        return most;
    }
    // the first band of share i of n
    int64_t share(int64_t i, int64_t n) const {
        const int64_t aim = (int64_t)((double)total() * i / n);
        int64_t low = 0, high = p.bands();
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (before(middle) < aim) low = middle + 1;
            else high = middle;
        }
        return i == n ? p.bands() : low;
    }
};

template <class Body> void tasks(int64_t threads, int64_t count, Body body) {
    run_tasks(threads, count, [](void* data, int64_t i) { (*(Body*)data)(i); }, &body);
}

struct Runner {
    const Product& p;
    const Kernels& kernels;
    int64_t threads;
    Work work{p};

    void bands(const Part& part, const void* panel, int64_t begin, int64_t end) const {
        Room room((part.width ? panel_room(p, part.width) : few_room(p)) * (int64_t)sizeof(float));
        if (part.width) kernels.panel(p, part, panel, (float*)room.get(), begin, end);
        else kernels.few(p, part, (float*)room.get(), begin, end);
    }
    int64_t panel_bytes(const Part& part) const { return (p.cols + 31) / 32 * 32 * part.width * kernels.column_bytes; }

    void whole(const Part& part) const {
        Room panel(panel_bytes(part));
        if (part.width) kernels.pack(p, part, 0, p.cols, panel.get());
        bands(part, panel.get(), 0, p.bands());
    }

    // parts that wait for each other: pack them all, then share out bands
    void together(const Part* parts, int64_t count) const {
        std::vector<int64_t> at(count + 1, 0);
        for (int64_t i = 0; i < count; i++) at[i + 1] = at[i] + panel_bytes(parts[i]);
        Room panels(at[count]);
        const int64_t slices = (p.cols + 511) / 512, shares = std::max<int64_t>(1, (4 * threads + count - 1) / count);
        if (at[count])
            tasks(threads, count * slices, [&](int64_t i) {
                const Part& part = parts[i / slices];
                const int64_t begin = i % slices * 512, end = std::min(p.cols, begin + 512);
                if (part.width) kernels.pack(p, part, begin, end, (char*)panels.get() + at[i / slices]);
            });
        tasks(threads, count * shares, [&](int64_t i) {
            const int64_t begin = work.share(i % shares, shares), end = work.share(i % shares + 1, shares);
            if (begin < end) bands(parts[i / shares], (char*)panels.get() + at[i / shares], begin, end);
        });
    }

    void run() const {
        int64_t widest = kernels.widest;
        // a band is one thread's: where few bands hold most of the blocks, threads need more parts
        const int64_t spread = threads > 1 ? work.total() / work.largest() : 0;
        while (threads > 1 && widest > kernels.narrowest && (p.n + widest - 1) / widest * spread < 2 * threads) widest /= 2;
        const std::vector<Part> parts = parts_of(p, kernels, widest);
        const int64_t count = (int64_t)parts.size(), round = 4 * threads;
        if (threads == 1 || count >= 4 * threads) {
            tasks(threads, count, [&](int64_t i) { whole(parts[i]); });
        } else {
            for (int64_t i = 0; i < count; i += round) together(parts.data() + i, std::min(round, count - i));
        }
    }
};

// threads that have at least some microseconds' work each
int64_t worthwhile(const Product& p, int64_t threads, bool is_bf16) {
    const double kept = (double)p.crow[p.bands()] * p.height * p.width, each = is_bf16 ? 0.5 : 1;
    const double nanoseconds = kept * std::max(0.15, 0.01 * (double)p.n) * each + 0.5 * (double)p.n * (double)(p.rows + p.cols);
    return std::max<int64_t>(1, std::min<int64_t>(threads, (int64_t)(nanoseconds / 8000)));
}

}  // namespace

// whether this processor has the instruction set of this number: 0 plain, 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16
EXPORT int32_t spmm_has(int32_t choice) { return kind_of(choice) != nullptr; }

// y [n, rows] = x [n, cols] W^T + bias, all of one type, contiguous; `choice` is an instruction set, -1 the best. What it is given was
// checked when it was made. Returns 0, 1 for an instruction set that is not there, 2 if memory ran out.
EXPORT int32_t spmm(const void* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t cols, int64_t height, int64_t width,
                    int32_t is_bf16, const void* x, int64_t n, const void* bias, void* y, int64_t threads, int32_t choice) {
    const Kind* kind = kind_of(choice);
    if (!kind || height < 1 || width < 1 || (width > 1 && width % 2)) return 1;
    if (!n || !rows) return 0;
    try {
        Product p{{values, col, crow, rows, cols, height, width}, x, n, bias, y, nullptr};
        std::vector<int64_t> starts;
        if (cols % width) {  // bands that keep the ragged last column of blocks have fewer weights
            const int64_t last = cols / width;
            int64_t start = 0;
            for (int64_t b = 0; b < p.bands(); b++) {
                starts.push_back(start);
                const int64_t blocks = crow[b + 1] - crow[b], ragged = blocks && col[crow[b + 1] - 1] == last;
                start += p.height_of(b) * (blocks * width - ragged * (width - cols % width));
            }
            p.starts = starts.data();
        }
        Runner{p, is_bf16 ? *kind->bf16 : *kind->f32, worthwhile(p, threads, is_bf16)}.run();
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}
