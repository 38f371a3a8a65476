// The kernels of the gradients. Included once for each instruction set, in its namespace, after gemm.h. Where some columns of a band are
// passed, their number is even unless the last of them is the odd last one of the band, and W is stored as spmm.h says.

static const int PACKED_INPUTS = 2 * LANES;

template <class T>
static void pack_columns(const Matrix& x, int64_t first, int64_t count, const Range& columns, float* to, int64_t pitch) {
    const T zeros[LANES] = {};
    for (int64_t c = columns.begin; c < columns.end; c += LANES) {
        const int64_t many = std::min<int64_t>(LANES, columns.end - c);
        for (int64_t i = 0; i < round_up(count, PACKED_INPUTS); i += LANES) {
            F<LANES> rows[LANES];
            const T* row = (const T*)x.numbers + (first + i) * x.width + c;
            for (int k = 0; k < LANES; k++) {
                const T* from = i + k < count ? row + k * x.width : zeros;
                rows[k] = many == LANES ? load_floats<LANES>(from) : load_floats<LANES>(Padded<LANES, T>(from, many).all);
            }
            transpose(rows);
            for (int k = 0; k < many; k++) store(to + (c - columns.begin + k) * pitch + i, rows[k]);
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

template <class T> static void pack_rows(const Gradient& g, int64_t first, int64_t count, const RowTile& tile, float* to) {
    const T* row = (const T*)g.dy + first * g.rows + tile.band * g.height + tile.first;
    const bool is_whole = tile.rows == TALLEST_TILE;
    for (int64_t i = 0; i < count; i++, row += g.rows, to += tile.lanes) {
        if (is_whole) {
            UNROLL for (int64_t r = 0; r < TALLEST_TILE; r += LANES) store(to + r, load_floats<LANES>(row + r));
        } else {
            for (int64_t r = 0; r < tile.lanes; r++) to[r] = r < tile.rows ? load_float(row + r) : 0.0f;
        }
    }
}

template <class T> static const float* widen(const void* values, int64_t first, int64_t count, float* scratch) {
    const T* from = (const T*)values + first;
    if constexpr (sizeof(T) == sizeof(float)) return from;
    for (int64_t i = 0; i < count; i++) scratch[i] = load_float(from + i);
    return scratch;
}

// MC columns of dx, whose weights lie in pairs, or a single column; the weights of two rows are `step` apart.
template <int NV, int MC>
static void add_columns(float* const* columns, const float* w, int64_t step, const float* dy, int64_t height, int64_t pitch, int64_t n) {
    float* to[MC];
    UNROLL for (int m = 0; m < MC; m++) to[m] = columns[m];
    for (int64_t i = 0; i < n; i += NV * LANES) {
        F<LANES> acc[MC][NV];
        UNROLL for (int m = 0; m < MC; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] = load<F<LANES>>(to[m] + i + v * LANES);
        const float *row = dy + i, *weights = w;
        int64_t r = 0;
        do {
            F<LANES> x[NV];
            UNROLL for (int v = 0; v < NV; v++) {
                x[v] = load<F<LANES>>(row + v * LANES);
                IN_REGISTER(x[v]);
            }
            UNROLL for (int m = 0; m < MC; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] += x[v] * weights[m / 2 * 2 * height + m % 2];
            row += pitch, weights += step;
        } while (++r < height);
        UNROLL for (int m = 0; m < MC; m++) UNROLL for (int v = 0; v < NV; v++) store(to[m] + i + v * LANES, acc[m][v]);
    }
}

static void add_to_inputs(float* const* columns, int64_t count, const float* weights, int64_t step, const float* dy, int64_t height,
                          int64_t pitch, int64_t n) {
    constexpr int NV = PACKED_INPUTS / LANES, MC = LANES == 16 ? 8 : 6;
    int64_t k = 0;
    for (; k + MC <= count; k += MC) add_columns<NV, MC>(columns + k, weights + k * height, 2, dy, height, pitch, n);
    for (; k + 4 <= count; k += 4) add_columns<NV, 4>(columns + k, weights + k * height, 2, dy, height, pitch, n);
    for (; k + 2 <= count; k += 2) add_columns<NV, 2>(columns + k, weights + k * height, 2, dy, height, pitch, n);
    if (k < count) add_columns<NV, 1>(columns + k, weights + k * height, step, dy, height, pitch, n);
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
template <int L, int NV, int MC>
static void add_tile(const float* const* columns, const float* dy, int64_t n, int64_t rows, int64_t height, float* out, bool add) {
    F<L> acc[MC][NV];
    const float* x[MC];
    UNROLL for (int m = 0; m < MC; m++) {
        x[m] = columns[m];
        UNROLL for (int v = 0; v < NV; v++) acc[m][v] = F<L>{};
    }
    for (int64_t i = 0; i < n; i++, dy += L * NV) {
        F<L> row[NV];
        UNROLL for (int v = 0; v < NV; v++) {
            row[v] = load<F<L>>(dy + v * L);
            IN_REGISTER(row[v]);
        }
        UNROLL for (int m = 0; m < MC; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] += row[v] * x[m][i];
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

template <int L, int NV, int MC>
static void add_tiles(const float* const* columns, int64_t count, const float* dy, int64_t n, const RowTile& tile, int64_t height, float* out,
                      bool add) {
    int64_t k = 0;
    float* pairs = out + 2 * tile.first;
    for (; k + MC <= count; k += MC) add_tile<L, NV, MC>(columns + k, dy, n, tile.rows, height, pairs + k * height, add);
    if constexpr (MC > 4)
        for (; k + 4 <= count; k += 4) add_tile<L, NV, 4>(columns + k, dy, n, tile.rows, height, pairs + k * height, add);
    for (; k + 2 <= count; k += 2) add_tile<L, NV, 2>(columns + k, dy, n, tile.rows, height, pairs + k * height, add);
    if (k < count) add_tile<L, NV, 1>(columns + k, dy, n, tile.rows, height, out + k * height + tile.first, add);
}

static void add_to_weights(const float* const* columns, int64_t count, const float* dy, int64_t n, const RowTile& tile, int64_t height,
                           float* out, bool add) {
    if (tile.lanes == 4) return add_tiles<4, 1, 8>(columns, count, dy, n, tile, height, out, add);
    if (tile.lanes == 8) return add_tiles<LANES == 4 ? 4 : 8, LANES == 4 ? 2 : 1, LANES == 4 ? 4 : 8>(columns, count, dy, n, tile, height, out, add);
    add_tiles<LANES, 16 / LANES, LANES == 16 ? 8 : LANES == 8 ? 6 : 2>(columns, count, dy, n, tile, height, out, add);
}

template <class T> static GradientKernels gradient_kernels() {
    return {PACKED_INPUTS, pack_columns<T>, unpack_columns<T>, pack_rows<T>, widen<T>, add_to_inputs, add_to_weights};
}
