// The product in loops, for processors and compilers without the vectors of the other files.

#pragma once

#include <cfloat>
#include <cmath>

#include "gradients.h"

namespace {

float load_float(const float* p) { return *p; }
float load_float(const uint16_t* p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
void store_float(float* p, float x) { *p = x; }
void store_float(uint16_t* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *p = (uint16_t)(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

int32_t load_number(const int8_t* p) { return *p; }
template <class T> float load_number(const T* p) { return load_float(p); }

// The sums of a band for one row of x: floats, or int32 of int8.
template <class T, class Sum> void multiply_band(const Product& p, const T* x, int64_t band, Sum* sums) {
    const int64_t height = p.height_of(band);
    const T* w = (const T*)p.values + p.start(band);
    const T* first = nullptr;  // the first column of a pair, while it waits for the second one
    std::fill(sums, sums + height, Sum());
    for (int64_t j = p.crow[band]; j < p.crow[band + 1]; j++)
        for (int64_t c = p.col[j] * p.width; c < std::min(p.cols, (p.col[j] + 1) * p.width); c++) {
            if (!first) {
                first = x + c;
                continue;
            }
            for (int64_t r = 0; r < height; r++)
                sums[r] += load_number(w + 2 * r) * load_number(first) + load_number(w + 2 * r + 1) * load_number(x + c);
            w += 2 * height, first = nullptr;
        }
    for (int64_t r = 0; first && r < height; r++) sums[r] += load_number(w + r) * load_number(first);
}

// Calls value(i, row, sum) for each row of x and of W, and stores what it returns, with the bias.
template <class T, class Y, class Bias, class Sum, class Value>
void multiply_rows(const Product& p, const Slice& slice, Sum* sums, int64_t begin, int64_t end, Value value) {
    for (int64_t band = begin; band < end; band++)
        for (int64_t i = slice.first; i < slice.first + slice.count; i++) {
            multiply_band(p, (const T*)p.x + i * p.cols, band, sums);
            for (int64_t r = 0, row = band * p.height; r < p.height_of(band); r++, row++)
                store_float((Y*)p.y + i * p.rows + row, value(i, row, sums[r]) + (p.bias ? load_float((const Bias*)p.bias + row) : 0.0f));
        }
}

template <class T> void gemv(const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
    multiply_rows<T, T, T>(p, slice, scratch, begin, end, [](int64_t, int64_t, float sum) { return sum; });
}

template <class Y> void gemv_int8(const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
    multiply_rows<int8_t, Y, float>(p, slice, (int32_t*)scratch, begin, end, [&](int64_t i, int64_t row, int32_t sum) {
        return (float)sum * (p.weight_scale[row] * p.input_scale[i]);
    });
}

template <class T> void quantize_row(const T* x, int64_t cols, int8_t* out, float* scale) {
    float top = 0;
    bool is_finite = true;
    for (int64_t c = 0; c < cols; c++) {
        const float size = std::fabs(load_float(x + c));
        is_finite = is_finite && size <= FLT_MAX;
        top = std::max(top, size);
    }
    const float factor = is_finite && top >= SMALLEST_INPUT ? 127 / top : 0;
    *scale = is_finite ? top / 127 : NAN;
    for (int64_t c = 0; c < cols; c++) out[c] = is_finite ? (int8_t)std::nearbyint(load_float(x + c) * factor) : 0;
}

Word word_of(float x) {
    Word bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

float float_of(Word bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

template <class T>
void pack_columns(const Matrix& x, int64_t first, int64_t count, const Range& columns, Word* to, int64_t pitch) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = columns.begin; c < columns.end; c++)
            to[(c - columns.begin) * pitch + i] = word_of(load_float((const T*)x.numbers + (first + i) * x.width + c));
}

template <class T>
void unpack_columns(const float* from, int64_t pitch, int64_t first, int64_t count, const Range& columns, void* to, int64_t width) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = columns.begin; c < columns.end; c++)
            store_float((T*)to + (first + i) * width + c, from[(c - columns.begin) * pitch + i]);
}

template <class T> void round_all(const float* from, const Range& numbers, void* to) {
    for (int64_t i = numbers.begin; i < numbers.end; i++) store_float((T*)to + i, from[i]);
}

template <class T> void pack_rows(const Gradient& g, int64_t first, int64_t count, const RowTile& tile, Word* to) {
    const T* dy = (const T*)g.dy + first * g.rows + tile.band * g.height + tile.first;
    for (int64_t i = 0; i < count; i++)
        for (int64_t r = 0; r < tile.rows; r++) to[i * tile.lanes + r] = word_of(load_float(dy + i * g.rows + r));
}

template <class T> const Word* pack_weights(const void* values, int64_t columns, int64_t height, Word* scratch) {
    for (int64_t i = 0; i < columns * height; i++) scratch[i] = word_of(load_float((const T*)values + i));
    return scratch;
}

// Where the weight of a row and of a column of a band is stored, among `count` columns.
int64_t position(int64_t row, int64_t k, int64_t count, int64_t height) {
    return k == count - 1 && count % 2 ? k * height + row : k / 2 * 2 * height + 2 * row + k % 2;
}

void add_to_inputs(float* const* columns, int64_t count, const Word* weights, int64_t step, const Word* dy, int64_t height, int64_t pitch,
                   int64_t n) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t r = 0; r < height; r++) {
            const float weight = float_of(weights[k == count - 1 && count % 2 ? k * height + r * step : position(r, k, count, height)]);
            for (int64_t i = 0; i < n; i++) columns[k][i] += weight * float_of(dy[r * pitch + i]);
        }
}

void add_to_weights(const Word* const* columns, int64_t count, const Word* dy, int64_t n, const RowTile& tile, int64_t height, float* out,
                    bool add) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t r = 0; r < tile.rows; r++) {
            float sum = 0;
            for (int64_t i = 0; i < n; i++) sum += float_of(columns[k][i]) * float_of(dy[i * tile.lanes + r]);
            float* to = out + position(tile.first + r, k, count, height);
            *to = add ? *to + sum : sum;
        }
}

template <class T> constexpr GradientKernels gradient_kernels() {
    return {1, 1, pack_columns<T>, pack_columns<T>, unpack_columns<T>, round_all<T>, pack_rows<T>, pack_weights<T>, add_to_inputs, add_to_weights};
}

constexpr Kernels f32 = {0, 0, {0, 0}, 1, nullptr, nullptr, gemv<float>}, bf16 = {0, 0, {0, 0}, 1, nullptr, nullptr, gemv<uint16_t>};
constexpr Kernels int8 = {0, 0, {0, 0}, 1, nullptr, nullptr,
                      [](const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
                          (p.is_bf16 ? gemv_int8<uint16_t> : gemv_int8<float>)(p, slice, scratch, begin, end);
                      }};
constexpr GradientKernels gradient_f32 = gradient_kernels<float>(), gradient_bf16 = gradient_kernels<uint16_t>();
constexpr KernelSet set = {&f32, &bf16, &int8, nullptr, false, [](const void* x, bool is_bf16, int64_t cols, int8_t* out, float* scale) {
                           if (is_bf16) quantize_row((const uint16_t*)x, cols, out, scale);
                           else quantize_row((const float*)x, cols, out, scale);
                       }, nullptr, nullptr, &gradient_f32, &gradient_bf16};

}  // namespace
