// The table of the kernels for one instruction set. Included last, in its namespace.

template <class K> static void pack_panel(const Product& p, const Slice& slice, int64_t begin, int64_t end, void* to) {
    switch (slice.panel) {
        case 4:
            if constexpr (K::MIN_PANEL <= 4) return pack<K, 4>(p, slice, begin, end, to);
            break;
        case 8:
            if constexpr (K::MIN_PANEL <= 8) return pack<K, 8>(p, slice, begin, end, to);
            break;
#if LANES * PANEL_VECTORS > 16
        case 16: return pack<K, 16>(p, slice, begin, end, to);
#endif
    }
    pack<K, LANES * PANEL_VECTORS>(p, slice, begin, end, to);
}

template <class K> static constexpr int64_t packed_bytes() { return K::template offset<64>(4) * sizeof(typename K::Packed) / 256; }

// Rows of x that bands are multiplied with at once: their columns stay in the second cache, which is larger where AVX-512 is.
static constexpr int64_t MAX_INPUTS = LANES == 16 ? 256 : 128;

// BlockType packs whole blocks, ColumnType single columns.
template <class BlockType, class ColumnType>
static constexpr Kernels kernels(int64_t gemv_rows, void (*gemv)(const Product&, const Slice&, float*, int64_t, int64_t)) {
    return {LANES * PANEL_VECTORS, BlockType::MIN_PANEL, {packed_bytes<BlockType>(), packed_bytes<ColumnType>()}, gemv_rows,
            [](const Product& p, const Slice& slice, int64_t begin, int64_t end, void* to) {
                (p.width == 1 ? pack_panel<ColumnType> : pack_panel<BlockType>)(p, slice, begin, end, to);
            },
            [](const Product& p, const Panel* panels, int64_t count, const Range& bands, const Range& columns, void* scratch) {
                (p.width == 1 ? gemm<ColumnType, true> : gemm<BlockType, false>)(p, panels, count, bands, columns, scratch);
            },
            gemv, MAX_INPUTS};
}
template <class BlockType, class ColumnType, class Words> static constexpr Kernels float_kernels() {
    return kernels<BlockType, ColumnType>(Words::template VECTOR_ROWS<4>, gemv<Words>);
}

#if defined(DOT_QUADS)
static constexpr Kernels int8_quads = {LANES * PANEL_VECTORS, Int8Quads::MIN_PANEL, {packed_bytes<Int8Quads>(), packed_bytes<Int8Quads>()}, 4,
                                   pack_panel<Int8Quads>, gemm<Int8Quads, false>, GEMV_QUADS, MAX_INPUTS};
#endif
