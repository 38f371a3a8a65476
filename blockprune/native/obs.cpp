// Optimal Brain Surgeon over the blocks of bands (metric/obs.py says what it computes): one band of rows a thread, its inverse Hessian
// in cache. Blocks that are removed are overwritten by the last one, so that the work shrinks with what is left.

#include "common.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

// h[r][c] -= sum over q of v[q][r] v[q][c], for c >= r only (and a few below, which nobody reads)
template <class T> INLINE void downdate(T* h, int64_t stride, const T* v, int64_t m, int64_t n) {
#if defined(__GNUC__) || defined(__clang__)
    typedef T vec __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
    const int64_t lanes = 64 / sizeof(T);
#else
    typedef T vec;
    const int64_t lanes = 1;
#endif
    int64_t r = 0;
    for (; r + 4 <= m; r += 4) {
        int64_t c = r;
        for (; c + 2 * lanes <= m; c += 2 * lanes) {
            vec *a = (vec*)(h + r * stride + c), *b = (vec*)(h + (r + 1) * stride + c);
            vec *d = (vec*)(h + (r + 2) * stride + c), *e = (vec*)(h + (r + 3) * stride + c);
            vec a0 = a[0], a1 = a[1], b0 = b[0], b1 = b[1], d0 = d[0], d1 = d[1], e0 = e[0], e1 = e[1];
            for (int64_t q = 0; q < n; q++) {
                const T* row = v + q * stride;
                const vec x0 = *(const vec*)(row + c), x1 = *(const vec*)(row + c + lanes);
                a0 -= x0 * row[r], a1 -= x1 * row[r], b0 -= x0 * row[r + 1], b1 -= x1 * row[r + 1];
                d0 -= x0 * row[r + 2], d1 -= x1 * row[r + 2], e0 -= x0 * row[r + 3], e1 -= x1 * row[r + 3];
            }
            a[0] = a0, a[1] = a1, b[0] = b0, b[1] = b1, d[0] = d0, d[1] = d1, e[0] = e0, e[1] = e1;
        }
        for (int64_t i = r; i < r + 4; i++)
            for (int64_t q = 0; q < n; q++) {
                const T factor = v[q * stride + i];
                for (int64_t k = c; k < m; k++) h[i * stride + k] -= factor * v[q * stride + k];
            }
    }
    for (; r < m; r++)
        for (int64_t q = 0; q < n; q++) {
            const T factor = v[q * stride + r];
            for (int64_t k = r; k < m; k++) h[r * stride + k] -= factor * v[q * stride + k];
        }
}

// lower [n][n] with lower lower^T = the block of h that starts on its diagonal at `at`; false if it is not positive definite
template <class T> INLINE bool cholesky(const T* h, int64_t stride, int64_t at, int64_t n, T* lower) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
            T sum = h[(at + j) * stride + at + i];
            for (int64_t q = 0; q < j; q++) sum -= lower[i * n + q] * lower[j * n + q];
            if (i > j) lower[i * n + j] = sum / lower[j * n + j];
            else if (sum > 0) lower[i * n + i] = std::sqrt(sum);
            else return false;
        }
    return true;
}

// x [n][width] -> lower^-1 x
template <class T> INLINE void solve(const T* lower, int64_t n, T* x, int64_t width, int64_t stride) {
    for (int64_t i = 0; i < n; i++) {
        for (int64_t q = 0; q < i; q++) {
            const T factor = lower[i * n + q];
            for (int64_t k = 0; k < width; k++) x[i * stride + k] -= factor * x[q * stride + k];
        }
        const T scale = 1 / lower[i * n + i];
        for (int64_t k = 0; k < width; k++) x[i * stride + k] *= scale;
    }
}

template <class T> struct Band {
    const T* rows;     // [k][m] the band's weights, transposed
    const T* inverse;  // [k][k]
    T* errors;         // [k / n] what each removal adds, in the order of removal; of those left at the end what each alone would add
    int64_t* order;    // [k / n] blocks in that order
};

// false: a block of the inverse is not positive definite in this precision
template <class T> INLINE bool sweep(const Band<T>& band, int64_t k, int64_t m, int64_t n, int64_t stop) {
    const int64_t blocks = k / n;
    std::vector<T> h(band.inverse, band.inverse + k * k), w(band.rows, band.rows + k * m), v(n * k);
    std::vector<T> lower(n * n), best_lower(n * n), y(n * m), best_y(n * m);
    std::vector<std::pair<T, int64_t>> left;
    std::vector<int64_t> ids(blocks);
    std::iota(ids.begin(), ids.end(), 0);
    for (int64_t done = 0; done < blocks; done++) {
        const int64_t alive = blocks - done;
        int64_t p = -1;
        T least = 0;
        left.clear();
        for (int64_t j = 0; j < alive; j++) {
            if (!cholesky(h.data(), k, j * n, n, lower.data())) return false;
            std::memcpy(y.data(), w.data() + j * n * m, n * m * sizeof(T));
            solve(lower.data(), n, y.data(), m, m);
            T sum = 0;
            for (int64_t i = 0; i < n * m; i++) sum += y[i] * y[i];
            if (done >= stop) left.emplace_back(sum, ids[j]);
            else if (p < 0 || sum < least || (sum == least && ids[j] < ids[p])) {
                p = j, least = sum;
                std::swap(lower, best_lower), std::swap(y, best_y);
            }
        }
        if (done >= stop) {
            std::sort(left.begin(), left.end());
            for (int64_t j = 0; j < alive; j++) band.errors[done + j] = left[j].first, band.order[done + j] = left[j].second;
            break;
        }
        band.errors[done] = least, band.order[done] = ids[p];
        const int64_t width = alive * n, last = width - n;
        for (int64_t q = 0; q < n; q++) {  // the removed block's rows of the inverse, read from its upper half
            T* row = v.data() + q * k;
            for (int64_t c = 0; c < p * n + q; c++) row[c] = h[c * k + p * n + q];
            std::memcpy(row + p * n + q, h.data() + (p * n + q) * k + p * n + q, (width - p * n - q) * sizeof(T));
        }
        solve(best_lower.data(), n, v.data(), width, k);
        for (int64_t c = 0; c < width; c++)
            for (int64_t q = 0; q < n; q++) {
                const T factor = v[q * k + c];
                for (int64_t i = 0; i < m; i++) w[c * m + i] -= factor * best_y[q * m + i];
            }
        downdate(h.data(), k, v.data(), width, n);
        ids[p] = ids[alive - 1];  // the last block moves to the removed one's place
        if (p * n == last) continue;
        std::memcpy(w.data() + p * n * m, w.data() + last * m, n * m * sizeof(T));
        for (int64_t q = 0; q < n; q++) {
            for (int64_t c = 0; c < p * n; c++) h[c * k + p * n + q] = h[c * k + last + q];
            for (int64_t c = q; c < n; c++) h[(p * n + q) * k + p * n + c] = h[(last + q) * k + last + c];
            for (int64_t c = (p + 1) * n; c < last; c++) h[(p * n + q) * k + c] = h[c * k + last + q];
        }
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
