// The intrinsics of AVX2.

INLINE U<4> extend(H<4> x) { return (U<4>)_mm_cvtepu16_epi32(_mm_cvtsi64_si128(load<int64_t>(&x))); }
INLINE U<8> extend(H<8> x) { return (U<8>)_mm256_cvtepu16_epi32((__m128i)x); }

INLINE U<8> zip(H<8> a, H<8> b) { return extend(a) | extend(b) << 16; }
INLINE U<4> zip(H<4> a, H<4> b) { return extend(a) | extend(b) << 16; }

INLINE F<4> permute(F<4> x, U<4> order) { return (F<4>)_mm_permutevar_ps((__m128)x, (__m128i)order); }
INLINE F<8> permute(F<8> x, U<8> order) { return (F<8>)_mm256_permutevar8x32_ps((__m256)x, (__m256i)order); }

INLINE U<4> widen(Vec<4>, const int8_t* p) { return (U<4>)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)); }
INLINE U<8> widen(Vec<8>, const int8_t* p) { return (U<8>)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }

// Stores integers from -128 to 127 as int8.
INLINE void narrow(int8_t* p, I<4> x) {
    const __m128i halves = _mm_packs_epi32((__m128i)x, (__m128i)x);
    store(p, _mm_cvtsi128_si32(_mm_packs_epi16(halves, halves)));
}
INLINE void narrow(int8_t* p, I<8> x) {
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(halves, halves));
}

// sums + a * b of both int16 in each word
INLINE I<4> dot_pairs(I<4> sums, U<4> a, U<4> b) { return sums + (I<4>)_mm_madd_epi16((__m128i)a, (__m128i)b); }
INLINE I<8> dot_pairs(I<8> sums, U<8> a, U<8> b) { return sums + (I<8>)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

#if defined(DOT_QUADS) && LANES == 8
// sums + a * b of all four bytes in each word, unsigned ones of a
#if defined(SATURATING)
INLINE I<8> dot_quads(I<8> sums, U<8> a, U<8> b) {
    return sums + (I<8>)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), _mm256_set1_epi16(1));
}
INLINE I<4> dot_quads(I<4> sums, U<4> a, U<4> b) {
    return sums + (I<4>)_mm_madd_epi16(_mm_maddubs_epi16((__m128i)a, (__m128i)b), _mm_set1_epi16(1));
}
// Ones for the bytes of two weights whose sum is not from -128 to 128.
INLINE uint32_t saturating(U<8> words) {
    const __m256i sums = _mm256_abs_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), (__m256i)words));
    return _mm256_movemask_epi8(_mm256_cmpgt_epi16(sums, _mm256_set1_epi16(128)));
}
INLINE uint32_t saturating(U<4> words) {
    const __m128i sums = _mm_abs_epi16(_mm_maddubs_epi16(_mm_set1_epi8(1), (__m128i)words));
    return _mm_movemask_epi8(_mm_cmpgt_epi16(sums, _mm_set1_epi16(128)));
}
#else
INLINE I<8> dot_quads(I<8> sums, U<8> a, U<8> b) { return (I<8>)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b); }
INLINE I<4> dot_quads(I<4> sums, U<4> a, U<4> b) { return (I<4>)_mm_dpbusd_avx_epi32((__m128i)sums, (__m128i)a, (__m128i)b); }
#endif
#endif

#if LANES == 8
INLINE void transpose(F<8> (&x)[8]) {
    __m256 t[8], u[8];
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) UNROLL for (int k = 0; k < 2; k++) {
        u[4 * i + 2 * k] = _mm256_shuffle_ps(t[4 * i + k], t[4 * i + 2 + k], 0x44);
        u[4 * i + 2 * k + 1] = _mm256_shuffle_ps(t[4 * i + k], t[4 * i + 2 + k], 0xee);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        x[i] = (F<8>)_mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
        x[4 + i] = (F<8>)_mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
    }
}
#endif
