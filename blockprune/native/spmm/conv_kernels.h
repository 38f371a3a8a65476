// The kernels of convolutions. Included once for each instruction set, in its namespace, after gemm.h.

static const int64_t CONV_PANEL = LANES * PANEL_VECTORS;

// A number of x in the type of a plane: floats, or bfloat16 as it is.
template <class P, class T> INLINE P number(const T* x) {
    if constexpr (sizeof(P) == sizeof(T)) return *x;
    else return load_float(x);
}
template <class P, class T> INLINE F<LANES> read_lanes(const T* x) {
    if constexpr (sizeof(P) == 4) return load_floats<LANES>(x);
    else return (F<LANES>)extend(load<H<LANES>>(x));
}
template <class P> INLINE void write_lanes(P* to, const F<LANES>& x) {
    if constexpr (sizeof(P) == 4) store(to, x);
    else store(to, __builtin_convertvector((U<LANES>)x, H<LANES>));
}

// Copies fewer than LANES numbers.
template <class T> INLINE void copy_few(T* to, const T* from, int64_t count) {
    UNROLL for (int half = LANES / 2; half; half /= 2)
        if (count >= half) {  // two copies that may overlap
            std::memcpy(to, from, half * sizeof(T));
            std::memcpy(to + count - half, from + count - half, half * sizeof(T));
            return;
        }
}

#if defined(SHUFFLES)
template <int... I> INLINE F<LANES> every_second(const F<LANES>& a, const F<LANES>& b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, 2 * I...);
}
#endif

// to[j] = x[j * stride]
template <class P, class T> static void copy_row(P* to, const T* x, int64_t count, int64_t stride) {
    int64_t j = 0;
    if (stride == 1) {
        for (; j + LANES <= count; j += LANES) write_lanes(to + j, read_lanes<P>(x + j));
        if (j && j < count) write_lanes(to + count - LANES, read_lanes<P>(x + count - LANES)), j = count;
    }
#if defined(SHUFFLES)
    const auto lanes = std::make_integer_sequence<int, LANES>();
    if (stride == 2)
        for (; j + LANES < count; j += LANES)
            write_lanes(to + j, every_second(read_lanes<P>(x + 2 * j), read_lanes<P>(x + 2 * j + LANES), lanes));
#endif
    for (; j < count; j++) to[j] = number<P>(x + j * stride);
}

// to[(channel - begin) * slot + j] = x[j * step + channel] for channels [begin, end); writes up to LANES - 1 numbers more.
template <class P, class T>
static void copy_channels(const Convolution& c, int64_t begin, int64_t end, P* to, const T* x, int64_t count, int64_t step) {
    const T zeros[LANES] = {};
    for (int64_t j = 0; j < count; j += 2 * LANES)  // a line of the cache is written at once
        for (int64_t channel = begin; channel < end; channel += LANES) {
            const int64_t many = std::min<int64_t>(LANES, end - channel);
            if (!std::memchr(c.used.data() + channel, 1, many)) continue;
            for (int64_t i = j; i < std::min(count, j + 2 * LANES); i += LANES) {
                F<LANES> lanes[LANES];
                UNROLL for (int k = 0; k < LANES; k++) {
                    const T* from = i + k < count ? x + (i + k) * step + channel : zeros;
                    lanes[k] = many == LANES ? read_lanes<P>(from) : read_lanes<P>(Padded<LANES, T>(from, many).all);
                }
                transpose(lanes);
                P* row = to + (channel - begin) * c.slot + i;
                if (many == LANES) {
                    UNROLL for (int k = 0; k < LANES; k++) write_lanes(row + k * c.slot, lanes[k]);
                } else {
                    for (int k = 0; k < many; k++) write_lanes(row + k * c.slot, lanes[k]);
                }
            }
        }
}

template <class K> static void copy_planes(const Convolution& c, const Strip& strip, int64_t begin, int64_t end, void* to) {
    typedef typename K::Weight T;
    typedef typename K::Packed P;
    const T* x = (const T*)c.x + strip.image * c.channels * c.image_height * c.image_width;
    const bool as_they_are = c.rows_follow();  // the rows are copied as one
    const int64_t all = c.plane_rows(strip.rows), rows = as_they_are ? 1 : all;
    const int64_t pitch = as_they_are ? all * c.pitch : c.pitch, width = as_they_are ? pitch : c.image_width;
    P* plane = (P*)to + begin * c.slot;
    const auto zero = [&](P* first, int64_t count) {
        for (int64_t channel = begin; count && channel < end; channel++)
            if (c.used[channel]) std::fill_n(first + (channel - begin) * c.slot, count, P());
    };
    for (int64_t remainder_y : c.remainders_y)
        for (int64_t remainder_x : c.remainders_x) {
            // columns [first, last) of a plane's row are in the image
            const int64_t before = c.pad_left - remainder_x;
            const int64_t first = std::min(pitch, std::max<int64_t>(0, before + c.stride_x - 1) / c.stride_x);
            const int64_t last = std::max(first, std::min(pitch, (width + before + c.stride_x - 1) / c.stride_x));
            for (int64_t i = 0; i < rows; i++) {
                const int64_t y = (strip.top + i) * c.stride_y + remainder_y - c.pad_top, column = first * c.stride_x - before;
                P* row = plane + i * pitch;
                if (y < 0 || y >= c.image_height) {
                    zero(row, pitch);
                    continue;
                }
                if (c.channels_last_x) {
                    copy_channels(c, begin, end, row + first, x + (y * c.image_width + column) * c.channels, last - first,
                                  c.stride_x * c.channels);
                } else {
                    for (int64_t channel = begin; channel < end; channel++)
                        if (c.used[channel])
                            copy_row(row + (channel - begin) * c.slot + first, x + (channel * c.image_height + y) * c.image_width + column,
                                     last - first, c.stride_x);
                }
                zero(row, first);
                zero(row + last, pitch - last);
            }
            zero(plane + rows * pitch, c.shared);
            plane += c.plane;
        }
    zero(plane, LANES);
}

template <class K, int NV, int MR>
static void conv_kernel(const Convolution& c, const ConvTile& tile, const void* planes, float* out, int64_t out_stride, int64_t first) {
    constexpr int SETS = MR * NV < 4 ? 4 : MR * NV < 8 ? 2 : 1;  // as in micro_kernel
    typedef typename K::Weight T;
    const auto* image = (const typename K::Packed*)planes;
    F<LANES> acc[SETS][MR][NV] = {};
    const T* w = (const T*)tile.w;
    const int32_t* offsets = c.offsets.data() + tile.offsets;
    const int64_t pairs = tile.columns / 2, row_stride = tile.row_stride, pair_stride = tile.pair_stride;
    const auto pair = [&](int set) __attribute__((always_inline)) {
        K::template pair<LANES>(acc[set], image + offsets[0], image + offsets[1], w, row_stride);
        offsets += 2, w += pair_stride;
    };
    int64_t j = 0;
    if constexpr (SETS > 1)
        for (; j + SETS <= pairs; j += SETS) UNROLL for (int s = 0; s < SETS; s++) pair(s);
    for (; j < pairs; j++) pair(0);
    if (tile.columns % 2) {
        T last[MR];
        for (int m = 0; m < MR; m++) last[m] = ((const T*)tile.last)[m * tile.last_stride];
        K::template single<LANES>(acc[0], image + offsets[0], last);
    }
    const int32_t* rows = c.rows_of(tile);
    UNROLL for (int m = 0; m < MR; m++) UNROLL for (int v = 0; v < NV; v++) {
        UNROLL for (int s = 1; s < SETS; s++) acc[0][m][v] += acc[s][m][v];
        store(out + (rows[m] - first) * out_stride + v * LANES, acc[0][m][v] + c.bias[rows[m]]);
    }
}

typedef void (*ConvKernel)(const Convolution&, const ConvTile&, const void* planes, float* out, int64_t out_stride, int64_t first);

template <class K, int NV, int... MR>
static void conv_panel(std::integer_sequence<int, MR...>, const Convolution& c, const ConvGroup& group, const void* planes, float* out,
                       int64_t out_stride, int64_t first) {
    static const ConvKernel kernels[] = {conv_kernel<K, NV, MR + 1>...};
    for (int64_t t = group.first_tile; t < group.end_tile; t++) kernels[c.tiles[t].rows - 1](c, c.tiles[t], planes, out, out_stride, first);
}

// All tiles of a group with a panel of 1 to PANEL_VECTORS vectors.
template <class K> static void multiply_group(const Convolution& c, const ConvGroup& group, int64_t vectors, const void* planes, float* out,
                                              int64_t out_stride, int64_t first) {
    const auto rows = std::make_integer_sequence<int, TILE_ROWS>();
    if (vectors == 1) conv_panel<K, 1>(rows, c, group, planes, out, out_stride, first);
#if PANEL_VECTORS > 2
    else if (vectors == 3) conv_panel<K, 3>(rows, c, group, planes, out, out_stride, first);
    else if (vectors == 4) conv_panel<K, 4>(rows, c, group, planes, out, out_stride, first);
#endif
    else conv_panel<K, 2>(rows, c, group, planes, out, out_stride, first);
}

struct Segment {  // lanes of a panel whose outputs lie next to each other
    int64_t lane, count, position;
};

// Stores a segment of the rows of a group from out[row - first][CONV_PANEL], channels last.
template <class T>
static void store_channels_last(const Convolution& c, const ConvGroup& group, const Segment& s, int64_t image, const float* out) {
    T* y = (T*)c.y + (image * c.out_height * c.out_width + s.position) * c.rows;
    for (int64_t i = 0; i < s.count; i += LANES)
        for (int64_t row = group.first; row < group.end; row += LANES) {
            const int64_t count = std::min<int64_t>(LANES, group.end - row), many = std::min<int64_t>(LANES, s.count - i);
            F<LANES> x[LANES];
            UNROLL for (int k = 0; k < LANES; k++) x[k] = load<F<LANES>>(out + (row - group.first + k) * CONV_PANEL + s.lane + i);
            transpose(x);
            for (int k = 0; k < many; k++) {
                T* to = y + (i + k) * c.rows + row;
                if (count == LANES) {
                    store_floats<LANES>(to, x[k]);
                } else {
                    T all[LANES];
                    store_floats<LANES>(all, x[k]);
                    copy_few(to, all, count);
                }
            }
        }
}

// Likewise, channels first, for the rows that tiles have.
template <class T>
static void store_channels_first(const Convolution& c, const ConvGroup& group, const Segment& s, int64_t image, const float* out) {
    for (int64_t t = group.first_tile; t < group.end_tile; t++)
        for (int64_t m = 0; m < c.tiles[t].rows; m++) {
            const int64_t row = c.rows_of(c.tiles[t])[m];
            T* y = (T*)c.y + (image * c.rows + row) * c.out_height * c.out_width + s.position;
            const float* from = out + (row - group.first) * CONV_PANEL + s.lane;
            int64_t i = 0;
            for (; i + LANES <= s.count; i += LANES) store_floats<LANES>(y + i, load<F<LANES>>(from + i));
            if (i < s.count) {
                T all[LANES];
                store_floats<LANES>(all, load<F<LANES>>(from + i));
                copy_few(y + i, all, s.count - i);
            }
        }
}

template <class K>
static void conv_multiply(const Convolution& c, const Strip& strip, const void* planes, float* scratch, int64_t begin, int64_t end) {
    typedef typename K::Weight T;
    const int64_t outputs = c.out_height * c.out_width, positions = c.positions(strip.rows), top = strip.top * c.out_width;
    for (int64_t g = begin; g < end; g++) {
        const ConvGroup& group = c.groups[g];
        int64_t t = group.first_tile, m = 0;
        for (int64_t row = group.first; row < group.end; row++) {  // rows that keep nothing
            if (t < group.end_tile && c.rows_of(c.tiles[t])[m] == row) {
                if (++m == c.tiles[t].rows) t++, m = 0;
            } else if (c.channels_last_y) {
                std::fill_n(scratch + (row - group.first) * CONV_PANEL, CONV_PANEL, c.bias[row]);
            } else {
                T value;
                store_float(&value, c.bias[row]);
                std::fill_n((T*)c.y + (strip.image * c.rows + row) * outputs + top, strip.rows * c.out_width, value);
            }
        }
        for (int64_t next = 0; next < positions;) {
            const int64_t vectors = std::min<int64_t>(PANEL_VECTORS, (positions - next + LANES - 1) / LANES), panel = vectors * LANES;
            const int64_t start = std::max<int64_t>(0, std::min(next, positions - panel));  // the last panel may compute some outputs again
            Segment segments[CONV_PANEL];
            int64_t count = 0;
            for (int64_t p = start, stop = std::min(start + panel, positions); p < stop;) {
                const int64_t row = c.pitch == c.out_width ? 0 : p / c.pitch, column = p - row * c.pitch;
                const int64_t many = c.pitch == c.out_width ? stop - p : std::min(stop - p, c.out_width - column);
                if (many > 0) segments[count++] = {p - start, many, top + row * c.out_width + column};
                p += many > 0 ? many : c.pitch - column;
            }
            next = start + panel;
            if (!count) continue;  // nothing but what a wide kernel reads beyond the end of a row of outputs
            const bool direct = sizeof(T) == 4 && !c.channels_last_y && segments[0].count == panel;
            float* out = direct ? (float*)c.y + strip.image * c.rows * outputs + segments[0].position : scratch;
            const int64_t out_stride = direct ? outputs : CONV_PANEL, first = direct ? 0 : group.first;
            const auto* from = (const typename K::Packed*)planes + start;
            multiply_group<K>(c, group, vectors, from, out, out_stride, first);
            for (int64_t s = 0; s < count && !direct; s++)
                (c.channels_last_y ? store_channels_last<T> : store_channels_first<T>)(c, group, segments[s], strip.image, out);
        }
    }
}

template <class K> static constexpr ConvKernels conv_kernels() {
    return {LANES, CONV_PANEL, TILE_ROWS, sizeof(typename K::Packed), copy_planes<K>, conv_multiply<K>};
}
