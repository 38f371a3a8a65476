// The kernels for AMX, where blocks are whole tiles: a tile holds 16 rows of x, or of W, and up to 64 bytes of each. One instruction
// multiplies all rows of a tile of x with all rows of a tile of W and adds to 16 x 16 sums. Numbers are int8 or bfloat16; of bfloat16,
// subnormal numbers count as zero.
//
// A band is 16 rows of W, and [columns / 2][16][2] is how a tile holds bfloat16: it is loaded as it is stored. Tiles of int8 need
// [columns / 4][16][4], so pairs are joined to quads first. A panel holds rows of x as [cols / step][rows][step], where a step is the
// columns of one multiplication: as many of a block as a tile holds.

#include "intrinsics.h"
#include "spmm.h"

#if defined(BEGIN_TARGET) && !defined(WITHOUT_AVX512) && !defined(WITHOUT_AMX) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <sys/syscall.h>
#include <unistd.h>

#define INSTRUCTIONS "instructions_avx512.h"
#define DOT_PAIRS
#define DOT_QUADS
#define LANES 16
BEGIN_TARGET(TARGET_AVX512_BF16)
namespace {
#include "vectors.h"

// Intrinsics of some compilers do not say that they read and write memory.
#define TILE_ZERO(T) asm volatile("tilezero %%tmm" #T::)
#define TILE_LOAD(T, FROM, STRIDE) asm volatile("tileloadd (%0,%1,1), %%tmm" #T ::"r"(FROM), "r"((int64_t)(STRIDE)) : "memory")
#define TILE_STORE(T, TO, STRIDE) asm volatile("tilestored %%tmm" #T ", (%0,%1,1)" ::"r"(TO), "r"((int64_t)(STRIDE)) : "memory")
#define TILE_DOT(SUMS, X, W)                                                                                \
    do {                                                                                                    \
        if constexpr (IS_INT8) asm volatile("tdpbssd %%tmm" #W ", %%tmm" #X ", %%tmm" #SUMS::);            \
        else asm volatile("tdpbf16ps %%tmm" #W ", %%tmm" #X ", %%tmm" #SUMS::);                            \
    } while (false)

const int64_t ROWS = 16;                // of a tile
const int64_t PANEL = 64;               // rows of x: four tiles
const int64_t PANELS_BYTES = 3 << 18;   // of a panel: less than the second cache of processors that have tiles

// The bytes of a row of a tile of x: the largest of 64, 32 and 16 of which a block is a multiple.
int64_t step_bytes(const Product& p, int64_t number) {
    const int64_t bytes = p.width * number;
    return bytes % 64 == 0 ? 64 : bytes % 32 == 0 ? 32 : 16;
}

// Shapes of the tiles: 0 to 3 hold sums, 4 weights, 6 and 7 rows of x.
struct Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    explicit Config(int64_t step) {
        for (int t = 0; t < 8; t++) row_bytes[t] = (uint16_t)(t < 6 ? 64 : step), rows[t] = (uint8_t)(t == 4 ? step / 4 : ROWS);
        asm volatile("ldtilecfg %0" ::"m"(*this) : "memory");
    }
    ~Config() { asm volatile("tilerelease" ::: "memory"); }
};

template <class T, int STEP> void pack_steps(const Product& p, const Slice& slice, int64_t begin, int64_t end, char* panel) {
    const int64_t at_once = 256;  // bytes of a row, so that what is written stays in the cache
    for (int64_t first = begin * (int64_t)sizeof(T); first < end * (int64_t)sizeof(T); first += at_once)
        for (int64_t r = 0; r < slice.panel; r++) {
            const char* from = (const char*)((const T*)p.x + (slice.first + r) * p.cols);
            for (int64_t byte = first; byte < std::min(end * (int64_t)sizeof(T), first + at_once); byte += STEP) {
                char* to = panel + byte * slice.panel + r * STEP;
                if (r < slice.count) std::memcpy(to, from + byte, STEP);
                else std::memset(to, 0, STEP);
            }
        }
}

template <class T> void pack_panel(const Product& p, const Slice& slice, int64_t begin, int64_t end, void* panel) {
    const int64_t step = step_bytes(p, sizeof(T));
    (step == 64 ? pack_steps<T, 64> : step == 32 ? pack_steps<T, 32> : pack_steps<T, 16>)(p, slice, begin, end, (char*)panel);
}

// What is multiplied: some blocks of a band, which `w` holds one step after another.
struct Blocks {
    const char* w;
    const int32_t* col;
    int64_t count, width_bytes, step;
    bool first;  // the sums hold nothing yet
};

// The sums [TILES][16][16] of a panel of x. `prefetches` says that the weights come from memory, not from a cache.
template <bool IS_INT8, int TILES> void multiply_tiles(const Blocks& blocks, const char* x, bool prefetches, float* sums) {
    const int64_t step = blocks.step, w_bytes = ROWS * step;
    if (blocks.first) {
        TILE_ZERO(0);
        if constexpr (TILES > 1) TILE_ZERO(1);
        if constexpr (TILES > 2) {
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
    } else {
        TILE_LOAD(0, sums, 64);
        if constexpr (TILES > 1) TILE_LOAD(1, sums + 256, 64);
        if constexpr (TILES > 2) {
            TILE_LOAD(2, sums + 512, 64);
            TILE_LOAD(3, sums + 768, 64);
        }
    }
    const char* w = blocks.w;
    for (int64_t j = 0; j < blocks.count; j++) {
        const char* from = x + blocks.col[j] * blocks.width_bytes * TILES * ROWS;
        for (int64_t k = 0; k < blocks.width_bytes; k += step, from += TILES * w_bytes, w += w_bytes) {
            TILE_LOAD(4, w, 64);
            if (prefetches)
                for (int64_t byte = 0; byte < w_bytes; byte += 64) prefetch_after(w + byte);
            TILE_LOAD(6, from, step);
            TILE_DOT(0, 6, 4);
            if constexpr (TILES > 1) {
                TILE_LOAD(7, from + w_bytes, step);
                TILE_DOT(1, 7, 4);
            }
            if constexpr (TILES > 2) {
                TILE_LOAD(6, from + 2 * w_bytes, step);
                TILE_DOT(2, 6, 4);
                TILE_LOAD(7, from + 3 * w_bytes, step);
                TILE_DOT(3, 7, 4);
            }
        }
    }
    TILE_STORE(0, sums, 64);
    if constexpr (TILES > 1) TILE_STORE(1, sums + 256, 64);
    if constexpr (TILES > 2) {
        TILE_STORE(2, sums + 512, 64);
        TILE_STORE(3, sums + 768, 64);
    }
}

// Joins stored pairs of columns: [columns / 2][16][2] becomes [columns / 4][16][4].
const char* joined(const int8_t* pairs, int64_t columns, void* scratch) {
    for (int64_t c = 0; c < columns; c += 4) {
        const int8_t* from = pairs + c * ROWS;
        prefetch_after(from);
        store((char*)scratch + c * ROWS, zip(load<H<16>>(from), load<H<16>>(from + 2 * ROWS)));
    }
    return (const char*)scratch;
}

template <class T, class Bias, bool IS_INT8> void store_tiles(const Product& p, const Panel& panel, const Range& bands) {
    const int64_t begin = bands.begin * ROWS, rows = (bands.end - bands.begin) * ROWS, pitch = panel.slice.panel, y_pitch = p.rows;
    const Bias* bias = p.bias ? (const Bias*)p.bias + begin : nullptr;
    const float* scale = IS_INT8 ? p.weight_scale + begin : nullptr;
    for (int64_t i = 0; i < panel.slice.count; i++) {
        const int64_t input = panel.slice.first + i;
        const float* sums = panel.sums + i * ROWS;
        const float input_scale = IS_INT8 ? p.input_scale[input] : 1;
        T* y = (T*)p.y + input * y_pitch + begin;
        for (int64_t row = 0; row < rows; row += ROWS) {
            F<16> numbers = load<F<16>>(sums + row * pitch);
            if constexpr (IS_INT8) numbers = scaled<16>((I<16>)numbers, load<F<16>>(scale + row) * input_scale);
            store_floats<16>(y + row, bias ? numbers + load_floats<16>(bias + row) : numbers);
        }
    }
}

template <bool IS_INT8>
void gemm_tiles(const Product& p, const Panel* panels, int64_t count, const Range& bands, const Range& columns, void* scratch) {
    const int64_t number = IS_INT8 ? 1 : 2, step = step_bytes(p, number);
    const Config config(step);
    for (int64_t band = bands.begin; band < bands.end; band++) {
        const int32_t* col = p.col + p.crow[band];
        const int64_t kept = p.crow[band + 1] - p.crow[band];
        const int64_t begin = first_after(col, 1, kept, p.width, columns.begin), end = first_after(col, 1, kept, p.width, columns.end);
        const char* w = (const char*)p.values + (p.start(band) + begin * p.width * ROWS) * number;
        if (IS_INT8) w = joined((const int8_t*)w, (end - begin) * p.width, scratch);
        const Blocks blocks = {w, col + begin, end - begin, p.width * number, step, begin == 0};
        for (int64_t i = 0; i < count; i++) {
            const int64_t rows = panels[i].slice.panel;
            const auto multiply = rows == 16 ? multiply_tiles<IS_INT8, 1> : rows == 32 ? multiply_tiles<IS_INT8, 2> : multiply_tiles<IS_INT8, 4>;
            multiply(blocks, (const char*)panels[i].packed, !IS_INT8 && i == 0, panels[i].sums + (band - bands.begin) * ROWS * rows);
        }
    }
    if (columns.end < p.cols) return;
    for (int64_t i = 0; i < count; i++) {
        if (!IS_INT8) store_tiles<uint16_t, uint16_t, false>(p, panels[i], bands);
        else (p.is_bf16 ? store_tiles<uint16_t, float, true> : store_tiles<float, float, true>)(p, panels[i], bands);
    }
}
}  // namespace
END_TARGET

// Linux gives tiles to a process that asks for them.
static bool may_use_tiles() {
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

const KernelSet* amx_kernels() {
    static const KernelSet* vectors = avx512_bf16_kernels();
    static const bool is_there = vectors && processor_has(AMX) && may_use_tiles();
    if (!is_there) return nullptr;
    const Kernels &few_bf16 = *vectors->bf16, &few_int8 = *vectors->int8_quads;
    static const Kernels bf16 = {PANEL, ROWS, {2, 2}, few_bf16.gemv_rows, pack_panel<uint16_t>, gemm_tiles<false>, few_bf16.gemv,
                                 PANEL, PANELS_BYTES, 2};
    static const Kernels int8 = {PANEL, ROWS, {1, 1}, few_int8.gemv_rows, pack_panel<int8_t>, gemm_tiles<true>, few_int8.gemv,
                                 4 * PANEL, PANELS_BYTES};  // pairs are joined once for four panels
    static const KernelSet set = [] {
        KernelSet all = *vectors;
        all.bf16_tiles = &bf16, all.int8_tiles = &int8;
        return all;
    }();
    return &set;
}
#else
const KernelSet* amx_kernels() { return nullptr; }
#endif
