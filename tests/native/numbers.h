// Random numbers for the programs that compare compiled loops with plain ones.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

static std::mt19937 rng(0);
static int draw(int low, int high) { return low + (int)(rng() % (unsigned)(high - low + 1)); }

// Numbers of a type in a buffer of exactly their size, all of them small integers, so that sums are exact.
struct Numbers {
    std::unique_ptr<char[]> memory;
    int64_t count;
    bool half;
    Numbers(int64_t count, bool half) : memory(new char[count * (half ? 2 : 4)]), count(count), half(half) {}
    void set(int64_t i, float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        const uint16_t upper = (uint16_t)(bits >> 16);
        if (half) std::memcpy(memory.get() + 2 * i, &upper, 2);
        else std::memcpy(memory.get() + 4 * i, &x, 4);
    }
    float get(int64_t i) const {
        uint16_t upper = 0;
        float x;
        if (half) {
            std::memcpy(&upper, memory.get() + 2 * i, 2);
            const uint32_t bits = (uint32_t)upper << 16;
            std::memcpy(&x, &bits, 4);
        } else {
            std::memcpy(&x, memory.get() + 4 * i, 4);
        }
        return x;
    }
    std::vector<float> all() const {
        std::vector<float> numbers(count);
        for (int64_t i = 0; i < count; i++) numbers[i] = get(i);
        return numbers;
    }
    void fill() {
        for (int64_t i = 0; i < count; i++) set(i, (float)draw(-3, 3));
    }
};
