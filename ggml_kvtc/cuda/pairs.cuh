// Codes to coefficients, eight at a time and without a branch on their width, looked up two at a time.
#pragma once

#include "tables.cuh"

namespace kvtc {

using pair_code = ggml_kvtc_cuda_pair_code; // its table is an address in shared memory here

__device__ __forceinline__ pair_code load_code(const pair_code * code) {
    const uint4 x = *(const uint4 *) code;
    return { x.x, x.y, x.z, x.w };
}

// of a table: what it reads never changes, so the compiler may move it
template <int offset = 0>
__device__ __forceinline__ uint32_t look_up(uint32_t address) {
    uint32_t x;
    asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(x) : "r"(address), "n"(offset));
    return x;
}

// the width of a group's codes, of a pair code's shift
template <int D>
__device__ __forceinline__ uint32_t get_width(uint32_t shift) {
    return D < 256 ? shift >> 9 & 15 : shift >> 9;
}

// the two words that hold eight codes of at most 5 bits
__device__ __forceinline__ uint2 load_words(const uint8_t * row, const pair_code & code) {
    const uint32_t * word = (const uint32_t *) (row + code.word);
    return make_uint2(word[0], word[1]);
}

// 32 bits of these, from any on
__device__ __forceinline__ uint32_t get_bits(const uint2 & words, uint32_t from) {
    return (uint32_t) (((uint64_t) words.y << 32 | words.x) >> from);
}

// Eight codes looked up in pairs; of single levels, something. b0: bits from the first code on; last: gives what the last pair begins at
// the third bit of, from the same of the pair before
template <int D, typename T>
__device__ __forceinline__ uint4 look_up_pairs(uint32_t b0, const pair_code & code, const T & last) {
    constexpr int COLUMN = GGML_KVTC_CUDA_COLUMN(D);
    const uint32_t two = code.shift >> 8;
    const uint32_t b1  = __funnelshift_r(b0, 0, two - 2); // shifts modulo 32: what wide and empty groups get does not count
    const uint32_t b2  = __funnelshift_r(b1, 0, two);
    const uint32_t b3  = last(b2);
    return make_uint4(look_up((b0 << 2 & code.mask) ^ code.table), look_up<1*COLUMN>((b1 & code.mask) ^ code.table),
        look_up<2*COLUMN>((b2 & code.mask) ^ code.table), look_up<3*COLUMN>((b3 & code.mask) ^ code.table));
}

// of at most 4 bits
template <int D>
__device__ __forceinline__ uint4 decode_bits(uint32_t bits, const pair_code & code) {
    return look_up_pairs<D>(bits, code, [&](uint32_t b2) { return __funnelshift_r(b2, 0, code.shift >> 8); });
}

template <int D>
__device__ __forceinline__ uint4 decode_words(const uint2 & words, const pair_code & code) {
    const uint32_t first = __funnelshift_r(words.x, words.y, code.shift); // its lowest 5 bits count
    if constexpr (D >= 256) { // no pair has 5
        return decode_bits<D>(first, code);
    }
    return look_up_pairs<D>(first, code, [&](uint32_t) { return get_bits(words, code.shift >> 16); });
}

template <int D>
__device__ __forceinline__ uint4 decode_eight(const uint8_t * row, const pair_code & code) {
    return decode_words<D>(load_words(row, code), code);
}

constexpr int LEVEL_SHIFT = 7;
static_assert(1 << LEVEL_SHIFT == GGML_KVTC_CUDA_LEVEL, "indices of banks are shifted by another number of bits");

// Eight codes of `width` bits, of which the first and the fifth begin at these bits of the words, looked up one by one in banks. mask: of an
// index; table: of the lane's bank; both levels of a pair of components lie there together, those of pairs COLUMN bytes apart
template <int COLUMN>
__device__ __forceinline__ uint4 look_up_levels(const uint2 & words, uint32_t first, uint32_t fifth, uint32_t width, uint32_t mask, uint32_t table) {
    uint32_t bits = __funnelshift_r(words.x, words.y, first) << LEVEL_SHIFT; // shifts are modulo 32
    const auto next = [&] {
        const uint32_t at = (bits & mask) | table;
        bits = __funnelshift_r(bits, 0, width);
        return at;
    };
    uint32_t at[8];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        at[c] = next();
    }
    bits = get_bits(words, fifth) << LEVEL_SHIFT;
#pragma unroll
    for (int c = 4; c < 8; ++c) {
        at[c] = next();
    }
    return make_uint4(__byte_perm(look_up(at[0]), look_up(at[1]), 0x7610),
        __byte_perm(look_up<1*COLUMN>(at[2]), look_up<1*COLUMN>(at[3]), 0x7610),
        __byte_perm(look_up<2*COLUMN>(at[4]), look_up<2*COLUMN>(at[5]), 0x7610),
        __byte_perm(look_up<3*COLUMN>(at[6]), look_up<3*COLUMN>(at[7]), 0x7610));
}

// Those of values' first eight groups; of single levels, something. bank: of the group's four, the lane's
template <int D>
__device__ __forceinline__ uint4 decode_levels(const uint8_t * row, const pair_code & code, int bank) {
    return look_up_levels<GGML_KVTC_CUDA_COLUMN(D)>(load_words(row, code), code.shift, code.shift >> 16, code.shift >> 9, code.mask, code.table + 4*bank);
}

// The same of the other groups, in pairs; bank: which the lane begins with
__device__ __forceinline__ uint4 decode_turned_pairs(const uint8_t * row, const pair_code & code, int bank) {
    const uint2    words = load_words(row, code);
    const uint32_t bits  = __funnelshift_r(words.x, words.y, code.shift);
    const uint32_t two   = code.shift >> 8 & 31;
    uint32_t x[4]; // pair bank ^ n
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const uint32_t pair = bank ^ n;
        x[n] = look_up((__funnelshift_r(bits << LEVEL_SHIFT, bits >> (32 - LEVEL_SHIFT), two*pair) & code.mask) + (code.table + 4*pair));
    }
    const bool odd = bank & 1;
    const uint4 y = make_uint4(odd ? x[1] : x[0], odd ? x[0] : x[1], odd ? x[3] : x[2], odd ? x[2] : x[3]);
    return bank & 2 ? make_uint4(y.z, y.w, y.x, y.y) : y;
}

// Eight codes of a group of values, of set group/8
template <int D, int SET>
__device__ __forceinline__ uint4 decode_banks(const uint8_t * row, const pair_code & code, int bank) {
    if constexpr (SET == 0) {
        return decode_levels<D>(row, code, bank);
    } else {
        return decode_turned_pairs(row, code, bank);
    }
}

// a level, of a table
__device__ __forceinline__ uint32_t look_up_one(uint32_t address) {
    uint16_t x;
    asm("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address));
    return x;
}

// eight codes of single levels, of 4 bits or more
template <int D>
__device__ __forceinline__ uint4 decode_wide(const uint8_t * row, const pair_code & code) {
    const uint32_t * word = (const uint32_t *) (row + code.word);
    const uint32_t w    = get_width<D>(code.shift);
    const uint32_t low  = __funnelshift_r (word[0], word[1], code.shift);
    const uint32_t high = __funnelshift_rc(low, __funnelshift_r(word[1], word[2], code.shift), 4*w); // the last four
    const uint32_t mask = (2u << w) - 2;
    uint32_t x[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const uint32_t bits = c < 4 ? low : high;
        x[c] = look_up_one(((c%4 == 0 ? bits << 1 : bits >> (c%4*w - 1)) & mask) | (code.table + (2*c << w))); // levels of one component are aligned to their size
    }
    return make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
}

// are its levels single?
__device__ __forceinline__ bool is_wide(const pair_code & code) {
    return code.shift & GGML_KVTC_CUDA_SINGLE;
}

// A group of single levels of 16 rows, by a whole warp: a lane has one component of every fourth row
template <int D>
__device__ __forceinline__ void decode_wide_rows(const uint8_t * rows, int stride, const pair_code & code, uint4 * to) {
    const uint32_t lane  = threadIdx.x % 32;
    const uint32_t w     = get_width<D>(code.shift);
    const uint32_t bit   = code.shift % 32 + lane%8*w;
    const uint32_t mask  = (2u << w) - 2;
    const uint32_t table = code.table + (2*(lane%8) << w);
    const uint8_t * from = rows + code.word + bit/32*4 + lane/8*stride;
    uint32_t x[4]; // all are on their way before the first is written
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t * word = (const uint32_t *) (from + 4*i*stride);
        x[i] = look_up_one(table + (__funnelshift_r(word[0], word[1], bit) << 1 & mask));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        ((uint16_t *) to)[32*i + lane] = (uint16_t) x[i];
    }
}

// n groups from `codes` on: those of single levels come to `to`, one after the other, for use(number of the n) to take
// from there
template <int D, typename T>
__device__ __forceinline__ void for_wide(const pair_code * codes, int n, const uint8_t * rows, int stride, uint4 * to, const T & use) {
#pragma unroll 1
    for (int g = 0; g < n; ++g) {
        const pair_code code = load_code(codes + g);
        if (is_wide(code)) {
            decode_wide_rows<D>(rows, stride, code, to);
            __syncwarp();
            use(g);
            __syncwarp();
        }
    }
}

} // namespace kvtc
