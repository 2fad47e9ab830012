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

// of queries: a token's (of all streams) head
struct query_row {
    int token, head;
};

__device__ __forceinline__ float * get_output(const attn_args & a, const output & out, const query_row & row) {
    return (float *) (out.dst + row.head*out.nb1 + row.token%a.n_tokens*out.nb2 + row.token/a.n_tokens*out.nb3);
}

// what a row's sums are multiplied by, from the largest logit and the sum of weights; share of the tokens in all weights (sink
// logits have the rest)
__device__ __forceinline__ float2 get_norm(const attn_args & a, int head, float top, float total, float & share) {
    float scale = 1.0f; // of the tokens' weights, when the sink's logit is the largest
    float sink  = 0.0f;
    if (a.sinks) {
        const float logit = a.sinks[head]*LOG2E;
        scale = logit > top ? exp2f(top - logit) : 1.0f;
        sink  = logit > top ? 1.0f : exp2f(logit - top);
    }
    const float all = scale*total + sink;
    const float inv = all > 0.0f ? scale/all : 0.0f;
    share = total*inv;
    return make_float2(top, top == -INFINITY ? 0.0f : inv);
}

// The key and value of each stream's one token, which attention has left out: they are added at the end. f32 [d, token, head], keys
// before RoPE
struct own_tokens {
    const char * x[2]; // keys, values; or nullptr: attention has seen them
    int64_t      nb1[2], nb2[2];
    cudaStream_t made; // where they are made
};

constexpr int COMBINE_FEW = 64; // query rows of a kv head that have a block for each

// values, meta: as decode() leaves them, n_split of them for each row. exact: rows of the batch's tokens that are written too. Either of
// exact and own needs combine_has_few
void combine(const attn_args & a, int d, const float * values, const float2 * meta, int n_split, const exact_rows & exact, const own_tokens & own,
             const output & out, cudaStream_t stream);
inline bool combine_has_few(const attn_shape & s) {
    return s.n_tokens*s.n_stream*s.group <= COMBINE_FEW;
}
// as prefill() leaves them
void combine(const attn_args & a, int d, const partial_sums & sums, const output & out, cudaStream_t stream);

} // namespace kvtc
