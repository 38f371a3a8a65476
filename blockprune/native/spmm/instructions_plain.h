// The intrinsics of SSE2 and NEON.

#if defined(__aarch64__)
INLINE U<4> extend(H<4> x) { return (U<4>)vmovl_u16((uint16x4_t)x); }
INLINE U<4> widen(Vec<4>, const int8_t* p) { return (U<4>)vmovl_s8(vld1_s8(p)); }
INLINE void narrow(int8_t* p, I<4> x) {
    const int16x4_t halves = vmovn_s32((int32x4_t)x);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(halves, halves));
    std::memcpy(p, &bytes, 4);
}
INLINE I<4> dot_pairs(I<4> sums, U<4> a, U<4> b) {
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return sums + (I<4>)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
INLINE F<4> permute(F<4> x, U<4> order) {
    return (F<4>)vqtbl1q_u8((uint8x16_t)x, (uint8x16_t)(order * 0x04040404u + 0x03020100u));
}
INLINE void transpose(F<4> (&x)[4]) {
    const float32x4x2_t a = vtrnq_f32((float32x4_t)x[0], (float32x4_t)x[1]), b = vtrnq_f32((float32x4_t)x[2], (float32x4_t)x[3]);
    x[0] = (F<4>)vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    x[1] = (F<4>)vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    x[2] = (F<4>)vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    x[3] = (F<4>)vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}
#else
INLINE U<4> extend(H<4> x) {
    return (U<4>)_mm_unpacklo_epi16(_mm_cvtsi64_si128(load<int64_t>(&x)), _mm_setzero_si128());
}
INLINE U<4> widen(Vec<4>, const int8_t* p) {
    const __m128i x = _mm_loadl_epi64((const __m128i*)p);
    return (U<4>)_mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8);
}
INLINE void narrow(int8_t* p, I<4> x) {
    const __m128i halves = _mm_packs_epi32((__m128i)x, (__m128i)x);
    store(p, _mm_cvtsi128_si32(_mm_packs_epi16(halves, halves)));
}
INLINE I<4> dot_pairs(I<4> sums, U<4> a, U<4> b) { return sums + (I<4>)_mm_madd_epi16((__m128i)a, (__m128i)b); }
INLINE F<4> permute(F<4> x, U<4> order) { return F<4>{x[order[0]], x[order[1]], x[order[2]], x[order[3]]}; }
INLINE void transpose(F<4> (&x)[4]) {
    __m128 a = (__m128)x[0], b = (__m128)x[1], c = (__m128)x[2], d = (__m128)x[3];
    _MM_TRANSPOSE4_PS(a, b, c, d);
    x[0] = (F<4>)a, x[1] = (F<4>)b, x[2] = (F<4>)c, x[3] = (F<4>)d;
}
#endif
