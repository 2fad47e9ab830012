// Which head's cells a block of decode-sm90-few.cu has, and which of these, where all heads' blocks are one row of the grid.
#pragma once

#include "decode.cuh"
#include "plan.h"

namespace kvtc {

// a block's part of a head's cells
struct block_share {
    int head, split, n_split;
};

// Of n_block blocks, heads (up to 32) get as many as they cost, at most n_most. Every warp finds the same: lane h knows what head h costs,
// the others 0. A head behind the last: the block has no part
__device__ __forceinline__ block_share find_share(float cost, int n_head, int n_block, int n_most) {
    const int   lane  = threadIdx.x % 32;
    const float exact = n_block*cost/warp_reduce_sum(cost);
    int n = (int) exact;
    const float each = cost/max(n, 1);
    int before = 0; // heads whose blocks have more to do: one of those which are left goes to them sooner
    for (int i = 0; i < n_head; ++i) {
        const float x = __shfl_sync(0xffffffff, each, i);
        before += x > each || (x == each && i < lane);
    }
    n += before < n_block - warp_reduce_sum(n) && lane < n_head;
    n  = min(n, n_most);
    int end = n;
    for (int i = 1; i < 32; i *= 2) {
        const int x = __shfl_up_sync(0xffffffff, end, i);
        end += lane >= i ? x : 0;
    }
    const int head = __popc(__ballot_sync(0xffffffff, lane < n_head && end <= (int) blockIdx.x));
    return { head, (int) blockIdx.x - __shfl_sync(0xffffffff, end - n, head), __shfl_sync(0xffffffff, n, head) };
}

// the slabs of one of a block's groups of warps: from x on, before y
__device__ __forceinline__ int2 find_slabs(int n_slab, int n_fine, const block_share & share, int group) {
    const int part   = share.split*SM90_GROUPS + group;
    const int n_part = share.n_split*SM90_GROUPS;
    return make_int2(get_first_slab(n_slab, n_fine, part, n_part), get_first_slab(n_slab, n_fine, part + 1, n_part));
}

// sums of a head that no block has, so that all have n_sum
template <int D>
__device__ __forceinline__ void clear_sums(const attn_args & a, const block_share & share, int stream, int n_sum, float * values, float2 * meta) {
    const int n = n_sum - share.n_split;
    for (int i = threadIdx.x; i < a.group*n*D; i += blockDim.x) {
        const int64_t at = ((int64_t) stream*a.n_head + share.head*a.group + i/(n*D))*n_sum + share.n_split + i/D%n;
        values[at*D + i%D] = 0.0f;
        if (i%D == 0) {
            meta[at] = make_float2(-INFINITY, 0.0f);
        }
    }
}

} // namespace kvtc
