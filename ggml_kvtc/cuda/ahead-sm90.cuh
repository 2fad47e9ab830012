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
            mask[0][0] = mine  >= a.n_kv ? __ushort_as_half(0xfc00) : mask_of ? mask_of[mine]  : __ushort_as_half(0);
            mask[0][1] = other >= a.n_kv ? __ushort_as_half(0xfc00) : mask_of ? mask_of[other] : __ushort_as_half(0);
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int key = first + 16*part + lane/4 + 8*i;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    mask[i][e] = key >= a.n_kv || token[e] < 0 ? __ushort_as_half(0xfc00) : mask_of ? mask_of[token[e]*a.ne_m1 + key] : __ushort_as_half(0);
                }
            }
        }
    }
};

} // namespace kvtc
