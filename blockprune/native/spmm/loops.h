// The product in loops, for processors and compilers without the vectors of the other files.

#pragma once

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

// The rows of y that a band has, for one row of x.
template <class T> void multiply_band(const Product& p, const T* x, T* y, int64_t band, float* sums) {
    const int64_t height = p.height_of(band), top = band * p.height;
    const T* w = (const T*)p.values + p.start(band);
    const T* first = nullptr;  // the first column of a pair, while it waits for the second one
    std::fill(sums, sums + height, 0.0f);
    for (int64_t j = p.crow[band]; j < p.crow[band + 1]; j++)
        for (int64_t c = p.col[j] * p.width; c < std::min(p.cols, (p.col[j] + 1) * p.width); c++) {
            if (!first) {
                first = x + c;
                continue;
            }
            for (int64_t r = 0; r < height; r++)
                sums[r] += load_float(w + 2 * r) * load_float(first) + load_float(w + 2 * r + 1) * load_float(x + c);
            w += 2 * height, first = nullptr;
        }
    for (int64_t r = 0; r < height; r++) {
        if (first) sums[r] += load_float(w + r) * load_float(first);
        store_float(y + top + r, sums[r] + (p.bias ? load_float((const T*)p.bias + top + r) : 0.0f));
    }
}

template <class T> void gemv(const Product& p, const Slice& slice, float* scratch, int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; band++)
        for (int64_t i = slice.first; i < slice.first + slice.count; i++)
            multiply_band(p, (const T*)p.x + i * p.cols, (T*)p.y + i * p.rows, band, scratch);
}

const Kernels f32 = {0, 0, 0, 1, nullptr, nullptr, gemv<float>}, bf16 = {0, 0, 0, 1, nullptr, nullptr, gemv<uint16_t>};
const KernelSet set = {&f32, &bf16, nullptr, nullptr};

}  // namespace
