// Codes to coefficients without a branch on their width: two lanes share a row, each takes every other group of eight, and looks
// its codes up two at a time. What a group needs (where it lies, how wide it is, where its tables are) is read from shared memory.
#pragma once

#include "tables.cuh"

namespace kvtc {

struct __align__(16) pair_code {
    uint32_t table; // address in shared memory, a multiple of a table's size: four tables of 4^w pairs; wide: [8][2^w] f16
    uint32_t word;  // byte offset in the row, a multiple of 4
    uint32_t shift; // bits from there to the first code | 2*width << 8
    uint32_t mask;  // of a pair's index, times 4; 0 for more than 4 bits
};

// Bytes of a group's tables in shared memory; groups without bits share 16 bytes of zeros. Small tables have a fifth place: odd
// groups start one later, so that the two halves of a warp, which read neighbouring groups, use different banks.
__device__ __forceinline__ int pair_bytes(int w) {
    return w == 0 ? 0 : w <= 4 ? (w <= 2 ? 20 : 16) << 2*w : 16 << w;
}

__device__ __forceinline__ uint32_t look_up(uint32_t address) {
    uint32_t x;
    asm("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

// Where group g of a head has its tables, counted from the head's first: the larger the earlier, so that all are aligned to their
// size. Zeros come last.
__device__ __forceinline__ int find_pairs(const ggml_kvtc_cuda_code * codes, int n, int g) {
    const int mine = pair_bytes(codes[g].width);
    int at = 0;
    for (int i = 0; i < n; ++i) {
        const int other = pair_bytes(codes[i].width);
        at += other > mine || (other == mine && i < g) ? other : 0;
    }
    if (g % 2 == 1 && (codes[g].width == 1 || codes[g].width == 2)) {
        at += mine/5;
    }
    return at;
}

// The levels of a group of 4 bits, on their way to fill_pairs.
struct pair_levels {
    uint32_t x[8];
};

__device__ __forceinline__ void load_levels(int w, const char * from, pair_levels & level) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        level.x[c] = w == 4 ? ((const uint16_t *) from)[c*16 + threadIdx.x%16] : 0;
    }
}

// A warp fills the tables of one group; from: the pack's.
__device__ __forceinline__ void fill_pairs(int w, const char * from, const pair_levels & level, uint8_t * to) {
    const int lane = threadIdx.x % 32;
    if (w == 0) {
        if (lane == 0) {
            *(uint4 *) to = make_uint4(0, 0, 0, 0);
        }
    } else if (w != 4) {
        for (int i = lane; i < (w <= 4 ? 1 << 2*w : 1 << w); i += 32) {
            ((uint4 *) to)[i] = ((const uint4 *) from)[i];
        }
    } else {
#pragma unroll
        for (int p = 0; p < 4; ++p) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const uint32_t next = __shfl_sync(0xffffffff, level.x[2*p + 1], 2*j + lane/16);
                ((uint32_t *) to)[p*256 + 32*j + lane] = level.x[2*p] | next << 16;
            }
        }
    }
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
