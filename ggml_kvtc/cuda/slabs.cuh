// Positions and masks of 16 cells as a warp of decode-sm90-d256.cu reads them, a slab of 64 cells ahead of their use.
#pragma once

#include "device.cuh"
#include "hopper.cuh"

namespace kvtc {

constexpr int SLAB90 = 16*GROUP_WARPS; // 16 cells for each warp of a group

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
            mask[0][0] = read_mask(a, of_mask, 0, mine);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                mask[i/2][i%2] = read_mask(a, of_mask, token[i%2], first + lane/4 + i/2*8);
            }
        }
    }

    // What positions hide; all threads ask. Not in `load`, which would wait for what it reads. query: ONE's position
    __device__ __forceinline__ void hide(const attn_args & a, int query, const int * query_pos, const int (&token)[2]) {
        if constexpr (ONE) {
            mask[0][0] = hide_by_position(a, mask[0][0], query, cell.x);
        } else if (a.n_span > 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int pos = __shfl_sync(0xffffffff, cell.x, threadIdx.x%32/4 + i/2*8);
                mask[i/2][i%2] = hide_by_position(a, mask[i/2][i%2], query_pos[max(0, token[i%2])], pos);
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
