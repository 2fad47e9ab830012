#include "kvtc-rows-lanes.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__GNUC__) && defined(__x86_64__)
#define KVTC_AVX2 __attribute__((target("avx2")))
#include <immintrin.h>
#endif

namespace {

constexpr int      LANES = GGML_KVTC_LANES;
constexpr uint32_t PLACE = KVTC_PROB_SUM - 1;

inline uint32_t load16(const uint8_t * p) {
    return (uint32_t) p[0] | (uint32_t) p[1] << 8;
}

inline uint32_t entry(int v, uint32_t f) {
    return (uint32_t) v << 24 | (f & PLACE) << GGML_KVTC_PROB_BITS;
}

// A value, and the state without it; what the state then lacks is due from the words.
inline uint8_t take_value(uint32_t & x, const kvtc_places & places) {
    const uint32_t e = places.at[x & PLACE];
    x = (e >> GGML_KVTC_PROB_BITS & PLACE)*(x >> GGML_KVTC_PROB_BITS) + (e & PLACE);
    return (uint8_t) (e >> 24);
}

// As many whole steps of LANES rows as have their words for certain. Returns the rows done.
int64_t decode_plain(kvtc_lanes & lanes, const kvtc_places & places, uint8_t * values, int64_t n) {
    uint32_t x[LANES]; // values are bytes, which the compiler takes for aliases of anything but locals
    std::copy_n(lanes.x, LANES, x);
    const uint8_t * p = lanes.p;
    int64_t t = 0;
    for (; t + LANES <= n && lanes.end - p >= 2*LANES; t += LANES) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES; ++i) {
            uint32_t next = x[i];
            values[t + i] = take_value(next, places);
            // no branch: whether a word is due is as good as random
            const uint32_t full = next << 16 | load16(p);
            const uint32_t low  = next < KVTC_LOW;
            x[i] = next + ((full - next) & (0u - low));
            p += 2*low;
        }
    }
    std::copy_n(x, LANES, lanes.x);
    lanes.p = p;
    return t;
}

#ifdef KVTC_AVX2

// Of eight lanes, which of the next words each takes: the words go to the lanes that are due, in order.
struct word_places {
    uint64_t of[256];

    constexpr word_places() : of() {
        for (int mask = 0; mask < 256; ++mask) {
            for (int i = 0, n = 0; i < 8; ++i) {
                of[mask] |= (uint64_t) (mask >> i & 1 ? n++ : 0) << 8*i;
            }
        }
    }
};
constexpr word_places WORDS;

// Asked for once a column or table: what is kept between calls would be state of the whole process.
bool use_avx2() {
    return __builtin_cpu_supports("avx2") && !getenv("GGML_KVTC_NO_VECTORS");
}

// As many whole steps of LANES rows as have their words for certain. Returns the rows done.
KVTC_AVX2 int64_t decode_avx2(kvtc_lanes & lanes, const kvtc_places & places, uint8_t * values, int64_t n) {
    constexpr int V = LANES/8;
    const __m256i place = _mm256_set1_epi32(PLACE);
    const uint8_t * p = lanes.p;
    __m256i x[V];
    for (int v = 0; v < V; ++v) {
        x[v] = _mm256_load_si256((const __m256i *) (lanes.x + 8*v));
    }
    int64_t t = 0;
    for (; t + LANES <= n && lanes.end - p >= 2*LANES + 16; t += LANES) { // a step takes 2*LANES bytes at most, the last load is of 16
        __m256i e[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            e[v] = _mm256_i32gather_epi32((const int *) places.at, _mm256_and_si256(x[v], place), 4);
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __m256i f = _mm256_and_si256(_mm256_srli_epi32(e[v], GGML_KVTC_PROB_BITS), place);
            x[v] = _mm256_add_epi32(_mm256_mullo_epi32(f, _mm256_srli_epi32(x[v], GGML_KVTC_PROB_BITS)), _mm256_and_si256(e[v], place));
            const __m256i  low  = _mm256_cmpeq_epi32(_mm256_srli_epi32(x[v], 16), _mm256_setzero_si256());
            const unsigned mask = (unsigned) _mm256_movemask_ps(_mm256_castsi256_ps(low));
            const __m256i  to   = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) &WORDS.of[mask]));
            const __m256i  word = _mm256_permutevar8x32_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) p)), to);
            x[v] = _mm256_blendv_epi8(x[v], _mm256_or_si256(_mm256_slli_epi32(x[v], 16), word), low);
            p += 2*__builtin_popcount(mask);
        }
        for (int v = 0; v < V; v += 2) { // the upper bytes of sixteen entries
            __m256i s = _mm256_packus_epi32(_mm256_srli_epi32(e[v], 24), _mm256_srli_epi32(e[v + 1], 24));
            s = _mm256_permute4x64_epi64(s, 0xd8);
            _mm_storeu_si128((__m128i *) (values + t + 8*v), _mm_packus_epi16(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1)));
        }
    }
    for (int v = 0; v < V; ++v) {
        _mm256_store_si256((__m256i *) (lanes.x + 8*v), x[v]);
    }
    lanes.p = p;
    return t;
}

KVTC_AVX2 void fill_avx2(kvtc_places & places, const uint16_t * frequencies, int n_values) {
    const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i eight = _mm256_set1_epi32(8);
    uint32_t * at = places.at;
    for (int v = 0; v < n_values; ++v) {
        const uint32_t f = frequencies[v];
        __m256i e = _mm256_add_epi32(_mm256_set1_epi32((int) entry(v, f)), first);
        // two without asking: most values have fewer places, and a wrong guess of a branch costs more than a store
        _mm256_storeu_si256((__m256i *) at, e);
        _mm256_storeu_si256((__m256i *) (at + 8), _mm256_add_epi32(e, eight));
        for (uint32_t i = 16; i < f; i += 8) {
            e = _mm256_add_epi32(e, eight);
            _mm256_storeu_si256((__m256i *) (at + i), _mm256_add_epi32(e, eight));
        }
        at += f;
    }
}

// Two rows' eight bytes to two numbers of 8*bits bits, as base64 is decoded.
KVTC_AVX2 inline __m128i pack_bits(__m128i bytes, int bits) {
    if (bits == 8) {
        return bytes;
    }
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16((short) (1 << bits << 8 | 1)));
    const __m128i fours = _mm_madd_epi16(pairs, _mm_set1_epi32(1 << 2*bits << 16 | 1));
    const __m128i low   = _mm_and_si128(fours, _mm_set1_epi64x(0xffffffff));
    return _mm_or_si128(low, _mm_slli_epi64(_mm_srli_epi64(fours, 32), 4*bits));
}

// Rows eight at a time; returns the rows done. Writes 8 bytes a row where the row has as many from here on: those that are too
// many belong to units that come later.
template <int B>
KVTC_AVX2 int64_t put_avx2(const kvtc_unit & unit, const uint8_t * values, size_t n_values, uint8_t * rows, size_t stride, int64_t n) {
    const bool whole = unit.byte + 8 <= stride;
    int64_t t = 0;
    for (; t + 8 <= n; t += 8) {
        __m128i c[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            c[i] = i < unit.n_columns ? _mm_loadl_epi64((const __m128i *) (values + i*n_values + (size_t) t)) : _mm_setzero_si128();
        }
        // rows for columns: neighbours of bytes, of pairs, of fours
        const __m128i a0 = _mm_unpacklo_epi8(c[0], c[1]), a1 = _mm_unpacklo_epi8(c[2], c[3]);
        const __m128i a2 = _mm_unpacklo_epi8(c[4], c[5]), a3 = _mm_unpacklo_epi8(c[6], c[7]);
        const __m128i b0 = _mm_unpacklo_epi16(a0, a1), b1 = _mm_unpackhi_epi16(a0, a1);
        const __m128i b2 = _mm_unpacklo_epi16(a2, a3), b3 = _mm_unpackhi_epi16(a2, a3);
        const __m128i two[4] = { _mm_unpacklo_epi32(b0, b2), _mm_unpackhi_epi32(b0, b2), _mm_unpacklo_epi32(b1, b3), _mm_unpackhi_epi32(b1, b3) };
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m128i  packed = pack_bits(two[i], B);
            const uint64_t word[2] = { (uint64_t) _mm_cvtsi128_si64(packed), (uint64_t) _mm_extract_epi64(packed, 1) };
            for (int k = 0; k < 2; ++k) {
                uint8_t * row = rows + (size_t) (t + 2*i + k)*stride + unit.byte;
                if (whole) {
                    memcpy(row, &word[k], 8);
                } else {
                    memcpy(row, &word[k], unit.n_bytes);
                }
            }
        }
    }
    return t;
}

#endif

} // namespace

void kvtc_fill_places(kvtc_places & places, const uint16_t * frequencies, int n_values) {
#ifdef KVTC_AVX2
    if (use_avx2()) {
        return fill_avx2(places, frequencies, n_values);
    }
#endif
    uint32_t * at = places.at;
    for (int v = 0; v < n_values; ++v) {
        const uint32_t f = frequencies[v];
        for (uint32_t i = 0; i < f; i += 8) { // eight without asking, as with vectors
            for (uint32_t k = 0; k < 8; ++k) {
                at[i + k] = entry(v, f) + i + k;
            }
        }
        at += f;
    }
}

bool kvtc_decode_column(kvtc_lanes & lanes, const kvtc_places & places, uint8_t * values, int64_t n) {
    int64_t t = 0;
#ifdef KVTC_AVX2
    if (use_avx2()) {
        t = decode_avx2(lanes, places, values, n);
    }
#endif
    t += decode_plain(lanes, places, values + t, n - t);
    for (; t < n; ++t) { // near the end of the words, and what is no multiple of the lanes
        uint32_t & x = lanes.x[t % LANES];
        values[t] = take_value(x, places);
        if (x < KVTC_LOW) {
            if (lanes.end - lanes.p < 2) {
                return false;
            }
            x = x << 16 | load16(lanes.p);
            lanes.p += 2;
        }
    }
    return true;
}

void kvtc_put_columns(const kvtc_unit & unit, const uint8_t * values, size_t n_values, uint8_t * rows, size_t stride, int64_t n) {
    int64_t t = 0;
#ifdef KVTC_AVX2
    if (unit.n_columns > 1 && use_avx2()) {
        switch (unit.column_bits) {
            case 5: t = put_avx2<5>(unit, values, n_values, rows, stride, n); break;
            case 6: t = put_avx2<6>(unit, values, n_values, rows, stride, n); break;
            case 8: t = put_avx2<8>(unit, values, n_values, rows, stride, n); break;
            default: break;
        }
    }
#endif
    if (unit.column_bits == 8) {
        for (int c = 0; c < unit.n_columns; ++c) {
            for (int64_t i = t; i < n; ++i) {
                rows[(size_t) i*stride + unit.byte + c] = values[c*n_values + (size_t) i];
            }
        }
        return;
    }
    for (; t < n; ++t) {
        uint64_t word = 0;
        for (int c = 0; c < unit.n_columns; ++c) {
            word |= (uint64_t) values[c*n_values + (size_t) t] << unit.column_bits*c;
        }
        uint8_t * row = rows + (size_t) t*stride + unit.byte;
        for (int i = 0; i < unit.n_bytes; ++i) {
            row[i] = (uint8_t) (word >> 8*i);
        }
    }
}
