// The product in loops, for processors and compilers without the vectors of the other files.

#pragma once

#include <cfloat>
#include <cmath>

#include "spmm.h"

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

const Kernels f32 = {0, 0, {0, 0}, 1, nullptr, nullptr, gemv<float>}, bf16 = {0, 0, {0, 0}, 1, nullptr, nullptr, gemv<uint16_t>};
const Kernels int8 = {0, 0, {0, 0}, 1, nullptr, nullptr,
                      [](const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
                          (p.is_bf16 ? gemv_int8<uint16_t> : gemv_int8<float>)(p, slice, scratch, begin, end);
                      }};
const KernelSet set = {&f32, &bf16, &int8, [](const void* x, bool is_bf16, int64_t cols, int8_t* out, float* scale) {
                           if (is_bf16) quantize_row((const uint16_t*)x, cols, out, scale);
                           else quantize_row((const float*)x, cols, out, scale);
                       }, nullptr, nullptr};

}  // namespace
