// Loops that torch has no fast form of. Plain C functions over raw memory, loaded with ctypes: nothing here knows torch, so one
// build serves every torch version. Optional: without a compiler the package uses torch for the same results.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "common.h"

#include <cmath>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

typedef struct { uint16_t bits; } bf16;

INLINE float wide(float x) { return x; }
INLINE float wide(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

enum Each { IDENTITY = 0, ABS = 1, SQUARE = 2 };
template <int EACH> INLINE float each(float x) { return EACH == ABS ? std::fabs(x) : EACH == SQUARE ? x * x : x; }

// acc[j] += sum of each(x) over the c elements of block j, for one row of `blocks` whole blocks
template <int EACH, int C, class T> INLINE void add_row(const T* x, float* acc, int64_t blocks, int64_t c) {
    const int64_t width = C ? C : c;
    for (int64_t j = 0; j < blocks; j++) {
        float sum = 0;
        for (int64_t k = 0; k < width; k++) sum += each<EACH>(wide(x[j * width + k]));
        acc[j] += sum;
    }
}

// the same for short blocks of bfloat16, two to a 32-bit word: splitting words keeps whole vectors busy
template <int EACH, int C> INLINE void add_row_words(const bf16* x, float* acc, int64_t blocks) {
    const uint32_t* words = (const uint32_t*)x;
    const int64_t per = C / 2;
    for (int64_t j = 0; j < blocks; j++) {
        float sum = 0;
        for (int64_t k = 0; k < per; k++) {
            uint32_t word, low, high;
            std::memcpy(&word, words + j * per + k, 4);
            low = word << 16, high = word & 0xffff0000u;
            float a, b;
            std::memcpy(&a, &low, 4);
            std::memcpy(&b, &high, 4);
            sum += each<EACH>(a) + each<EACH>(b);
        }
        acc[j] += sum;
    }
}

template <int EACH, int C> INLINE void add_short_row(const float* x, float* acc, int64_t blocks) { add_row<EACH, C>(x, acc, blocks, C); }
template <int EACH, int C> INLINE void add_short_row(const bf16* x, float* acc, int64_t blocks) { add_row_words<EACH, C>(x, acc, blocks); }

template <int EACH, class T>
INLINE void pool_part(const T* x, int64_t stride, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out, int64_t out_stride) {
    const int64_t whole = cols / c, tail = cols % c, blocks = whole + (tail > 0);
    std::vector<float> part(blocks);
    std::vector<double> total(blocks);
    for (int64_t top = 0; top < rows; top += r, out += out_stride) {
        const int64_t end = top + r < rows ? top + r : rows;
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t i = top; i < end;) {  // float sums of at most 32 rows, added up in double
            const int64_t stop = i + 32 < end ? i + 32 : end;
            std::fill(part.begin(), part.end(), 0.0f);
            for (; i < stop; i++) {
                const T* row = x + i * stride;
                switch (c) {
                    case 1: add_row<EACH, 1>(row, part.data(), whole, c); break;
                    case 2: add_short_row<EACH, 2>(row, part.data(), whole); break;
                    case 4: add_short_row<EACH, 4>(row, part.data(), whole); break;
                    case 8: add_row<EACH, 8>(row, part.data(), whole, c); break;
                    case 16: add_row<EACH, 16>(row, part.data(), whole, c); break;
                    case 32: add_row<EACH, 32>(row, part.data(), whole, c); break;
                    default: add_row<EACH, 0>(row, part.data(), whole, c);
                }
                if (tail) add_row<EACH, 0>(row + whole * c, part.data() + whole, 1, tail);
            }
            if (end - top <= 32) break;
            for (int64_t j = 0; j < blocks; j++) total[j] += part[j];
        }
        if (end - top <= 32) {
            std::memcpy(out, part.data(), blocks * sizeof(float));
        } else {
            for (int64_t j = 0; j < blocks; j++) out[j] = (float)total[j];
        }
    }
}

#define PART(NAME, T, EACH)                                                                                                               \
    static CLONES void NAME(const T* x, int64_t stride, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out, int64_t out_stride) { \
        pool_part<EACH>(x, stride, rows, cols, r, c, out, out_stride);                                                                     \
    }
PART(f32_identity, float, IDENTITY)
PART(f32_abs, float, ABS)
PART(f32_square, float, SQUARE)
PART(bf16_identity, bf16, IDENTITY)
PART(bf16_abs, bf16, ABS)
PART(bf16_square, bf16, SQUARE)

template <class T, class F>
static void pool(F part, const T* x, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out, int64_t threads) {
    const int64_t down = (rows + r - 1) / r, across = (cols + c - 1) / c;
    if (down >= across || down >= threads) {
        parallel(down, threads, [=](int64_t i, int64_t j) {
            part(x + i * r * cols, cols, std::min(rows, j * r) - i * r, cols, r, c, out + i * across, across);
        });
    } else {  // few tall blocks: share out the columns
        parallel(across, threads, [=](int64_t i, int64_t j) { part(x + i * c, cols, rows, std::min(cols, j * c) - i * c, r, c, out + i, across); });
    }
}

// ask for large pages before a large result is first written: a page fault for each 4 KiB costs as much as the sums that fill it
static void large_pages(float* out, int64_t n) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)1 << 21, begin = ((uintptr_t)out + page - 1) & ~(page - 1), end = (uintptr_t)(out + n) & ~(page - 1);
    if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)out, (void)n;
#endif
}

// x [rows, cols] -> out [ceil(rows / r), ceil(cols / c)]: sums over blocks of r x c, ragged at the ends. Returns 0, or 1 for an unknown type.
EXPORT int32_t pool_sum(const void* x, int32_t is_bf16, int32_t each, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out, int64_t threads) {
    typedef void (*F32)(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
    typedef void (*BF16)(const bf16*, int64_t, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
    static const F32 f32[] = {f32_identity, f32_abs, f32_square};
    static const BF16 half[] = {bf16_identity, bf16_abs, bf16_square};
    if (each < 0 || each > 2 || rows < 1 || cols < 1 || r < 1 || c < 1) return 1;
    large_pages(out, ((rows + r - 1) / r) * ((cols + c - 1) / c));
    if (is_bf16) pool(half[each], (const bf16*)x, rows, cols, r, c, out, threads);
    else pool(f32[each], (const float*)x, rows, cols, r, c, out, threads);
    return 0;
}

// an importable module, so that the ordinary build and install machinery finds a place for the library
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernels", NULL, 0, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_kernels(void) { return PyModule_Create(&module); }
