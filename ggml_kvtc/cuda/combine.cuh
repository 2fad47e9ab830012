// From partial sums in coefficient space to the operation's result.
#pragma once

#include "exact.cuh"
#include "plan.h"
#include "sums.cuh"

namespace kvtc {

// f32 [d, n_head, n_tokens, n_stream]
struct output {
    char  * dst;
    int64_t nb1, nb2, nb3;
};

constexpr int COMBINE_FEW = 64; // query rows of a kv head that have a block for each

// values, meta: as decode() leaves them, n_split of them for each row. exact: rows of the batch's tokens that are written too
void combine(const attn_args & a, int d, const float * values, const float2 * meta, int n_split, const exact_rows & exact, const output & out, cudaStream_t stream);
inline bool combine_writes_exact(const attn_shape & s) {
    return s.n_tokens*s.n_stream*s.group <= COMBINE_FEW;
}
// as prefill() leaves them
void combine(const attn_args & a, int d, const partial_sums & sums, const output & out, cudaStream_t stream);

} // namespace kvtc
