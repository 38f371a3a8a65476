// Optimal Brain Surgeon over the blocks of one band, for one instruction set; metric/optimal_brain_surgeon.py says what it computes. The
// file is included once for each instruction set, inside its namespace and with its target switched on. The includer defines VECTOR_BYTES
// (0 without vectors), TILE_VECTORS and DOWNDATE_ROWS.
//
// A removal takes V^T V off the inverse Hessian, where V has a row for each input of the removed block. These products wait until there
// are enough rows of V for an efficient matrix product, a downdate. The weights and the diagonal blocks of the inverse decide which block
// is removed next, so they are updated at each step. A downdate also moves the last blocks to the places of the removed ones, so that the
// work shrinks.

template <class T> struct VectorOf {
#if VECTOR_BYTES
    typedef T type __attribute__((vector_size(VECTOR_BYTES)));
    typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
#else
    typedef T type, unaligned;
#endif
};
template <class T> using Vec = typename VectorOf<T>::type;
template <class T> constexpr int64_t LANES = sizeof(Vec<T>) / sizeof(T);
template <class T> constexpr int64_t PANEL = TILE_VECTORS * LANES<T>;  // columns of a tile of a downdate

const int64_t WAITING_ROWS = 32;  // rows of V that wait for a downdate

template <class T> INLINE Vec<T> load(const T* p) { return *(const typename VectorOf<T>::unaligned*)p; }
template <class T> INLINE void store(T* p, const Vec<T>& x) { *(typename VectorOf<T>::unaligned*)p = x; }
template <class T> INLINE T sum_of(const Vec<T>& x) {
    T lanes[LANES<T>], sum = 0;
    std::memcpy(lanes, &x, sizeof(x));
    for (T lane : lanes) sum += lane;
    return sum;
}

template <int N> struct Constant {
    static constexpr int value = N;
};

// acc[i][v] -= sum over q of a[q][i] b[q][v]: the micro-kernel, on a tile of accumulators
template <class T, int ROWS, int VECTORS>
INLINE void multiply(Vec<T> (&acc)[ROWS][VECTORS], const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth) {
    for (int64_t q = 0; q < depth; q++, a += lda, b += ldb) {
        Vec<T> x[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) x[v] = load(b + v * LANES<T>);
        UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int v = 0; v < VECTORS; v++) acc[i][v] -= x[v] * a[i];
    }
}
template <class T, int ROWS, int VECTORS> INLINE void load_tile(Vec<T> (&acc)[ROWS][VECTORS], const T* p, int64_t ld) {
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int v = 0; v < VECTORS; v++) acc[i][v] = load(p + i * ld + v * LANES<T>);
}
template <class T, int ROWS, int VECTORS> INLINE void store_tile(const Vec<T> (&acc)[ROWS][VECTORS], T* p, int64_t ld) {
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int v = 0; v < VECTORS; v++) store(p + i * ld + v * LANES<T>, acc[i][v]);
}

// Calls body(vectors, column) for strips of up to MOST vectors, a constant, that cover the columns [begin, end).
template <class T, int MOST, class Body> INLINE void for_strips(int64_t begin, int64_t end, Body body) {
    for (; begin + (MOST - 1) * LANES<T> < end; begin += MOST * LANES<T>) body(Constant<MOST>(), begin);
    if constexpr (MOST > 1) for_strips<T, (MOST + 1) / 2>(begin, end, body);
}
// Vectors of a tile of some rows: enough accumulators to hide the latency of a multiplication, few enough for the registers.
constexpr int tile_vectors(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : TILE_VECTORS; }

// Calls body(rows, i) for panels of up to four rows, a constant, that cover n rows, as long as it returns true.
template <class Body> INLINE bool for_panels(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        if (!body(Constant<4>(), i)) return false;
    if (n - i == 3) return body(Constant<3>(), i);
    if (n - i == 2) return body(Constant<2>(), i);
    return n == i || body(Constant<1>(), i);
}

// A small upper triangle R
template <class T, int N> struct Triangle {
    T reciprocal[N];  // of the diagonal
    T above[N][N];    // the diagonal

    // R of A = R^T R; false if A is not positive definite
    ALWAYS_INLINE bool factorize(const T* a, int64_t lda) {
        T x[N][N];
        UNROLL for (int i = 0; i < N; i++) UNROLL for (int j = i; j < N; j++) x[i][j] = a[i * lda + j];
        UNROLL for (int q = 0; q < N; q++) {
            if (!(x[q][q] > 0)) return false;
            reciprocal[q] = 1 / std::sqrt(x[q][q]);
            UNROLL for (int j = q + 1; j < N; j++) above[q][j] = x[q][j] * reciprocal[q];
            UNROLL for (int i = q + 1; i < N; i++) UNROLL for (int j = i; j < N; j++) x[i][j] -= above[q][i] * above[q][j];
        }
        return true;
    }
    ALWAYS_INLINE void read(const T* r, int64_t ldr) {
        UNROLL for (int i = 0; i < N; i++) {
            reciprocal[i] = 1 / r[i * ldr + i];
            UNROLL for (int j = i + 1; j < N; j++) above[i][j] = r[i * ldr + j];
        }
    }
    // acc -> R^-T acc
    template <int VECTORS> ALWAYS_INLINE void solve(Vec<T> (&acc)[N][VECTORS]) const {
        UNROLL for (int i = 0; i < N; i++) {
            UNROLL for (int q = 0; q < i; q++) UNROLL for (int v = 0; v < VECTORS; v++) acc[i][v] -= acc[q][v] * above[q][i];
            UNROLL for (int v = 0; v < VECTORS; v++) acc[i][v] *= reciprocal[i];
        }
    }
};

// v[i] = p[i], p[i + N], p[i + 2 N] ...
template <class T, int N> INLINE void load_interleaved(Vec<T> (&v)[N], const T* p) {
    T columns[N][LANES<T>];
    for (int64_t lane = 0; lane < LANES<T>; lane++)
        for (int i = 0; i < N; i++) columns[i][lane] = p[lane * N + i];
    for (int i = 0; i < N; i++) v[i] = load(columns[i]);
}
// Whether the lanes are positive, except for those of empty slots.
template <class T> INLINE bool all_positive(const Vec<T>& x, const Vec<T>& empty) {
    T lanes[LANES<T>], gone[LANES<T>];
    std::memcpy(lanes, &x, sizeof(x));
    std::memcpy(gone, &empty, sizeof(x));
    bool all = true;
    for (int64_t lane = 0; lane < LANES<T>; lane++) all &= lanes[lane] > 0 || gone[lane] > 0;
    return all;
}

// [A | Y] with A [n][n], of which the upper half is given -> [R | R^-T Y] with A = R^T R; false if A is not positive definite. The columns
// of both parts are padded to whole vectors.
template <class T> static bool eliminate(const T* in, T* out, int64_t ld, int64_t n) {
    return for_panels(n, [=](auto panel_rows, int64_t i) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(panel_rows)::value, VECTORS = (ROWS + LANES<T> - 1) / LANES<T>;
        const int64_t first = i / LANES<T> * LANES<T>;
        Triangle<T, ROWS> diagonal;
        Vec<T> tile[ROWS][VECTORS];
        load_tile<T>(tile, in + i * ld + first, ld);
        multiply<T>(tile, out + i, ld, out + first, ld, i);
        store_tile<T>(tile, out + i * ld + first, ld);
        if (!diagonal.factorize(out + i * ld + i, ld)) return false;
        diagonal.solve(tile);
        store_tile<T>(tile, out + i * ld + first, ld);
        for_strips<T, tile_vectors(ROWS)>(first + VECTORS * LANES<T>, ld, [=](auto vectors, int64_t c) __attribute__((always_inline)) {
            Vec<T> acc[ROWS][decltype(vectors)::value];
            load_tile<T>(acc, in + i * ld + c, ld);
            multiply<T>(acc, out + i, ld, out + c, ld, i);
            diagonal.solve(acc);
            store_tile<T>(acc, out + i * ld + c, ld);
        });
        return true;
    });
}

// c [rows][cols] -= a^T b with a [depth][rows] and b [depth][cols]; `upper`: from the diagonal on. Columns are padded to whole vectors.
template <class T>
static void subtract_product(T* c, int64_t ldc, int64_t rows, int64_t cols, bool upper, const T* a, int64_t lda, const T* b, int64_t ldb,
                             int64_t depth) {
    for_panels(rows, [=](auto panel_rows, int64_t i) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(panel_rows)::value;
        const int64_t first = upper ? i / LANES<T> * LANES<T> : 0;
        for_strips<T, tile_vectors(ROWS)>(first, cols, [=](auto vectors, int64_t j) __attribute__((always_inline)) {
            Vec<T> acc[ROWS][decltype(vectors)::value];
            load_tile<T>(acc, c + i * ldc + j, ldc);
            multiply<T>(acc, a + i, lda, b + j, ldb, depth);
            store_tile<T>(acc, c + i * ldc + j, ldc);
        });
        return true;
    });
}

// How the numbers of a band lie in its scratch buffers. Rows are padded, so that whole vectors can be read and written.
template <class T> struct Layout {
    int64_t n, m, k;
    int64_t slots;    // blocks, rounded up to whole vectors
    int64_t ld;       // leading dimension of the inverse and of V
    int64_t max_waiting;  // removed blocks whose rows of V wait for a downdate
    // A factor is [n][ld_factor]: R of a diagonal block of the inverse and, from column factor_weights on, R^-T of the block's weights.
    int64_t factor_weights, ld_factor;
    // A block is [n][ld_block]: the diagonal block itself and, from column block_weights on, the weights. As many small blocks as a
    // vector has lanes are interleaved number by number; of larger ones each lies by itself.
    int64_t interleaved, block_weights, ld_block;

    explicit Layout(const BandShape& shape) : n(shape.n), m(shape.m), k(shape.k) {
        slots = round_up(shape.blocks(), LANES<T>);
        // a power of two would put the numbers of a column into the same few cache sets
        ld = round_up(std::max(k, slots * n), PANEL<T>) + 64 / (int64_t)sizeof(T);
        max_waiting = std::max<int64_t>(1, WAITING_ROWS / n);
        factor_weights = round_up(n, LANES<T>);
        ld_factor = factor_weights + round_up(m, LANES<T>);
        const bool small = n == 1 || n == 2 || n == 4 || n == 8;
        interleaved = small ? LANES<T> : 1;
        block_weights = small ? n : factor_weights;
        ld_block = small ? n + m : ld_factor;
    }
    int64_t start(int64_t slot) const { return slot / interleaved * interleaved * n * ld_block + slot % interleaved; }
};

template <class T> static SweepSizes sweep_sizes(const BandShape& shape) {
    const Layout<T> layout(shape);
    const int64_t padded = round_up(layout.k, PANEL<T>), rows = layout.max_waiting * layout.n, factor = layout.n * layout.ld_factor;
    const int64_t blocks = layout.slots * layout.n * layout.ld_block;
    return {{padded * layout.ld, rows * layout.ld, padded * rows, blocks, factor, factor, 2 * layout.slots}, 2 * layout.slots};
}

// Blocks are kept in slots, one after another: block columns of the inverse and of V, and places in `blocks`.
template <class T> struct State {
    const Layout<T> layout;
    T* const inverse;        // [k][ld] the upper half of the inverse, less V^T V of the rows of V that wait
    T* const v;              // [max_waiting * n][ld]
    T* const packed;         // [panels][max_waiting * n][PANEL] V as a downdate reads it
    T* const blocks;         // the diagonal blocks of the inverse, and weights
    T* const factor;         // of the block that is removed
    T* const trial;          // the factor of a block that is scored
    T* const scores;         // [slots] what the removal of each block would add to the error; infinity for an empty slot
    T* const empty;          // [slots] infinity for an empty slot, else 0
    int64_t* const ids;      // [slots] which block it is
    int64_t* const removed;  // [max_waiting] slots of the removed blocks whose rows of V wait
    int64_t used, waiting;   // slots in use, and removed blocks among them
};

template <class T> static State<T> initial_state(const BandShape& shape, const Band<T>& band, const SweepScratch<T>& scratch) {
    const Layout<T> layout(shape);
    T* const* buffers = scratch.buffers;
    T *scores = buffers[SCORES], *empty = scores + layout.slots;
    int64_t *ids = scratch.ids, *removed = ids + layout.slots;
    const State<T> state = {layout, buffers[INVERSE], buffers[ROWS_OF_V], buffers[PACKED_V], buffers[BLOCKS], buffers[FACTOR],
                            buffers[TRIAL], scores, empty, ids, removed, shape.blocks(), 0};
    const SweepSizes sizes = sweep_sizes<T>(shape);
    for (int i = 0; i < BUFFER_COUNT; i++)
        if (i != INVERSE && i != PACKED_V) std::memset(buffers[i], 0, sizes.numbers[i] * sizeof(T));
    const int64_t k = layout.k, n = layout.n, m = layout.m, padded = round_up(k, PANEL<T>);
    for (int64_t r = 0; r < padded; r++) {
        const int64_t first = std::min(r / n * n, r / PANEL<T> * PANEL<T>), copied = r < k ? k - first : 0;
        T* row = state.inverse + r * layout.ld;
        if (copied) std::memcpy(row + first, band.inverse + r * k + first, copied * sizeof(T));
        std::memset(row + first + copied, 0, (layout.ld - first - copied) * sizeof(T));
    }
    for (int64_t slot = 0; slot < layout.slots; slot++) {
        state.ids[slot] = slot;
        state.scores[slot] = state.empty[slot] = slot < state.used ? 0 : std::numeric_limits<T>::infinity();
        if (slot >= state.used) continue;
        T* block = state.blocks + layout.start(slot);
        for (int64_t q = 0; q < n; q++, block += layout.ld_block * layout.interleaved) {
            for (int64_t c = 0; c < n; c++) block[c * layout.interleaved] = band.inverse[(slot * n + q) * k + slot * n + c];
            for (int64_t i = 0; i < m; i++) block[(layout.block_weights + i) * layout.interleaved] = band.weights[(slot * n + q) * m + i];
        }
    }
    return state;
}

// What the removal of a block adds to the error: the sum of the squares of R^-T w.
template <class T> static T added_error(const Layout<T>& layout, const T* factor) {
    Vec<T> sum = {};
    for (int64_t q = 0; q < layout.n; q++)
        for (int64_t c = layout.factor_weights; c < layout.ld_factor; c += LANES<T>) {
            const Vec<T> y = load(factor + q * layout.ld_factor + c);
            sum += y * y;
        }
    return sum_of<T>(sum);
}

// Updates the diagonal blocks and the weights after a removal, by its rows of V, and scores the blocks. `rows` is null before the first
// removal. Returns false if a block is not positive definite.
template <class T> static bool update_blocks(const State<T>& state, const T* rows) {
    const Layout<T>& layout = state.layout;
    const int64_t n = layout.n;
    const T* y = state.factor + layout.factor_weights;
    for (int64_t slot = 0; slot < state.used; slot++) {
        if (state.empty[slot] > 0) continue;
        T* block = state.blocks + layout.start(slot);
        if (rows) {
            const T* v = rows + slot * n;
            subtract_product(block, layout.ld_block, n, n, true, v, layout.ld, v, layout.ld, n);
            subtract_product(block + layout.block_weights, layout.ld_block, n, layout.m, false, v, layout.ld, y, layout.ld_factor, n);
        }
        if (!eliminate(block, state.trial, layout.ld_factor, n)) return false;
        state.scores[slot] = added_error(layout, state.trial);
    }
    return true;
}

// The same for interleaved blocks of N inputs: each lane works on one block.
template <class T, int N> static bool update_interleaved_blocks(const State<T>& state, const T* rows) {
    const Layout<T>& layout = state.layout;
    const int64_t L = LANES<T>;
    const T* y = state.factor + layout.factor_weights;
    bool definite = true;
    for (int64_t slot = 0; slot < state.used; slot += L) {
        T* block = state.blocks + layout.start(slot);
        const Vec<T> empty = load(state.empty + slot);
        Vec<T> a[N][N], v[N][N], reciprocal[N], sum = {};
        for (int i = 0; i < N; i++)
            for (int j = i; j < N; j++) a[i][j] = load(block + (i * layout.ld_block + j) * L);
        if (rows) {
            for (int q = 0; q < N; q++) load_interleaved<T, N>(v[q], rows + q * layout.ld + slot * N);
            for (int i = 0; i < N; i++)
                for (int j = i; j < N; j++) {
                    for (int q = 0; q < N; q++) a[i][j] -= v[q][i] * v[q][j];
                    store(block + (i * layout.ld_block + j) * L, a[i][j]);
                }
        }
        for (int q = 0; q < N; q++) {  // elimination without square roots; the multiples of rows that it subtracts go to the lower half
            definite &= all_positive<T>(a[q][q], empty);
            reciprocal[q] = 1 / a[q][q];
            for (int i = q + 1; i < N; i++) {
                a[i][q] = a[q][i] * reciprocal[q];
                for (int j = i; j < N; j++) a[i][j] -= a[i][q] * a[q][j];
            }
        }
        for (int64_t r = 0; r < layout.m; r++) {
            Vec<T> w[N];
            for (int i = 0; i < N; i++) {
                T* p = block + (i * layout.ld_block + N + r) * L;
                w[i] = load(p);
                if (!rows) continue;
                for (int q = 0; q < N; q++) w[i] -= v[q][i] * y[q * layout.ld_factor + r];
                store(p, w[i]);
            }
            for (int q = 0; q < N; q++) {
                for (int i = q + 1; i < N; i++) w[i] -= a[i][q] * w[q];
                sum += w[q] * w[q] * reciprocal[q];
            }
        }
        store(state.scores + slot, empty > Vec<T>{} ? empty : sum);
    }
    return definite;
}

// The slot of the block whose removal adds least to the error; the first block of several that add the same.
template <class T> static int64_t cheapest_slot(const State<T>& state) {
    Vec<T> least = load(state.scores);
    for (int64_t slot = LANES<T>; slot < state.used; slot += LANES<T>) {
        const Vec<T> x = load(state.scores + slot);
        least = x < least ? x : least;
    }
    T lanes[LANES<T>];
    std::memcpy(lanes, &least, sizeof(least));
    const T score = *std::min_element(lanes, lanes + LANES<T>);
    int64_t best = -1;
    for (int64_t slot = 0; slot < state.used; slot++)
        if (!(state.scores[slot] > score) && !(state.empty[slot] > 0) && (best < 0 || state.ids[slot] < state.ids[best])) best = slot;
    return best;
}

// Stores [R | R^-T w] of a block in state.factor.
template <class T> static bool factorize(const State<T>& state, int64_t slot) {
    const Layout<T>& layout = state.layout;
    const T* block = state.blocks + layout.start(slot);
    for (int64_t q = 0; q < layout.n; q++, block += layout.ld_block * layout.interleaved) {
        T* row = state.factor + q * layout.ld_factor;
        for (int64_t c = 0; c < layout.n; c++) row[c] = block[c * layout.interleaved];
        for (int64_t i = 0; i < layout.m; i++) row[layout.factor_weights + i] = block[(layout.block_weights + i) * layout.interleaved];
    }
    return eliminate(state.factor, state.factor, layout.ld_factor, layout.n);
}

// The rows of V of a block: R^-T times its rows of the inverse.
template <class T> static void compute_v(const State<T>& state, int64_t slot, T* rows) {
    const Layout<T>& layout = state.layout;
    const int64_t n = layout.n, ld = layout.ld, first = slot * n, width = state.used * n;
    for (int64_t c = 0; c < first; c++)
        for (int64_t q = 0; q < n; q++) rows[q * ld + c] = state.inverse[c * ld + first + q];
    for (int64_t q = 0; q < n; q++) {
        for (int64_t c = 0; c < q; c++) rows[q * ld + first + c] = state.inverse[(first + c) * ld + first + q];
        std::memcpy(rows + q * ld + first + q, state.inverse + (first + q) * ld + first + q, (width - first - q) * sizeof(T));
    }
    for_panels(n, [&](auto panel_rows, int64_t i) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(panel_rows)::value;
        Triangle<T, ROWS> diagonal;
        diagonal.read(state.factor + i * layout.ld_factor + i, layout.ld_factor);
        for_strips<T, tile_vectors(ROWS)>(0, width, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
            Vec<T> acc[ROWS][decltype(vectors)::value];
            load_tile<T>(acc, rows + i * ld + c, ld);
            multiply<T>(acc, state.v + first + i, ld, state.v + c, ld, state.waiting * n);
            multiply<T>(acc, state.factor + i, layout.ld_factor, rows + c, ld, i);
            diagonal.solve(acc);
            store_tile<T>(acc, rows + i * ld + c, ld);
        });
        return true;
    });
}

// The slots from `left` on are given up: the blocks in slots from[i] move to slots to[i]. Both lists rise.
struct Moves {
    int64_t left, count;
    const int64_t *from, *to;
};

// Moves what rows [begin, end) of the inverse hold of these blocks. A column that would come to lie below the diagonal becomes a row above
// it. N is n, or 0 where n is only known at run time.
template <class T, int N> static void move_blocks(const State<T>& state, const Moves& moves, int64_t begin, int64_t end) {
    const int64_t n = N ? N : state.layout.n, ld = state.layout.ld, *from = moves.from, *to = moves.to;
    int64_t i = 0;
    for (int64_t r = begin; r < end; r++) {
        const int64_t slot = r / n;
        if (state.empty[slot] > 0) continue;
        const T* row = state.inverse + r * ld;
        T* target = state.inverse + r * ld;
        if (slot < moves.left) {
            for (; i < moves.count && to[i] < slot; i++) {}
            for (int64_t j = 0; j < i; j++)
                for (int64_t c = 0; c < n; c++) state.inverse[(to[j] * n + c) * ld + r] = row[from[j] * n + c];
        } else {
            for (i = 0; from[i] < slot; i++) {}
            target = state.inverse + (to[i] * n + r % n) * ld;
        }
        for (int64_t j = i; j < moves.count; j++)
            for (int64_t c = 0; c < n; c++) target[to[j] * n + c] = row[from[j] * n + c];
    }
}

// Subtracts the waiting products from the upper half of the inverse, and moves the last blocks to the slots of the removed ones.
template <class T> static void downdate(State<T>& state) {
    const Layout<T>& layout = state.layout;
    const int64_t n = layout.n, ld = layout.ld, width = state.used * n, depth = state.waiting * n;
    for (int64_t c = 0; c < width; c += PANEL<T>) {
        T* panel = state.packed + c * depth;
        for (int64_t q = 0; q < depth; q++) std::memcpy(panel + q * PANEL<T>, state.v + q * ld + c, PANEL<T> * sizeof(T));
    }
    int64_t *to = state.removed, from[WAITING_ROWS];
    for (int64_t i = 1; i < state.waiting; i++)  // sorts the slots of the removed blocks
        for (int64_t j = i; j > 0 && to[j] < to[j - 1]; j--) std::swap(to[j], to[j - 1]);
    Moves moves = {state.used - state.waiting, 0, from, to};
    for (int64_t slot = moves.left; slot < state.used; slot++)
        if (!(state.empty[slot] > 0)) from[moves.count++] = slot;
    for (int64_t r = 0; r < width; r += DOWNDATE_ROWS) {
        const T* a = state.packed + r / PANEL<T> * PANEL<T> * depth + r % PANEL<T>;
        for (int64_t c = r / PANEL<T> * PANEL<T>; c < width; c += PANEL<T>) {
            Vec<T> acc[DOWNDATE_ROWS][TILE_VECTORS];
            load_tile<T>(acc, state.inverse + r * ld + c, ld);
            multiply<T>(acc, a, PANEL<T>, state.packed + c * depth, PANEL<T>, depth);
            store_tile<T>(acc, state.inverse + r * ld + c, ld);
        }
        (n == 1 ? move_blocks<T, 1> : move_blocks<T, 0>)(state, moves, r, std::min(width, r + DOWNDATE_ROWS));
    }
    for (int64_t i = 0; i < moves.count; i++) {
        const T* block = state.blocks + layout.start(from[i]);
        T* target = state.blocks + layout.start(to[i]);
        for (int64_t e = 0; e < n * layout.ld_block * layout.interleaved; e += layout.interleaved) target[e] = block[e];
        state.ids[to[i]] = state.ids[from[i]], state.scores[to[i]] = state.scores[from[i]];
        state.empty[to[i]] = 0;
    }
    for (int64_t slot = moves.left; slot < state.used; slot++) state.scores[slot] = state.empty[slot] = std::numeric_limits<T>::infinity();
    state.used = moves.left, state.waiting = 0;
}

template <class T> static bool update(const State<T>& state, const T* rows) {
    switch (state.layout.interleaved > 1 ? state.layout.n : 0) {
        case 1: return update_interleaved_blocks<T, 1>(state, rows);
        case 2: return update_interleaved_blocks<T, 2>(state, rows);
        case 4: return update_interleaved_blocks<T, 4>(state, rows);
        case 8: return update_interleaved_blocks<T, 8>(state, rows);
        default: return update_blocks<T>(state, rows);
    }
}

template <class T> static bool sweep(const BandShape& shape, const Band<T>& band, const SweepScratch<T>& scratch) {
    State<T> state = initial_state(shape, band, scratch);
    const int64_t blocks = shape.blocks(), stop = std::min(shape.stop, blocks);
    if (!update<T>(state, nullptr)) return false;
    for (int64_t done = 0; done < stop; done++) {
        if (*shape.interrupted) return true;
        const int64_t slot = cheapest_slot(state);
        band.errors[done] = state.scores[slot], band.order[done] = state.ids[slot];
        if (!factorize(state, slot)) return false;
        T* rows = state.v + state.waiting * state.layout.n * state.layout.ld;
        compute_v(state, slot, rows);
        state.scores[slot] = state.empty[slot] = std::numeric_limits<T>::infinity();
        state.removed[state.waiting++] = slot;
        if (!update<T>(state, rows)) return false;
        if (state.waiting == state.layout.max_waiting && done + 1 < stop) downdate(state);
    }
    for (int64_t slot = 0, done = stop; slot < state.used; slot++)
        if (!(state.empty[slot] > 0)) band.errors[done] = state.scores[slot], band.order[done++] = state.ids[slot];
    return true;
}
