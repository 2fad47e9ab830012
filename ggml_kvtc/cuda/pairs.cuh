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

// eight codes of at most 4 bits; of wider groups, something
__device__ __forceinline__ uint4 decode_eight(const uint8_t * row, const pair_code & code) {
    const uint32_t * word = (const uint32_t *) (row + code.word);
    const uint32_t   size = code.mask + 4;
    const uint32_t   two  = code.shift >> 8;
    const uint32_t   b0   = __funnelshift_r(word[0], word[1], code.shift); // its lowest 5 bits count
    const uint32_t   b1   = __funnelshift_r(b0, 0, two - 2); // shifts modulo 32: what wide and empty groups get does not count
    const uint32_t   b2   = __funnelshift_r(b1, 0, two);
    const uint32_t   b3   = __funnelshift_r(b2, 0, two);
    uint4 x;
    x.x = look_up((b0 << 2 & code.mask) | code.table);
    x.y = look_up((b1 & code.mask) | (code.table + size));
    x.z = look_up((b2 & code.mask) | (code.table + 2*size));
    x.w = look_up((b3 & code.mask) | (code.table + 3*size));
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

} // namespace kvtc
