// What is read of cells in global memory ahead of its use: of a slab's, and of a stretch's.
#pragma once

#include "device.cuh"
#include "hopper.cuh"

namespace kvtc {

// ONE: one token, for which each warp knows of the whole slab what its group has in common
template <bool ONE>
struct slab_ahead {
    int2 cell;                 // (position, slot) of one of the 32 that hold the warp's
    half mask[ONE ? 1 : 2][2]; // of the thread's two cells and two queries; ONE: of that cell, and of one of the slab's other half
    int2 other;                // ONE: that one

    // first: the slab's first cell; part: the warp's 16 of its 64; token: of the thread's queries, or -1
    __device__ __forceinline__ void load(const attn_args & a, const half * mask_of, const int2 * info, const int (&token)[2], int first, int part) {
        const int lane = threadIdx.x % 32;
        const int mine = first + 32*(part/2) + lane;
        cell = info[min(mine, a.n_kv - 1)];
        if constexpr (ONE) {
            const int second = first + 32*(1 - part/2) + lane;
            other = info[min(second, a.n_kv - 1)];
            mask[0][0] = read_mask(a, mask_of, 0, mine);
            mask[0][1] = read_mask(a, mask_of, 0, second);
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
            mask[0][0] = hide_cell(a, mask[0][0], query, cell);
            mask[0][1] = hide_cell(a, mask[0][1], query, other);
        } else if (a.n_span > 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = __shfl_sync(0xffffffff, cell.x, 16*(part%2) + threadIdx.x%32/4 + i/2*8);
                mask[i/2][i%2] = hide_by_position(a, mask[i/2][i%2], query_pos[max(0, token[i%2])], at);
            }
        }
    }
};

// The cells of a stretch, up to 64*GROUP_WARPS, of which a thread has two. SHARED: they are on their way to shared memory while the stretch before
// is processed: the compiler would wait for what is read to registers, to put it aside
template <bool SHARED>
struct stretch_ahead {
    int2 * cells; // SHARED: the group's place
    int    first, first_pos;

    // first: cell; what was there has been read by all
    __device__ __forceinline__ void load(const attn_args & a, const int2 * info, int first_cell, int part) {
        first = first_cell;
        if constexpr (SHARED) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int i = (GROUP_WARPS*j + part)*32 + threadIdx.x%32;
                copy_async<8>(cells + i, info + min(first + i, a.n_kv - 1));
            }
            copy_commit();
        }
        first_pos = info[first].x;
    }

    // Of n cells, the slabs of 64 whose cells, of those that the warp has, do not come in the order of their positions, all seen, with codes only;
    // a bit for each
    __device__ __forceinline__ uint32_t find_others(const attn_args & a, const half * mask_of, const int2 * info, int query_pos, int n, int part) const {
        uint32_t others = 0;
        if constexpr (SHARED) {
            copy_wait<0>();
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int i = (GROUP_WARPS*j + part)*32 + threadIdx.x%32;
            int2 x = SHARED ? cells[i] : info[min(first + i, a.n_kv - 1)];
            const half seen = hide_cell(a, read_mask(a, mask_of, 0, first + i), query_pos, x);
            const bool plain = first_pos >= 0 && is_plain(a, x, seen, first_pos + i, query_pos);
            others |= __any_sync(0xffffffff, i < n && !plain) ? 1u << (GROUP_WARPS/2*j + part/2) : 0;
        }
        return others;
    }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Whether any cell of a slab is seen, and the range of positions, which its group must know alike. Each warp of one token finds it for
// itself: a barrier would make all wait for the slowest. ranges: [4] of the warps, others in the next slab. Behind it the warp's keys
// have arrived for all its threads
template <bool ONE>
__device__ __forceinline__ bool find_range(const slab_ahead<ONE> & x, int2 * ranges, int group, int part, int & lowest, int & highest) {
    bool seen = is_seen(x.mask[0][0]) || is_seen(x.mask[0][1]);
    lowest  = x.cell.x < 0 ? INT_MAX : x.cell.x; // empty cells are masked: any angle will do for them
    highest = x.cell.x;
    if constexpr (ONE) {
        lowest  = min(lowest, x.other.x < 0 ? INT_MAX : x.other.x);
        highest = max(highest, x.other.x);
    } else {
        seen = seen || is_seen(x.mask[1][0]) || is_seen(x.mask[1][1]);
    }
    lowest  = warp_min(lowest);
    highest = warp_max(highest);
    copy_wait<0>(); // the keys
    if constexpr (ONE) {
        seen = __any_sync(0xffffffff, seen);
    } else {
        if (threadIdx.x % 32 == 0) {
            ranges[part] = make_int2(lowest, highest);
        }
        seen = __any_sync(0xffffffff, meet(group, seen));
#pragma unroll
        for (int i = 0; i < GROUP_WARPS; i += 2) {
            lowest  = min(lowest,  ranges[i].x);
            highest = max(highest, ranges[i].y);
        }
    }
    __syncwarp();
    return seen;
}
#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
