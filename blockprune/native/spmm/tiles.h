// Many rows of x: they lie across the lanes. x is packed in panels of P rows, one column (or pair of columns) after another; a tile of
// MR rows of W by NV vectors of x stays in registers while it runs over kept columns. Included once for each instruction set.

// acc[m][v] += x[v] * w[m * stride]
template <int L, int NV, int MR> INLINE void multiply(F<L> (&acc)[MR][NV], const float* x, const float* w, int64_t stride) {
    F<L> across[NV];
    UNROLL for (int v = 0; v < NV; v++) {
        across[v] = load<F<L>>(x + v * L);
        IN_REGISTER(across[v]);
    }
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] += across[v] * w[m * stride];
}

// How a type is packed and multiplied. `pair` multiplies two packed columns, at a and b, with pairs of weights; `single` one column.
struct Float {
    typedef float Weight;
    typedef float Packed;
    static const int64_t BLOCK = LANES;  // columns that are packed at a time
    template <int P> static constexpr int64_t at(int64_t column) { return column * P; }
    template <int L, int NV, int MR> INLINE void pair(F<L> (&acc)[MR][NV], const float* a, const float* b, const float* w) {
        multiply<L>(acc, a, w, 2);
        multiply<L>(acc, b, w + 1, 2);
    }
    template <int L, int NV, int MR> INLINE void single(F<L> (&acc)[MR][NV], const float* a, const float* w) {
        multiply<L>(acc, a, w, 1);
    }
    INLINE F<LANES> columns(const float* row) { return load<F<LANES>>(row); }
    template <int P> INLINE void put(float* panel, int64_t k, const F<LANES>& x) {
        std::memcpy(panel + k * P, &x, std::min(P, LANES) * sizeof(float));
    }
};

struct Widened {  // bfloat16 where only floats are multiplied
    typedef uint16_t Weight;
    typedef float Packed;
    static const int64_t BLOCK = LANES;
    template <int P> static constexpr int64_t at(int64_t column) { return column * P; }
    template <int L, int NV, int MR> INLINE void pair(F<L> (&acc)[MR][NV], const float* a, const float* b, const uint16_t* w) {
        F<L> x[NV], y[NV];
        UNROLL for (int v = 0; v < NV; v++) {
            x[v] = load<F<L>>(a + v * L), y[v] = load<F<L>>(b + v * L);
            IN_REGISTER(x[v]);
            IN_REGISTER(y[v]);
        }
        UNROLL for (int m = 0; m < MR; m++) {
            const U<L> two = U<L>{} + load<uint32_t>(w + 2 * m);
            const F<L> first = (F<L>)low_half(two), second = (F<L>)high_half(two);
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] += x[v] * first;
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] += y[v] * second;
        }
    }
    template <int L, int NV, int MR> INLINE void single(F<L> (&acc)[MR][NV], const float* a, const uint16_t* w) {
        float wide[MR];
        for (int m = 0; m < MR; m++) wide[m] = widen(w[m]);
        multiply<L>(acc, a, wide, 1);
    }
    INLINE F<LANES> columns(const uint16_t* row) { return widen<LANES>(row); }
    template <int P> INLINE void put(float* panel, int64_t k, const F<LANES>& x) { Float::put<P>(panel, k, x); }
};

#if defined(DOT_PAIRS)
template <int L, int NV, int MR> INLINE void dot(F<L> (&acc)[MR][NV], const U<L> (&x)[NV], const uint16_t* w) {
    UNROLL for (int m = 0; m < MR; m++) {
        const U<L> two = U<L>{} + load<uint32_t>(w + 2 * m);
        UNROLL for (int v = 0; v < NV; v++) acc[m][v] = dot_pairs(acc[m][v], x[v], two);
    }
}
template <int L, int NV, int MR> INLINE void dot_single(F<L> (&acc)[MR][NV], const U<L> (&x)[NV], const uint16_t* w) {
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] = dot_pairs(acc[m][v], x[v], U<L>{} + w[m]);
}

struct Pairs {  // bfloat16 whose kept columns come in neighbouring pairs: packed two to a word
    typedef uint16_t Weight;
    typedef uint32_t Packed;
    static const int64_t BLOCK = 2 * LANES;
    template <int P> static constexpr int64_t at(int64_t column) { return column / 2 * P; }
    template <int L, int NV> INLINE void words(U<L> (&x)[NV], const uint32_t* a) {
        UNROLL for (int v = 0; v < NV; v++) {
            x[v] = load<U<L>>(a + v * L);
            IN_REGISTER(x[v]);
        }
    }
    template <int L, int NV, int MR> INLINE void pair(F<L> (&acc)[MR][NV], const uint32_t* a, const uint32_t*, const uint16_t* w) {
        U<L> x[NV];
        words<L>(x, a);
        dot<L>(acc, x, w);
    }
    template <int L, int NV, int MR> INLINE void single(F<L> (&acc)[MR][NV], const uint32_t* a, const uint16_t* w) {
        U<L> x[NV];
        words<L>(x, a);
        dot_single<L>(acc, x, w);
    }
    INLINE F<LANES> columns(const uint16_t* row) { return load<F<LANES>>(row); }
    template <int P> INLINE void put(uint32_t* panel, int64_t k, const F<LANES>& x) { Float::put<P>((float*)panel, k, x); }
};

struct Singles {  // bfloat16 with any two kept columns for a pair: packed one by one
    typedef uint16_t Weight;
    typedef uint16_t Packed;
    static const int64_t BLOCK = 2 * LANES;
    template <int P> static constexpr int64_t at(int64_t column) { return column * P; }
    template <int L, int NV, int MR> INLINE void pair(F<L> (&acc)[MR][NV], const uint16_t* a, const uint16_t* b, const uint16_t* w) {
        U<L> x[NV];
        UNROLL for (int v = 0; v < NV; v++) {
            x[v] = zip(load<H<L>>(a + v * L), load<H<L>>(b + v * L));
            IN_REGISTER(x[v]);
        }
        dot<L>(acc, x, w);
    }
    template <int L, int NV, int MR> INLINE void single(F<L> (&acc)[MR][NV], const uint16_t* a, const uint16_t* w) {
        U<L> x[NV];
        UNROLL for (int v = 0; v < NV; v++) x[v] = extend(load<H<L>>(a + v * L));
        dot_single<L>(acc, x, w);
    }
    INLINE F<LANES> columns(const uint16_t* row) { return load<F<LANES>>(row); }
    template <int P> INLINE void put(uint16_t* panel, int64_t k, const F<LANES>& x) {
        const H<LANES> first = __builtin_convertvector((U<LANES>)x & 0xffffu, H<LANES>);
        const H<LANES> second = __builtin_convertvector((U<LANES>)x >> 16, H<LANES>);
        std::memcpy(panel + 2 * k * P, &first, std::min(P, LANES) * sizeof(uint16_t));
        std::memcpy(panel + (2 * k + 1) * P, &second, std::min(P, LANES) * sizeof(uint16_t));
    }
};
#endif

// a run of kept columns: what a tile multiplies
template <class K> struct Run {
    const typename K::Weight* w;
    const typename K::Packed* panel;
    const int32_t* col;      // the block of columns of each, or two columns of each pair
    int64_t count, width;    // blocks of `width` columns (even), or pairs
    int64_t height;          // of the band: weights are 2 * height apart from pair to pair
    const typename K::Weight* last;  // of an odd last column, or null
    int64_t last_col;
    bool first;              // nothing is in `out` yet
    float* out;              // [MR][P]
};

template <class K, int L, int NV, int MR, bool LISTED> static void tile(const Run<K>& run) {
    constexpr int P = L * NV, SETS = MR * NV < 4 ? 4 : MR * NV < 8 ? 2 : 1;  // enough sums at a time to hide the time that one takes
    F<L> acc[SETS][MR][NV] = {};
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++)
        if (!run.first) acc[0][m][v] = load<F<L>>(run.out + m * P + v * L);
    const auto* w = run.w;
    const auto pair = [&](int set, const typename K::Packed* a, const typename K::Packed* b) __attribute__((always_inline)) {
        K::template pair<L>(acc[set], a, b, w);
        UNROLL for (int byte = 0; byte < 2 * MR * (int)sizeof(*w); byte += 64) ahead((const char*)w + byte);
        w += 2 * run.height;
    };
    if (LISTED) {
        const auto at = [&](int64_t i) __attribute__((always_inline)) { return run.panel + K::template at<P>(run.col[i]); };
        int64_t j = 0;
        for (; j + SETS <= run.count; j += SETS) UNROLL for (int s = 0; s < SETS; s++) pair(s, at(2 * (j + s)), at(2 * (j + s) + 1));
        for (; j < run.count; j++) pair(0, at(2 * j), at(2 * j + 1));
    } else {
        constexpr int64_t next = K::template at<P>(2);  // packed pair
        const int64_t pairs = run.width / 2;
        for (int64_t j = 0; j < run.count; j++) {
            const auto* a = run.panel + K::template at<P>(run.col[j] * run.width);
            int64_t k = 0;
            for (; k + SETS <= pairs; k += SETS) UNROLL for (int s = 0; s < SETS; s++, a += next) pair(s, a, a + next / 2);
            for (; k < pairs; k++, a += next) pair(0, a, a + next / 2);
        }
    }
    if (run.last) K::template single<L>(acc[0], run.panel + K::template at<P>(run.last_col), run.last);
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++) {
        UNROLL for (int s = 1; s < SETS; s++) acc[0][m][v] += acc[s][m][v];
        store(run.out + m * P + v * L, acc[0][m][v]);
    }
}

template <class K, int P> static void pack(const Product& p, const Part& part, int64_t begin, int64_t end, void* to) {
    typedef typename K::Weight T;
    const T zeros[K::BLOCK] = {};
    auto* panel = (typename K::Packed*)to;
    for (int64_t c = begin; c < end; c += K::BLOCK)
        for (int64_t i = 0; i < P; i += LANES) {
            F<LANES> x[LANES];
            const T* row = (const T*)p.x + (part.first + i) * p.cols + c;
            if (c + K::BLOCK <= end) {
                UNROLL for (int k = 0; k < LANES; k++) x[k] = K::columns(i + k < part.count ? row + k * p.cols : zeros);
            } else {
                for (int k = 0; k < LANES; k++) {
                    const Padded<K::BLOCK, T> rest(i + k < part.count ? row + k * p.cols : zeros, i + k < part.count ? end - c : 0);
                    x[k] = K::columns(rest.all);
                }
            }
            transpose(x);
            const int64_t rows = std::min<int64_t>(LANES, (end - c + K::BLOCK / LANES - 1) / (K::BLOCK / LANES));
            if (rows == LANES) {
                UNROLL for (int k = 0; k < LANES; k++) K::template put<P>(panel + K::template at<P>(c) + i, k, x[k]);
            } else {
                for (int k = 0; k < rows; k++) K::template put<P>(panel + K::template at<P>(c) + i, k, x[k]);
            }
        }
}

// out [filled][P], rows of W from `top` on -> y
template <class T, int P> static void flush(const Product& p, const Part& part, const float* out, int64_t top, int64_t filled) {
    for (int64_t i = 0; i < part.count; i += LANES) {
        for (int64_t r = 0; r < filled; r += LANES) {
            const int64_t many = std::min<int64_t>(LANES, filled - r);
            const F<LANES> bias = p.bias ? numbers<LANES>(Padded<LANES, T>((const T*)p.bias + top + r, many).all) : F<LANES>{};
            F<LANES> x[LANES];
            UNROLL for (int k = 0; k < LANES; k++) x[k] = load<F<LANES>>(out + (r + k) * P + i);
            transpose(x);
            T* y = (T*)p.y + (part.first + i) * p.rows + top + r;
            if (many == LANES && i + LANES <= part.count) {
                UNROLL for (int k = 0; k < LANES; k++) narrow<LANES>(y + k * p.rows, x[k] + bias);
            } else {
                for (int k = 0; k < std::min<int64_t>(LANES, part.count - i); k++) narrow<LANES>(y + k * p.rows, x[k] + bias, many);
            }
        }
    }
}

template <class K, int L, int NV, bool LISTED> struct Panel {
    static const int P = L * NV, TALLEST = NV == 1 ? ACROSS : TALL;
    typedef typename K::Weight T;
    typedef void (*Tile)(const Run<K>&);

    template <int... MR> static Tile choose(int64_t rows, std::integer_sequence<int, MR...>) {
        static const Tile tiles[] = {tile<K, L, NV, MR + 1, LISTED>...};
        return rows <= TALL ? tiles[rows - 1] : tile<K, L, NV, TALLEST, LISTED>;
    }

    static void rows(Run<K> run) {  // of one band, in tiles of about the same height
        const int64_t height = run.height, tiles = height % TALLEST ? (height + TALL - 1) / TALL : height / TALLEST;
        const auto *w = run.w, *last = run.last;
        float* out = run.out;
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t top = height * t / tiles, bottom = height * (t + 1) / tiles;
            run.w = w + 2 * top, run.last = last ? last + top : nullptr, run.out = out + top * P;
            choose(bottom - top, std::make_integer_sequence<int, TALL>())(run);
        }
    }

    static void band(const Product& p, const void* panel, int64_t b, float* out) {
        const int64_t height = p.height_of(b), blocks = p.crow[b + 1] - p.crow[b];
        if (!blocks) return std::fill(out, out + height * P, 0.0f);
        const int32_t* col = p.col + p.crow[b];
        const T* w = (const T*)p.values + p.start(b);
        const int64_t rest = LISTED ? blocks & 1 : (col[blocks - 1] + 1) * p.width > p.cols ? p.cols - col[blocks - 1] * p.width : 0;
        const int64_t count = LISTED ? blocks / 2 : blocks - (rest > 0), each = height * (LISTED ? 2 : p.width);
        // weights that several tiles share are read in parts that stay close
        const int64_t step = std::max<int64_t>(1, height <= TALLEST ? count : NEAR / (each * (int64_t)sizeof(T)));
        Run<K> run = {w, (const typename K::Packed*)panel, col, 0, p.width, height, nullptr, 0, true, out};
        for (int64_t j = 0; j < count || (LISTED && j == 0); j += step) {
            run.w = w + j * each, run.col = col + (LISTED ? 2 * j : j), run.count = std::min(step, count - j), run.first = j == 0;
            if (LISTED && rest && j + step >= count) run.last = w + count * each, run.last_col = col[blocks - 1];
            rows(run);
        }
        if (!LISTED && rest) {  // the ragged block at the end of the columns
            static const int32_t here = 0;
            run.panel += K::template at<P>(col[count] * p.width);
            run.w = w + count * each, run.col = &here, run.count = 1, run.width = rest & ~1, run.first = count == 0;
            if (rest & 1) run.last = run.w + (rest - 1) * height, run.last_col = rest - 1;
            rows(run);
        }
    }

    static void bands(const Product& p, const Part& part, const void* panel, float* out, int64_t begin, int64_t end) {
        int64_t filled = 0;
        for (int64_t b = begin; b < end; b++) {
            band(p, panel, b, out + filled * P);
            filled += p.height_of(b);
            if (b + 1 < end && filled < GATHERED) continue;
            flush<T, P>(p, part, out, b * p.height + p.height_of(b) - filled, filled);
            filled = 0;
        }
    }
};
