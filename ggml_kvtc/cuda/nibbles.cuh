// Codes to coefficients by permutations of bytes: a thread that decodes the same eight components of many rows holds their levels in
// registers. Four rows are looked up at once.
#pragma once

#include "pairs.cuh"

namespace kvtc {

// 16 levels of eight components, the lower and the upper bytes of their f16. Fewer levels are repeated, so that whatever lies
// above a code's bits in its nibble does not count.
struct level_bytes {
    uint32_t lower[8][4];
    uint32_t upper[8][4];
};

// a permutation of the bytes of x, y; the highest bit of a nibble of `which` must be 0
__device__ __forceinline__ uint32_t permute(uint32_t x, uint32_t y, uint32_t which) {
    uint32_t z;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(which)); // __byte_perm masks `which` once more
    return z;
}

// bits of x where mask is 1, of y where it is 0
__device__ __forceinline__ uint32_t choose(uint32_t mask, uint32_t x, uint32_t y) {
    return (x & mask) | (y & ~mask);
}

// In shared memory, [group of 8 groups][component][lower, upper][group] of four words: threads of eight groups read neighbours.
constexpr int LEVEL_BYTES = 256; // of a group

// of component c of a group's f16 [8][2^width]; of no bits or more than 4, zeros
__device__ __forceinline__ void read_levels(uint32_t (&x)[8], const half * levels, int width, int c) {
    const uint32_t * pairs = (const uint32_t *) (levels + (c << width));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x[i] = width > 0 && width <= 4 ? pairs[i & (((1 << width) - 1) >> 1)] : 0;
    }
}

__device__ __forceinline__ void store_levels(uint4 * to, const uint32_t (&x)[8], int group, int c) {
    to += (group/8*16 + 2*c)*8 + group%8;
    to[0] = make_uint4(permute(x[0], x[1], 0x6420), permute(x[2], x[3], 0x6420), permute(x[4], x[5], 0x6420), permute(x[6], x[7], 0x6420));
    to[8] = make_uint4(permute(x[0], x[1], 0x7531), permute(x[2], x[3], 0x7531), permute(x[4], x[5], 0x7531), permute(x[6], x[7], 0x7531));
}

__device__ __forceinline__ void load_levels(level_bytes & t, const uint4 * from, int group) {
    from += group/8*16*8 + group%8;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const uint4 x = from[2*c*8];
        const uint4 y = from[2*c*8 + 8];
        t.lower[c][0] = x.x; t.lower[c][1] = x.y; t.lower[c][2] = x.z; t.lower[c][3] = x.w;
        t.upper[c][0] = y.x; t.upper[c][1] = y.y; t.upper[c][2] = y.z; t.upper[c][3] = y.w;
    }
}

// eight codes of `width` bits to nibbles
__device__ __forceinline__ uint32_t spread(uint32_t x, uint32_t width) {
    x = choose(0x0000ffff, x, x << ((16 - 4*width) & 31));
    x = choose(0x00ff00ff, x, x << ((8 - 2*width) & 31));
    return choose(0x0f0f0f0f, x, x << ((4 - width) & 31));
}

// codes[n]: the nibbles of row n; x[c][0]: component c of rows 0 and 1; x[c][1]: of rows 2 and 3
__device__ __forceinline__ void decode_four(const uint32_t (&codes)[4], const level_bytes & t, uint32_t (&x)[8][2]) {
    constexpr uint32_t LOW = 0x0f0f0f0f;
    const uint32_t byte[2][2] = { // of even and odd components: bytes of rows 0 and 1, of rows 2 and 3
        { choose(LOW, codes[0], codes[1] << 4), choose(LOW, codes[2], codes[3] << 4) },
        { choose(LOW, codes[0] >> 4, codes[1]), choose(LOW, codes[2] >> 4, codes[3]) },
    };
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t four  = permute(byte[odd][0], byte[odd][1], i == 0 ? 0x5140 : 0x7362); // four rows' codes of two components
            const uint32_t index = four & 0x77777777;
            const uint32_t half  = ((four >> 1) & 0x44444444) | 0x32103210; // which half of the levels
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int c = 4*i + 2*j + odd;
                const auto look = [&](const uint32_t (&of)[4]) {
                    return permute(permute(of[0], of[1], index >> 16*j), permute(of[2], of[3], index >> 16*j), half >> 16*j);
                };
                const uint32_t lower = look(t.lower[c]);
                const uint32_t upper = look(t.upper[c]);
                x[c][0] = permute(lower, upper, 0x5140);
                x[c][1] = permute(lower, upper, 0x7362);
            }
        }
    }
}

// component c of row n becomes half c of y
__device__ __forceinline__ void set_row(uint32_t (&x)[8][2], int n, const uint4 & y) {
    const uint32_t from[4] = { y.x, y.y, y.z, y.w };
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        x[c][n/2] = permute(x[c][n/2], from[c/2], n%2 == 0 ? (c%2 == 0 ? 0x3254 : 0x3276) : (c%2 == 0 ? 0x5410 : 0x7610));
    }
}

// eight codes of more than 4 bits, whose levels may lie anywhere
__device__ __forceinline__ uint4 look_up_wide(const uint8_t * row, const pair_code & code, const half * levels) {
    const uint32_t * word = (const uint32_t *) (row + code.word);
    uint32_t lo = __funnelshift_r(word[0], word[1], code.shift);
    uint32_t hi = __funnelshift_r(word[1], word[2], code.shift);
    const uint32_t w = code.shift >> 9;
    uint32_t x[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        x[c] = __half_as_ushort((levels + (c << w))[lo & ((1u << w) - 1)]);
        lo = __funnelshift_r(lo, hi, w);
        hi >>= w;
    }
    return make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
}

} // namespace kvtc
