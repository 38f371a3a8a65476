// Vectors in one notation, included once for each instruction set, inside its namespace and with its target switched on. The includer
// says LANES (floats in its widest vector) and where its INSTRUCTIONS are.

template <int L> struct Vec {
    typedef float F __attribute__((vector_size(4 * L)));
    typedef uint32_t U __attribute__((vector_size(4 * L)));
    typedef uint64_t Q __attribute__((vector_size(4 * L)));
    typedef uint16_t H __attribute__((vector_size(2 * L)));
};
template <int L> using F = typename Vec<L>::F;
template <int L> using U = typename Vec<L>::U;
template <int L> using Q = typename Vec<L>::Q;
template <int L> using H = typename Vec<L>::H;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#if defined(__x86_64__)
#define IN_REGISTER(v) asm("" : "+v"(v))  // else gcc loads it from memory once for each multiplication
#elif defined(__aarch64__)
#define IN_REGISTER(v) asm("" : "+w"(v))
#endif

template <class T> INLINE T load(const void* p) {  // from wherever: a plain `*p` would promise an alignment
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}
template <class T> INLINE void store(void* p, T value) { std::memcpy(p, &value, sizeof(T)); }
INLINE void ahead(const void* p) { __builtin_prefetch((const void*)((uintptr_t)p + FAR)); }  // fetch what comes after it

#include INSTRUCTIONS

// bfloat16 is the upper half of a float; a pair of them is one 32-bit word, the first in its lower half
template <class U> INLINE U low_half(U pair) { return pair << 16; }
template <class U> INLINE U high_half(U pair) { return pair & 0xffff0000u; }
template <int L> INLINE F<L> widen(const uint16_t* p) { return (F<L>)(extend(load<H<L>>(p)) << 16); }
INLINE float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    return load<float>(&bits);
}

INLINE uint32_t rounded(uint32_t bits) { return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; }  // to the nearest, ties to even
INLINE void narrow(uint16_t* p, float x) {
    const uint32_t bits = load<uint32_t>(&x);
    *p = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : rounded(bits));
}
INLINE void narrow(float* p, float x) { *p = x; }

// as many numbers as a vector has, or `count` of them, to memory in their type
template <int L> INLINE void narrow(float* p, F<L> x) { store(p, x); }
template <int L> INLINE void narrow(uint16_t* p, F<L> x) {
#if defined(DOT_PAIRS)
    static_assert(L == 16, "the widest vector");
    store(p, (H<L>)_mm512_cvtneps_pbh((__m512)x));
#else
    const U<L> bits = (U<L>)x, nan = (U<L>)((bits & 0x7fffffffu) > 0x7f800000u);
    const U<L> round = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store(p, __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & round), H<L>));
#endif
}
template <int L, class T> INLINE void narrow(T* p, F<L> x, int64_t count) {
    T all[L];
    narrow<L>(all, x);
    std::memcpy(p, all, count * sizeof(T));
}

template <int L> INLINE F<L> numbers(const float* p) { return load<F<L>>(p); }
template <int L> INLINE F<L> numbers(const uint16_t* p) { return widen<L>(p); }
INLINE float number(const float* p) { return *p; }
INLINE float number(const uint16_t* p) { return widen(*p); }

// `count` numbers and zeros after them, without a read past their end
template <int L, class T> struct Padded {
    T all[L] = {};
    Padded(const T* p, int64_t count) { std::memcpy(all, p, count * sizeof(T)); }
};
