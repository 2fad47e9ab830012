// Attention straight from the codes; its result is partial sums that combine.cuh finishes.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace kvtc {

// values: f32 [row][split][d] sums of weighted coefficients; meta: [row][split] (largest logit * log2(e), sum of weights);
// row = (stream*n_tokens + token)*n_head + head
void decode(const attn_args & a, int d, const decode_plan & p, float * values, float2 * meta, cudaStream_t stream);

// the same where keys are of another kind; queries are in the space in which these are stored (expand-sides.cu)
void decode_sides(const attn_args & a, const attn_shape & s, const decode_plan & p, float * values, float2 * meta, cudaStream_t stream);

// the same on sm_90a
void decode_sm90(const attn_args & a, int d, const sm90_plan & p, float * values, float2 * meta, cudaStream_t stream);
void decode_sm90_few(const attn_args & a, int d, const sm90_plan & p, float * values, float2 * meta, cudaStream_t stream); // where the plan says so
void decode_sm90_slow(const attn_args & a, const sm90_slow_plan & p, float * values, float2 * meta, cudaStream_t stream);
void decode_sm90_d256(const attn_args & a, const sm90_d256_plan & p, float * values, float2 * meta, cudaStream_t stream);

} // namespace kvtc
