// The intrinsics of AVX-512.

#include "instructions_avx2.h"

INLINE U<16> extend(H<16> x) { return (U<16>)_mm512_cvtepu16_epi32((__m256i)x); }

INLINE void transpose(F<16> (&x)[16]) {
    __m512 t[16], u[16];
    UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps((__m512)x[2 * i], (__m512)x[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps((__m512)x[2 * i], (__m512)x[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int k = 0; k < 2; k++) {
        const __m512d a = _mm512_castps_pd(t[4 * i + k]), b = _mm512_castps_pd(t[4 * i + 2 + k]);
        u[4 * i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        u[4 * i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int k = 0; k < 2; k++) {
        t[8 * k + i] = _mm512_shuffle_f32x4(u[8 * k + i], u[8 * k + 4 + i], 0x88);
        t[8 * k + 4 + i] = _mm512_shuffle_f32x4(u[8 * k + i], u[8 * k + 4 + i], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int k = 0; k < 2; k++) {
        x[4 * k + i] = (F<16>)_mm512_shuffle_f32x4(t[4 * k + i], t[8 + 4 * k + i], 0x88);
        x[8 + 4 * k + i] = (F<16>)_mm512_shuffle_f32x4(t[4 * k + i], t[8 + 4 * k + i], 0xdd);
    }
}

INLINE U<16> widen(Vec<16>, const int8_t* p) { return (U<16>)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void narrow(int8_t* p, I<16> x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x)); }
#if defined(DOT_QUADS)
INLINE I<16> dot_pairs(I<16> sums, U<16> a, U<16> b) { return (I<16>)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b); }
INLINE I<16> dot_quads(I<16> sums, U<16> a, U<16> b) { return (I<16>)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b); }
INLINE I<8> dot_quads(I<8> sums, U<8> a, U<8> b) { return (I<8>)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)a, (__m256i)b); }
INLINE I<4> dot_quads(I<4> sums, U<4> a, U<4> b) { return (I<4>)_mm_dpbusd_epi32((__m128i)sums, (__m128i)a, (__m128i)b); }
#else
INLINE I<16> dot_pairs(I<16> sums, U<16> a, U<16> b) { return sums + (I<16>)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#endif

INLINE F<16> permute(F<16> x, U<16> order) { return (F<16>)_mm512_permutexvar_ps((__m512i)order, (__m512)x); }

// Each word of the result holds a number of a in its lower half and one of b in its upper half.
INLINE U<16> zip(H<16> a, H<16> b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                           18, 2, 17, 1, 16, 0);
    return (U<16>)_mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1));
}
#if defined(DOT_PAIRS)
INLINE F<16> dot_pairs(F<16> sum, U<16> x, U<16> w) { return (F<16>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
INLINE F<8> dot_pairs(F<8> sum, U<8> x, U<8> w) { return (F<8>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)x, (__m256bh)w); }
INLINE F<4> dot_pairs(F<4> sum, U<4> x, U<4> w) { return (F<4>)_mm_dpbf16_ps((__m128)sum, (__m128bh)x, (__m128bh)w); }
#endif
