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
            UNROLL for (int i = 0; i < N; i++) {
                const T* row = x + i * p.cols;
                if (i == 0) UNROLL for (int v = 0; v < NV; v++) __builtin_prefetch((const char*)((uintptr_t)(w + 2 * (top + v * ROWS)) + FAR / 2));
                const F<L> words = K::template spread<L>(LISTED ? K::join(row + a, row + b) : load<typename K::Word>(row + a));
                UNROLL for (int v = 0; v < NV; v++)
                    acc[s][i][v] = K::template add<L>(acc[s][i][v], load<F<L>>(w + 2 * (top + v * ROWS)), words);
            }
        },
        [&](const T* w, int64_t a) {
            for (int i = 0; i < N; i++)
                for (int r = 0; r < NV * ROWS; r++) odd[i][r] = number(w + top + r) * number(x + i * p.cols + a);
        });
    UNROLL for (int s = 1; s < SETS; s++) UNROLL for (int i = 0; i < N; i++) UNROLL for (int v = 0; v < NV; v++) acc[0][i][v] += acc[s][i][v];
    for (int i = 0; i < N; i++) {
        float all[NV * L];
        UNROLL for (int v = 0; v < NV; v++) store(all + v * L, acc[0][i][v]);
        for (int r = 0; r < NV * ROWS; r++)
            sums[i * band.height + top + r] = odd[i][r] + (L == ROWS ? all[r] : all[2 * r] + all[2 * r + 1]);
    }
}

// the same for one row
template <class K, int N, bool LISTED>
static void across_one(const Product& p, const typename K::T* x, const Band<typename K::T>& band, int64_t r, float* sums) {
    typedef typename K::T T;
    float acc[N] = {};
    each_pair<1, LISTED>(
        p, band,
        [&](int, const T* w, int64_t a, int64_t b) {
            for (int i = 0; i < N; i++) {
                const T* row = x + i * p.cols;
                acc[i] += number(w + 2 * r) * number(row + a) + number(w + 2 * r + 1) * number(row + b);
            }
        },
        [&](const T* w, int64_t a) {
            for (int i = 0; i < N; i++) acc[i] += number(w + r) * number(x + i * p.cols + a);
        });
    for (int i = 0; i < N; i++) sums[i * band.height + r] = acc[i];
}

template <class K, int L, int N, bool LISTED>
static void all_rows(const Product& p, const typename K::T* x, const Band<typename K::T>& band, int64_t r, float* sums) {
    constexpr int ROWS = K::template LANE_ROWS<L>;
    for (; r + 4 * ROWS <= band.height && N * 4 <= ACROSS; r += 4 * ROWS) across<K, L, 4, N, LISTED>(p, x, band, r, sums);
    for (; r + 2 * ROWS <= band.height && N * 2 <= ACROSS; r += 2 * ROWS) across<K, L, 2, N, LISTED>(p, x, band, r, sums);
    for (; r + ROWS <= band.height; r += ROWS) across<K, L, 1, N, LISTED>(p, x, band, r, sums);
    if constexpr (L > 4) all_rows<K, L / 2, N, LISTED>(p, x, band, r, sums);
    else for (; r < band.height; r++) across_one<K, N, LISTED>(p, x, band, r, sums);
}

template <class T> static void store_sums(const Product& p, int64_t first, int64_t count, int64_t top, int64_t height, const float* sums) {
    for (int64_t i = 0; i < count; i++) {
        T* y = (T*)p.y + (first + i) * p.rows + top;
        const float* from = sums + i * height;
        const T* bias = p.bias ? (const T*)p.bias + top : nullptr;
        int64_t r = 0;
        for (; r + LANES <= height; r += LANES)
            narrow<LANES>(y + r, load<F<LANES>>(from + r) + (bias ? numbers<LANES>(bias + r) : F<LANES>{}));
        for (; r < height; r++) narrow(y + r, from[r] + (bias ? number(bias + r) : 0.0f));
    }
}

// the numbers of x that a band keeps, brought together; how many they are
template <class T, int WIDTH> static int64_t gather(const Product& p, const Band<T>& band, T* to) {
    const int64_t width = WIDTH ? WIDTH : p.width;
    const T* x = (const T*)p.x;
    const int64_t whole = band.blocks - (band.blocks && (band.col[band.blocks - 1] + 1) * width > p.cols);
    for (int64_t j = 0; j < whole; j++) std::memcpy(to + j * width, x + band.col[j] * width, width * sizeof(T));
    if (whole == band.blocks) return whole * width;
    const int64_t begin = band.col[whole] * width;
    std::memcpy(to + whole * width, x + begin, (p.cols - begin) * sizeof(T));
    return whole * width + p.cols - begin;
}
template <class T> static int64_t gather(const Product& p, const Band<T>& band, T* to) {
    switch (p.width) {
        case 1: return gather<T, 1>(p, band, to);
        case 2: return gather<T, 2>(p, band, to);
        case 4: return gather<T, 4>(p, band, to);
        case 8: return gather<T, 8>(p, band, to);
        case 16: return gather<T, 16>(p, band, to);
        case 32: return gather<T, 32>(p, band, to);
        default: return gather<T, 0>(p, band, to);
    }
}

// One row of x and bands lower than 8 rows: W, whose rows repeat every HEIGHT words, meets a window of L words of the gathered x in
// HEIGHT vectors, each with the window's words rearranged, alike in every window.
template <class K, int HEIGHT> static void low(const Product& p, const Band<typename K::T>& band, float* room, float* sums) {
    typedef typename K::T T;
    constexpr int L = LANES, COLUMNS = 2 * K::template LANE_ROWS<L>, SETS = HEIGHT < 4 ? 4 : 2;
    T* x = (T*)room;
    const int64_t count = gather(p, band, x);
    std::fill(x + count, x + count + COLUMNS, T());
    U<L> order[HEIGHT];
    UNROLL for (int v = 0; v < HEIGHT; v++) UNROLL for (int l = 0; l < L; l++) order[v][l] = K::source(v * L + l, HEIGHT);
    F<L> acc[SETS][HEIGHT] = {};
    const T* w = band.w;
    int64_t k = 0;
#define WINDOW(set, w)                                               \
    UNROLL for (int v = 0; v < HEIGHT; v++) acc[set][v] = K::template add<L>( \
        acc[set][v], load<F<L>>((w) + v * COLUMNS), HEIGHT == 1 ? load<F<L>>(x + k) : permute(load<F<L>>(x + k), order[v]))
    for (; k + SETS * COLUMNS <= count;)
        UNROLL for (int s = 0; s < SETS; s++) {
            WINDOW(s, w);
            UNROLL for (int v = 0; v < HEIGHT; v++) __builtin_prefetch((const char*)((uintptr_t)(w + v * COLUMNS) + FAR / 2));
            k += COLUMNS, w += HEIGHT * COLUMNS;
        }
    for (; k + COLUMNS <= count; k += COLUMNS, w += HEIGHT * COLUMNS) {
        WINDOW(0, w);
    }
    if (k < count) {
        T part[HEIGHT * COLUMNS] = {};
        const int64_t even = (count - k) / 2 * 2;
        std::memcpy(part, w, even * HEIGHT * sizeof(T));
        if (even < count - k)
            for (int r = 0; r < HEIGHT; r++) part[even * HEIGHT + 2 * r] = w[even * HEIGHT + r];
        WINDOW(SETS - 1, part);
    }
#undef WINDOW
    UNROLL for (int s = 1; s < SETS; s++) UNROLL for (int v = 0; v < HEIGHT; v++) acc[0][v] += acc[s][v];
    constexpr bool alike = K::row(L, HEIGHT) == 0;  // every vector holds the same rows
    if (alike) for (int v = 1; v < HEIGHT; v++) acc[0][0] += acc[0][v];
    float all[HEIGHT][L];
    UNROLL for (int v = 0; v < HEIGHT; v++) store(all[v], acc[0][v]);
    std::fill(sums, sums + HEIGHT, 0.0f);
    for (int v = 0; v < (alike ? 1 : HEIGHT); v++) UNROLL for (int l = 0; l < L; l++) sums[K::row(v * L + l, HEIGHT)] += all[v][l];
}

template <class K, int N, bool LISTED>
static void few_bands(const Product& p, int64_t first, float* room, int64_t begin, int64_t end) {
    typedef typename K::T T;
    float* sums = room + p.cols + 64;
    for (int64_t b = begin; b < end; b++) {
        const Band<T> band(p, b);
        const T* x = (const T*)p.x + first * p.cols;
        if (N == 1 && band.height < 8) {
            Product one = p;
            one.x = x;
            switch (band.height) {
                case 1: low<K, 1>(one, band, room, sums); break;
                case 2: low<K, 2>(one, band, room, sums); break;
                case 3: low<K, 3>(one, band, room, sums); break;
                case 4: low<K, 4>(one, band, room, sums); break;
                case 5: low<K, 5>(one, band, room, sums); break;
                case 6: low<K, 6>(one, band, room, sums); break;
                default: low<K, 7>(one, band, room, sums);
            }
        } else {
            all_rows<K, LANES, N, LISTED>(p, x, band, 0, sums);
        }
        store_sums<T>(p, first, N, b * p.height, band.height, sums);
    }
}

template <class K> static void few(const Product& p, int64_t first, int64_t count, float* room, int64_t begin, int64_t end) {
    typedef void (*Bands)(const Product&, int64_t, float*, int64_t, int64_t);
    static const Bands bands[2][4] = {
        {few_bands<K, 1, false>, few_bands<K, 2, false>, few_bands<K, 3, false>, few_bands<K, 4, false>},
        {few_bands<K, 1, true>, few_bands<K, 2, true>, few_bands<K, 3, true>, few_bands<K, 4, true>}};
    bands[p.width == 1][count - 1](p, first, room, begin, end);
}
