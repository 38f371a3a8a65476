// A few rows of x, at most four, multiplied as they are: reading the weights takes the time, so they are read once, from start to end, and
// rows of W lie across the lanes of vectors. Included once for each instruction set.

// A pair of weights, or of numbers of x, is a word: 64 bits of float, 32 of bfloat16. A vector of L floats holds the words of
// VECTOR_ROWS<L> rows of W.
struct F32Words {
    typedef float T;
    typedef uint64_t Word;
    static const int BANDS = F32_BANDS_IN_TURNS;  // that one row of x is multiplied with
    template <int L> static constexpr int VECTOR_ROWS = L / 2;
    template <int L> INLINE F<L> broadcast(uint64_t word) { return (F<L>)(Q<L>{} + word); }
    template <int L> INLINE F<L> multiply_add(F<L> sum, F<L> w, F<L> x) { return sum + w * x; }
    INLINE uint64_t join(const float* a, const float* b) { return load<uint32_t>(a) | (uint64_t)load<uint32_t>(b) << 32; }
    // of blocks of `height` rows: the lane of x that a lane of W meets, and the row of W that it belongs to
    static constexpr int lane_of_x(int lane, int height) { return lane / 2 / height * 2 + lane % 2; }
    static constexpr int row(int lane, int height) { return lane / 2 % height; }
};
template <class Dot> struct Bf16Words : Dot {
    typedef uint16_t T;
    typedef uint32_t Word;
    static const int BANDS = 1;
    template <int L> static constexpr int VECTOR_ROWS = L;
    template <int L> INLINE F<L> broadcast(uint32_t word) { return (F<L>)(U<L>{} + word); }
    INLINE uint32_t join(const uint16_t* a, const uint16_t* b) { return *a | (uint32_t)*b << 16; }
    static constexpr int lane_of_x(int lane, int height) { return lane / height; }
    static constexpr int row(int lane, int height) { return lane % height; }
};
struct DotAsF32 {
    template <int L> INLINE F<L> multiply_add(F<L> sum, F<L> w, F<L> x) {
        sum += (F<L>)low_half((U<L>)w) * (F<L>)low_half((U<L>)x);
        return sum + (F<L>)high_half((U<L>)w) * (F<L>)high_half((U<L>)x);
    }
};
#if defined(DOT_PAIRS)
struct DotPairs {
    template <int L> INLINE F<L> multiply_add(F<L> sum, F<L> w, F<L> x) { return dot_pairs(sum, (U<L>)w, (U<L>)x); }
};
#endif

template <class T> struct Band {
    int64_t height, blocks;
    const int32_t* col;
    const T* w;
    Band(const Product& p, int64_t band)
        : height(p.height_of(band)), blocks(p.crow[band + 1] - p.crow[band]), col(p.col + p.crow[band]),
          w((const T*)p.values + p.start(band)) {}
    Band part(int64_t first, int64_t count, int64_t width) const {  // some of its blocks; an even number of them before, or of columns
        Band some = *this;
        some.blocks = count, some.col += first, some.w += first * width * height;
        return some;
    }
};

// Calls pair(set, w, a, b) for each pair of kept columns, the sets in turn, then single(w, a) for an odd last column. SINGLE says that
// blocks are one column wide.
template <int SETS, bool SINGLE, class T, class Pair, class Single>
INLINE void for_each_pair(const Product& p, const Band<T>& band, Pair pair, Single single) {
    const T* w = band.w;
    const int64_t stride = 2 * band.height;
    if (SINGLE) {
        int64_t j = 0;
        if constexpr (SETS > 1)
            for (; j + 2 * SETS <= band.blocks; j += 2 * SETS)
                UNROLL for (int s = 0; s < SETS; s++, w += stride) pair(s, w, band.col[j + 2 * s], band.col[j + 2 * s + 1]);
        for (; j + 2 <= band.blocks; j += 2, w += stride) pair(0, w, band.col[j], band.col[j + 1]);
        if (j < band.blocks) single(w, band.col[j]);
        return;
    }
    for (int64_t j = 0; j < band.blocks; j++) {
        const int64_t begin = band.col[j] * p.width, end = std::min(p.cols, begin + p.width);
        int64_t c = begin;
        if constexpr (SETS > 1)
            for (; c + 2 * SETS <= end; c += 2 * SETS)
                UNROLL for (int s = 0; s < SETS; s++, w += stride) pair(s, w, c + 2 * s, c + 2 * s + 1);
        if constexpr (SETS > 2)
            if (c + SETS <= end) {
                UNROLL for (int s = 0; s < SETS / 2; s++, w += stride) pair(s, w, c + 2 * s, c + 2 * s + 1);
                c += SETS;
            }
        for (; c + 2 <= end; c += 2, w += stride) pair(0, w, c, c + 1);
        if (c < end) single(w, c);
    }
}

// Calls multiply(band, part) for parts of some bands of one height, which together are all of them. Two bands take turns, because
// processors with AVX2 fetch two arrays ahead faster than one, and faster by themselves than with prefetch instructions.
template <bool SINGLE, int BANDS, class T, class Multiply>
INLINE void in_turns(const Product& p, const Band<T> (&bands)[BANDS], Multiply multiply) {
    int64_t j = 0;
    if constexpr (BANDS == 2) {
        const int64_t step = SINGLE ? 16 : 1, both = std::min(bands[0].blocks, bands[1].blocks);
        for (; j + step <= both; j += step) UNROLL for (int b = 0; b < BANDS; b++) multiply(b, bands[b].part(j, step, p.width));
    }
    UNROLL for (int b = 0; b < BANDS; b++) multiply(b, bands[b].part(j, bands[b].blocks - j, p.width));
}

// sums[b][i][r] for rows [top, top + NV * VECTOR_ROWS<L>) of some bands and N rows of x
template <class K, int L, int NV, int N, bool SINGLE, int BANDS>
static void multiply_rows(const Product& p, const typename K::T* x, const Band<typename K::T> (&bands)[BANDS], int64_t top, float* sums) {
    typedef typename K::T T;
    constexpr bool IN_TURNS = N == 1 && K::BANDS > 1;  // also where this band is left over: its sums are added in the same order
    constexpr int ROWS = K::template VECTOR_ROWS<L>, VECTORS = N * NV * (IN_TURNS ? K::BANDS : 1);
    constexpr int SETS = VECTORS >= 8 ? 1 : VECTORS >= 4 ? 2 : VECTORS >= 2 ? 4 : 8;
    F<L> acc[BANDS][SETS][N][NV] = {};
    float last[BANDS][N][NV * ROWS] = {};
    in_turns<SINGLE>(p, bands, [&](int b, const Band<T>& part) __attribute__((always_inline)) {
        for_each_pair<SETS, SINGLE>(
            p, part,
            [&](int s, const T* w, int64_t first, int64_t second) __attribute__((always_inline)) {
                UNROLL for (int v = 0; !IN_TURNS && v < NV; v++) prefetch_after(w + 2 * (top + v * ROWS));
                UNROLL for (int i = 0; i < N; i++) {
                    const T* row = x + i * p.cols;
                    const F<L> words = K::template broadcast<L>(SINGLE ? K::join(row + first, row + second) : load<typename K::Word>(row + first));
                    UNROLL for (int v = 0; v < NV; v++)
                        acc[b][s][i][v] = K::template multiply_add<L>(acc[b][s][i][v], load<F<L>>(w + 2 * (top + v * ROWS)), words);
                }
            },
            [&](const T* w, int64_t column) {
                for (int i = 0; i < N; i++)
                    for (int r = 0; r < NV * ROWS; r++) last[b][i][r] = load_float(w + top + r) * load_float(x + i * p.cols + column);
            });
    });
    UNROLL for (int b = 0; b < BANDS; b++) UNROLL for (int i = 0; i < N; i++, sums += bands[0].height) {
        float all[NV * L];
        UNROLL for (int v = 0; v < NV; v++) {
            UNROLL for (int s = 1; s < SETS; s++) acc[b][0][i][v] += acc[b][s][i][v];
            store(all + v * L, acc[b][0][i][v]);
        }
        for (int r = 0; r < NV * ROWS; r++) sums[top + r] = last[b][i][r] + (L == ROWS ? all[r] : all[2 * r] + all[2 * r + 1]);
    }
}

// The same for the last rows of a band, fewer than the smallest vector has, and one row of x.
template <class K, int ROWS, bool SINGLE>
static void multiply_last_rows(const Product& p, const typename K::T* x, const Band<typename K::T>& band, float* sums) {
    typedef typename K::T T;
    const int64_t top = band.height - ROWS;
    float acc[ROWS][2] = {};
    for_each_pair<1, SINGLE>(
        p, band,
        [&](int, const T* w, int64_t a, int64_t b) __attribute__((always_inline)) {
            UNROLL for (int r = 0; r < ROWS; r++) {
                acc[r][0] += load_float(w + 2 * (top + r)) * load_float(x + a);
                acc[r][1] += load_float(w + 2 * (top + r) + 1) * load_float(x + b);
            }
        },
        [&](const T* w, int64_t a) {
            for (int r = 0; r < ROWS; r++) acc[r][0] += load_float(w + top + r) * load_float(x + a);
        });
    for (int r = 0; r < ROWS; r++) sums[top + r] = acc[r][0] + acc[r][1];
}

// Whole tiles of two or four vectors, of some bands of one height, from their first row on. Returns the next row.
template <class K, int N, bool SINGLE, int BANDS>
static int64_t multiply_tiles(const Product& p, const typename K::T* x, const Band<typename K::T> (&bands)[BANDS], float* sums) {
    constexpr int ROWS = K::template VECTOR_ROWS<LANES>;
    int64_t r = 0;
    if constexpr (BANDS * N * 4 <= ACCUMULATORS)
        for (; r + 4 * ROWS <= bands[0].height; r += 4 * ROWS) multiply_rows<K, LANES, 4, N, SINGLE>(p, x, bands, r, sums);
    if constexpr (BANDS * N * 2 <= ACCUMULATORS)
        for (; r + 2 * ROWS <= bands[0].height; r += 2 * ROWS) multiply_rows<K, LANES, 2, N, SINGLE>(p, x, bands, r, sums);
    return r;
}

// The rows of a band from r on: in vectors of L lanes, then of fewer, and the last ones for each row of x by itself.
template <class K, int L, int N, bool SINGLE>
static void multiply_band(const Product& p, const typename K::T* x, const Band<typename K::T>& band, int64_t r, float* sums) {
    constexpr int ROWS = K::template VECTOR_ROWS<L>;
    const Band<typename K::T> bands[1] = {band};
    for (; r + ROWS <= band.height; r += ROWS) multiply_rows<K, L, 1, N, SINGLE>(p, x, bands, r, sums);
    if constexpr (L > 4) return multiply_band<K, L / 2, N, SINGLE>(p, x, band, r, sums);
    for (int64_t i = 0; i < N; i++, x += p.cols, sums += band.height) {
        if (r + 1 == band.height) multiply_last_rows<K, 1, SINGLE>(p, x, band, sums);
        if (r + 2 == band.height) multiply_last_rows<K, 2, SINGLE>(p, x, band, sums);
        if (r + 3 == band.height) multiply_last_rows<K, 3, SINGLE>(p, x, band, sums);
    }
}

template <class T> static void store_sums(const Product& p, const Slice& slice, int64_t top, int64_t height, const float* sums) {
    for (int64_t i = 0; i < slice.count; i++) {
        T* y = (T*)p.y + (slice.first + i) * p.rows + top;
        const float* row = sums + i * height;
        const T* bias = p.bias ? (const T*)p.bias + top : nullptr;
        int64_t r = 0;
        for (; r + LANES <= height; r += LANES)
            store_floats<LANES>(y + r, load<F<LANES>>(row + r) + (bias ? load_floats<LANES>(bias + r) : F<LANES>{}));
        for (; r < height; r++) store_float(y + r, row[r] + (bias ? load_float(bias + r) : 0.0f));
    }
}

// A low band, of HEIGHT rows and whole blocks: a vector of W holds all rows of some columns, and is multiplied with a vector of these
// columns of x, permuted. Rows of x are `stride` apart, and can be read a vector past their end.
template <class K, int L, int HEIGHT, int N>
static void multiply_low_blocks(const Product& p, const typename K::T* x, int64_t stride, const Band<typename K::T>& band, float* sums) {
    typedef typename K::T T;
    constexpr int STEP = 2 * K::template VECTOR_ROWS<L>, COLUMNS = STEP / HEIGHT, SETS = N < 3 ? 4 : 2;
    const int64_t vectors = p.width / COLUMNS;
    U<L> order;
    UNROLL for (int l = 0; l < L; l++) order[l] = K::lane_of_x(l, HEIGHT);
    F<L> acc[SETS][N] = {};
    const T* w = band.w;
    const auto add = [&](int set, const T* columns) __attribute__((always_inline)) {
        const F<L> weights = load<F<L>>(w);
        UNROLL for (int i = 0; i < N; i++) {
            const F<L> words = load<F<L>>(columns + i * stride);
            acc[set][i] = K::template multiply_add<L>(acc[set][i], weights, HEIGHT == 1 ? words : permute(words, order));
        }
        prefetch_after(w);
        w += STEP;
    };
    int64_t j = 0;
    if (vectors == 1)
        for (; j + SETS <= band.blocks; j += SETS) UNROLL for (int s = 0; s < SETS; s++) add(s, x + band.col[j + s] * p.width);
    for (; j < band.blocks; j++) {
        const T* columns = x + band.col[j] * p.width;
        int64_t v = 0;
        for (; v + SETS <= vectors; v += SETS) UNROLL for (int s = 0; s < SETS; s++) add(s, columns + (v + s) * COLUMNS);
        for (; v < vectors; v++) add(0, columns + v * COLUMNS);
    }
    for (int i = 0; i < N * HEIGHT; i++) sums[i] = 0;
    UNROLL for (int i = 0; i < N; i++) {
        float all[L];
        UNROLL for (int s = 1; s < SETS; s++) acc[0][i] += acc[s][i];
        store(all, acc[0][i]);
        UNROLL for (int l = 0; l < L; l++) sums[i * HEIGHT + K::row(l, HEIGHT)] += all[l];
    }
}

// Returns false if no vector fits the blocks.
template <class K, int L, int HEIGHT, int N>
static bool try_low_blocks(const Product& p, const typename K::T* x, int64_t stride, const Band<typename K::T>& band, float* sums) {
    if constexpr (HEIGHT <= K::template VECTOR_ROWS<L>)
        if (p.width % (2 * K::template VECTOR_ROWS<L> / HEIGHT) == 0)
            return multiply_low_blocks<K, L, HEIGHT, N>(p, x, stride, band, sums), true;
    if constexpr (L > 4) return try_low_blocks<K, L / 2, HEIGHT, N>(p, x, stride, band, sums);
    return false;
}

// The same with the ragged block at the end of the columns.
template <class K, int N>
static bool multiply_low_band(const Product& p, const typename K::T* x, int64_t stride, Band<typename K::T> band, float* sums) {
    const bool ragged = band.blocks && (band.col[band.blocks - 1] + 1) * p.width > p.cols;
    band.blocks -= ragged;
    bool done = band.height == 1 && try_low_blocks<K, LANES, 1, N>(p, x, stride, band, sums);
    if constexpr (N <= 2) {
        if (band.height == 2) done = try_low_blocks<K, LANES, 2, N>(p, x, stride, band, sums);
        if (band.height == 4) done = try_low_blocks<K, LANES, 4, N>(p, x, stride, band, sums);
    }
    if (!done) return false;
    const auto* w = band.w + band.blocks * p.width * band.height;
    for (int64_t c = ragged ? band.col[band.blocks] * p.width : p.cols; c < p.cols; c += 2, w += 2 * band.height)
        for (int64_t i = 0; i < N; i++)
            for (int64_t r = 0; r < band.height; r++) {
                const auto* column = x + i * stride + c;
                float& sum = sums[i * band.height + r];
                if (c + 1 < p.cols) sum += load_float(w + 2 * r) * load_float(column) + load_float(w + 2 * r + 1) * load_float(column + 1);
                else sum += load_float(w + r) * load_float(column);
            }
    return true;
}

template <class K, int N, bool SINGLE>
static void gemv_bands(const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
    typedef typename K::T T;
    const int64_t stride = p.cols + 2 * LANES;
    const T* x = (const T*)p.x + slice.first * p.cols;
    const bool low = !SINGLE && p.height < 8;
    T* padded = (T*)(scratch + 4 * p.height);  // [N][stride] x with zeros after each row
    for (int64_t i = 0; low && i < N; i++) {
        std::memcpy(padded + i * stride, x + i * p.cols, p.cols * sizeof(T));
        std::memset(padded + i * stride + p.cols, 0, (stride - p.cols) * sizeof(T));
    }
    int64_t b = begin;
    if constexpr (N == 1 && K::BANDS == 2)
        for (; !low && b + 2 <= end && p.height_of(b + 1) == p.height; b += 2) {
            const Band<T> bands[2] = {{p, b}, {p, b + 1}};
            const int64_t done = multiply_tiles<K, N, SINGLE>(p, x, bands, scratch);
            for (int64_t i = 0; i < 2; i++) {
                float* sums = scratch + i * p.height;
                if (done < p.height) multiply_band<K, LANES, N, SINGLE>(p, x, bands[i], done, sums);
                store_sums<T>(p, slice, (b + i) * p.height, p.height, sums);
            }
        }
    for (; b < end; b++) {
        const Band<T> bands[1] = {{p, b}};
        const int64_t height = bands[0].height;
        if (!low || !multiply_low_band<K, N>(p, padded, stride, bands[0], scratch)) {
            const int64_t done = multiply_tiles<K, N, SINGLE>(p, x, bands, scratch);
            if (done < height) multiply_band<K, LANES, N, SINGLE>(p, x, bands[0], done, scratch);
        }
        store_sums<T>(p, slice, b * p.height, height, scratch);
    }
}

template <class K> static void gemv(const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
    typedef void (*Bands)(const Product&, const Slice&, float*, int64_t, int64_t);
    static const Bands bands[2][4] = {
        {gemv_bands<K, 1, false>, gemv_bands<K, 2, false>, gemv_bands<K, 3, false>, gemv_bands<K, 4, false>},
        {gemv_bands<K, 1, true>, gemv_bands<K, 2, true>, gemv_bands<K, 3, true>, gemv_bands<K, 4, true>}};
    bands[p.width == 1][slice.count - 1](p, slice, scratch, begin, end);
}
