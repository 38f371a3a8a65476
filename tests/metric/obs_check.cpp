// Random bands and matrices for obs.cpp and pool.cpp of blockprune/native on every instruction set, built with sanitizers by
// test_optimal_brain_surgeon.py: nothing is read or written outside of its buffer, each block is removed once, and sums are exact.

#include "obs.cpp"
#include "pool.cpp"

#include "avx2.cpp"
#include "avx512.cpp"
#include "plain.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>

using Numbers = std::vector<double>;

template <class T>
static bool removes_each_once(const Numbers& rows, const Numbers& inverse, int64_t k, int64_t m, int64_t n, int64_t stop, int32_t isa) {
    const std::vector<T> given(rows.begin(), rows.end()), h(inverse.begin(), inverse.end());
    const int64_t blocks = k / n, group[] = {0, 0};
    std::vector<T> errors(2 * blocks);
    std::vector<int64_t> order(2 * blocks), count(2 * blocks);
    const std::atomic<int32_t> interrupted{0};
    if (obs_sweep(given.data(), h.data(), group, sizeof(T) == 8, 2, k, m, n, stop, errors.data(), order.data(), 2, isa, &interrupted)) return false;
    for (int64_t i = 0; i < 2 * blocks; i++) count[i / blocks * blocks + order[i]]++;
    return std::all_of(count.begin(), count.end(), [](int64_t c) { return c == 1; });
}

static bool sums_exactly(const std::vector<int>& x, bool is_bf16, int64_t rows, int64_t cols, int64_t r, int64_t c, int32_t isa) {
    const int64_t block_cols = (cols + c - 1) / c;
    std::vector<float> floats(x.begin(), x.end()), sums((rows + r - 1) / r * block_cols), expected(sums.size());
    std::vector<uint16_t> halves(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        uint32_t bits;
        std::memcpy(&bits, &floats[i], 4);
        halves[i] = (uint16_t)(bits >> 16);
        expected[i / cols / r * block_cols + i % cols / c] += floats[i] * floats[i];
    }
    const void* numbers = is_bf16 ? (const void*)halves.data() : floats.data();
    return !pool_sum(numbers, is_bf16, SQUARE, rows, cols, r, c, sums.data(), 2, isa) && sums == expected;
}

int main(int, char** arguments) {
    std::mt19937 random(0);
    std::normal_distribution<double> normal;
    for (int32_t isa = PLAIN; isa <= AVX512; isa++) {
        if (!has_isa(isa)) continue;
        for (int64_t i = 0; i < std::atoi(arguments[1]); i++) {
            const int64_t n = 1 + random() % (i % 3 ? 8 : 40), blocks = 1 + random() % (n > 10 ? 6 : 60), k = n * blocks;
            const int64_t m = 1 + random() % 20, stop = random() % (blocks + 1);
            Numbers x(2 * k), inverse(k * k), rows(2 * k * m);
            for (double& v : x) v = normal(random);
            for (double& v : rows) v = normal(random);
            for (int64_t r = 0; r < k; r++)
                for (int64_t c = 0; c < k; c++) inverse[r * k + c] = (x[r] * x[c] + x[k + r] * x[k + c]) / k + (r == c);
            if (!removes_each_once<float>(rows, inverse, k, m, n, stop, isa)) return 1;
            if (!removes_each_once<double>(rows, inverse, k, m, n, blocks, isa)) return 1;
        }
        for (int64_t i = 0; i < std::atoi(arguments[1]); i++) {
            const int64_t rows = 1 + random() % 80, cols = 1 + random() % 150, r = 1 + random() % rows, wide = 1 << random() % 6;
            std::vector<int> x(rows * cols);
            for (int& v : x) v = (int)(random() % 7) - 3;
            if (!sums_exactly(x, i % 2, rows, cols, r, i % 3 ? wide : 1 + random() % cols, isa)) return 2;
        }
        std::printf("instructions %d: each block once, sums exact\n", isa);
    }
}
