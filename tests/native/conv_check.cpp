// Compares the block-sparse convolution on every instruction set with loops, over images of any size and exactly sized buffers, also where
// allocations or threads fail. test_sanitizers.py builds it, as spmm_check.cpp.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "failures.h"
#include "numbers.h"

extern "C" int32_t has_isa(int32_t isa);
extern "C" int32_t conv2d(const void* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t height, int64_t width,
                          int32_t is_bf16, const int64_t* geometry, const void* x, const void* bias, void* y, int64_t begin, int64_t end,
                          int64_t threads, int32_t isa);

struct Geometry {
    int64_t images, channels, height, width, kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, pad_top, pad_left, out_height,
        out_width, last_x, last_y;
};

// The sum of the products of a filter's kept numbers and what lies under them for one output. It reads copies that no other thread has, so
// the thread sanitizer need not watch it, which would take most of the time.
#if defined(__GNUC__)
__attribute__((no_sanitize("thread")))
#endif
static float add_products(float sum, const Geometry& g, const float* filter, const int64_t* columns, int64_t many, const float* x, int64_t n,
                          int64_t o) {
    const int64_t taps = g.kernel_y * g.kernel_x;
    for (int64_t k = 0; k < many; k++) {
        const int64_t channel = columns[k] / taps, tap = columns[k] % taps;
        const int64_t i = o / g.out_width * g.stride_y + tap / g.kernel_x * g.dilation_y - g.pad_top;
        const int64_t j = o % g.out_width * g.stride_x + tap % g.kernel_x * g.dilation_x - g.pad_left;
        if (i < 0 || i >= g.height || j < 0 || j >= g.width) continue;
        const int64_t from = g.last_x ? ((n * g.height + i) * g.width + j) * g.channels + channel
                                      : ((n * g.channels + channel) * g.height + i) * g.width + j;
        sum += filter[k] * x[from];
    }
    return sum;
}

// Returns how many numbers of a convolution are wrong.
static int run(const Geometry& g, int64_t rows, int64_t height, int64_t width, double density, bool half, bool with_bias, int64_t parts,
               int64_t threads, int isa) {
    const int64_t taps = g.kernel_y * g.kernel_x, cols = g.channels * taps, bands = (rows + height - 1) / height;
    const int64_t across = (cols + width - 1) / width, outputs = g.out_height * g.out_width;
    std::vector<std::vector<int64_t>> columns(bands);  // kept, of each band
    std::vector<int32_t> kept;
    std::unique_ptr<int64_t[]> crow(new int64_t[bands + 1]);
    const bool alike = draw(0, 1);  // bands keep everything or nothing
    int64_t count = 0;
    for (int64_t b = 0; b < bands; b++) {
        crow[b] = (int64_t)kept.size();
        const bool whole = draw(0, 999) < density * 1000;
        for (int64_t j = 0; j < across; j++)
            if (alike ? whole : draw(0, 999) < density * 1000) {
                kept.push_back((int32_t)j);
                for (int64_t c = j * width; c < std::min(cols, (j + 1) * width); c++) columns[b].push_back(c);
            }
        count += (int64_t)columns[b].size() * std::min(height, rows - b * height);
    }
    crow[bands] = (int64_t)kept.size();
    std::unique_ptr<int32_t[]> col(new int32_t[kept.size()]);
    std::copy(kept.begin(), kept.end(), col.get());
    Numbers values(count, half), x(g.images * g.channels * g.height * g.width, half), bias(rows, half), y(g.images * rows * outputs, half);
    values.fill(), x.fill(), bias.fill(), y.fill();
    const int64_t all = g.images * g.out_height;
    for (int64_t part = 0; part < parts; part++) {
        const int32_t failed = with_failures([&] {
            return conv2d(values.memory.get(), col.get(), crow.get(), rows, height, width, half, (const int64_t*)&g, x.memory.get(),
                          with_bias ? bias.memory.get() : nullptr, y.memory.get(), all * part / parts, all * (part + 1) / parts, threads, isa);
        });
        if (failed) return failed == 2 && refused_allocations > 0 ? 0 : 1;
    }
    const std::vector<float> inputs = x.all();
    int wrong = 0;
    int64_t start = 0;
    for (int64_t b = 0; b < bands; b++) {
        const int64_t high = std::min(height, rows - b * height), many = (int64_t)columns[b].size();
        std::vector<float> filter(many);
        for (int64_t r = 0; r < high; r++) {
            const int64_t row = b * height + r;
            for (int64_t k = 0; k < many; k++)
                filter[k] = values.get(start + (k == many - 1 && many % 2 ? k * high + r : k / 2 * 2 * high + 2 * r + k % 2));
            for (int64_t n = 0; n < g.images; n++)
                for (int64_t o = 0; o < outputs; o++) {
                    const float sum = add_products(with_bias ? bias.get(row) : 0, g, filter.data(), columns[b].data(), many, inputs.data(), n, o);
                    const float got = y.get(g.last_y ? (n * outputs + o) * rows + row : (n * rows + row) * outputs + o);
                    wrong += std::fabs(sum - got) > (half ? std::fabs(sum) / 256 : 0);
                }
        }
        start += many * high;
    }
    if (wrong)
        std::printf("%d wrong: %d images of %d x %d x %d, %d filters in %d x %d, %d threads, instructions %d\n", wrong, (int)g.images,
                    (int)g.channels, (int)g.height, (int)g.width, (int)rows, (int)height, (int)width, (int)threads, isa);
    return wrong;
}

static Geometry geometry(int64_t images, int64_t channels, int64_t most, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
    Geometry g{images, channels, 0, 0, kernel ? kernel : draw(1, 3), kernel ? kernel : draw(1, 3), stride ? stride : draw(1, 3),
               stride ? stride : draw(1, 3), dilation, dilation, pad < 0 ? draw(0, 2) : pad, pad < 0 ? draw(0, 2) : pad, 0, 0, draw(0, 1), 0};
    const int64_t bottom = pad < 0 ? draw(0, 2) : pad, right = pad < 0 ? draw(0, 2) : pad;
    g.last_y = draw(0, 3) ? g.last_x : !g.last_x;
    g.height = std::max<int64_t>(1, dilation * (g.kernel_y - 1) + 1 - g.pad_top - bottom) + draw(0, (int)most);
    g.width = std::max<int64_t>(1, dilation * (g.kernel_x - 1) + 1 - g.pad_left - right) + draw(0, (int)most);
    g.out_height = (g.height + g.pad_top + bottom - dilation * (g.kernel_y - 1) - 1) / g.stride_y + 1;
    g.out_width = (g.width + g.pad_left + right - dilation * (g.kernel_x - 1) - 1) / g.stride_x + 1;
    return g;
}

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
    int wrong = 0, ran = 0;
    for (int isa = 0; isa < 6; isa++) {
        if (!has_isa(isa)) continue;
        std::printf("instructions %d\n", isa);
        for (int round = 0; round < rounds; round++) {
            const int heights[] = {1, 1, 2, 4, 5, 7, 8, 16, 17, 32}, widths[] = {1, 1, 2, 4, 6, 16, 18, 36};
            const int64_t height = heights[draw(0, 9)], width = widths[draw(0, 7)];
            const Geometry g = geometry(draw(0, 2), draw(1, 20), draw(0, 1) ? 6 : 20, 0, 0, draw(0, 5) ? draw(1, 2) : draw(3, 40), draw(0, 2) ? -1 : 0);
            const double densities[] = {0, 0.2, 0.6, 1};
            fail_next(round % 3 ? -1 : draw(0, 20), round % 5 ? -1 : draw(0, 2));
            wrong += run(g, draw(1, 2 * (int)height + 9), height, width, densities[draw(0, 3)], draw(0, 1), draw(0, 1),
                         draw(0, 2) ? 1 : draw(1, 40), draw(0, 3) ? 1 : draw(2, 4), isa);
            ran++;
        }
        for (int number = 0; number < 60; number++) {  // one allocation or thread fails after another
            number < 57 ? fail_next(number, -1) : fail_next(-1, number - 57);
            wrong += run(geometry(6, 24, 8, 3, 1, 1, 1), 64, 8, 4, 1, false, true, 1, 4, isa), ran++;
        }
        fail_next(-1, -1);
        for (int64_t kernel : {1, 3})  // enough work for several threads, in several strips or in several groups of rows
            for (int64_t images : {1, 9}) {
                wrong += run(geometry(images, 40, 16, kernel, 1, 1, 0), 96, 8, 4, 1, images > 1, true, 1, 3, isa);
                ran++;
            }
    }
    std::printf("%d convolutions, %d numbers wrong, %d allocations and %d threads refused\n", ran, wrong, (int)refused_allocations,
                (int)refused_threads);
    return wrong != 0;
}
