// Sums of attention over ranges of columns, before they are merged.
#pragma once

#include "device.cuh"

namespace kvtc {

// For each row, range and chunk of ranges: the largest logit, the sum of weights, and the weighted sum of coefficients.
struct partial_sums {
    const float2 * meta;          // (largest logit, sum of weights)
    const float  * values;        // [.][d]
    int64_t        size;          // 8-byte units from chunk to chunk
    int            n_chunk;
    int            n_split;       // ranges of a chunk
    int            split_step;    // rows from range to range
    float          to_log2;       // factor that turns logits into powers of two
    int            n_cols;        // query rows of a block of prefill; 0: rows follow each other
    int            n_cols2;       // of these, heads of the group
    int            n_token_block, n_head_block;
    const float2 * old_meta;      // a sum for each row to add, logits as powers of two, or nullptr
    const float  * old_values;
};

// a row's place in the first range of the first chunk
__device__ __forceinline__ int64_t get_place(const attn_args & a, const partial_sums & p, int64_t row) {
    if (p.n_cols == 0) {
        return row*p.n_split;
    }
    const int head   = (int) (row%a.n_head);
    const int token  = (int) (row/a.n_head%a.n_tokens);
    const int stream = (int) (row/a.n_head/a.n_tokens);
    const int g      = head%a.group;
    const int n_col1 = p.n_cols/p.n_cols2;
    const int64_t block = ((((int64_t) stream*a.n_head_kv + head/a.group)*p.n_head_block + g/p.n_cols2)*p.n_token_block + token/n_col1)*p.n_split;
    return block*p.n_cols + token%n_col1*p.n_cols2 + g%p.n_cols2;
}

__device__ __forceinline__ float2 get_meta(const partial_sums & p, int64_t place, int chunk, int split) {
    const float2 m = p.meta[chunk*p.size + place + split*p.split_step];
    return make_float2(m.x*p.to_log2, m.y);
}

template <int D>
__device__ __forceinline__ float4 get_value(const partial_sums & p, int64_t place, int chunk, int split, int c) {
    return *(const float4 *) (p.values + 2*chunk*p.size + (place + split*p.split_step)*D + c);
}

} // namespace kvtc
