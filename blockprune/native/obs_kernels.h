// Optimal Brain Surgeon over the blocks of one band, for one instruction set; metric/optimal_brain_surgeon.py says what it computes. The
// file is included once for each instruction set, inside its namespace and with its target switched on. The includer defines VECTOR_BYTES
// (0 without vectors), TILE_VECTORS and DOWNDATE_ROWS.
//
// A removal takes V^T V off the inverse Hessian, where V has a row for each input of the removed block. These products wait until there
// are enough rows of V for an efficient matrix product, a downdate. The weights and the diagonal blocks of the inverse decide what is
// removed next, so they are updated at each step. A downdate also moves the last blocks to the places of the removed ones: the work shrinks.

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
        for_strips<T, tile_vectors(ROWS)>(upper ? i / LANES<T> * LANES<T> : 0, cols, [=](auto vectors, int64_t j) __attribute__((always_inline)) {
            Vec<T> acc[ROWS][decltype(vectors)::value];
            load_tile<T>(acc, c + i * ldc + j, ldc);
            multiply<T>(acc, a + i, lda, b + j, ldb, depth);
            store_tile<T>(acc, c + i * ldc + j, ldc);
        });
        return true;
    });
}

// How the numbers of a band lie in its scratch buffers. A row of several buffers is padded, so that whole vectors can be read and written.
template <class T> struct Layout {
    int64_t n, m, k;
    int64_t slots;    // blocks, rounded up to whole vectors
    int64_t ld;       // leading dimension of the inverse and of V
    int64_t waiting;  // removed blocks whose rows of V wait for a downdate
    // A factor is [n][ld_factor]: a diagonal block of the inverse and, from column factor_weights on, the block's weights.
    int64_t factor_weights, ld_factor;
    // A block is [n][ld_block], likewise with the weights from column block_weights on. Of small blocks, LANES are interleaved number by
    // number, so that each lane of a vector works on one block; of others each lies by itself.
    int64_t interleaved, block_weights, ld_block;

    explicit Layout(const BandShape& shape) : n(shape.n), m(shape.m), k(shape.k) {
        slots = round_up(shape.blocks(), LANES<T>);
        // a power of two would put the numbers of a column into the same few cache sets
        ld = round_up(std::max(k, slots * n), PANEL<T>) + 64 / (int64_t)sizeof(T);
        waiting = std::max<int64_t>(1, WAITING_ROWS / n);
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
    const Layout<T> at(shape);
    const int64_t padded = round_up(at.k, PANEL<T>), rows = at.waiting * at.n, factor = at.n * at.ld_factor;
    return {{padded * at.ld, rows * at.ld, padded * rows, at.slots * at.n * at.ld_block, factor, factor, 2 * at.slots}, 2 * at.slots};
}

template <class T> struct State {
    const Layout<T> at;
    T* const inverse;      // [k][ld] the upper half of the inverse, less V^T V of the rows of V that wait
    T* const v;            // [waiting * n][ld]
    T* const packed;       // [panels][waiting * n][PANEL] V as a downdate reads it
    T* const blocks;       // in slots
    T* const factor;       // of the block that is removed
    T* const trial;        // of a block that is scored
    T* const scores;       // [slots] what the removal of each block would add to the error
    T* const empty;        // [slots] 0, or infinity for a slot without a block
    int64_t* const ids;    // [slots] the block in each slot
    int64_t* const gone;   // [slots] slots of the removed blocks whose rows of V wait
    int64_t held, waiting; // slots in use; removed blocks among them
};

template <class T> static State<T> initial_state(const BandShape& shape, const Band<T>& band, const SweepScratch<T>& scratch) {
    const Layout<T> at(shape);
    T* const* buffers = scratch.buffers;
    const State<T> s = {at, buffers[INVERSE], buffers[ROWS_OF_V], buffers[PACKED_V], buffers[BLOCKS], buffers[FACTOR], buffers[TRIAL],
                        buffers[SCORES], buffers[SCORES] + at.slots, scratch.ids, scratch.ids + at.slots, shape.blocks(), 0};
    const SweepSizes sizes = sweep_sizes<T>(shape);
    for (int i = 0; i < BUFFER_COUNT; i++)
        if (i != INVERSE && i != PACKED_V) std::memset(buffers[i], 0, sizes.numbers[i] * sizeof(T));
    const int64_t k = at.k, n = at.n, m = at.m, padded = round_up(k, PANEL<T>);
    for (int64_t r = 0; r < padded; r++) {
        const int64_t first = std::min(r / n * n, r / PANEL<T> * PANEL<T>), copied = r < k ? k - first : 0;
        T* row = s.inverse + r * at.ld;
        if (copied) std::memcpy(row + first, band.inverse + r * k + first, copied * sizeof(T));
        std::memset(row + first + copied, 0, (at.ld - first - copied) * sizeof(T));
    }
    for (int64_t slot = 0; slot < at.slots; slot++) {
        s.ids[slot] = slot;
        s.scores[slot] = s.empty[slot] = slot < s.held ? 0 : std::numeric_limits<T>::infinity();
        if (slot >= s.held) continue;
        T* block = s.blocks + at.start(slot);
        for (int64_t q = 0; q < n; q++, block += at.ld_block * at.interleaved) {
            for (int64_t c = 0; c < n; c++) block[c * at.interleaved] = band.inverse[(slot * n + q) * k + slot * n + c];
            for (int64_t i = 0; i < m; i++) block[(at.block_weights + i) * at.interleaved] = band.weights[(slot * n + q) * m + i];
        }
    }
    return s;
}

// The sum of the squares of R^-T Y.
template <class T> static T error_of(const Layout<T>& at, const T* factor) {
    Vec<T> sum = {};
    for (int64_t q = 0; q < at.n; q++)
        for (int64_t c = at.factor_weights; c < at.ld_factor; c += LANES<T>) {
            const Vec<T> y = load(factor + q * at.ld_factor + c);
            sum += y * y;
        }
    return sum_of<T>(sum);
}

// Takes what a removal changed off the blocks and their weights, and scores the blocks; `rows` of V is null before the first removal. Returns
// false if a block is not positive definite.
template <class T> static bool update_blocks(const State<T>& s, const T* rows) {
    const Layout<T>& at = s.at;
    for (int64_t slot = 0; slot < s.held; slot++) {
        if (s.empty[slot] > 0) continue;
        T* block = s.blocks + at.start(slot);
        if (rows) {
            const T* v = rows + slot * at.n;
            subtract_product(block, at.ld_block, at.n, at.n, true, v, at.ld, v, at.ld, at.n);
            subtract_product(block + at.block_weights, at.ld_block, at.n, at.m, false, v, at.ld, s.factor + at.factor_weights, at.ld_factor, at.n);
        }
        if (!eliminate(block, s.trial, at.ld_factor, at.n)) return false;
        s.scores[slot] = error_of(at, s.trial);
    }
    return true;
}

// The same for interleaved blocks of N inputs.
template <class T, int N> static bool update_interleaved_blocks(const State<T>& s, const T* rows) {
    const Layout<T>& at = s.at;
    const int64_t L = LANES<T>;
    const T* y = s.factor + at.factor_weights;
    bool definite = true;
    for (int64_t slot = 0; slot < s.held; slot += L) {
        T* block = s.blocks + at.start(slot);
        const Vec<T> empty = load(s.empty + slot);
        Vec<T> a[N][N], v[N][N], reciprocal[N], sum = {};
        for (int i = 0; i < N; i++)
            for (int j = i; j < N; j++) a[i][j] = load(block + (i * at.ld_block + j) * L);
        if (rows) {
            for (int q = 0; q < N; q++) load_interleaved<T, N>(v[q], rows + q * at.ld + slot * N);
            for (int i = 0; i < N; i++)
                for (int j = i; j < N; j++) {
                    for (int q = 0; q < N; q++) a[i][j] -= v[q][i] * v[q][j];
                    store(block + (i * at.ld_block + j) * L, a[i][j]);
                }
        }
        for (int q = 0; q < N; q++) {  // a = R^T D^-1 R with the diagonal D of R; its rows q of R^T D^-1 go to the lower half
            definite &= all_positive<T>(a[q][q], empty);
            reciprocal[q] = 1 / a[q][q];
            for (int i = q + 1; i < N; i++) {
                a[i][q] = a[q][i] * reciprocal[q];
                for (int j = i; j < N; j++) a[i][j] -= a[i][q] * a[q][j];
            }
        }
        for (int64_t r = 0; r < at.m; r++) {
            Vec<T> w[N];
            for (int i = 0; i < N; i++) {
                T* p = block + (i * at.ld_block + N + r) * L;
                w[i] = load(p);
                if (!rows) continue;
                for (int q = 0; q < N; q++) w[i] -= v[q][i] * y[q * at.ld_factor + r];
                store(p, w[i]);
            }
            for (int q = 0; q < N; q++) {
                for (int i = q + 1; i < N; i++) w[i] -= a[i][q] * w[q];
                sum += w[q] * w[q] * reciprocal[q];
            }
        }
        store(s.scores + slot, empty > Vec<T>{} ? empty : sum);
    }
    return definite;
}

// The slot of the block whose removal adds least; of several that add the same the first block of the band.
template <class T> static int64_t lowest(const State<T>& s) {
    Vec<T> least = load(s.scores);
    for (int64_t slot = LANES<T>; slot < s.held; slot += LANES<T>) {
        const Vec<T> x = load(s.scores + slot);
        least = x < least ? x : least;
    }
    T lanes[LANES<T>];
    std::memcpy(lanes, &least, sizeof(least));
    const T score = *std::min_element(lanes, lanes + LANES<T>);
    int64_t best = -1;
    for (int64_t slot = 0; slot < s.held; slot++)
        if (!(s.scores[slot] > score) && !(s.empty[slot] > 0) && (best < 0 || s.ids[slot] < s.ids[best])) best = slot;
    return best;
}

// Puts [R | R^-T w] of a block into s.factor.
template <class T> static bool factorize(const State<T>& s, int64_t slot) {
    const Layout<T>& at = s.at;
    const T* block = s.blocks + at.start(slot);
    for (int64_t q = 0; q < at.n; q++, block += at.ld_block * at.interleaved) {
        T* row = s.factor + q * at.ld_factor;
        for (int64_t c = 0; c < at.n; c++) row[c] = block[c * at.interleaved];
        for (int64_t i = 0; i < at.m; i++) row[at.factor_weights + i] = block[(at.block_weights + i) * at.interleaved];
    }
    return eliminate(s.factor, s.factor, at.ld_factor, at.n);
}

// The rows of V of a block: R^-T times its rows of the inverse.
template <class T> static void rows_of_v(const State<T>& s, int64_t slot, T* rows) {
    const Layout<T>& at = s.at;
    const int64_t n = at.n, ld = at.ld, first = slot * n, width = s.held * n;
    for (int64_t c = 0; c < first; c++)
        for (int64_t q = 0; q < n; q++) rows[q * ld + c] = s.inverse[c * ld + first + q];
    for (int64_t q = 0; q < n; q++) {
        for (int64_t c = 0; c < q; c++) rows[q * ld + first + c] = s.inverse[(first + c) * ld + first + q];
        std::memcpy(rows + q * ld + first + q, s.inverse + (first + q) * ld + first + q, (width - first - q) * sizeof(T));
    }
    for_panels(n, [&](auto panel_rows, int64_t i) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(panel_rows)::value;
        Triangle<T, ROWS> diagonal;
        diagonal.read(s.factor + i * at.ld_factor + i, at.ld_factor);
        for_strips<T, tile_vectors(ROWS)>(0, width, [&](auto vectors, int64_t c) __attribute__((always_inline)) {
            Vec<T> acc[ROWS][decltype(vectors)::value];
            load_tile<T>(acc, rows + i * ld + c, ld);
            multiply<T>(acc, s.v + first + i, ld, s.v + c, ld, s.waiting * n);
            multiply<T>(acc, s.factor + i, at.ld_factor, rows + c, ld, i);
            diagonal.solve(acc);
            store_tile<T>(acc, rows + i * ld + c, ld);
        });
        return true;
    });
}

// Moves what rows [begin, end) of the inverse hold of the blocks in slots from[i] to where it belongs when they are in slots to[i]; slots
// from `left` on are given up. Both lists rise, so that the upper half stays above the diagonal, or gets there as a column that becomes a
// row. N is the inputs of a block, or 0 where they are only known at run time.
template <class T, int N>
static void move_columns(const State<T>& s, int64_t begin, int64_t end, int64_t left, const int64_t* from, const int64_t* to, int64_t moves) {
    const int64_t n = N ? N : s.at.n, ld = s.at.ld;
    int64_t i = 0;
    for (int64_t r = begin; r < end; r++) {
        const int64_t slot = r / n;
        if (s.empty[slot] > 0) continue;
        const T* row = s.inverse + r * ld;
        T* target = s.inverse + r * ld;
        if (slot < left) {
            for (; i < moves && to[i] < slot; i++) {}
            for (int64_t j = 0; j < i; j++)
                for (int64_t c = 0; c < n; c++) s.inverse[(to[j] * n + c) * ld + r] = row[from[j] * n + c];
        } else {
            for (i = 0; from[i] < slot; i++) {}
            target = s.inverse + (to[i] * n + r % n) * ld;
        }
        for (int64_t j = i; j < moves; j++)
            for (int64_t c = 0; c < n; c++) target[to[j] * n + c] = row[from[j] * n + c];
    }
}

// Takes the waiting products off the upper half of the inverse, and moves the last blocks to the slots of the removed ones.
template <class T> static void downdate(State<T>& s) {
    const Layout<T>& at = s.at;
    const int64_t n = at.n, ld = at.ld, width = s.held * n, depth = s.waiting * n, left = s.held - s.waiting;
    for (int64_t c = 0; c < width; c += PANEL<T>)
        for (int64_t q = 0; q < depth; q++) std::memcpy(s.packed + c * depth + q * PANEL<T>, s.v + q * ld + c, PANEL<T> * sizeof(T));
    int64_t *to = s.gone, moves = 0, from[WAITING_ROWS];  // slots [left, held) are given up: block from[i] moves to slot to[i]
    for (int64_t i = 1; i < s.waiting; i++)  // in rising order
        for (int64_t j = i; j > 0 && to[j] < to[j - 1]; j--) std::swap(to[j], to[j - 1]);
    for (int64_t slot = left; slot < s.held; slot++)
        if (!(s.empty[slot] > 0)) from[moves++] = slot;
    for (int64_t r = 0; r < width; r += DOWNDATE_ROWS) {
        const T* a = s.packed + r / PANEL<T> * PANEL<T> * depth + r % PANEL<T>;
        for (int64_t c = r / PANEL<T> * PANEL<T>; c < width; c += PANEL<T>) {
            Vec<T> acc[DOWNDATE_ROWS][TILE_VECTORS];
            load_tile<T>(acc, s.inverse + r * ld + c, ld);
            multiply<T>(acc, a, PANEL<T>, s.packed + c * depth, PANEL<T>, depth);
            store_tile<T>(acc, s.inverse + r * ld + c, ld);
        }
        (n == 1 ? move_columns<T, 1> : move_columns<T, 0>)(s, r, std::min(width, r + DOWNDATE_ROWS), left, from, to, moves);
    }
    for (int64_t i = 0; i < moves; i++) {
        const T* block = s.blocks + at.start(from[i]);
        T* place = s.blocks + at.start(to[i]);
        for (int64_t e = 0; e < n * at.ld_block * at.interleaved; e += at.interleaved) place[e] = block[e];
        s.ids[to[i]] = s.ids[from[i]], s.scores[to[i]] = s.scores[from[i]];
        s.empty[to[i]] = 0;
    }
    for (int64_t slot = left; slot < s.held; slot++) s.scores[slot] = s.empty[slot] = std::numeric_limits<T>::infinity();
    s.held = left, s.waiting = 0;
}

template <class T> static bool update(const State<T>& s, const T* rows) {
    switch (s.at.interleaved > 1 ? s.at.n : 0) {
        case 1: return update_interleaved_blocks<T, 1>(s, rows);
        case 2: return update_interleaved_blocks<T, 2>(s, rows);
        case 4: return update_interleaved_blocks<T, 4>(s, rows);
        case 8: return update_interleaved_blocks<T, 8>(s, rows);
        default: return update_blocks<T>(s, rows);
    }
}

template <class T> static bool sweep(const BandShape& shape, const Band<T>& band, const SweepScratch<T>& scratch) {
    State<T> s = initial_state(shape, band, scratch);
    const int64_t blocks = shape.blocks(), stop = std::min(shape.stop, blocks);
    if (!update<T>(s, nullptr)) return false;
    for (int64_t done = 0; done < stop; done++) {
        const int64_t slot = lowest(s);
        band.errors[done] = s.scores[slot], band.order[done] = s.ids[slot];
        if (!factorize(s, slot)) return false;
        T* rows = s.v + s.waiting * s.at.n * s.at.ld;
        rows_of_v(s, slot, rows);
        s.scores[slot] = s.empty[slot] = std::numeric_limits<T>::infinity();
        s.gone[s.waiting++] = slot;
        if (!update<T>(s, rows)) return false;
        if (s.waiting == s.at.waiting && done + 1 < stop) downdate(s);
    }
    for (int64_t slot = 0, done = stop; slot < s.held; slot++)
        if (!(s.empty[slot] > 0)) band.errors[done] = s.scores[slot], band.order[done++] = s.ids[slot];
    return true;
}
