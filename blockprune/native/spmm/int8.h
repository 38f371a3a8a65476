// Weights and inputs in int8, which are multiplied and added exactly, in int32. A pair of numbers is a word: two int16, the first in its
// lower half. Included once for each instruction set.

struct Int8 {
    typedef int8_t Number;
    typedef int16_t Weight;  // weights are widened once for all panels
    typedef uint32_t Packed;
    template <int L> using Sums = I<L>;
    static const bool IS_SCALED = true;
    static const int GROUP = 2;
    static const int64_t MIN_PANEL = LANES;  // fewer sizes than of floats, because each takes seconds to compile
    static const int64_t COLUMNS = 2 * LANES;
    INLINE const int16_t* weights(const int8_t* stored, int64_t columns, int64_t height, void* to) {
        const int64_t count = columns * height;
        int16_t* scratch = (int16_t*)to;
        int64_t i = 0;
        for (; i + 2 * LANES <= count; i += 2 * LANES) {
            prefetch_after(stored + i);
            store(scratch + i, widen<LANES>(stored + i));
        }
        for (; i < count; i++) scratch[i] = stored[i];
        return scratch;
    }
    INLINE F<LANES> load_columns(const int8_t* row) { return (F<LANES>)widen<LANES>(row); }
    template <int L, int NV, int MR> INLINE void multiply_add(I<L> (&acc)[MR][NV], U<L> (&x)[NV], const int16_t* w) {
        UNROLL for (int v = 0; v < NV; v++) IN_REGISTER(x[v]);
        UNROLL for (int m = 0; m < MR; m++) {
            const U<L> word = U<L>{} + load<uint32_t>(w + 2 * m);
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] = dot_pairs(acc[m][v], x[v], word);
        }
    }
    template <int L, int NV, int MR> INLINE void multiply_add_single(I<L> (&acc)[MR][NV], const uint32_t* a, const int16_t* w) {
        UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++)
            acc[m][v] = dot_pairs(acc[m][v], load<U<L>>(a + v * L), U<L>{} + (uint16_t)w[m]);
    }
};

struct Int8Pairs : Int8 {  // whose kept columns come in neighbouring pairs: two columns are packed into one word
    template <int P> static constexpr int64_t offset(int64_t column) { return column / 2 * P; }
    template <int L, int NV, int MR> INLINE void pair(I<L> (&acc)[MR][NV], const uint32_t* a, const uint32_t*, const int16_t* w) {
        U<L> x[NV];
        UNROLL for (int v = 0; v < NV; v++) x[v] = load<U<L>>(a + v * L);
        multiply_add<L>(acc, x, w);
    }
    template <int L, int NV, int MR> INLINE void single(I<L> (&acc)[MR][NV], const uint32_t* a, const int16_t* w) {
        multiply_add_single<L>(acc, a, w);
    }
    template <int P> INLINE void store_packed(uint32_t* panel, int64_t k, const F<LANES>& x) { F32::store_packed<P>((float*)panel, k, x); }
};

struct Int8Columns : Int8 {  // of which any two kept columns may be a pair: a word holds a number in its lower half
    template <int P> static constexpr int64_t offset(int64_t column) { return column * P; }
    template <int L, int NV, int MR> INLINE void pair(I<L> (&acc)[MR][NV], const uint32_t* a, const uint32_t* b, const int16_t* w) {
        U<L> x[NV];
        UNROLL for (int v = 0; v < NV; v++) x[v] = load<U<L>>(a + v * L) | load<U<L>>(b + v * L) << 16;
        multiply_add<L>(acc, x, w);
    }
    template <int L, int NV, int MR> INLINE void single(I<L> (&acc)[MR][NV], const uint32_t* a, const int16_t* w) {
        multiply_add_single<L>(acc, a, w);
    }
    template <int P> INLINE void store_packed(uint32_t* panel, int64_t k, const F<LANES>& x) {
        F32::store_packed<P>((float*)panel, 2 * k, (F<LANES>)((U<LANES>)x & 0xffffu));
        F32::store_packed<P>((float*)panel, 2 * k + 1, (F<LANES>)((U<LANES>)x >> 16));
    }
};

template <class T> INLINE void keep_largest(U<LANES>& largest, const T* x) {
    const U<LANES> bits = (U<LANES>)load_floats<LANES>(x) & 0x7fffffffu, is_larger = (U<LANES>)((I<LANES>)bits > (I<LANES>)largest);
    largest = (bits & is_larger) | (largest & ~is_larger);
}

template <class T> INLINE I<LANES> quantized(const T* x, float factor) {
    F<LANES> product = load_floats<LANES>(x) * factor;
    IN_REGISTER(product);                           // is rounded before the sum: not multiplied and added in one instruction
    return (I<LANES>)(product + 12582912.0f) - 0x4b400000;  // adding 1.5 * 2^23 rounds to an integer, which the lowest bits hold
}

// A row of x in int8, and its scale: the largest magnitude becomes 127. A row with NaN or infinity becomes zeros with the scale NaN.
template <class T> static void quantize_row(const T* x, int64_t cols, int8_t* out, float* scale) {
    const int64_t whole = cols / LANES * LANES;
    const Padded<LANES, T> tail(x + whole, cols - whole);
    U<LANES> largest = {};
    for (int64_t c = 0; c < whole; c += LANES) keep_largest(largest, x + c);
    keep_largest(largest, tail.all);
    uint32_t bits = 0;
    for (int l = 0; l < LANES; l++) bits = std::max(bits, (uint32_t)largest[l]);
    if (bits >= 0x7f800000u) {
        *scale = __builtin_nanf("");
        std::memset(out, 0, cols);
        return;
    }
    const float top = load<float>(&bits), factor = top >= SMALLEST_INPUT ? 127 / top : 0;
    *scale = top / 127;
    for (int64_t c = 0; c < whole; c += LANES) narrow(out + c, quantized(x + c, factor));
    int8_t last[LANES];
    narrow(last, quantized(tail.all, factor));
    std::memcpy(out + whole, last, cols - whole);
}

// sums[i][r] for rows [top, top + NV * L) of a band and N rows of x, which are widened.
template <int L, int NV, int N, bool SINGLE>
static void multiply_int8_rows(const Product& p, const int16_t* x, int64_t stride, const Band<int8_t>& band, int64_t top, int32_t* sums) {
    I<L> acc[N][NV] = {};
    int32_t last[N][NV * L] = {};
    for_each_pair<1, SINGLE>(
        p, band,
        [&](int, const int8_t* w, int64_t a, int64_t b) __attribute__((always_inline)) {
            UNROLL for (int v = 0; v < NV; v++) {
                U<L> weights = widen<L>(w + 2 * (top + v * L));
                IN_REGISTER(weights);
                UNROLL for (int i = 0; i < N; i++) {
                    const int16_t* row = x + i * stride;
                    const uint32_t word = SINGLE ? (uint16_t)row[a] | (uint32_t)(uint16_t)row[b] << 16 : load<uint32_t>(row + a);
                    acc[i][v] = dot_pairs(acc[i][v], weights, U<L>{} + word);
                }
            }
            prefetch_after(w + 2 * top);
        },
        [&](const int8_t* w, int64_t a) {
            for (int i = 0; i < N; i++)
                for (int r = 0; r < NV * L; r++) last[i][r] = w[top + r] * x[i * stride + a];
        });
    UNROLL for (int i = 0; i < N; i++) {
        int32_t* out = sums + i * band.height + top;
        UNROLL for (int v = 0; v < NV; v++) store(out + v * L, acc[i][v]);
        for (int r = 0; r < NV * L; r++) out[r] += last[i][r];
    }
}

// The rows of a band from r on: in vectors of L lanes, then of fewer, then one by one.
template <int L, int N, bool SINGLE>
static void multiply_int8_band(const Product& p, const int16_t* x, int64_t stride, const Band<int8_t>& band, int64_t r, int32_t* sums) {
    if constexpr (L == LANES)
        for (; r + 2 * L <= band.height; r += 2 * L) multiply_int8_rows<L, 2, N, SINGLE>(p, x, stride, band, r, sums);
    for (; r + L <= band.height; r += L) multiply_int8_rows<L, 1, N, SINGLE>(p, x, stride, band, r, sums);
    if constexpr (L > 4) return multiply_int8_band<L / 2, N, SINGLE>(p, x, stride, band, r, sums);
    for (; r < band.height; r++)
        for (int i = 0; i < N; i++) {
            int32_t sum = 0;
            const int16_t* row = x + i * stride;
            for_each_pair<1, SINGLE>(
                p, band, [&](int, const int8_t* w, int64_t a, int64_t b) { sum += w[2 * r] * row[a] + w[2 * r + 1] * row[b]; },
                [&](const int8_t* w, int64_t a) { sum += w[r] * row[a]; });
            sums[i * band.height + r] = sum;
        }
}

template <class T> static void store_int8_sums(const Product& p, const Slice& slice, int64_t top, int64_t height, const int32_t* sums) {
    for (int64_t i = 0; i < slice.count; i++) {
        T* y = (T*)p.y + (slice.first + i) * p.rows + top;
        const float input_scale = p.input_scale[slice.first + i];
        for (int64_t r = 0; r < height; r++) {
            const float product = (float)sums[i * height + r] * (p.weight_scale[top + r] * input_scale);
            store_float(y + r, product + (p.bias ? ((const float*)p.bias)[top + r] : 0.0f));
        }
    }
}

template <int N, bool SINGLE>
static void gemv_int8_bands(const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
    int32_t* sums = (int32_t*)scratch;
    int16_t* x = (int16_t*)(scratch + 4 * p.height);
    const int64_t stride = p.cols + 2;
    for (int64_t i = 0; i < N; i++) Int8::weights((const int8_t*)p.x + (slice.first + i) * p.cols, p.cols, 1, x + i * stride);
    for (int64_t b = begin; b < end; b++) {
        const Band<int8_t> band(p, b);
        multiply_int8_band<LANES, N, SINGLE>(p, x, stride, band, 0, sums);
        (p.is_bf16 ? store_int8_sums<uint16_t> : store_int8_sums<float>)(p, slice, b * p.height, band.height, sums);
    }
}

[[maybe_unused]] static void gemv_int8(const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
    typedef void (*Bands)(const Product&, const Slice&, float*, int64_t, int64_t);
    static const Bands bands[2][4] = {
        {gemv_int8_bands<1, false>, gemv_int8_bands<2, false>, gemv_int8_bands<3, false>, gemv_int8_bands<4, false>},
        {gemv_int8_bands<1, true>, gemv_int8_bands<2, true>, gemv_int8_bands<3, true>, gemv_int8_bands<4, true>}};
    bands[p.width == 1][slice.count - 1](p, slice, scratch, begin, end);
}

[[maybe_unused]] static void quantize(const void* x, bool is_bf16, int64_t cols, int8_t* out, float* scale) {
    if (is_bf16) quantize_row((const uint16_t*)x, cols, out, scale);
    else quantize_row((const float*)x, cols, out, scale);
}
