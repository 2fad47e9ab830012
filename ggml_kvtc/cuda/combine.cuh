// From partial sums in coefficient space to the operation's result.
#pragma once

#include "sums.cuh"

namespace kvtc {

// f32 [d, n_head, n_tokens, n_stream]
struct output {
    char  * dst;
    int64_t nb1, nb2, nb3;
};

// values, meta: as decode() leaves them, n_split of them for each row
void combine(const attn_args & a, int d, const float * values, const float2 * meta, int n_split, const output & out, cudaStream_t stream);
// as prefill() leaves them
void combine(const attn_args & a, int d, const partial_sums & sums, const output & out, cudaStream_t stream);

} // namespace kvtc
