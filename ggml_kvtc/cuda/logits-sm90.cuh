// The end of a slab's logits in decode-sm90.cu and decode-sm90-d256.cu, before they become weights.
#pragma once

#include "ahead-sm90.cuh"

namespace kvtc {

// Keys that count exactly for some of a batch's tokens and by their codes for others: a slab that has any is passed through twice
struct either_keys {
    uint32_t keys; // of the 32 cells that hold the warp's, a bit for each
    bool     any;  // has the group any?
    int      pass; // 0: they count where their codes do, 1: where they are exact; all others count in the first
};

// Caps and masks. w[2*i + x]: key lane/4 + 8*i, query 2*(lane%4) + x; at: the lane that has key lane/4; row_pos: positions
// of keys; query_pos: of tokens; token: of the thread's queries, or -1. True where a logit is larger than the largest so far
template <bool ONE>
__device__ __forceinline__ bool finish_logits(const attn_args & a, float (&w)[4], const slab_ahead<ONE> & now, const float (&slope)[2], int at, const either_keys & either, const int * query_pos,
                                              const int (&token)[2], const int (&row_pos)[2], const float (&top)[2]) {
    cap_logits(a, w);
    bool rises = false;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float & v = w[2*i + x];
            v += slope[x]*(ONE ? __shfl_sync(0xffffffff, __half2float(now.mask[0][0]), at + 8*i) : __half2float(now.mask[ONE ? 0 : i][x]));
            if (either.any) {
                if (either.keys && token[x] >= 0) {
                    const bool some = either.keys >> (at + 8*i) & 1;
                    const bool ex   = some && is_exact(a, query_pos[token[x]], row_pos[i]);
                    if (either.pass == 0 ? ex : !ex) {
                        v = -INFINITY;
                    }
                } else if (either.pass == 1) {
                    v = -INFINITY; // another warp of the group has keys for this pass
                }
            }
            rises = rises || v > top[x];
        }
    }
    return rises;
}

} // namespace kvtc
