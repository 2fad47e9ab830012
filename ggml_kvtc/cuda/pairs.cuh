// Codes to coefficients without a branch on their width: two lanes share a row, each takes every other group of eight, and looks
// its codes up two at a time. What a group needs (where it lies, how wide it is, where its tables are) is read from shared memory.
#pragma once

#include "tables.cuh"

namespace kvtc {

using pair_code = ggml_kvtc_cuda_pair_code; // its table is an address in shared memory here

__device__ __forceinline__ uint32_t look_up(uint32_t address) {
    uint32_t x;
    asm("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

// eight codes of more than 4 bits
__device__ __forceinline__ uint4 decode_wide(const uint8_t * row, const pair_code & code) {
    const uint32_t * word = (const uint32_t *) (row + code.word);
    const uint64_t bits = (uint64_t) __funnelshift_r(word[1], word[2], code.shift) << 32 | __funnelshift_r(word[0], word[1], code.shift);
    const uint32_t w    = code.shift >> 9;
    uint32_t x[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const uint32_t at = code.table + 2*((c << w) + ((uint32_t) (bits >> c*w) & ((1u << w) - 1)));
        x[c] = look_up(at & ~3u) >> 8*(at & 2) & 0xffff;
    }
    return make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
}

// Coefficients of a warp's 16 rows into a tile. row: of lane % 16; n_wide: pairs of groups, the first ones, of which one may be wide
template <int D, typename T, bool with_gain>
__device__ __forceinline__ void decode_pairs(const uint8_t * row, const pair_code * codes, int n_wide, float gain, half * tile) {
    const int   lane = threadIdx.x % 32;
    const half2 g2   = __floats2half2_rn(gain, gain);
    uint4     * out  = (uint4 *) tile + lane%16*T::row + lane/16*T::group;
    const auto put = [&](int i, const uint4 & x) {
        out[2*i*T::group] = with_gain ? make_uint4(mul_half2(x.x, g2), mul_half2(x.y, g2), mul_half2(x.z, g2), mul_half2(x.w, g2)) : x;
    };
    constexpr int U = D/16 < 8 ? D/16 : 8;
#pragma unroll
    for (int i0 = 0; i0 < D/16; i0 += U) { // the compiler would not move loads over the stores
        uint4 x[U];
#pragma unroll
        for (int i = 0; i < U; ++i) {
            const uint4      code = *(const uint4 *) (codes + 2*(i0 + i) + lane/16); // table, word, shift, mask
            const uint32_t * word = (const uint32_t *) (row + code.y);
            const uint32_t   size = code.w + 4;
            const uint32_t   two  = code.z >> 8;
            const uint32_t   b0   = __funnelshift_r(word[0], word[1], code.z); // its lowest 5 bits count
            const uint32_t   b1   = __funnelshift_r(b0, 0, two - 2); // shifts modulo 32: what wide and empty groups get does not count
            const uint32_t   b2   = __funnelshift_r(b1, 0, two);
            const uint32_t   b3   = __funnelshift_r(b2, 0, two);
            x[i].x = look_up((b0 << 2 & code.w) | code.x);
            x[i].y = look_up((b1 & code.w) | (code.x + size));
            x[i].z = look_up((b2 & code.w) | (code.x + 2*size));
            x[i].w = look_up((b3 & code.w) | (code.x + 3*size));
        }
#pragma unroll
        for (int i = 0; i < U; ++i) {
            put(i0 + i, x[i]);
        }
    }
#pragma unroll 1
    for (int i = 0; i < n_wide; ++i) {
        const pair_code & code = codes[2*i + lane/16];
        if (code.shift >> 8 > 8) {
            put(i, decode_wide(row, code));
        }
    }
}

} // namespace kvtc
