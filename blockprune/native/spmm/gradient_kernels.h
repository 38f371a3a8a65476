// The kernels of the gradients, for words of floats and of pairs of bfloat16. Included once for each instruction set, in its namespace, after
// gemm.h. Where some columns of a band are passed, their number is even unless the last of them is the odd last one of the band, and W is
// stored as spmm.h says.

static const int PACKED_INPUTS = 2 * LANES;

// The numbers of a matrix of T as words of floats.
template <class T> struct FloatWords {
    static constexpr int64_t PER_WORD = 1;
    template <int L> INLINE void multiply_add(F<L>& sums, U<L> x, U<L> w) { sums += (F<L>)x * (F<L>)w; }
    static const Word* pack_weights(const void* values, int64_t columns, int64_t height, Word* scratch) {
        if constexpr (sizeof(T) == sizeof(float)) return (const Word*)values;
        for (int64_t i = 0; i < columns * height; i++) store(scratch + i, load_float((const T*)values + i));
        return scratch;
    }
};

#if defined(DOT_PAIRS)
struct PairWords {  // of bfloat16
    static constexpr int64_t PER_WORD = 2;
    template <int L> INLINE void multiply_add(F<L>& sums, U<L> x, U<L> w) { sums = dot_pairs(sums, x, w); }
    // Two columns are stored row by row, and become words of two rows.
    static const Word* pack_weights(const void* values, int64_t columns, int64_t height, Word* scratch) {
        const uint16_t* from = (const uint16_t*)values;
        Word* to = scratch;
        int64_t k = 0;
        for (; k + 2 <= columns; k += 2, from += 2 * height) {
            int64_t r = 0;
            for (; r + LANES <= height; r += LANES, to += LANES) {
                const Q<LANES> rows = load<Q<LANES>>(from + 2 * r);
                store(to, (rows & 0xffff00000000ffffull) | (rows & 0x0000ffff00000000ull) >> 16 | (rows & 0x00000000ffff0000ull) << 16);
            }
            for (; r < height; r += 2)
                for (int c = 0; c < 2; c++) *to++ = from[2 * r + c] | (r + 1 < height ? (Word)from[2 * r + 2 + c] << 16 : 0);
        }
        if (k < columns)
            for (int64_t r = 0; r < height; r += 2) *to++ = from[r] | (r + 1 < height ? (Word)from[r + 1] << 16 : 0);
        return scratch;
    }
};
#endif

// How a matrix is read as words: of ROWS rows and COLUMNS columns each. `load` gives LANES words of a row.
template <class T> struct Singles {
    typedef T Number;
    static constexpr int64_t ROWS = 1, COLUMNS = 1;
    INLINE U<LANES> load(const T* row, int64_t) { return (U<LANES>)load_floats<LANES>(row); }
};
#if defined(DOT_PAIRS)
struct RowPairs {
    typedef uint16_t Number;
    static constexpr int64_t ROWS = 2, COLUMNS = 1;
    INLINE U<LANES> load(const uint16_t* row, int64_t width) { return zip(::load<H<LANES>>(row), ::load<H<LANES>>(row + width)); }
};
struct ColumnPairs {
    typedef uint16_t Number;
    static constexpr int64_t ROWS = 1, COLUMNS = 2;
    INLINE U<LANES> load(const uint16_t* row, int64_t) { return ::load<U<LANES>>(row); }
};
#endif

// LANES words of a row, with zeros where the matrix has no more rows and columns.
template <class Read> static U<LANES> load_words(const typename Read::Number* row, int64_t width, int64_t rows, int64_t columns) {
    constexpr int64_t SPAN = LANES * Read::COLUMNS;
    if (rows >= Read::ROWS && columns >= SPAN) return Read::load(row, width);
    typename Read::Number numbers[Read::ROWS * SPAN] = {};
    if (columns > 0)
        for (int64_t r = 0; r < std::min(rows, Read::ROWS); r++)
            std::memcpy(numbers + r * SPAN, row + r * width, std::min(columns, SPAN) * sizeof(numbers[0]));
    return Read::load(numbers, SPAN);
}

template <class Read>
static void pack_columns(const Matrix& x, int64_t first, int64_t count, const Range& columns, Word* to, int64_t pitch) {
    for (int64_t c = columns.begin; c < columns.end; c += LANES * Read::COLUMNS) {
        const int64_t many = std::min<int64_t>(LANES, (columns.end - c + Read::COLUMNS - 1) / Read::COLUMNS);
        for (int64_t i = 0; i < round_up(count, PACKED_INPUTS); i += LANES * Read::ROWS) {
            F<LANES> words[LANES];
            for (int k = 0; k < LANES; k++) {
                const int64_t r = i + k * Read::ROWS;
                const auto* row = (const typename Read::Number*)x.numbers + (first + r) * x.width + c;
                words[k] = (F<LANES>)load_words<Read>(row, x.width, count - r, columns.end - c);
            }
            transpose(words);
            for (int k = 0; k < many; k++) store(to + ((c - columns.begin) / Read::COLUMNS + k) * pitch + i / Read::ROWS, words[k]);
        }
    }
}

template <class T>
static void unpack_columns(const float* from, int64_t pitch, int64_t first, int64_t count, const Range& columns, void* to, int64_t width) {
    for (int64_t c = columns.begin; c < columns.end; c += LANES) {
        const int64_t many = std::min<int64_t>(LANES, columns.end - c);
        for (int64_t i = 0; i < count; i += LANES) {
            F<LANES> rows[LANES] = {};
            for (int k = 0; k < many; k++) rows[k] = load<F<LANES>>(from + (c - columns.begin + k) * pitch + i);
            transpose(rows);
            T* row = (T*)to + (first + i) * width + c;
            for (int64_t k = 0; k < std::min<int64_t>(LANES, count - i); k++) {
                if (many == LANES) store_floats<LANES>(row + k * width, rows[k]);
                else store_floats<LANES>(row + k * width, rows[k], many);
            }
        }
    }
}

template <class T> static void round_all(const float* from, const Range& numbers, void* to) {
    int64_t i = numbers.begin;
    for (; i + LANES <= numbers.end; i += LANES) store_floats<LANES>((T*)to + i, load<F<LANES>>(from + i));
    store_floats<LANES>((T*)to + i, load<F<LANES>>(Padded<LANES, float>(from + i, numbers.end - i).all), numbers.end - i);
}

template <class Read> static void pack_rows(const Gradient& g, int64_t first, int64_t count, const RowTile& tile, Word* to) {
    const auto* row = (const typename Read::Number*)g.dy + first * g.rows + tile.band * g.height + tile.first;
    for (int64_t i = 0; i < count; i += Read::ROWS, row += Read::ROWS * g.rows, to += tile.lanes)
        for (int64_t r = 0; r < tile.lanes; r += LANES) {
            const U<LANES> words = load_words<Read>(row + r, g.rows, count - i, tile.rows - r);
            std::memcpy(to + r, &words, std::min<int64_t>(LANES, tile.lanes - r) * sizeof(Word));
        }
}

// MC columns of dx, whose weights lie in pairs, or a single column; the weights of two rows are `step` apart.
template <class Words, int NV, int MC>
static void add_columns(float* const* columns, const Word* w, int64_t step, const Word* dy, int64_t height, int64_t pitch, int64_t n) {
    float* to[MC];
    UNROLL for (int m = 0; m < MC; m++) to[m] = columns[m];
    for (int64_t i = 0; i < n; i += NV * LANES) {
        F<LANES> acc[MC][NV];
        UNROLL for (int m = 0; m < MC; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] = load<F<LANES>>(to[m] + i + v * LANES);
        const Word *row = dy + i, *weights = w;
        int64_t r = 0;
        do {
            U<LANES> x[NV];
            UNROLL for (int v = 0; v < NV; v++) {
                x[v] = load<U<LANES>>(row + v * LANES);
                IN_REGISTER(x[v]);
            }
            UNROLL for (int m = 0; m < MC; m++) UNROLL for (int v = 0; v < NV; v++)
                Words::template multiply_add<LANES>(acc[m][v], x[v], U<LANES>{} + weights[m / 2 * 2 * height + m % 2]);
            row += pitch, weights += step;
        } while (++r < height);
        UNROLL for (int m = 0; m < MC; m++) UNROLL for (int v = 0; v < NV; v++) store(to[m] + i + v * LANES, acc[m][v]);
    }
}

template <class Words>
static void add_to_inputs(float* const* columns, int64_t count, const Word* weights, int64_t step, const Word* dy, int64_t height,
                          int64_t pitch, int64_t n) {
    constexpr int NV = PACKED_INPUTS / LANES, MC = LANES == 16 ? 8 : 6;
    int64_t k = 0;
    for (; k + MC <= count; k += MC) add_columns<Words, NV, MC>(columns + k, weights + k * height, 2, dy, height, pitch, n);
    for (; k + 4 <= count; k += 4) add_columns<Words, NV, 4>(columns + k, weights + k * height, 2, dy, height, pitch, n);
    for (; k + 2 <= count; k += 2) add_columns<Words, NV, 2>(columns + k, weights + k * height, 2, dy, height, pitch, n);
    if (k < count) add_columns<Words, NV, 1>(columns + k, weights + k * height, step, dy, height, pitch, n);
}

// Two columns of sums, row after row.
template <int L, int... I> INLINE void interleave(F<L> (&pair)[2], std::integer_sequence<int, I...>) {
#if defined(SHUFFLES)
    const F<L> a = pair[0], b = pair[1];
    pair[0] = __builtin_shufflevector(a, b, (I % 2 ? L + I / 2 : I / 2)...);
    pair[1] = __builtin_shufflevector(a, b, (I % 2 ? L + L / 2 + I / 2 : L / 2 + I / 2)...);
#else
    float all[2 * L];
    for (int i = 0; i < L; i++) all[2 * i] = pair[0][i], all[2 * i + 1] = pair[1][i];
    std::memcpy(pair, all, sizeof(all));
#endif
}

// The sums of MC columns with a tile of NV vectors of L rows.
template <class Words, int L, int NV, int MC>
static void add_tile(const Word* const* columns, const Word* dy, int64_t n, int64_t rows, int64_t height, float* out, bool add) {
    F<L> acc[MC][NV];
    const Word* x[MC];
    UNROLL for (int m = 0; m < MC; m++) {
        x[m] = columns[m];
        UNROLL for (int v = 0; v < NV; v++) acc[m][v] = F<L>{};
    }
    for (int64_t i = 0; i < n; i++, dy += L * NV) {
        U<L> row[NV];
        UNROLL for (int v = 0; v < NV; v++) {
            row[v] = load<U<L>>(dy + v * L);
            IN_REGISTER(row[v]);
        }
        UNROLL for (int m = 0; m < MC; m++) UNROLL for (int v = 0; v < NV; v++)
            Words::template multiply_add<L>(acc[m][v], row[v], U<L>{} + x[m][i]);
    }
    if (rows == L * NV) {
        UNROLL for (int m = 0; m + 1 < MC; m += 2) UNROLL for (int v = 0; v < NV; v++) {
            F<L> pair[2] = {acc[m][v], acc[m + 1][v]};
            interleave<L>(pair, std::make_integer_sequence<int, L>());
            float* to = out + m * height + 2 * v * L;
            UNROLL for (int k = 0; k < 2; k++) store(to + k * L, add ? load<F<L>>(to + k * L) + pair[k] : pair[k]);
        }
        if (MC == 1)
            UNROLL for (int v = 0; v < NV; v++) store(out + v * L, add ? load<F<L>>(out + v * L) + acc[0][v] : acc[0][v]);
        return;
    }
    for (int m = 0; m < MC; m++) {
        float sums[L * NV];
        std::memcpy(sums, acc[m], sizeof(sums));
        for (int64_t r = 0; r < rows; r++) {
            float* to = MC == 1 ? out + r : out + m / 2 * 2 * height + 2 * r + m % 2;
            *to = add ? *to + sums[r] : sums[r];
        }
    }
}

template <class Words, int L, int NV, int MC>
static void add_tiles(const Word* const* columns, int64_t count, const Word* dy, int64_t n, const RowTile& tile, int64_t height, float* out,
                      bool add) {
    int64_t k = 0;
    float* pairs = out + 2 * tile.first;
    for (; k + MC <= count; k += MC) add_tile<Words, L, NV, MC>(columns + k, dy, n, tile.rows, height, pairs + k * height, add);
    if constexpr (MC > 4)
        for (; k + 4 <= count; k += 4) add_tile<Words, L, NV, 4>(columns + k, dy, n, tile.rows, height, pairs + k * height, add);
    for (; k + 2 <= count; k += 2) add_tile<Words, L, NV, 2>(columns + k, dy, n, tile.rows, height, pairs + k * height, add);
    if (k < count) add_tile<Words, L, NV, 1>(columns + k, dy, n, tile.rows, height, out + k * height + tile.first, add);
}

template <class Words>
static void add_to_weights(const Word* const* columns, int64_t count, const Word* dy, int64_t n, const RowTile& tile, int64_t height,
                           float* out, bool add) {
    constexpr int L = LANES == 4 ? 4 : 8;  // for eight rows
    if (tile.lanes == 4) return add_tiles<Words, 4, 1, 8>(columns, count, dy, n, tile, height, out, add);
    if (tile.lanes == 8) return add_tiles<Words, L, 8 / L, L>(columns, count, dy, n, tile, height, out, add);
    add_tiles<Words, LANES, 16 / LANES, LANES == 16 ? 8 : LANES == 8 ? 6 : 2>(columns, count, dy, n, tile, height, out, add);
}

template <class T, class Words, class ReadX, class ReadDy> static constexpr GradientKernels gradient_kernels() {
    return {Words::PER_WORD, PACKED_INPUTS,    pack_columns<ReadX>, pack_columns<ReadDy>, unpack_columns<T>,
            round_all<T>,    pack_rows<ReadX>, Words::pack_weights, add_to_inputs<Words>, add_to_weights<Words>};
}
template <class T> static constexpr GradientKernels gradient_kernels() { return gradient_kernels<T, FloatWords<T>, Singles<T>, Singles<T>>(); }
#if defined(DOT_PAIRS)
static constexpr GradientKernels gradient_pairs = gradient_kernels<uint16_t, PairWords, RowPairs, ColumnPairs>();
#endif
