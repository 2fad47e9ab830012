// What Hopper's decode kernels read of the pack before their first slab of 64 cells, and of the cache a slab ahead.
#pragma once

#include "device.cuh"
#include "hopper.cuh"
#include "stage.cuh"
#include "turn-sm90.cuh"

namespace kvtc {

constexpr int SLAB90 = 16*GROUP_WARPS; // 16 cells for each warp of a group

//
// of the pack, by all threads of a block
//

// matrix: [D/64][D columns][8 groups of 8 components], wgmma's operand with a swizzle of 128 bytes; of each 32 components, lane%4 == q
// of a product has the eight of group q as columns 2*q, 2*q + 1 of four steps. Then [D columns][8], the mean's upper and lower half
// and zeros, without a swizzle.
template <int D, int THREADS>
__device__ __forceinline__ void load_columns(half * matrix, const char * base, const ggml_kvtc_cuda_head & head, int rope_type, int n_rot) {
    // Lanes 8*p + c read piece p of column c's 64 bytes, so that a load touches few lines, and exchange words
    const int lane = threadIdx.x % 32;
    const bool odd[2] = { (lane & 8) != 0, (lane & 16) != 0 };
#pragma unroll (D/16)
    for (int i = threadIdx.x/32; i < D/8*(D/32); i += THREADS/32) {
        const int column = i%(D/8)*8 + lane%8;
        const int block  = i/(D/8); // of 32 components
        const uint4 from = ((const uint4 *) (at<half>(base, head.decode) + column_channel(column, rope_type, n_rot)*D))[block*4 + lane/8];
        uint32_t x[4] = { from.x, from.y, from.z, from.w };
#pragma unroll
        for (int k = 0; k < 2; ++k) { // word j of piece p and word p of piece j change places: bit 0, then bit 1, of p and j
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t & lower = x[k == 0 ? 2*j : j];
                uint32_t & upper = x[k == 0 ? 2*j + 1 : j + 2];
                const uint32_t other = __shfl_xor_sync(0xffffffff, odd[k] ? lower : upper, 8 << k);
                lower = odd[k] ? other : lower;
                upper = odd[k] ? upper : other;
            }
        }
        const int chunk = block%2*4 + lane/8; // of 64 components
        ((uint4 *) matrix)[(block/2*D + column)*8 + (chunk ^ column%8)] = make_uint4(x[0], x[1], x[2], x[3]);
    }
    for (int i = threadIdx.x; i < D; i += THREADS) {
        const float mean  = at<float>(base, head.mean)[column_channel(i, rope_type, n_rot)];
        const float upper = __half2float(__float2half(mean));
        ((uint4 *) matrix)[D/8*D + i] = make_uint4(pack_half2(upper, mean - upper), 0, 0, 0);
    }
}

// turns: [n][TURN_WORDS], (cos, cos) and (sin, sin) of pairs 16*u + 2*q, + 1, then of + 8, + 9, at word 16*u + 4*q
template <int D, int THREADS>
__device__ __forceinline__ void load_turns(uint32_t * turns, const uint4 * from, int n) {
    for (int i = threadIdx.x; i < n*(D/8); i += THREADS) {
        const uint4 x = from[i]; // (cos, sin) of pairs 4*j .. 4*j + 3
        const int   j = i%(D/8);
        uint32_t * to = turns + i/(D/8)*TURN_WORDS<D> + j/4*16 + j%2*8 + j/2%2*2;
        *(uint2 *)  to      = make_uint2(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632));
        *(uint2 *) (to + 4) = make_uint2(__byte_perm(x.z, x.w, 0x5410), __byte_perm(x.z, x.w, 0x7632));
    }
}

//
// of positions and masks: 16 cells, by a warp
//

// ONE: one token
template <bool ONE>
struct cells_ahead {
    int2 cell;                   // of lane % 16
    half mask[ONE ? 1 : 2][2];   // ONE: of that cell, in the first; else of cells lane/4 + 8*i for two tokens

    __device__ __forceinline__ void load(const attn_args & a, const int2 * info, const half * of_mask, const int (&token)[2], int first) {
        const int lane = threadIdx.x % 32;
        const int mine = first + lane%16;
        cell = info[min(mine, a.n_kv - 1)];
        if constexpr (ONE) {
            mask[0][0] = mine >= a.n_kv ? __ushort_as_half(0xfc00) : of_mask ? of_mask[mine] : __ushort_as_half(0);
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = first + lane/4 + 8*i;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    mask[i][e] = at >= a.n_kv || token[e] < 0 ? __ushort_as_half(0xfc00) : of_mask ? of_mask[token[e]*a.ne_m1 + at] : __ushort_as_half(0);
                }
            }
        }
    }

    __device__ __forceinline__ bool any_seen() const {
        if constexpr (ONE) {
            return is_seen(mask[0][0]);
        } else {
            return is_seen(mask[0][0]) || is_seen(mask[0][1]) || is_seen(mask[1][0]) || is_seen(mask[1][1]);
        }
    }

    // of cell lane/4 + 8*i, for the thread's token e; all threads ask
    __device__ __forceinline__ float get_mask(int i, int e) const {
        if constexpr (ONE) {
            return __shfl_sync(0xffffffff, __half2float(mask[0][0]), threadIdx.x%32/4 + 8*i);
        } else {
            return __half2float(mask[i][e]);
        }
    }
};

} // namespace kvtc
