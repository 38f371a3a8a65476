// The table of the kernels for one instruction set. Included last, in its namespace.

template <class K> static void pack_panel(const Product& p, const Slice& slice, int64_t begin, int64_t end, void* to) {
    switch (slice.panel) {
        case 4: return pack<K, 4>(p, slice, begin, end, to);
        case 8: return pack<K, 8>(p, slice, begin, end, to);
#if LANES * PANEL_VECTORS > 16
        case 16: return pack<K, 16>(p, slice, begin, end, to);
#endif
        default: return pack<K, LANES * PANEL_VECTORS>(p, slice, begin, end, to);
    }
}

// BlockType packs whole blocks, ColumnType single columns.
template <class BlockType, class ColumnType, class Words> static Kernels kernels() {
    const int64_t packed_bytes = sizeof(typename BlockType::Packed) * LANES / BlockType::COLUMNS;
    return {LANES * PANEL_VECTORS, 4, packed_bytes, Words::template VECTOR_ROWS<4>,
            [](const Product& p, const Slice& slice, int64_t begin, int64_t end, void* to) {
                (p.width == 1 ? pack_panel<ColumnType> : pack_panel<BlockType>)(p, slice, begin, end, to);
            },
            [](const Product& p, const Panel* panels, int64_t count, const Range& bands, const Range& columns, void* scratch) {
                (p.width == 1 ? gemm<ColumnType, true> : gemm<BlockType, false>)(p, panels, count, bands, columns, scratch);
            },
            gemv<Words>};
}
