// Optimal Brain Surgeon over the blocks of bands (metric/obs.py says what it computes): one band of rows a thread.
//
// What a removal takes off the inverse Hessian waits until there is enough of it for a matrix product; the weights and the diagonal
// blocks of the inverse, which say what goes next, are up to date at each step. What is left closes the gaps, so that the work shrinks.

#include "common.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#if (defined(__GNUC__) || defined(__clang__)) && !defined(WITHOUT_VECTORS)
template <class T> using vec __attribute__((vector_size(64), aligned(sizeof(T)), may_alias)) = T;
template <class T> using four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias)) = T;
#else
template <class T> using vec = T;
template <class T> using four = T;
#endif
template <class T> const int64_t lanes = sizeof(vec<T>) / sizeof(T);
template <class T> const int64_t few = sizeof(four<T>) / sizeof(T);
const int64_t TALL = 4;   // rows of a tile that stay in registers
const int64_t LAZY = 32;  // rows that wait
const int64_t GAPS = 16;  // gaps are closed when they are one in so many

// h[r][c] -= sum over q of v[q][r] v[q][c], for c >= r only (and a few below, which nobody reads); packed is room for v
template <class T> INLINE void downdate(T* h, int64_t stride, const T* v, int64_t m, int64_t n, T* packed) {
    const int64_t panel = 128 / sizeof(T), parts = panel / lanes<T>, whole = m - m % panel;
    for (int64_t c = 0; c < whole; c += panel)  // [panels][n][panel]: what is read together lies together
        for (int64_t q = 0; q < n; q++) std::memcpy(packed + c * n + q * panel, v + q * stride + c, panel * sizeof(T));
    for (int64_t r = 0; r < whole; r += TALL) {
        const T* left = packed + r / panel * panel * n + r % panel;
        for (int64_t c = r / panel * panel; c < whole; c += panel) {
            const T* right = packed + c * n;
            T* at = h + r * stride + c;
            vec<T> sums[TALL][parts];
            for (int64_t i = 0; i < TALL; i++)
                for (int64_t l = 0; l < parts; l++) sums[i][l] = *(vec<T>*)(at + i * stride + l * lanes<T>);
            for (int64_t q = 0; q < n; q++)
                for (int64_t l = 0; l < parts; l++) {
                    const vec<T> x = *(const vec<T>*)(right + q * panel + l * lanes<T>);
                    for (int64_t i = 0; i < TALL; i++) sums[i][l] -= x * left[q * panel + i];
                }
            for (int64_t i = 0; i < TALL; i++)
                for (int64_t l = 0; l < parts; l++) *(vec<T>*)(at + i * stride + l * lanes<T>) = sums[i][l];
        }
    }
    for (int64_t r = 0; r < m; r++)
        for (int64_t q = 0; q < n; q++) {
            const T factor = v[q * stride + r];
            for (int64_t k = std::max(r, whole); k < m; k++) h[r * stride + k] -= factor * v[q * stride + k];
        }
}

// out [as long as V] -= sum over q of x[q] z[q]
template <class T, class V> INLINE void subtract_part(T* out, const T* x, int64_t x_row, const T* z, int64_t z_row, int64_t n) {
    V sum = *(V*)out;
    for (int64_t q = 0; q < n; q++) sum -= x[q * x_row] * *(const V*)(z + q * z_row);
    *(V*)out = sum;
}

// out [a][b] -= sum over q of x[q][a] z[q][b]
template <class T> INLINE void subtract(T* out, int64_t a, int64_t b, const T* x, int64_t x_row, const T* z, int64_t z_row, int64_t n) {
    for (int64_t i = 0; i < a; i++, out += b) {
        int64_t j = 0;
        for (; j + lanes<T> <= b; j += lanes<T>) subtract_part<T, vec<T>>(out + j, x + i, x_row, z + j, z_row, n);
        for (; j + few<T> <= b; j += few<T>) subtract_part<T, four<T>>(out + j, x + i, x_row, z + j, z_row, n);
        for (; j < b; j++) subtract_part<T, T>(out + j, x + i, x_row, z + j, z_row, n);
    }
}

// both [n][n + m], A symmetric with a matrix Y beside it -> R, of which A = R^T R, and R^-T Y; false if A is not positive definite
template <class T> INLINE bool eliminate(T* both, int64_t n, int64_t m) {
    for (int64_t j = 0; j < n; j++) {
        T* row = both + j * (n + m);
        if (!(row[j] > 0)) return false;
        const T scale = 1 / std::sqrt(row[j]);
        for (int64_t c = 0; c < n + m; c++) row[c] *= scale;
        for (int64_t i = j + 1; i < n; i++) {
            const T times = row[i];
            for (int64_t c = 0; c < n + m; c++) both[i * (n + m) + c] -= times * row[c];
        }
    }
    return true;
}

// x [n][width] -> R^-T x
template <class T> INLINE void solve(const T* upper, int64_t upper_row, int64_t n, T* x, int64_t width, int64_t stride) {
    for (int64_t i = 0; i < n; i++) {
        for (int64_t q = 0; q < i; q++) {
            const T factor = upper[q * upper_row + i];
            for (int64_t k = 0; k < width; k++) x[i * stride + k] -= factor * x[q * stride + k];
        }
        const T scale = 1 / upper[i * upper_row + i];
        for (int64_t k = 0; k < width; k++) x[i * stride + k] *= scale;
    }
}

template <class T> struct Band {
    const T* rows;     // [k][m] the band's weights, transposed
    const T* inverse;  // [k][k]
    T* errors;         // [k / n] what each removal adds, in the order of removal; of those left at the end what each alone would add
    int64_t* order;    // [k / n] blocks in that order
};

struct Run {  // of blocks that are left
    int64_t begin, end;
};

static inline std::vector<Run> runs_of(const std::vector<char>& gone, int64_t held) {
    std::vector<Run> runs;
    for (int64_t j = 0; j < held; j++)
        if (!gone[j]) {
            if (runs.empty() || runs.back().end < j) runs.push_back({j, j});
            runs.back().end++;
        }
    return runs;
}

// x [blocks][size]: the runs move together
template <class T> INLINE void close_gaps(T* x, int64_t size, const std::vector<Run>& runs) {
    int64_t to = 0;
    for (const Run& run : runs) {
        std::memmove(x + to * size, x + run.begin * size, (run.end - run.begin) * size * sizeof(T));
        to += run.end - run.begin;
    }
}

// h [blocks * n][stride], the upper half and the diagonal blocks: likewise in rows and columns
template <class T> INLINE void close_gaps(T* h, int64_t stride, int64_t n, const std::vector<Run>& runs) {
    int64_t to = 0;
    for (size_t i = 0; i < runs.size(); i++)
        for (int64_t r = runs[i].begin * n; r < runs[i].end * n; r++, to++) {
            T* out = h + to * stride + to / n * n;
            for (size_t j = i; j < runs.size(); j++) {
                const int64_t begin = j > i ? runs[j].begin * n : r / n * n, length = runs[j].end * n - begin;
                std::memmove(out, h + r * stride + begin, length * sizeof(T));
                out += length;
            }
        }
}

// false: a block of the inverse is not positive definite in this precision
template <class T> INLINE bool sweep(const Band<T>& band, int64_t k, int64_t m, int64_t n, int64_t stop) {
    const int64_t blocks = k / n, most = std::max<int64_t>(1, LAZY / n);
    const int64_t ld = k + lanes<T>;  // numbers a row: a power of two, and those of a column would push each other out of the cache
    std::vector<T> h(k * ld), w(band.rows, band.rows + k * m), v(most * n * ld), packed(most * n * k);  // the inverse is h - v^T v
    std::vector<T> diagonal(k * n), both(n * (n + m)), sums(blocks);  // blocks on its diagonal; one of them, and its weights
    std::vector<char> gone(blocks, 0);
    std::vector<int64_t> ids(blocks);
    std::iota(ids.begin(), ids.end(), 0);
    for (int64_t r = 0; r < k; r++) std::memcpy(&h[r * ld], band.inverse + r * k, k * sizeof(T));
    for (int64_t j = 0; j < blocks; j++)
        for (int64_t q = 0; q < n; q++) std::memcpy(&diagonal[(j * n + q) * n], &h[(j * n + q) * ld + j * n], n * sizeof(T));
    const auto factor = [&](int64_t j) {
        for (int64_t q = 0; q < n; q++) {
            std::memcpy(&both[q * (n + m)], &diagonal[(j * n + q) * n], n * sizeof(T));
            std::memcpy(&both[q * (n + m) + n], &w[(j * n + q) * m], m * sizeof(T));
        }
        return eliminate(both.data(), n, m);
    };
    int64_t held = blocks, dead = 0, waiting = 0;  // blocks in h; how many of them are gone, and of how many v waits
    for (int64_t done = 0; done < blocks; done++) {
        if (n == 1) {
            if (m == 1)
                for (int64_t j = 0; j < held; j++) sums[j] = w[j] * w[j] / diagonal[j];
            else
                for (int64_t j = 0; j < held; j++) {
                    T sum = 0;
                    for (int64_t i = 0; i < m; i++) sum += w[j * m + i] * w[j * m + i];
                    sums[j] = sum / diagonal[j];
                }
            for (int64_t j = 0; j < held; j++)
                if (!(diagonal[j] > 0) && !gone[j]) return false;
        } else
            for (int64_t j = 0; j < held; j++) {
                if (gone[j]) continue;
                if (!factor(j)) return false;
                T sum = 0;
                for (int64_t q = 0; q < n; q++)
                    for (int64_t i = n; i < n + m; i++) sum += both[q * (n + m) + i] * both[q * (n + m) + i];
                sums[j] = sum;
            }
        if (done >= stop) {
            std::vector<std::pair<T, int64_t>> left;
            for (int64_t j = 0; j < held; j++)
                if (!gone[j]) left.emplace_back(sums[j], ids[j]);
            std::sort(left.begin(), left.end());
            for (auto [sum, id] : left) band.errors[done] = sum, band.order[done++] = id;
            break;
        }
        int64_t p = -1;
        for (int64_t j = 0; j < held; j++)
            if (!gone[j] && (p < 0 || sums[j] < sums[p])) p = j;
        band.errors[done] = sums[p], band.order[done] = ids[p];
        if (!factor(p)) return false;
        const int64_t width = held * n, at = p * n;
        T* rows = v.data() + waiting * n * ld;  // the block's rows of the inverse: the upper half of h, less what waits
        for (int64_t c = 0; c < at; c++)
            for (int64_t q = 0; q < n; q++) rows[q * ld + c] = h[c * ld + at + q];
        for (int64_t q = 0; q < n; q++) {
            for (int64_t c = 0; c < q; c++) rows[q * ld + at + c] = h[(at + c) * ld + at + q];
            std::memcpy(rows + q * ld + at + q, &h[(at + q) * ld + at + q], (width - at - q) * sizeof(T));
        }
        for (int64_t t = 0; t < waiting * n; t++)
            for (int64_t q = 0; q < n; q++) {
                const T times = v[t * ld + at + q];
                for (int64_t c = 0; c < width; c++) rows[q * ld + c] -= times * v[t * ld + c];
            }
        const T* y = both.data() + n;
        solve(both.data(), n + m, n, rows, width, ld);
        if (m == 1)
            for (int64_t q = 0; q < n; q++)
                for (int64_t c = 0; c < width; c++) w[c] -= rows[q * ld + c] * y[q * (n + m)];
        else subtract(w.data(), width, m, rows, ld, y, n + m, n);
        if (n == 1)
            for (int64_t c = 0; c < width; c++) diagonal[c] -= rows[c] * rows[c];
        else
            for (int64_t j = 0; j < held; j++) subtract(diagonal.data() + j * n * n, n, n, rows + j * n, ld, rows + j * n, ld, n);
        gone[p] = 1, dead++;
        if (++waiting < most) continue;
        downdate(h.data(), ld, v.data(), width, waiting * n, packed.data());
        waiting = 0;
        if (dead * GAPS < held) continue;
        const std::vector<Run> runs = runs_of(gone, held);
        close_gaps(h.data(), ld, n, runs);
        close_gaps(w.data(), n * m, runs), close_gaps(diagonal.data(), n * n, runs), close_gaps(ids.data(), 1, runs);
        held -= dead, dead = 0;
        gone.assign(held, 0);
    }
    return true;
}

static CLONES bool sweep_f32(const Band<float>& band, int64_t k, int64_t m, int64_t n, int64_t stop) { return sweep(band, k, m, n, stop); }
static CLONES bool sweep_f64(const Band<double>& band, int64_t k, int64_t m, int64_t n, int64_t stop) { return sweep(band, k, m, n, stop); }

template <class T, class F>
static int64_t all(F one, const T* rows, const T* inverses, const int64_t* group, int64_t bands, int64_t k, int64_t m, int64_t n, int64_t stop,
                   T* errors, int64_t* order, int64_t threads) {
    std::atomic<int64_t> next(0), failed(0);
    parallel(std::min(threads, bands), threads, [&](int64_t, int64_t) {
        for (int64_t i; (i = next++) < bands;) {
            const Band<T> band = {rows + i * k * m, inverses + group[i] * k * k, errors + i * (k / n), order + i * (k / n)};
            if (!one(band, k, m, n, stop)) failed = i + 1;
        }
    });
    return failed;
}

// rows [bands][k][m], inverses [groups][k][k], group [bands] -> errors, order [bands][k / n]. Returns 0, or 1 + a band that failed.
EXPORT int64_t obs_sweep(const void* rows, const void* inverses, const int64_t* group, int32_t is_double, int64_t bands, int64_t k, int64_t m,
                         int64_t n, int64_t stop, void* errors, int64_t* order, int64_t threads) {
    if (is_double)
        return all(sweep_f64, (const double*)rows, (const double*)inverses, group, bands, k, m, n, stop, (double*)errors, order, threads);
    return all(sweep_f32, (const float*)rows, (const float*)inverses, group, bands, k, m, n, stop, (float*)errors, order, threads);
}
