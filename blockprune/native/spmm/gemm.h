// Many rows of x: they lie across the lanes of vectors. A panel holds P rows of x, packed one column (or pair of columns) after another.
// The micro-kernel keeps a tile of accumulators, MR rows of W by NV vectors of x, in registers while it runs over the kept columns of a
// band. Included once for each instruction set.

// acc[m][v] += x[v] * w[m * stride]
template <int L, int NV, int MR> INLINE void multiply_add(F<L> (&acc)[MR][NV], const float* x, const float* w, int64_t stride) {
    F<L> column[NV];
    UNROLL for (int v = 0; v < NV; v++) {
        column[v] = load<F<L>>(x + v * L);
        IN_REGISTER(column[v]);
    }
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] += column[v] * w[m * stride];
}

// How a type of number is packed and multiplied: `pair` multiplies two packed columns, at a and b, with pairs of weights, `single` one
// column, and the weights of neighbouring rows are `stride` apart; `load_columns` and `store_packed` move numbers of x into a panel;
// offset<P>(c) is where column c starts in a panel of P rows.
template <class T> struct Floats {
    typedef T Number;  // of x, of the stored weights and of y
    typedef T Weight;  // as the micro-kernel reads it
    template <int L> using Sums = F<L>;
    static const bool IS_SCALED = false;  // whether sums are integers, which scales make floats
    static const int GROUP = 2;           // columns that `pair` multiplies
    static const int64_t MIN_PANEL = 4;   // rows of the smallest panel
    INLINE const T* weights(const T* stored, int64_t, int64_t, void*) { return stored; }  // of some columns, and their height
};

struct F32 : Floats<float> {
    typedef float Packed;
    static const int64_t COLUMNS = LANES;  // are packed at a time
    template <int P> static constexpr int64_t offset(int64_t column) { return column * P; }
    template <int L, int NV, int MR>
    INLINE void pair(F<L> (&acc)[MR][NV], const float* a, const float* b, const float* w, int64_t stride = 2) {
        multiply_add<L>(acc, a, w, stride);
        multiply_add<L>(acc, b, w + 1, stride);
    }
    template <int L, int NV, int MR> INLINE void single(F<L> (&acc)[MR][NV], const float* a, const float* w) {
        multiply_add<L>(acc, a, w, 1);
    }
    INLINE F<LANES> load_columns(const float* row) { return load<F<LANES>>(row); }
    template <int P> INLINE void store_packed(float* panel, int64_t k, const F<LANES>& x) {
        std::memcpy(panel + k * P, &x, std::min(P, LANES) * sizeof(float));
    }
};

struct Bf16AsF32 : Floats<uint16_t> {  // bfloat16, where only floats can be multiplied
    typedef float Packed;
    static const int64_t COLUMNS = LANES;
    template <int P> static constexpr int64_t offset(int64_t column) { return column * P; }
    template <int L, int NV, int MR>
    INLINE void pair(F<L> (&acc)[MR][NV], const float* a, const float* b, const uint16_t* w, int64_t stride = 2) {
        F<L> x[NV], y[NV];
        UNROLL for (int v = 0; v < NV; v++) {
            x[v] = load<F<L>>(a + v * L), y[v] = load<F<L>>(b + v * L);
            IN_REGISTER(x[v]);
            IN_REGISTER(y[v]);
        }
        UNROLL for (int m = 0; m < MR; m++) {
            const U<L> two = U<L>{} + load<uint32_t>(w + m * stride);
            const F<L> first = (F<L>)low_half(two), second = (F<L>)high_half(two);
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] += x[v] * first;
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] += y[v] * second;
        }
    }
    template <int L, int NV, int MR> INLINE void single(F<L> (&acc)[MR][NV], const float* a, const uint16_t* w) {
        float floats[MR];
        for (int m = 0; m < MR; m++) floats[m] = load_float(w + m);
        multiply_add<L>(acc, a, floats, 1);
    }
    INLINE F<LANES> load_columns(const uint16_t* row) { return load_floats<LANES>(row); }
    template <int P> INLINE void store_packed(float* panel, int64_t k, const F<LANES>& x) { F32::store_packed<P>(panel, k, x); }
};

#if defined(DOT_PAIRS)
template <int L, int NV, int MR>
INLINE void dot(F<L> (&acc)[MR][NV], const U<L> (&x)[NV], const uint16_t* w, int64_t stride = 2) {
    UNROLL for (int m = 0; m < MR; m++) {
        const U<L> two = U<L>{} + load<uint32_t>(w + m * stride);
        UNROLL for (int v = 0; v < NV; v++) acc[m][v] = dot_pairs(acc[m][v], x[v], two);
    }
}
template <int L, int NV, int MR> INLINE void dot_single(F<L> (&acc)[MR][NV], const U<L> (&x)[NV], const uint16_t* w) {
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] = dot_pairs(acc[m][v], x[v], U<L>{} + w[m]);
}

struct Bf16Pairs : Floats<uint16_t> {  // bfloat16 whose kept columns come in neighbouring pairs: two columns are packed into one word
    typedef uint32_t Packed;
    static const int64_t COLUMNS = 2 * LANES;
    template <int P> static constexpr int64_t offset(int64_t column) { return column / 2 * P; }
    template <int L, int NV> INLINE void load_words(U<L> (&x)[NV], const uint32_t* a) {
        UNROLL for (int v = 0; v < NV; v++) {
            x[v] = load<U<L>>(a + v * L);
            IN_REGISTER(x[v]);
        }
    }
    template <int L, int NV, int MR> INLINE void pair(F<L> (&acc)[MR][NV], const uint32_t* a, const uint32_t*, const uint16_t* w) {
        U<L> x[NV];
        load_words<L>(x, a);
        dot<L>(acc, x, w);
    }
    template <int L, int NV, int MR> INLINE void single(F<L> (&acc)[MR][NV], const uint32_t* a, const uint16_t* w) {
        U<L> x[NV];
        load_words<L>(x, a);
        dot_single<L>(acc, x, w);
    }
    INLINE F<LANES> load_columns(const uint16_t* row) { return load<F<LANES>>(row); }
    template <int P> INLINE void store_packed(uint32_t* panel, int64_t k, const F<LANES>& x) { F32::store_packed<P>((float*)panel, k, x); }
};

struct Bf16Columns : Floats<uint16_t> {  // bfloat16 of which any two kept columns may be a pair: columns are packed one by one
    typedef uint16_t Packed;
    static const int64_t COLUMNS = 2 * LANES;
    template <int P> static constexpr int64_t offset(int64_t column) { return column * P; }
    template <int L, int NV, int MR>
    INLINE void pair(F<L> (&acc)[MR][NV], const uint16_t* a, const uint16_t* b, const uint16_t* w, int64_t stride = 2) {
        U<L> x[NV];
        UNROLL for (int v = 0; v < NV; v++) {
            x[v] = zip(load<H<L>>(a + v * L), load<H<L>>(b + v * L));
            IN_REGISTER(x[v]);
        }
        dot<L>(acc, x, w, stride);
    }
    template <int L, int NV, int MR> INLINE void single(F<L> (&acc)[MR][NV], const uint16_t* a, const uint16_t* w) {
        U<L> x[NV];
        UNROLL for (int v = 0; v < NV; v++) x[v] = extend(load<H<L>>(a + v * L));
        dot_single<L>(acc, x, w);
    }
    INLINE F<LANES> load_columns(const uint16_t* row) { return load<F<LANES>>(row); }
    template <int P> INLINE void store_packed(uint16_t* panel, int64_t k, const F<LANES>& x) {
        const H<LANES> first = __builtin_convertvector((U<LANES>)x & 0xffffu, H<LANES>);
        const H<LANES> second = __builtin_convertvector((U<LANES>)x >> 16, H<LANES>);
        std::memcpy(panel + 2 * k * P, &first, std::min(P, LANES) * sizeof(uint16_t));
        std::memcpy(panel + (2 * k + 1) * P, &second, std::min(P, LANES) * sizeof(uint16_t));
    }
};
#endif

// A part of four weights of a row, which is multiplied by itself, because an instruction would saturate with the whole.
struct Remainder {
    int32_t row, column;  // of the band, and of the panel: the first of the four
    uint32_t word;
};

// What the micro-kernel multiplies: some kept blocks of a band, or pairs of its columns where blocks are one column wide.
template <class K> struct TileInput {
    const typename K::Weight* w;
    const typename K::Packed* panel;
    const int32_t* col;      // the column of blocks of each block, or the two columns of each pair
    int64_t count, width;    // blocks of `width` columns, a multiple of GROUP; or pairs
    int64_t height;          // of the band: the weights of two groups are GROUP * height apart
    const int32_t* offsets;  // what is added to the sums of each row, where numbers of x have an offset
    const typename K::Weight* last;  // the weights of an odd last column, or null
    int64_t last_col;
    int64_t origin;          // the column of the panel that columns are counted from
    bool first;              // `sums` hold nothing yet
    float* sums;             // [MR][P], or integers
    const Remainder* remainders = nullptr;
    int64_t remainder_count = 0;
};

// SINGLE says that blocks are one column wide.
template <class K, int L, int NV, int MR, bool SINGLE> static void micro_kernel(const TileInput<K>& input) {
    constexpr int P = L * NV, SETS = MR * NV < 4 ? 4 : MR * NV < 8 ? 2 : 1;  // sets of accumulators, to hide the latency of additions
    typedef typename K::template Sums<L> Sums;
    Sums acc[SETS][MR][NV] = {};
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++)
        if (!input.first) acc[0][m][v] = load<Sums>(input.sums + m * P + v * L);
    if constexpr (K::GROUP == 4)
        UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++) acc[0][m][v] += input.offsets[m];
    const auto* w = input.w;
    const auto pair = [&](int set, const typename K::Packed* a, const typename K::Packed* b) __attribute__((always_inline)) {
        K::template pair<L>(acc[set], a, b, w);
        if (!K::IS_SCALED)  // else they are in the cache
            UNROLL for (int byte = 0; byte < 2 * MR * (int)sizeof(*w); byte += 64) prefetch_after((const char*)w + byte);
        w += K::GROUP * input.height;
    };
    if (SINGLE) {
        const auto column = [&](int64_t i) __attribute__((always_inline)) { return input.panel + K::template offset<P>(input.col[i]); };
        int64_t j = 0;
        if constexpr (SETS > 1)
            for (; j + SETS <= input.count; j += SETS)
                UNROLL for (int s = 0; s < SETS; s++) pair(s, column(2 * (j + s)), column(2 * (j + s) + 1));
        for (; j < input.count; j++) pair(0, column(2 * j), column(2 * j + 1));
    } else {
        constexpr int64_t step = K::template offset<P>(K::GROUP);
        const int64_t pairs = input.width / K::GROUP;
        for (int64_t j = 0; j < input.count; j++) {
            const auto* a = input.panel + K::template offset<P>(input.col[j] * input.width);
            int64_t k = 0;
            if constexpr (SETS > 1)
                for (; k + SETS <= pairs; k += SETS) UNROLL for (int s = 0; s < SETS; s++, a += step) pair(s, a, a + step / 2);
            for (; k < pairs; k++, a += step) pair(0, a, a + step / 2);
        }
    }
    if constexpr (K::GROUP == 2)
        if (input.last) K::template single<L>(acc[0], input.panel + K::template offset<P>(input.last_col), input.last);
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++) {
        UNROLL for (int s = 1; s < SETS; s++) acc[0][m][v] += acc[s][m][v];
        store(input.sums + m * P + v * L, acc[0][m][v]);
    }
}

template <class K, int P> static void pack(const Product& p, const Slice& slice, int64_t begin, int64_t end, void* to) {
    typedef typename K::Number T;
    const T zeros[K::COLUMNS] = {};
    auto* panel = (typename K::Packed*)to;
    for (int64_t c = begin; c < end; c += K::COLUMNS)
        for (int64_t i = 0; i < P; i += LANES) {
            F<LANES> x[LANES];
            const T* row = (const T*)p.x + (slice.first + i) * p.cols + c;
            if (c + K::COLUMNS <= end) {
                UNROLL for (int k = 0; k < LANES; k++) x[k] = K::load_columns(i + k < slice.count ? row + k * p.cols : zeros);
            } else {
                for (int k = 0; k < LANES; k++) {
                    const Padded<K::COLUMNS, T> tail(i + k < slice.count ? row + k * p.cols : zeros, i + k < slice.count ? end - c : 0);
                    x[k] = K::load_columns(tail.all);
                }
            }
            transpose(x);
            const int64_t rows = std::min<int64_t>(LANES, (end - c + K::COLUMNS / LANES - 1) / (K::COLUMNS / LANES));
            auto* packed = panel + K::template offset<P>(c) + i;
            if (rows == LANES) {
                UNROLL for (int k = 0; k < LANES; k++) K::template store_packed<P>(packed, k, x[k]);
            } else {
                for (int k = 0; k < rows; k++) K::template store_packed<P>(packed, k, x[k]);
            }
        }
}

// Transposes the sums [rows][P] of a panel and stores them, scaled and with the bias, in the columns of y from `top` on.
template <class K, class T, int P> static void store_panel(const Product& p, const Panel& panel, int64_t top, int64_t rows) {
    typedef std::conditional_t<K::IS_SCALED, float, T> Bias;
    const Slice& slice = panel.slice;
    for (int64_t i = 0; i < slice.count; i += LANES) {
        for (int64_t r = 0; r < rows; r += LANES) {
            const int64_t count = std::min<int64_t>(LANES, rows - r), inputs = std::min<int64_t>(LANES, slice.count - i);
            const F<LANES> bias = p.bias ? load_floats<LANES>(Padded<LANES, Bias>((const Bias*)p.bias + top + r, count).all) : F<LANES>{};
            F<LANES> x[LANES];
            UNROLL for (int k = 0; k < LANES; k++) x[k] = load<F<LANES>>(panel.sums + (r + k) * P + i);
            transpose(x);
            if constexpr (K::IS_SCALED) {
                const F<LANES> scale = load<F<LANES>>(Padded<LANES, float>(p.weight_scale + top + r, count).all);
                for (int k = 0; k < inputs; k++) x[k] = scaled<LANES>((I<LANES>)x[k], scale * p.input_scale[slice.first + i + k]);
            }
            T* y = (T*)p.y + (slice.first + i) * p.rows + top + r;
            if (count == LANES && inputs == LANES) {
                UNROLL for (int k = 0; k < LANES; k++) store_floats<LANES>(y + k * p.rows, x[k] + bias);
            } else {
                for (int k = 0; k < inputs; k++) store_floats<LANES>(y + k * p.rows, x[k] + bias, count);
            }
        }
    }
}

// The product of kept blocks of a band with a panel of NV vectors of L rows of x.
template <class K, int L, int NV, bool SINGLE> struct PanelProduct {
    // rows of a tile; bands that are taller than TILE_ROWS rarely meet the narrowest panel, since a gemv takes so few rows of x
    static const int P = L * NV, MAX_ROWS = NV == 1 && (L > 4 || LANES == 4) ? ACCUMULATORS : TILE_ROWS;
    typedef void (*MicroKernel)(const TileInput<K>&);

    template <int... MR> static MicroKernel kernel_for(int64_t rows, std::integer_sequence<int, MR...>) {
        static const MicroKernel kernels[] = {micro_kernel<K, L, NV, MR + 1, SINGLE>...};
        return rows <= TILE_ROWS ? kernels[rows - 1] : micro_kernel<K, L, NV, MAX_ROWS, SINGLE>;
    }

    static void multiply(TileInput<K> input) {  // all rows of a band, in tiles of about the same number of rows
        const int height = (int)input.height, tiles = height % MAX_ROWS ? (height + TILE_ROWS - 1) / TILE_ROWS : height / MAX_ROWS;
        const auto *w = input.w, *last = input.last;
        const int32_t* offsets = input.offsets;
        float* sums = input.sums;
        input.panel += K::template offset<P>(input.origin);
        for (int t = 0, top = 0, bottom; t < tiles; t++, top = bottom) {
            bottom = height * (t + 1) / tiles;
            input.w = w + K::GROUP * top, input.last = last ? last + top : nullptr, input.sums = sums + top * P;
            input.offsets = offsets + top;
            kernel_for(bottom - top, std::make_integer_sequence<int, TILE_ROWS>())(input);
        }
        if constexpr (K::GROUP == 4)
            for (int64_t i = 0; i < input.remainder_count; i++) {
                const Remainder& remainder = input.remainders[i];
                I<L> acc[1][NV];
                float* to = sums + remainder.row * P;
                UNROLL for (int v = 0; v < NV; v++) acc[0][v] = load<I<L>>(to + v * L);
                const uint32_t* x = input.panel + K::template offset<P>(remainder.column);
                K::template pair<L>(acc, x, x, (const int8_t*)&remainder.word);
                UNROLL for (int v = 0; v < NV; v++) store(to + v * L, acc[0][v]);
            }
    }

    static void store_output(const Product& p, const Panel& panel, int64_t top, int64_t rows) {
        if constexpr (!K::IS_SCALED) store_panel<K, typename K::Number, P>(p, panel, top, rows);
        else if (p.is_bf16) store_panel<K, uint16_t, P>(p, panel, top, rows);
        else store_panel<K, float, P>(p, panel, top, rows);
    }
};

// Calls action(product) with the PanelProduct of panels of some rows.
template <class K, bool SINGLE, class Action> INLINE void with_panel_product(int64_t panel_rows, Action action) {
    if (panel_rows == LANES * PANEL_VECTORS) return action(PanelProduct<K, LANES, PANEL_VECTORS, SINGLE>());
    if constexpr (PANEL_VECTORS > 2)
        if (panel_rows == LANES * 2) return action(PanelProduct<K, LANES, 2, SINGLE>());
    if constexpr (LANES > 8 && K::MIN_PANEL < LANES)
        if (panel_rows == LANES / 2) return action(PanelProduct<K, LANES / 2, 1, SINGLE>());
    if constexpr (LANES > 4 && K::MIN_PANEL < LANES)
        if (panel_rows == 4) return action(PanelProduct<K, 4, 1, SINGLE>());
    action(PanelProduct<K, LANES, 1, SINGLE>());
}

// A band times all panels: its kept blocks that start in some columns. The sums of the band start at row `top` of the sums of each panel.
template <class K, bool SINGLE> struct BandProduct {
    typedef typename K::Number T;
    const Product& p;
    const Panel* panels;
    int64_t panel_count, band, top;
    void* scratch;

    const int64_t height = p.height_of(band), blocks = p.crow[band + 1] - p.crow[band];
    const int32_t* col = p.col + p.crow[band];
    const T* values = (const T*)p.values + p.start(band);
    const int64_t last_block = blocks ? col[blocks - 1] * p.width : 0;
    // kept columns outside of whole blocks, or of whole pairs of columns
    const int64_t tail = SINGLE ? blocks & 1 : blocks && last_block + p.width > p.cols ? p.cols - last_block : 0;
    const int64_t per_item = SINGLE ? 2 : 1, count = SINGLE ? blocks / 2 : blocks - (tail > 0), weights = height * per_item * p.width;

    void multiply_panels(TileInput<K>& input) const {
        for (int64_t i = 0; i < panel_count; i++) {
            const Panel& panel = panels[i];
            input.panel = (const typename K::Packed*)panel.packed, input.sums = panel.sums + top * panel.slice.panel;
            with_panel_product<K, SINGLE>(panel.slice.panel, [&](auto product) { product.multiply(input); });
        }
    }
    // The columns of remainders are counted among those of the part at first.
    void add_offsets(TileInput<K>& input) const {
        if constexpr (K::GROUP == 4) {
            auto* quads = (typename K::Weights*)scratch;
            for (int64_t i = 0; i < quads->remainder_count; i++) {
                int32_t& column = quads->remainders[i].column;
                const int32_t width = (int32_t)input.width, block = column / width;
                column += (input.col[block] - block) * width;
            }
            input.offsets = quads->offsets(), input.remainders = quads->remainders, input.remainder_count = quads->remainder_count;
        }
    }
    void multiply(const Range& columns) const {
        const bool is_last = columns.end >= p.cols;
        const auto first_item = [&](int64_t column) { return first_after(col, per_item, count, p.width, column); };
        const int64_t begin = columns.begin ? first_item(columns.begin) : 0, end = is_last ? count : first_item(columns.end);
        // several tiles and all panels read the weights: they are read in parts, which stay in the cache
        const int64_t step = std::max<int64_t>(1, CACHED_BYTES / (weights * (int64_t)sizeof(typename K::Weight)));
        TileInput<K> input = {nullptr, nullptr, nullptr, 0, p.width, height, nullptr, nullptr, 0, 0, false, nullptr};
        for (int64_t j = begin; j < end; j += step) {
            input.count = std::min(step, end - j), input.first = j == 0, input.col = col + per_item * j;
            input.w = K::weights(values + j * weights, input.count * per_item * p.width, height, scratch);
            add_offsets(input);
            multiply_panels(input);
        }
        if (is_last && tail) multiply_tail(input);
        if (is_last && !blocks)
            for (int64_t i = 0; i < panel_count; i++)
                std::memset(panels[i].sums + top * panels[i].slice.panel, 0, height * panels[i].slice.panel * sizeof(float));
    }
    void multiply_tail(TileInput<K>& input) const {
        static const int32_t zero = 0;
        const int64_t columns = SINGLE ? 1 : tail, pairs = K::GROUP == 4 ? (columns + 3) / 4 : columns / 2;
        input.first = count == 0, input.col = &zero, input.count = pairs > 0, input.width = K::GROUP * pairs;
        input.origin = SINGLE ? 0 : last_block;
        input.w = K::weights(values + count * weights, columns, height, scratch);
        add_offsets(input);
        if (K::GROUP == 2 && columns & 1) input.last = input.w + 2 * pairs * height, input.last_col = SINGLE ? col[blocks - 1] : columns - 1;
        multiply_panels(input);
    }
};

template <class K, bool SINGLE>
static void gemm(const Product& p, const Panel* panels, int64_t count, const Range& bands, const Range& columns, void* scratch) {
    int64_t rows = 0;
    for (int64_t band = bands.begin; band < bands.end; rows += p.height_of(band++))
        BandProduct<K, SINGLE>{p, panels, count, band, rows, scratch}.multiply(columns);
    if (columns.end < p.cols) return;
    for (int64_t i = 0; i < count; i++)
        with_panel_product<K, SINGLE>(panels[i].slice.panel,
                                      [&](auto product) { product.store_output(p, panels[i], bands.begin * p.height, rows); });
}
