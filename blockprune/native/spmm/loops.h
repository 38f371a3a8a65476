// The product by plain loops, for processors and compilers without the vectors of the other files.

#pragma once

#include "spmm.h"

namespace {

float number(const float* p) { return *p; }
float number(const uint16_t* p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
void narrow(float* p, float x) { *p = x; }
void narrow(uint16_t* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *p = (uint16_t)(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// y[i][top ..] for one row of x and one band
template <class T> void row(const Product& p, const T* x, T* y, int64_t b, float* sums) {
    const int64_t height = p.height_of(b), top = b * p.height;
    const T* w = (const T*)p.values + p.start(b);
    const T* before = nullptr;  // the input of the column before, where it waits for its pair
    std::fill(sums, sums + height, 0.0f);
    for (int64_t j = p.crow[b]; j < p.crow[b + 1]; j++)
        for (int64_t c = p.col[j] * p.width; c < std::min(p.cols, (p.col[j] + 1) * p.width); c++) {
            if (!before) {
                before = x + c;
                continue;
            }
            for (int64_t r = 0; r < height; r++) sums[r] += number(w + 2 * r) * number(before) + number(w + 2 * r + 1) * number(x + c);
            w += 2 * height, before = nullptr;
        }
    for (int64_t r = 0; r < height; r++) {
        if (before) sums[r] += number(w + r) * number(before);
        narrow(y + top + r, sums[r] + (p.bias ? number((const T*)p.bias + top + r) : 0.0f));
    }
}

template <class T> void few(const Product& p, const Part& part, float* room, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
        for (int64_t i = part.first; i < part.first + part.count; i++) row(p, (const T*)p.x + i * p.cols, (T*)p.y + i * p.rows, b, room);
}

const Kernels f32 = {0, 0, 0, 1, nullptr, nullptr, few<float>}, bf16 = {0, 0, 0, 1, nullptr, nullptr, few<uint16_t>};
const Kind kind = {&f32, &bf16};

}  // namespace
