// Vectors in one notation, included once for each instruction set, inside its namespace and with its target switched on. The includer
// defines LANES (floats in its widest vector) and INSTRUCTIONS (the header with its intrinsics).

template <int L> struct Vec {
    typedef float F __attribute__((vector_size(4 * L)));
    typedef uint32_t U __attribute__((vector_size(4 * L)));
    typedef int32_t I __attribute__((vector_size(4 * L)));
    typedef uint64_t Q __attribute__((vector_size(4 * L)));
    typedef uint16_t H __attribute__((vector_size(2 * L)));
};
template <int L> using F = typename Vec<L>::F;
template <int L> using U = typename Vec<L>::U;
template <int L> using I = typename Vec<L>::I;
template <int L> using Q = typename Vec<L>::Q;
template <int L> using H = typename Vec<L>::H;

template <class T> INLINE T load(const void* p) {  // from any address: `*p` would promise an alignment
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}
template <class T> INLINE void store(void* p, T value) { std::memcpy(p, &value, sizeof(T)); }
INLINE void prefetch_after(const void* p) { __builtin_prefetch((const void*)((uintptr_t)p + PREFETCH_DISTANCE)); }

#include INSTRUCTIONS

// 2 * L numbers of int8 as words of two int16.
template <int L> INLINE U<L> widen(const int8_t* p) { return widen(Vec<L>(), p); }

// A bfloat16 number is the upper half of a float. A pair of them is one 32-bit word, the first in its lower half.
template <class U> INLINE U low_half(U pair) { return pair << 16; }
template <class U> INLINE U high_half(U pair) { return pair & 0xffff0000u; }

INLINE float load_float(const float* p) { return *p; }
INLINE float load_float(const uint16_t* p) {
    const uint32_t bits = (uint32_t)*p << 16;
    return load<float>(&bits);
}
template <int L> INLINE F<L> load_floats(const float* p) { return load<F<L>>(p); }
template <int L> INLINE F<L> load_floats(const uint16_t* p) { return (F<L>)(extend(load<H<L>>(p)) << 16); }

INLINE uint32_t round_to_bf16(uint32_t bits) { return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; }  // to the nearest, ties to even
INLINE void store_float(float* p, float x) { *p = x; }
INLINE void store_float(uint16_t* p, float x) {
    const uint32_t bits = load<uint32_t>(&x);
    *p = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : round_to_bf16(bits));
}
template <int L> INLINE F<L> scaled(I<L> sums, F<L> scale) { return __builtin_convertvector(sums, F<L>) * scale; }
template <int L> INLINE void store_floats(float* p, F<L> x) { store(p, x); }
template <int L> INLINE void store_floats(uint16_t* p, F<L> x) {
#if defined(DOT_PAIRS)
    static_assert(L == 16, "the widest vector");
    store(p, (H<L>)_mm512_cvtneps_pbh((__m512)x));
#else
    const U<L> bits = (U<L>)x, nan = (U<L>)((bits & 0x7fffffffu) > 0x7f800000u);
    const U<L> round = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store(p, __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & round), H<L>));
#endif
}
template <int L, class T> INLINE void store_floats(T* p, F<L> x, int64_t count) {
    T all[L];
    store_floats<L>(all, x);
    std::memcpy(p, all, count * sizeof(T));
}

// `count` numbers with zeros after them, read without a step past their end.
template <int L, class T> struct Padded {
    T all[L] = {};
    Padded(const T* p, int64_t count) { std::memcpy(all, p, count * sizeof(T)); }
};
