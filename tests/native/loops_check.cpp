// Runs block sums and Optimal Brain Surgeon on every instruction set, over ragged shapes and exactly sized buffers, in several threads; then
// again while allocations or threads fail, one after another, and while another thread interrupts them. test_sanitizers.py builds it.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "failures.h"

extern "C" int32_t has_isa(int32_t isa);
extern "C" int32_t pool_sum(const void* x, int32_t is_bf16, int32_t term, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out,
                            int64_t threads, int32_t isa);
extern "C" int64_t obs_sweep(const void* weights, const void* inverses, const int64_t* group, int32_t is_double, int64_t bands, int64_t k,
                             int64_t m, int64_t n, int64_t stop, void* errors, int64_t* order, int64_t threads, int32_t isa,
                             const std::atomic<int32_t>* interrupted);

static std::mt19937 rng(0);
static int draw(int low, int high) { return low + (int)(rng() % (unsigned)(high - low + 1)); }
static int wrong = 0;
static void check(bool right, const char* what) {
    if (!right) std::printf("wrong: %s\n", what), wrong++;
}

// Sums of whole numbers, which are exact.
static void run_pool(bool is_bf16, int64_t rows, int64_t cols, int64_t r, int64_t c, int64_t threads, int isa) {
    std::unique_ptr<float[]> x(new float[rows * cols]);
    std::unique_ptr<uint16_t[]> halves(new uint16_t[rows * cols]);
    for (int64_t i = 0; i < rows * cols; i++) {
        x[i] = (float)draw(-3, 3);
        uint32_t bits;
        std::memcpy(&bits, &x[i], 4);
        halves[i] = (uint16_t)(bits >> 16);
    }
    const void* numbers = is_bf16 ? (const void*)halves.get() : x.get();
    const int64_t high = (rows + r - 1) / r, wide = (cols + c - 1) / c;
    std::unique_ptr<float[]> out(new float[high * wide]);
    const int32_t failed = with_failures([&] { return pool_sum(numbers, is_bf16, 2, rows, cols, r, c, out.get(), threads, isa); });
    check(failed == 0 || failed == 2, "what pool_sum returns");
    for (int64_t i = 0; !failed && i < high; i++)
        for (int64_t j = 0; j < wide; j++) {
            float sum = 0;
            for (int64_t a = i * r; a < std::min(rows, (i + 1) * r); a++)
                for (int64_t b = j * c; b < std::min(cols, (j + 1) * c); b++) sum += x[a * cols + b] * x[a * cols + b];
            check(out[i * wide + j] == sum, "a sum");
        }
}

// A diagonal inverse, for which removals are known: the block with the least sum of squares over the diagonal is removed next.
template <class T> static void run_obs(int64_t bands, int64_t blocks, int64_t m, int64_t n, int64_t threads, int isa, bool interrupt) {
    const int64_t k = blocks * n, stop = draw(0, (int)blocks);
    std::unique_ptr<T[]> weights(new T[bands * k * m]), inverse(new T[k * k]()), errors(new T[bands * blocks]);
    std::unique_ptr<int64_t[]> group(new int64_t[bands]()), order(new int64_t[bands * blocks]);
    for (int64_t i = 0; i < bands * k * m; i++) weights[i] = (T)(1 + rng() % 1000) / 1000;
    for (int64_t i = 0; i < k; i++) inverse[i * k + i] = (T)(1 + i % 3);
    std::atomic<int32_t> interrupted(0);
    std::unique_ptr<std::thread> other;
    if (interrupt) other.reset(new std::thread([&] { interrupted = 1; }));
    const int64_t failed = with_failures([&] {
        return obs_sweep(weights.get(), inverse.get(), group.get(), sizeof(T) == 8, bands, k, m, n, stop, errors.get(), order.get(), threads,
                         isa, &interrupted);
    });
    if (other) other->join();
    check(failed == 0 || failed == -2 || (interrupt && failed == -3), "what obs_sweep returns");
    for (int64_t band = 0; !failed && band < bands; band++) {
        std::vector<bool> listed(blocks);
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t block = order[band * blocks + i];
            check(block >= 0 && block < blocks && !listed[block], "an order");
            if (block < 0 || block >= blocks) continue;
            listed[block] = true;
            double expected = 0;
            for (int64_t q = block * n; q < (block + 1) * n; q++)
                for (int64_t r = 0; r < m; r++) expected += (double)weights[(band * k + q) * m + r] * weights[(band * k + q) * m + r] / (1 + q % 3);
            const double error = errors[band * blocks + i];
            check(std::fabs(error - expected) <= 1e-4 * expected, "an error of a removal");
            check(i == 0 || error >= errors[band * blocks + i - 1] * (1 - 1e-4), "an order of errors");
        }
    }
}

// An inverse with correlations and columns that the block width may not fill evenly: each block is removed once.
template <class T> static void run_correlated(int64_t blocks, int64_t m, int64_t n, int64_t threads, int isa) {
    const int64_t bands = 2, k = blocks * n, stop = draw(0, (int)blocks);
    std::normal_distribution<double> normal;
    std::vector<double> x(2 * k);
    for (double& v : x) v = normal(rng);
    std::unique_ptr<T[]> weights(new T[bands * k * m]), inverse(new T[k * k]), errors(new T[bands * blocks]);
    std::unique_ptr<int64_t[]> group(new int64_t[bands]()), order(new int64_t[bands * blocks]);
    for (int64_t i = 0; i < bands * k * m; i++) weights[i] = (T)normal(rng);
    for (int64_t r = 0; r < k; r++)
        for (int64_t c = 0; c < k; c++) inverse[r * k + c] = (T)((x[r] * x[c] + x[k + r] * x[k + c]) / k + (r == c));
    const std::atomic<int32_t> interrupted(0);
    const int64_t failed = with_failures([&] {
        return obs_sweep(weights.get(), inverse.get(), group.get(), sizeof(T) == 8, bands, k, m, n, stop, errors.get(), order.get(), threads,
                         isa, &interrupted);
    });
    check(failed == 0 || failed == -2, "what obs_sweep returns");
    if (failed) return;
    std::vector<int64_t> count(bands * blocks);
    for (int64_t i = 0; i < bands * blocks; i++) count[i / blocks * blocks + order[i]]++;
    check(std::all_of(count.begin(), count.end(), [](int64_t c) { return c == 1; }), "an order with correlated inputs");
}

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
    for (int isa = 0; isa < 6; isa++) {
        if (!has_isa(isa)) continue;
        std::printf("instructions %d\n", isa);
        for (int round = 0; round < rounds; round++) {
            const int sizes[] = {1, 2, 3, 4, 5, 8, 16, 33};
            const int64_t n = sizes[draw(0, 7)], m = sizes[draw(0, 7)], threads = draw(1, 4);
            fail_next(round % 2 ? draw(0, 12) : -1, round % 4 == 3 ? draw(0, 3) : -1);
            run_pool(round % 2 == 0, draw(1, 80), draw(1, 150), sizes[draw(0, 7)], sizes[draw(0, 7)], threads, isa);
            fail_next(round % 2 ? draw(0, 60) : -1, round % 4 == 3 ? draw(0, 3) : -1);
            if (round % 3) run_obs<float>(draw(1, 6), draw(1, 20), m, n, threads, isa, round % 5 == 0);
            else run_obs<double>(draw(1, 6), draw(1, 20), m, n, threads, isa, round % 5 == 0);
            fail_next(round % 2 ? draw(0, 60) : -1, round % 4 == 3 ? draw(0, 3) : -1);
            const int width = draw(1, round % 3 ? 8 : 40), blocks = draw(1, width > 10 ? 6 : 60);
            run_correlated<float>(blocks, draw(1, 20), width, threads, isa);
            run_correlated<double>(blocks, draw(1, 20), width, threads, isa);
        }
    }
    std::printf("%d numbers wrong, %d allocations and %d threads refused\n", wrong, (int)refused_allocations, (int)refused_threads);
    return wrong != 0;
}
