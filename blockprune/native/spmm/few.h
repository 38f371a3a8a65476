// Few rows of x, as they are: reading the weights is what costs, so they go through once, from start to end, rows of W across the lanes.
// Included once for each instruction set.

// A pair of weights, or of x, is a word, and so are the lanes: 64 bits of float, 32 of bfloat16.
struct FloatWords {
    typedef float T;
    typedef uint64_t Word;
    template <int L> static constexpr int LANE_ROWS = L / 2;
    template <int L> INLINE F<L> spread(uint64_t word) { return (F<L>)(Q<L>{} + word); }
    template <int L> INLINE F<L> add(F<L> sum, F<L> w, F<L> x) { return sum + w * x; }
    INLINE uint64_t join(const float* a, const float* b) { return load<uint32_t>(a) | (uint64_t)load<uint32_t>(b) << 32; }
    static constexpr int source(int lane, int height) { return lane / 2 / height * 2 + lane % 2; }  // the lane of x that a lane of W needs
    static constexpr int row(int lane, int height) { return lane / 2 % height; }
};
template <class Dot> struct HalfWords : Dot {
    typedef uint16_t T;
    typedef uint32_t Word;
    template <int L> static constexpr int LANE_ROWS = L;
    template <int L> INLINE F<L> spread(uint32_t word) { return (F<L>)(U<L>{} + word); }
    INLINE uint32_t join(const uint16_t* a, const uint16_t* b) { return *a | (uint32_t)*b << 16; }
    static constexpr int source(int lane, int height) { return lane / height; }
    static constexpr int row(int lane, int height) { return lane % height; }
};
struct WidenedDot {
    template <int L> INLINE F<L> add(F<L> sum, F<L> w, F<L> x) {
        sum += (F<L>)low_half((U<L>)w) * (F<L>)low_half((U<L>)x);
        return sum + (F<L>)high_half((U<L>)w) * (F<L>)high_half((U<L>)x);
    }
};
#if defined(DOT_PAIRS)
struct PairsDot {
    template <int L> INLINE F<L> add(F<L> sum, F<L> w, F<L> x) { return dot_pairs(sum, (U<L>)w, (U<L>)x); }
};
#endif

template <class T> struct Band {
    int64_t height, blocks;
    const int32_t* col;
    const T* w;
    Band(const Product& p, int64_t b)
        : height(p.height_of(b)), blocks(p.crow[b + 1] - p.crow[b]), col(p.col + p.crow[b]), w((const T*)p.values + p.start(b)) {}
};

// pair(set, w, a, b) for each pair of kept columns, sets in turn; then single(w, a) for an odd last one
template <int SETS, bool LISTED, class T, class Pair, class Single>
INLINE void each_pair(const Product& p, const Band<T>& band, Pair pair, Single single) {
    const T* w = band.w;
    const int64_t stride = 2 * band.height;
    if (LISTED) {
        int64_t j = 0;
        for (; j + 2 * SETS <= band.blocks; j += 2 * SETS)
            UNROLL for (int s = 0; s < SETS; s++, w += stride) pair(s, w, band.col[j + 2 * s], band.col[j + 2 * s + 1]);
        for (; j + 2 <= band.blocks; j += 2, w += stride) pair(0, w, band.col[j], band.col[j + 1]);
        if (j < band.blocks) single(w, band.col[j]);
        return;
    }
    for (int64_t j = 0; j < band.blocks; j++) {
        const int64_t begin = band.col[j] * p.width, end = std::min(p.cols, begin + p.width);
        int64_t c = begin;
        for (; c + 2 * SETS <= end; c += 2 * SETS)
            UNROLL for (int s = 0; s < SETS; s++, w += stride) pair(s, w, c + 2 * s, c + 2 * s + 1);
        if (SETS > 4 && c + 8 <= end) {
            UNROLL for (int s = 0; s < 4; s++, w += stride) pair(s, w, c + 2 * s, c + 2 * s + 1);
            c += 8;
        }
        if (SETS > 2 && c + 4 <= end) {
            UNROLL for (int s = 0; s < 2; s++, w += stride) pair(s, w, c + 2 * s, c + 2 * s + 1);
            c += 4;
        }
        if (c + 2 <= end) pair(0, w, c, c + 1), w += stride, c += 2;
        if (c < end) single(w, c);
    }
}

// sums[i][r] of rows [top, top + NV * LANE_ROWS<L>) of a band, for N rows of x
template <class K, int L, int NV, int N, bool LISTED>
static void across(const Product& p, const typename K::T* x, const Band<typename K::T>& band, int64_t top, float* sums) {
    typedef typename K::T T;
    constexpr int ROWS = K::template LANE_ROWS<L>, SETS = N * NV >= 8 ? 1 : N * NV >= 4 ? 2 : N * NV >= 2 ? 4 : 8;
    F<L> acc[SETS][N][NV] = {};
    float odd[N][NV * ROWS] = {};
    each_pair<SETS, LISTED>(
        p, band,
        [&](int s, const T* w, int64_t a, int64_t b) __attribute__((always_inline)) {
            UNROLL for (int v = 0; v < NV; v++) ahead(w + 2 * (top + v * ROWS));
            UNROLL for (int i = 0; i < N; i++) {
                const T* row = x + i * p.cols;
                const F<L> words = K::template spread<L>(LISTED ? K::join(row + a, row + b) : load<typename K::Word>(row + a));
                UNROLL for (int v = 0; v < NV; v++)
                    acc[s][i][v] = K::template add<L>(acc[s][i][v], load<F<L>>(w + 2 * (top + v * ROWS)), words);
            }
        },
        [&](const T* w, int64_t a) {
            for (int i = 0; i < N; i++)
                for (int r = 0; r < NV * ROWS; r++) odd[i][r] = number(w + top + r) * number(x + i * p.cols + a);
        });
    UNROLL for (int i = 0; i < N; i++) {
        float all[NV * L];
        UNROLL for (int v = 0; v < NV; v++) {
            UNROLL for (int s = 1; s < SETS; s++) acc[0][i][v] += acc[s][i][v];
            store(all + v * L, acc[0][i][v]);
        }
        for (int r = 0; r < NV * ROWS; r++)
            sums[i * band.height + top + r] = odd[i][r] + (L == ROWS ? all[r] : all[2 * r] + all[2 * r + 1]);
    }
}

// the same for the last rows, fewer than a vector has
template <class K, int ROWS, int N, bool LISTED>
static void rest(const Product& p, const typename K::T* x, const Band<typename K::T>& band, float* sums) {
    typedef typename K::T T;
    const int64_t top = band.height - ROWS;
    float acc[N][ROWS][2] = {};
    each_pair<1, LISTED>(
        p, band,
        [&](int, const T* w, int64_t a, int64_t b) __attribute__((always_inline)) {
            UNROLL for (int i = 0; i < N; i++) UNROLL for (int r = 0; r < ROWS; r++) {
                acc[i][r][0] += number(w + 2 * (top + r)) * number(x + i * p.cols + a);
                acc[i][r][1] += number(w + 2 * (top + r) + 1) * number(x + i * p.cols + b);
            }
        },
        [&](const T* w, int64_t a) {
            for (int i = 0; i < N; i++)
                for (int r = 0; r < ROWS; r++) acc[i][r][0] += number(w + top + r) * number(x + i * p.cols + a);
        });
    for (int i = 0; i < N; i++)
        for (int r = 0; r < ROWS; r++) sums[i * band.height + top + r] = acc[i][r][0] + acc[i][r][1];
}

template <class K, int L, int N, bool LISTED>
static void all_rows(const Product& p, const typename K::T* x, const Band<typename K::T>& band, int64_t r, float* sums) {
    constexpr int ROWS = K::template LANE_ROWS<L>;
    if constexpr (L == LANES && N * 4 <= ACROSS)
        for (; r + 4 * ROWS <= band.height; r += 4 * ROWS) across<K, L, 4, N, LISTED>(p, x, band, r, sums);
    if constexpr (L == LANES && N * 2 <= ACROSS)
        for (; r + 2 * ROWS <= band.height; r += 2 * ROWS) across<K, L, 2, N, LISTED>(p, x, band, r, sums);
    for (; r + ROWS <= band.height; r += ROWS) across<K, L, 1, N, LISTED>(p, x, band, r, sums);
    if constexpr (L > 4) all_rows<K, L / 2, N, LISTED>(p, x, band, r, sums);
    else if (r + 1 == band.height) rest<K, 1, N, LISTED>(p, x, band, sums);
    else if (r + 2 == band.height) rest<K, 2, N, LISTED>(p, x, band, sums);
    else if (r + 3 == band.height) rest<K, 3, N, LISTED>(p, x, band, sums);
}

template <class T> static void store_sums(const Product& p, const Part& part, int64_t top, int64_t height, const float* sums) {
    for (int64_t i = 0; i < part.count; i++) {
        T* y = (T*)p.y + (part.first + i) * p.rows + top;
        const float* from = sums + i * height;
        const T* bias = p.bias ? (const T*)p.bias + top : nullptr;
        int64_t r = 0;
        for (; r + LANES <= height; r += LANES)
            narrow<LANES>(y + r, load<F<LANES>>(from + r) + (bias ? numbers<LANES>(bias + r) : F<LANES>{}));
        for (; r < height; r++) narrow(y + r, from[r] + (bias ? number(bias + r) : 0.0f));
    }
}

// Low bands, whole blocks: a vector of L words of W holds HEIGHT rows of some columns, and meets as much of x as L words are, rearranged.
// Rows of x are `stride` apart, and can be read a vector past their end.
template <class K, int L, int HEIGHT, int N>
static void low(const Product& p, const typename K::T* x, int64_t stride, const Band<typename K::T>& band, float* sums) {
    typedef typename K::T T;
    constexpr int STEP = 2 * K::template LANE_ROWS<L>, COLUMNS = STEP / HEIGHT, SETS = N < 3 ? 4 : 2;
    const int64_t vectors = p.width / COLUMNS;
    U<L> order;
    UNROLL for (int l = 0; l < L; l++) order[l] = K::source(l, HEIGHT);
    F<L> acc[SETS][N] = {};
    const T* w = band.w;
    const auto add = [&](int set, const T* at) __attribute__((always_inline)) {
        const F<L> weights = load<F<L>>(w);
        UNROLL for (int i = 0; i < N; i++) {
            const F<L> window = load<F<L>>(at + i * stride);
            acc[set][i] = K::template add<L>(acc[set][i], weights, HEIGHT == 1 ? window : permute(window, order));
        }
        ahead(w);
        w += STEP;
    };
    int64_t j = 0;
    if (vectors == 1)
        for (; j + SETS <= band.blocks; j += SETS) UNROLL for (int s = 0; s < SETS; s++) add(s, x + band.col[j + s] * p.width);
    for (; j < band.blocks; j++) {
        const T* at = x + band.col[j] * p.width;
        int64_t v = 0;
        for (; v + SETS <= vectors; v += SETS) UNROLL for (int s = 0; s < SETS; s++) add(s, at + (v + s) * COLUMNS);
        for (; v < vectors; v++) add(0, at + v * COLUMNS);
    }
    std::fill(sums, sums + N * HEIGHT, 0.0f);
    UNROLL for (int i = 0; i < N; i++) {
        float all[L];
        UNROLL for (int s = 1; s < SETS; s++) acc[0][i] += acc[s][i];
        store(all, acc[0][i]);
        UNROLL for (int l = 0; l < L; l++) sums[i * HEIGHT + K::row(l, HEIGHT)] += all[l];
    }
}

// whether that was possible
template <class K, int L, int HEIGHT, int N>
static bool low_blocks(const Product& p, const typename K::T* x, int64_t stride, const Band<typename K::T>& band, float* sums) {
    if constexpr (HEIGHT <= K::template LANE_ROWS<L>)
        if (p.width % (2 * K::template LANE_ROWS<L> / HEIGHT) == 0) return low<K, L, HEIGHT, N>(p, x, stride, band, sums), true;
    if constexpr (L > 4) return low_blocks<K, L / 2, HEIGHT, N>(p, x, stride, band, sums);
    return false;
}

// the same with the ragged block at the end of the columns
template <class K, int N>
static bool low_band(const Product& p, const typename K::T* x, int64_t stride, Band<typename K::T> band, float* sums) {
    const bool ragged = band.blocks && (band.col[band.blocks - 1] + 1) * p.width > p.cols;
    band.blocks -= ragged;
    bool done = band.height == 1 && low_blocks<K, LANES, 1, N>(p, x, stride, band, sums);
    if constexpr (N <= 2) {
        if (band.height == 2) done = low_blocks<K, LANES, 2, N>(p, x, stride, band, sums);
        if (band.height == 4) done = low_blocks<K, LANES, 4, N>(p, x, stride, band, sums);
    }
    if (!done) return false;
    const auto* w = band.w + band.blocks * p.width * band.height;
    for (int64_t c = ragged ? band.col[band.blocks] * p.width : p.cols; c < p.cols; c += 2, w += 2 * band.height)
        for (int64_t i = 0; i < N; i++)
            for (int64_t r = 0; r < band.height; r++) {
                const auto* at = x + i * stride + c;
                if (c + 1 < p.cols) sums[i * band.height + r] += number(w + 2 * r) * number(at) + number(w + 2 * r + 1) * number(at + 1);
                else sums[i * band.height + r] += number(w + r) * number(at);
            }
    return true;
}

template <class K, int N, bool LISTED>
static void few_bands(const Product& p, const Part& part, float* room, int64_t begin, int64_t end) {
    typedef typename K::T T;
    const int64_t stride = p.cols + 2 * LANES;
    const T* x = (const T*)p.x + part.first * p.cols;
    const bool low = !LISTED && p.height < 8;
    T* padded = (T*)(room + 4 * p.height);
    for (int64_t i = 0; low && i < N; i++)
        std::fill(std::copy(x + i * p.cols, x + (i + 1) * p.cols, padded + i * stride), padded + (i + 1) * stride, T());
    for (int64_t b = begin; b < end; b++) {
        const Band<T> band(p, b);
        if (!low || !low_band<K, N>(p, padded, stride, band, room)) all_rows<K, LANES, N, LISTED>(p, x, band, 0, room);
        store_sums<T>(p, part, b * p.height, band.height, room);
    }
}

template <class K> static void few(const Product& p, const Part& part, float* room, int64_t begin, int64_t end) {
    typedef void (*Bands)(const Product&, const Part&, float*, int64_t, int64_t);
    static const Bands bands[2][4] = {
        {few_bands<K, 1, false>, few_bands<K, 2, false>, few_bands<K, 3, false>, few_bands<K, 4, false>},
        {few_bands<K, 1, true>, few_bands<K, 2, true>, few_bands<K, 3, true>, few_bands<K, 4, true>}};
    bands[p.width == 1][part.count - 1](p, part, room, begin, end);
}
