// Compares the block-sparse product on every instruction set with loops, over ragged shapes and exactly sized buffers, also where
// allocations or threads fail. test_sanitizers.py builds it; it can be built by hand with other compilers or for other processors, and says
// what it ran.

#include <algorithm>
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
extern "C" int32_t spmm(const void* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t cols, int64_t height,
                        int64_t width, int32_t is_bf16, const void* x, int64_t n, const void* bias, void* y, int64_t threads, int32_t isa);
extern "C" int32_t spmm_int8(const int8_t* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t cols, int64_t height,
                             int64_t width, int32_t is_bf16, const void* x, int64_t n, const void* bias, void* y, const float* scale,
                             int64_t threads, int32_t isa);

extern "C" int32_t gradient(const void* values, const int32_t* col, const int64_t* crow, int64_t rows, int64_t cols, int64_t height,
                            int64_t width, int32_t is_bf16, const void* x, int64_t n, const void* dy, void* out, int32_t is_float, int64_t threads,
                            int32_t isa);

// Rows of x in int8, as they are multiplied, and the scale of each.
static void quantize(Numbers& x, int64_t cols, std::vector<float>& scales) {
    for (int64_t i = 0; i < (int64_t)scales.size(); i++) {
        float top = 0;
        for (int64_t c = 0; c < cols; c++) top = std::max(top, std::fabs(x.get(i * cols + c)));
        for (int64_t c = 0; c < cols; c++) x.set(i * cols + c, top ? std::nearbyint(x.get(i * cols + c) * (127 / top)) : 0);
        scales[i] = top / 127;
    }
}

// Which blocks of a matrix are kept.
struct Pattern {
    int64_t bands, count = 0;                   // of kept numbers
    std::vector<std::vector<int64_t>> columns;  // kept, of each band
    std::unique_ptr<int64_t[]> crow;
    std::unique_ptr<int32_t[]> col;
    Pattern(int64_t rows, int64_t cols, int64_t height, int64_t width, double density)
        : bands((rows + height - 1) / height), columns(bands), crow(new int64_t[bands + 1]) {
        std::vector<int32_t> kept;
        for (int64_t b = 0; b < bands; b++) {
            crow[b] = (int64_t)kept.size();
            for (int64_t j = 0; j < (cols + width - 1) / width; j++)
                if (draw(0, 999) < density * 1000) {
                    kept.push_back((int32_t)j);
                    for (int64_t c = j * width; c < std::min(cols, (j + 1) * width); c++) columns[b].push_back(c);
                }
            count += (int64_t)columns[b].size() * std::min(height, rows - b * height);
        }
        crow[bands] = (int64_t)kept.size();
        col.reset(new int32_t[kept.size()]);
        std::copy(kept.begin(), kept.end(), col.get());
    }
};

// Where the number of a row and of the k-th of some kept columns lies in a band.
static int64_t place(int64_t row, int64_t k, int64_t many, int64_t high) {
    return k == many - 1 && many % 2 ? k * high + row : k / 2 * 2 * high + 2 * row + k % 2;
}

// The sum of the products of a row's kept numbers and an input. It reads copies that no other thread has, so the thread sanitizer need not
// watch it, which would take most of the time.
#if defined(__GNUC__)
__attribute__((no_sanitize("thread")))
#endif
static float sum_of_products(const float* row, const float* x, const int64_t* columns, int64_t many) {
    float sum = 0;
    for (int64_t k = 0; k < many; k++) sum += row[k] * x[columns[k]];
    return sum;
}

// Returns how many numbers of a product are wrong. Weights are of the type of x and y, or int8.
static int run(int64_t rows, int64_t cols, int64_t height, int64_t width, int64_t n, double density, bool half, bool with_bias,
               int64_t threads, int isa, bool is_int8 = false) {
    const Pattern pattern(rows, cols, height, width, density);
    const auto& columns = pattern.columns;
    const auto &crow = pattern.crow;
    const auto &col = pattern.col;
    const int64_t bands = pattern.bands, count = pattern.count;
    Numbers values(count, half), x(n * cols, half), bias(rows, half && !is_int8), y(n * rows, half);
    values.fill(), x.fill(), bias.fill(), y.fill();
    const void* at_bias = with_bias ? bias.memory.get() : nullptr;
    std::unique_ptr<int8_t[]> whole(new int8_t[count]);
    std::unique_ptr<float[]> scale(new float[rows]);
    for (int64_t i = 0; is_int8 && i < count; i++) whole[i] = (int8_t)draw(-127, 127), values.set(i, whole[i]);
    for (int64_t r = 0; r < rows; r++) scale[r] = is_int8 ? (float)draw(1, 9) / 64 : 1;
    const int32_t failed = with_failures([&] {
        if (is_int8)
            return spmm_int8(whole.get(), col.get(), crow.get(), rows, cols, height, width, half, x.memory.get(), n, at_bias,
                             y.memory.get(), scale.get(), threads, isa);
        return spmm(values.memory.get(), col.get(), crow.get(), rows, cols, height, width, half, x.memory.get(), n, at_bias,
                    y.memory.get(), threads, isa);
    });
    if (failed) return failed == 2 && refused_allocations > 0 ? 0 : 1;
    int wrong = 0;
    int64_t start = 0;
    std::vector<float> scales(n, 1.0f);
    if (is_int8) quantize(x, cols, scales);
    const std::vector<float> inputs = x.all();
    for (int64_t b = 0; b < bands; b++) {
        const int64_t high = std::min(height, rows - b * height), many = (int64_t)columns[b].size();
        std::vector<float> row(many);
        for (int64_t r = 0; r < high; r++) {
            for (int64_t k = 0; k < many; k++) row[k] = values.get(start + place(r, k, many, high));
            for (int64_t i = 0; i < n; i++) {
                float sum = sum_of_products(row.data(), inputs.data() + i * cols, columns[b].data(), many);
                sum = sum * (scale[b * height + r] * scales[i]) + (with_bias ? bias.get(b * height + r) : 0);
                const float tolerance = half ? std::fabs(sum) / 256 : is_int8 ? 1e-5f * (1 + std::fabs(sum)) : 0;
                wrong += std::fabs(sum - y.get(i * rows + b * height + r)) > tolerance;
            }
        }
        start += many * high;
    }
    if (wrong)
        std::printf("%d wrong: [%d, %d] in %d x %d, n %d, density %g, %s, bias %d, %d threads, instructions %d\n", wrong, (int)rows,
                    (int)cols, (int)height, (int)width, (int)n, density, is_int8 ? "int8" : half ? "bfloat16" : "float32", with_bias, (int)threads, isa);
    return wrong;
}

// The gradient of the weight of an output and an input, of which each `n` numbers lie a row apart; adds to that of the inputs.
#if defined(__GNUC__)
__attribute__((no_sanitize("thread")))
#endif
static float add_gradients(const float* dy, int64_t rows, const float* x, float weight, float* dx, int64_t cols, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += dy[i * rows] * x[i * cols], dx[i * cols] += dy[i * rows] * weight;
    return sum;
}

// Returns how many numbers of the gradients of a product are wrong.
static int run_gradients(int64_t rows, int64_t cols, int64_t height, int64_t width, int64_t n, double density, bool half, int64_t threads,
                         int isa) {
    const Pattern pattern(rows, cols, height, width, density);
    Numbers values(pattern.count, half), x(n * cols, half), dy(n * rows, half), dx(n * cols, half), dw(pattern.count, false), rounded(pattern.count, half);
    values.fill(), x.fill(), dy.fill(), dx.fill(), dw.fill(), rounded.fill();
    int32_t failed = 0;
    for (Numbers* out : {&dx, &dw, &rounded})
        failed = std::max(failed, with_failures([&] {
                              return gradient(values.memory.get(), pattern.col.get(), pattern.crow.get(), rows, cols, height, width, half,
                                              out == &dx ? nullptr : x.memory.get(), n, dy.memory.get(), out->memory.get(), out == &dw, threads, isa);
                          }));
    if (failed) return failed == 2 && refused_allocations > 0 ? 0 : 1;
    std::vector<float> sums(n * cols, 0.0f);
    const std::vector<float> inputs = x.all(), outputs = dy.all();
    int wrong = 0;
    int64_t start = 0;
    for (int64_t b = 0; b < pattern.bands; b++) {
        const int64_t high = std::min(height, rows - b * height), many = (int64_t)pattern.columns[b].size();
        for (int64_t r = 0; r < high; r++)
            for (int64_t k = 0; k < many; k++) {
                const int64_t column = pattern.columns[b][k], at = start + place(r, k, many, high);
                const float sum = add_gradients(outputs.data() + b * height + r, rows, inputs.data() + column, values.get(at),
                                                sums.data() + column, cols, n);
                wrong += n && (sum != dw.get(at) || std::fabs(sum - rounded.get(at)) > (half ? std::fabs(sum) / 256 : 0));
            }
        start += many * high;
    }
    for (int64_t i = 0; i < n * cols; i++) wrong += std::fabs(sums[i] - dx.get(i)) > (half ? std::fabs(sums[i]) / 256 : 0);
    if (wrong)
        std::printf("%d wrong gradients: [%d, %d] in %d x %d, n %d, density %g, %s, %d threads, instructions %d\n", wrong, (int)rows, (int)cols,
                    (int)height, (int)width, (int)n, density, half ? "bfloat16" : "float32", (int)threads, isa);
    return wrong;
}

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
    int wrong = 0, ran = 0;
    for (int isa = 0; isa < 7; isa++) {
        if (!has_isa(isa)) continue;
        std::printf("instructions %d\n", isa);
        for (int round = 0; round < rounds; round++) {
            const int heights[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 16, 16, 17, 24, 31, 32, 40}, widths[] = {1, 1, 2, 4, 6, 8, 16, 18, 32, 64};
            const int64_t height = heights[draw(0, 17)], width = widths[draw(0, 9)];
            const bool large = round % 16 == 0;  // so that bands are read in parts
            const bool whole = height == 16 && width >= 16;  // blocks are tiles of a processor that has them
            const int64_t rows = whole ? 16 * draw(1, 4) : draw(1, 3 * (int)height + 5), any = large ? draw(800, 1500) : draw(1, 90);
            const int64_t cols = whole ? (any + width - 1) / width * width : any;
            const int64_t n = draw(0, 3) ? draw(0, 20) : draw(20, 70);
            const double densities[] = {0, 0.2, 0.6, 1};
            fail_next(round % 3 ? -1 : draw(0, 8), round % 5 ? -1 : draw(0, 2));
            const double density = densities[draw(0, 3)];
            const bool half = draw(0, 1);
            const int64_t threads = draw(0, 3) ? 1 : draw(2, 4);
            wrong += run(rows, cols, height, width, n, density, half, draw(0, 1), threads, isa, !draw(0, 2));
            wrong += run_gradients(rows, cols, height, width, n, density, half, threads, isa);
            ran += 2;
        }
        for (int allocation = -1; allocation < 20; allocation++)  // one allocation fails after another, in several threads
            for (int which = 0; which < 2; which++) {
                fail_next(allocation, allocation % 4 - 1);
                if (which) wrong += run_gradients(96, 1024, 8, 4, 40, 0.9, false, 4, isa);
                else wrong += run(96, 1024, 8, 4, 40, 0.9, false, true, 4, isa, allocation % 2);
                ran++;
            }
        fail_next(-1, -1);
        for (int64_t n : {1, 7, 40, 129})  // enough work for several threads, all of it in one band or spread
            for (int64_t height : {8, 96}) {
                wrong += run(96, 1024, height, n % 2 ? 1 : 4, n, 0.9, n > 7, true, 3, isa);
                wrong += run(96, 1021, height, n % 2 ? 1 : 4, n, 0.9, n > 7, true, 3, isa, true);
                wrong += run(96, 1024, 16, n % 2 ? 64 : 16, n, 0.9, n > 7, true, 3, isa, height == 8);
                wrong += run(91, 1021, height, 8, n, 0.9, n > 7, true, 3, isa, true);
                wrong += run_gradients(96, 1024, height, n % 2 ? 1 : 4, n, 0.9, n > 7, 3, isa), ran += 5;
            }
    }
    std::printf("%d products, %d numbers wrong, %d allocations and %d threads refused\n", ran, wrong, (int)refused_allocations,
                (int)refused_threads);
    return wrong != 0;
}
