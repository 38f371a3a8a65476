// Sums over the blocks of a matrix, for one instruction set: included once for each, inside its namespace and with its target switched on.

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <int TERM> INLINE float term(float x) { return TERM == ABS ? std::fabs(x) : TERM == SQUARE ? x * x : x; }

// sums[j] += the terms of block j in one row of `blocks` whole blocks of c elements; C is c, or 0 where that is only known at run time
template <int TERM, int C, class T> INLINE void add_row(const T* x, float* sums, int64_t blocks, int64_t c) {
    const int64_t width = C ? C : c;
    for (int64_t j = 0; j < blocks; j++) {
        float sum = 0;
        for (int64_t k = 0; k < width; k++) sum += term<TERM>(to_float(x[j * width + k]));
        sums[j] += sum;
    }
}

// The same for narrow blocks of bfloat16, which are read as pairs in 32-bit words: splitting words keeps whole vectors busy.
template <int TERM, int C> INLINE void add_row_of_pairs(const bf16* x, float* sums, int64_t blocks) {
    const int64_t pairs = C / 2;
    for (int64_t j = 0; j < blocks; j++) {
        float sum = 0;
        for (int64_t k = 0; k < pairs; k++) {
            uint32_t pair;
            std::memcpy(&pair, x + 2 * (j * pairs + k), 4);
            const uint32_t low = pair << 16, high = pair & 0xffff0000u;
            float a, b;
            std::memcpy(&a, &low, 4);
            std::memcpy(&b, &high, 4);
            sum += term<TERM>(a) + term<TERM>(b);
        }
        sums[j] += sum;
    }
}

template <int TERM, int C> INLINE void add_narrow_row(const float* x, float* sums, int64_t blocks) {
    add_row<TERM, C>(x, sums, blocks, C);
}
template <int TERM, int C> INLINE void add_narrow_row(const bf16* x, float* sums, int64_t blocks) {
    add_row_of_pairs<TERM, C>(x, sums, blocks);
}

template <int TERM, class T>
static void pool_part(const T* x, int64_t stride, int64_t rows, int64_t cols, int64_t r, int64_t c, float* out, int64_t out_stride,
                      float* partial, double* total) {
    const int64_t whole = cols / c, tail = cols % c, blocks = whole + (tail > 0);
    for (int64_t top = 0; top < rows; top += r, out += out_stride) {
        const int64_t end = top + r < rows ? top + r : rows;
        for (int64_t j = 0; j < blocks; j++) total[j] = 0;
        for (int64_t i = top; i < end;) {  // float sums of at most 32 rows are added up in double
            const int64_t stop = i + 32 < end ? i + 32 : end;
            for (int64_t j = 0; j < blocks; j++) partial[j] = 0;
            for (; i < stop; i++) {
                const T* row = x + i * stride;
                switch (c) {
                    case 1: add_row<TERM, 1>(row, partial, whole, c); break;
                    case 2: add_narrow_row<TERM, 2>(row, partial, whole); break;
                    case 4: add_narrow_row<TERM, 4>(row, partial, whole); break;
                    case 8: add_row<TERM, 8>(row, partial, whole, c); break;
                    case 16: add_row<TERM, 16>(row, partial, whole, c); break;
                    case 32: add_row<TERM, 32>(row, partial, whole, c); break;
                    default: add_row<TERM, 0>(row, partial, whole, c);
                }
                if (tail) add_row<TERM, 0>(row + whole * c, partial + whole, 1, tail);
            }
            if (end - top <= 32) break;
            for (int64_t j = 0; j < blocks; j++) total[j] += partial[j];
        }
        if (end - top <= 32) {
            std::memcpy(out, partial, blocks * sizeof(float));
        } else {
            for (int64_t j = 0; j < blocks; j++) out[j] = (float)total[j];
        }
    }
}
