// The few vector operations the kernels are written in: AVX-512, AVX2, or plain loops the compiler vectorises.
// W floats to a vector; GGML_KVTC_PAD is a multiple of every W.
#pragma once

#include "vec.h" // ggml_v_expf

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kvtc {

// a hint: p need not be readable
inline void prefetch(const void * p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    (void) p;
#endif
}

} // namespace kvtc

#if defined(__AVX512F__) && defined(__AVX512DQ__)

#include <immintrin.h>

namespace kvtc {

constexpr int W = 16;
using vf = __m512;
using vi = __m512i;

inline vf   load (const float * p)        { return _mm512_loadu_ps(p); }
inline void store(float * p, vf a)        { _mm512_storeu_ps(p, a); }
inline vf   set1 (float x)                { return _mm512_set1_ps(x); }
inline vf   add  (vf a, vf b)             { return _mm512_add_ps(a, b); }
inline vf   mul  (vf a, vf b)             { return _mm512_mul_ps(a, b); }
inline vf   fma  (vf a, vf b, vf c)       { return _mm512_fmadd_ps(a, b, c); }  //  a*b + c
inline vf   fnma (vf a, vf b, vf c)       { return _mm512_fnmadd_ps(a, b, c); } // -a*b + c
inline vf   max  (vf a, vf b)             { return _mm512_max_ps(a, b); }
inline float hmax(vf a)                   { return _mm512_reduce_max_ps(a); }
inline float hsum(vf a)                   { return _mm512_reduce_add_ps(a); }

inline vi   iload (const int32_t * p)     { return _mm512_loadu_si512(p); }
inline vf   gather(const float * p, vi i) { return _mm512_i32gather_ps(i, p, 4); }
// 32 bits at each byte offset
inline vi   gather_bytes(const uint8_t * p, vi offset) { return _mm512_i32gather_epi32(offset, p, 1); }
inline vi   shift_right (vi a, int n)                  { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
template <int n> inline vi shift_right(vi a)           { return _mm512_srli_epi32(a, n); }
inline vi   shift_left  (vi a, int n)                  { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
inline vi   bit_or      (vi a, vi b)                   { return _mm512_or_si512(a, b); }
// 16 bytes at each offset, as four words of 32 bits
inline void load_pieces(const uint8_t * p, const int32_t * offsets, vi * word) {
    vi x[4];
    for (int i = 0; i < 4; ++i) { // rows i, i + 4, i + 8, i + 12
        const auto piece = [&](int l) { return _mm_loadu_si128((const __m128i *) (p + offsets[i + 4*l])); };
        x[i] = _mm512_castsi128_si512(piece(0));
        x[i] = _mm512_inserti32x4(x[i], piece(1), 1);
        x[i] = _mm512_inserti32x4(x[i], piece(2), 2);
        x[i] = _mm512_inserti32x4(x[i], piece(3), 3);
    }
    const vi lo[2] = { _mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpacklo_epi32(x[2], x[3]) };
    const vi hi[2] = { _mm512_unpackhi_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[2], x[3]) };
    word[0] = _mm512_unpacklo_epi64(lo[0], lo[1]);
    word[1] = _mm512_unpackhi_epi64(lo[0], lo[1]);
    word[2] = _mm512_unpacklo_epi64(hi[0], hi[1]);
    word[3] = _mm512_unpackhi_epi64(hi[0], hi[1]);
}

// table[code] with code in the low w bits of index; tables of w <= 4 bits repeat up to 16 entries
template <int w> inline vf lookup(const float * table, vi index) {
    if constexpr (w <= 4) {
        return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
    } else if constexpr (w == 5) {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
    } else if constexpr (w == 6) {
        const vf low  = _mm512_permutex2var_ps(_mm512_loadu_ps(table),      index, _mm512_loadu_ps(table + 16));
        const vf high = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), index, _mm512_loadu_ps(table + 48));
        return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high);
    } else {
        return gather(table, _mm512_and_si512(index, _mm512_set1_epi32((1 << w) - 1)));
    }
}

inline vf   vexp(vf x)                    { return ggml_v_expf(x); }

} // namespace kvtc

#elif defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

namespace kvtc {

constexpr int W = 8;
using vf = __m256;
using vi = __m256i;

inline vf   load (const float * p)        { return _mm256_loadu_ps(p); }
inline void store(float * p, vf a)        { _mm256_storeu_ps(p, a); }
inline vf   set1 (float x)                { return _mm256_set1_ps(x); }
inline vf   add  (vf a, vf b)             { return _mm256_add_ps(a, b); }
inline vf   mul  (vf a, vf b)             { return _mm256_mul_ps(a, b); }
inline vf   fma  (vf a, vf b, vf c)       { return _mm256_fmadd_ps(a, b, c); }
inline vf   fnma (vf a, vf b, vf c)       { return _mm256_fnmadd_ps(a, b, c); }
inline vf   max  (vf a, vf b)             { return _mm256_max_ps(a, b); }
inline float hmax(vf a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float hsum(vf a) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}

inline vi   iload (const int32_t * p)     { return _mm256_loadu_si256((const __m256i *) p); }
inline vf   gather(const float * p, vi i) { return _mm256_i32gather_ps(p, i, 4); }
inline vi   gather_bytes(const uint8_t * p, vi offset) { return _mm256_i32gather_epi32((const int *) p, offset, 1); }
inline vi   shift_right (vi a, int n)                  { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
template <int n> inline vi shift_right(vi a)           { return _mm256_srli_epi32(a, n); }
inline vi   shift_left  (vi a, int n)                  { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
inline vi   bit_or      (vi a, vi b)                   { return _mm256_or_si256(a, b); }
inline void load_pieces(const uint8_t * p, const int32_t * offsets, vi * word) {
    vi x[4];
    for (int i = 0; i < 4; ++i) { // rows i, i + 4
        const auto piece = [&](int l) { return _mm_loadu_si128((const __m128i *) (p + offsets[i + 4*l])); };
        x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(0)), piece(1), 1);
    }
    const vi lo[2] = { _mm256_unpacklo_epi32(x[0], x[1]), _mm256_unpacklo_epi32(x[2], x[3]) };
    const vi hi[2] = { _mm256_unpackhi_epi32(x[0], x[1]), _mm256_unpackhi_epi32(x[2], x[3]) };
    word[0] = _mm256_unpacklo_epi64(lo[0], lo[1]);
    word[1] = _mm256_unpackhi_epi64(lo[0], lo[1]);
    word[2] = _mm256_unpacklo_epi64(hi[0], hi[1]);
    word[3] = _mm256_unpackhi_epi64(hi[0], hi[1]);
}

template <int w> inline vf lookup(const float * table, vi index) {
    if constexpr (w <= 3) {
        return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    } else if constexpr (w == 4) {
        const vf low  = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table),     index);
        const vf high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))); // bit 3 becomes the sign
    } else {
        return gather(table, _mm256_and_si256(index, _mm256_set1_epi32((1 << w) - 1)));
    }
}

inline vf   vexp(vf x)                    { return ggml_v_expf(x); }

} // namespace kvtc

#else

namespace kvtc {

constexpr int W = 8;
struct vf { float   x[W]; };
struct vi { int32_t x[W]; };

#define KVTC_EACH(expr) do { for (int l = 0; l < W; ++l) { r.x[l] = (expr); } } while (0)

inline vf   load (const float * p)        { vf r; memcpy(r.x, p, sizeof(r.x)); return r; }
inline void store(float * p, vf a)        { memcpy(p, a.x, sizeof(a.x)); }
inline vf   set1 (float x)                { vf r; KVTC_EACH(x); return r; }
inline vf   add  (vf a, vf b)             { vf r; KVTC_EACH(a.x[l] + b.x[l]); return r; }
inline vf   mul  (vf a, vf b)             { vf r; KVTC_EACH(a.x[l]*b.x[l]); return r; }
inline vf   fma  (vf a, vf b, vf c)       { vf r; KVTC_EACH(a.x[l]*b.x[l] + c.x[l]); return r; }
inline vf   fnma (vf a, vf b, vf c)       { vf r; KVTC_EACH(c.x[l] - a.x[l]*b.x[l]); return r; }
inline vf   max  (vf a, vf b)             { vf r; KVTC_EACH(a.x[l] > b.x[l] ? a.x[l] : b.x[l]); return r; }
inline float hmax(vf a)                   { float m = a.x[0]; for (float x : a.x) { m = x > m ? x : m; } return m; }
inline float hsum(vf a)                   { float s = 0.0f; for (float x : a.x) { s += x; } return s; }

inline vi   iload (const int32_t * p)     { vi r; memcpy(r.x, p, sizeof(r.x)); return r; }
inline vf   gather(const float * p, vi i) { vf r; KVTC_EACH(p[i.x[l]]); return r; }
inline vi   gather_bytes(const uint8_t * p, vi offset) {
    vi r;
    for (int l = 0; l < W; ++l) {
        const uint8_t * q = p + offset.x[l];
        r.x[l] = (int32_t) ((uint32_t) q[0] | (uint32_t) q[1] << 8 | (uint32_t) q[2] << 16 | (uint32_t) q[3] << 24);
    }
    return r;
}
inline vi   shift_right(vi a, int n)      { vi r; KVTC_EACH((int32_t) ((uint32_t) a.x[l] >> n)); return r; }
template <int n> inline vi shift_right(vi a) { return shift_right(a, n); }
inline vi   shift_left (vi a, int n)      { vi r; KVTC_EACH((int32_t) ((uint32_t) a.x[l] << n)); return r; }
inline vi   bit_or     (vi a, vi b)       { vi r; KVTC_EACH(a.x[l] | b.x[l]); return r; }
inline void load_pieces(const uint8_t * p, const int32_t * offsets, vi * word) {
    for (int i = 0; i < 4; ++i) {
        word[i] = gather_bytes(p + 4*i, iload(offsets));
    }
}

template <int w> inline vf lookup(const float * table, vi index) { vf r; KVTC_EACH(table[index.x[l] & ((1 << w) - 1)]); return r; }

inline vf   vexp(vf a)                    { vf r; KVTC_EACH(expf(a.x[l])); return r; }

#undef KVTC_EACH

} // namespace kvtc

#endif
