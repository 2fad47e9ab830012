// What is read of a slab's cells in global memory, a slab ahead of its use.
#pragma once

#include "device.cuh"
#include "hopper.cuh"

namespace kvtc {

// ONE: one token, for which each warp knows of the whole slab what its group has in common
template <bool ONE>
struct slab_ahead {
    int2 cell;                 // (position, slot) of one of the 32 that hold the warp's
    half mask[ONE ? 1 : 2][2]; // of the thread's two cells and two queries; ONE: of that cell, and of one of the slab's other half
    int  pos;                  // ONE: of that one

    // first: the slab's first cell; part: the warp's 16 of its 64; token: of the thread's queries, or -1
    __device__ __forceinline__ void load(const attn_args & a, const half * mask_of, const int2 * info, const int (&token)[2], int first, int part) {
        const int lane = threadIdx.x % 32;
        const int mine = first + 32*(part/2) + lane;
        cell = info[min(mine, a.n_kv - 1)];
        if constexpr (ONE) {
            const int other = first + 32*(1 - part/2) + lane;
            pos = info[min(other, a.n_kv - 1)].x;
            mask[0][0] = read_mask(a, mask_of, 0, mine);
            mask[0][1] = read_mask(a, mask_of, 0, other);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                mask[i/2][i%2] = read_mask(a, mask_of, token[i%2], first + 16*part + lane/4 + i/2*8);
            }
        }
    }

    // What positions hide; all threads ask. Not in `load`, which would wait for what it reads. query: ONE's position
    __device__ __forceinline__ void hide(const attn_args & a, int query, const int * query_pos, const int (&token)[2], int part) {
        if constexpr (ONE) {
            mask[0][0] = hide_by_position(a, mask[0][0], query, cell.x);
            mask[0][1] = hide_by_position(a, mask[0][1], query, pos);
        } else if (a.n_span > 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = __shfl_sync(0xffffffff, cell.x, 16*(part%2) + threadIdx.x%32/4 + i/2*8);
                mask[i/2][i%2] = hide_by_position(a, mask[i/2][i%2], query_pos[max(0, token[i%2])], at);
            }
        }
    }
};

} // namespace kvtc
