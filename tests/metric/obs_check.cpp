// Random bands for blockprune/native/obs.cpp, compiled with sanitizers by tests/test_obs.py: nothing is read or written outside, and each
// block goes once.

#include "obs.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>

using Numbers = std::vector<double>;

template <class T> static bool each_once(const Numbers& rows, const Numbers& inverse, int64_t k, int64_t m, int64_t n, int64_t stop) {
    const std::vector<T> given(rows.begin(), rows.end()), h(inverse.begin(), inverse.end());
    const int64_t blocks = k / n, group[] = {0, 0};
    std::vector<T> errors(2 * blocks);
    std::vector<int64_t> order(2 * blocks), count(2 * blocks);
    if (obs_sweep(given.data(), h.data(), group, sizeof(T) == 8, 2, k, m, n, stop, errors.data(), order.data(), 2)) return false;
    for (int64_t i = 0; i < 2 * blocks; i++) count[i / blocks * blocks + order[i]]++;
    return std::all_of(count.begin(), count.end(), [](int64_t c) { return c == 1; });
}

int main(int, char** arguments) {
    std::mt19937 random(0);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < std::atoi(arguments[1]); i++) {
        const int64_t n = 1 + random() % (i % 3 ? 5 : 40), blocks = 1 + random() % (n > 10 ? 6 : 60), k = n * blocks, m = 1 + random() % 20;
        Numbers x(2 * k), inverse(k * k), rows(2 * k * m);
        for (double& v : x) v = normal(random);
        for (double& v : rows) v = normal(random);
        for (int64_t r = 0; r < k; r++)
            for (int64_t c = 0; c < k; c++) inverse[r * k + c] = (x[r] * x[c] + x[k + r] * x[k + c]) / k + (r == c);
        const int64_t stop = random() % (blocks + 1);
        if (!each_once<float>(rows, inverse, k, m, n, stop) || !each_once<double>(rows, inverse, k, m, n, blocks)) return 1;
    }
    std::puts("each block once");
}
