// The table of what was made for one instruction set. Included last, in its namespace.

template <class K, bool LISTED>
static void panel(const Product& p, const Part& part, const void* x, float* room, int64_t begin, int64_t end) {
    switch (part.width) {
        case LANES * WIDE: return Panel<K, LANES, WIDE, LISTED>::bands(p, part, x, room, begin, end);
#if WIDE > 2
        case LANES * 2: return Panel<K, LANES, 2, LISTED>::bands(p, part, x, room, begin, end);
#endif
        case LANES: return Panel<K, LANES, 1, LISTED>::bands(p, part, x, room, begin, end);
#if LANES > 8
        case LANES / 2: return Panel<K, LANES / 2, 1, LISTED>::bands(p, part, x, room, begin, end);
#endif
#if LANES > 4
        default: return Panel<K, 4, 1, LISTED>::bands(p, part, x, room, begin, end);
#endif
    }
}

template <class K> static void pack_panel(const Product& p, const Part& part, int64_t begin, int64_t end, void* to) {
    switch (part.width) {
        case 4: return pack<K, 4>(p, part, begin, end, to);
        case 8: return pack<K, 8>(p, part, begin, end, to);
        case 16: return pack<K, 16>(p, part, begin, end, to);
        default: return pack<K, LANES * WIDE>(p, part, begin, end, to);
    }
}

template <class Even, class Listed, class Words> static Kernels kernels() {
    const int64_t bytes = sizeof(typename Even::Packed) * LANES / Even::BLOCK;
    return {LANES * WIDE, 4, bytes, Words::template LANE_ROWS<4>,
            [](const Product& p, const Part& part, int64_t begin, int64_t end, void* to) {
                (p.width == 1 ? pack_panel<Listed> : pack_panel<Even>)(p, part, begin, end, to);
            },
            [](const Product& p, const Part& part, const void* x, float* room, int64_t begin, int64_t end) {
                (p.width == 1 ? panel<Listed, true> : panel<Even, false>)(p, part, x, room, begin, end);
            },
            few<Words>};
}
