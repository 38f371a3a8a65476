// int8 where blocks are a multiple of four columns wide: four neighbouring columns are a word of four bytes, which `dot_quads` multiplies and
// adds. It takes numbers of x as unsigned bytes, so 128 is added to x; 128 times the sum of a row's weights is taken off again, which leaves
// the same exact sums. Where SATURATING is defined, `dot_quads` adds two products in int16, which hold 255 * 128: of two weights whose sum is
// larger, a remainder is multiplied by itself. If weights are normally distributed, one pair in 150 has a remainder.

static const uint32_t OFFSETS = 0x80808080u;  // 128 in each byte: adding it to a number of int8 is inverting its highest bit

// The word of four columns of a row, from column c on; zeros follow the last of `columns`.
static uint32_t quad_of(const int8_t* stored, int64_t columns, int64_t height, int64_t c, int64_t r) {
    const int8_t* first = stored + c * height + 2 * r;
    if (c + 4 <= columns) return load<uint16_t>(first) | (uint32_t)load<uint16_t>(first + 2 * height) << 16;
    const uint32_t last = columns % 2 ? (uint8_t)stored[(columns - 1) * height + r] : 0;
    return columns - c == 1 ? last : load<uint16_t>(first) | last << 16;
}

// The weights of some columns for the micro-kernel, and what belongs to them, in one buffer.
struct Quads {
    Remainder* remainders;
    int64_t remainder_count;

    int32_t* offsets() { return (int32_t*)this + 16; }  // [height] what takes the 128 off the sums of each row
    uint32_t* words(int64_t height) { return (uint32_t*)offsets() + round_up(height, 16); }  // [columns / 4][height]
    void start(int64_t columns, int64_t height) {
        remainder_count = 0, remainders = (Remainder*)(words(height) + (columns + 3) / 4 * height);
    }
    // Takes the remainders out of a word.
    void split(uint32_t& word, int64_t row, int64_t column) {
        uint32_t left = 0;
        for (int shift = 0; shift < 32; shift += 16) {
            const int a = (int8_t)(word >> shift), b = (int8_t)(word >> (shift + 8)), over = a + b - std::max(-128, std::min(128, a + b));
            left |= (uint32_t)(uint8_t)over << (shift + (std::abs(b) > std::abs(a) ? 8 : 0));
        }
        const uint32_t odd = 0x80808080u;  // bytes are subtracted without borrowing from their neighbours
        word = ((word | odd) - (left & ~odd)) ^ ((word ^ ~left) & odd);
        remainders[remainder_count++] = {(int32_t)row, (int32_t)column, left};
    }
};

// Joins stored pairs of columns, rows from r on.
template <int L> static void join_pairs(const int8_t* stored, int64_t columns, int64_t height, int64_t r, Quads* quads) {
    const int64_t whole = columns / 4 * 4;
    uint32_t* const all = quads->words(height);
    I<L> sums;
    const auto put = [&](const U<L>& words, int64_t c, uint32_t* to) __attribute__((always_inline)) {
        store(to, words);
        sums = dot_quads(sums, U<L>{} + OFFSETS, words);
#if defined(SATURATING)
        for (uint32_t bytes = saturating(words), i = 0; bytes; bytes &= ~(15u << 4 * i)) {
            i = __builtin_ctz(bytes) / 4;
            quads->split(to[i], r + i, c);
        }
#endif
    };
    for (; r + L <= height; r += L) {
        const int8_t* pairs = stored + 2 * r;
        uint32_t* to = all + r;
        sums = I<L>{};
        for (int64_t c = 0; c < whole; c += 4, pairs += 4 * height, to += height) {
            prefetch_after(pairs);
            put(zip(load<H<L>>(pairs), load<H<L>>(pairs + 2 * height)), c, to);
        }
        if (whole < columns) {
            uint32_t last[L];
            for (int i = 0; i < L; i++) last[i] = quad_of(stored, columns, height, whole, r + i);
            put(load<U<L>>(last), whole, to);
        }
        store(quads->offsets() + r, -sums);
    }
    if constexpr (L > 4) {
        join_pairs<L / 2>(stored, columns, height, r, quads);
    } else {
        for (; r < height; r++) {
            sums = I<L>{};
            for (int64_t c = 0; c < columns; c += 4) {
                uint32_t one_row[L] = {};
                put(U<L>{quad_of(stored, columns, height, c, r)}, c, one_row);
                all[c / 4 * height + r] = one_row[0];
            }
            quads->offsets()[r] = -sums[0];
        }
    }
}

struct Int8Quads : Int8 {
    typedef int8_t Weight;
    typedef Quads Weights;
    static const int GROUP = 4;
    static const int64_t COLUMNS = 4 * LANES;
    template <int P> static constexpr int64_t offset(int64_t column) { return column / 4 * P; }
    static const int8_t* weights(const int8_t* stored, int64_t columns, int64_t height, void* scratch) {
        Quads* quads = (Quads*)scratch;
        quads->start(columns, height);
        join_pairs<LANES>(stored, columns, height, 0, quads);
        return (const int8_t*)quads->words(height);
    }
    INLINE F<LANES> load_columns(const int8_t* row) { return (F<LANES>)(load<U<LANES>>(row) ^ OFFSETS); }
    template <int P> INLINE void store_packed(uint32_t* panel, int64_t k, const F<LANES>& x) { F32::store_packed<P>((float*)panel, k, x); }
    template <int L, int NV, int MR> INLINE void pair(I<L> (&acc)[MR][NV], const uint32_t* a, const uint32_t*, const int8_t* w) {
        U<L> x[NV];
        UNROLL for (int v = 0; v < NV; v++) {
            x[v] = load<U<L>>(a + v * L);
            IN_REGISTER(x[v]);
        }
        UNROLL for (int m = 0; m < MR; m++) {
            const U<L> word = U<L>{} + load<uint32_t>(w + 4 * m);
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] = dot_quads(acc[m][v], x[v], word);
        }
    }
};

#if defined(SATURATING)
#define GEMV_QUADS gemv_int8  // pairs are as fast, because reading the weights takes the time
#else
#define GEMV_QUADS gemv_quads
// sums[i][r] for rows [top, top + NV * L) of a band and N rows of x, which have the offset.
template <int L, int NV, int N>
static void multiply_quad_rows(const Product& p, const uint8_t* x, int64_t stride, const Band<int8_t>& band, int64_t top, int32_t* sums) {
    constexpr int SETS = N * NV >= 4 ? 1 : N * NV >= 2 ? 2 : 4;
    I<L> acc[SETS][N][NV] = {}, offsets[SETS][NV] = {};
    const int8_t* w = band.w + 2 * top;
    const auto add = [&](int set, const uint8_t* columns) __attribute__((always_inline)) {
        UNROLL for (int v = 0; v < NV; v++) {
            U<L> weights = zip(load<H<L>>(w + 2 * v * L), load<H<L>>(w + 2 * band.height + 2 * v * L));
            IN_REGISTER(weights);
            offsets[set][v] = dot_quads(offsets[set][v], U<L>{} + OFFSETS, weights);
            UNROLL for (int i = 0; i < N; i++)
                acc[set][i][v] = dot_quads(acc[set][i][v], U<L>{} + load<uint32_t>(columns + i * stride), weights);
        }
        prefetch_after(w);
        w += 4 * band.height;
    };
    for (int64_t j = 0; j < band.blocks; j++) {
        const int64_t begin = band.col[j] * p.width, end = std::min(p.cols, begin + p.width);
        int64_t c = begin;
        if constexpr (SETS > 1)
            for (; c + 4 * SETS <= end; c += 4 * SETS) UNROLL for (int s = 0; s < SETS; s++) add(s, x + c + 4 * s);
        for (; c + 4 <= end; c += 4) add(0, x + c);
    }
    UNROLL for (int i = 0; i < N; i++) {
        int32_t* out = sums + i * band.height + top;
        UNROLL for (int v = 0; v < NV; v++) {
            UNROLL for (int s = 1; s < SETS; s++) acc[0][i][v] += acc[s][i][v] - offsets[s][v];
            store(out + v * L, acc[0][i][v] - offsets[0][v]);
        }
    }
}

// The rows of a band from r on: in vectors of L lanes, then of fewer.
template <int L, int N>
static int64_t multiply_quad_band(const Product& p, const uint8_t* x, int64_t stride, const Band<int8_t>& band, int64_t r, int32_t* sums) {
    if constexpr (L == 8 && LANES == 8)  // stored blocks are at most 16 rows high
        for (; r + 2 * L <= band.height; r += 2 * L) multiply_quad_rows<L, 2, N>(p, x, stride, band, r, sums);
    for (; r + L <= band.height; r += L) multiply_quad_rows<L, 1, N>(p, x, stride, band, r, sums);
    if constexpr (L > 4) return multiply_quad_band<L / 2, N>(p, x, stride, band, r, sums);
    return r;
}

// sums[r] += the product of some rows with `count` neighbouring columns, of which the first is the k-th kept one.
static void add_columns(const Band<int8_t>& band, const Range& rows, int64_t kept, int64_t k, const uint8_t* x, int64_t count, int32_t* sums) {
    for (int64_t r = rows.begin; r < rows.end; r++) {
        int32_t sum = 0;
        for (int64_t c = 0; c < count; c++) {
            const int64_t at = k + c;
            const int8_t* w = band.w + (at == kept - 1 && kept % 2 ? at * band.height + r : at / 2 * 2 * band.height + 2 * r + at % 2);
            sum += *w * (int8_t)(x[c] ^ 128);
        }
        sums[r] += sum;
    }
}

template <int N> static void gemv_quad_bands(const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
    int32_t* sums = (int32_t*)scratch;
    uint8_t* x = (uint8_t*)(scratch + 4 * p.height);
    const int8_t* numbers = (const int8_t*)p.x + slice.first * p.cols;
    int64_t c = 0;
    for (; c + 4 * LANES <= N * p.cols; c += 4 * LANES) store(x + c, load<U<LANES>>(numbers + c) ^ OFFSETS);
    for (; c < N * p.cols; c++) x[c] = (uint8_t)numbers[c] ^ 128;
    for (int64_t b = begin; b < end; b++) {
        const Band<int8_t> band(p, b);
        const int64_t rows = multiply_quad_band<LANES, N>(p, x, p.cols, band, 0, sums), kept = p.kept_columns(b);
        for (int64_t i = 0; i < N; i++) {
            const uint8_t* row = x + i * p.cols;
            int32_t* to = sums + i * band.height;
            for (int64_t r = rows; r < band.height; r++) to[r] = 0;
            for (int64_t j = 0; rows < band.height && j < band.blocks; j++)  // rows that fill no vector
                add_columns(band, {rows, band.height}, kept, j * p.width, row + band.col[j] * p.width,
                            std::min(p.width, p.cols - band.col[j] * p.width), to);
            if (kept % 4) add_columns(band, {0, rows}, kept, kept / 4 * 4, row + p.cols - kept % 4, kept % 4, to);  // columns that fill no word
        }
        (p.is_bf16 ? store_int8_sums<uint16_t> : store_int8_sums<float>)(p, slice, b * p.height, band.height, sums);
    }
}

static void gemv_quads(const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
    typedef void (*Bands)(const Product&, const Slice&, float*, int64_t, int64_t);
    static const Bands bands[4] = {gemv_quad_bands<1>, gemv_quad_bands<2>, gemv_quad_bands<3>, gemv_quad_bands<4>};
    bands[slice.count - 1](p, slice, scratch, begin, end);
}
#endif
