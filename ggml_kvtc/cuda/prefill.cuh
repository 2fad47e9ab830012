// Attention for many query rows: cells are expanded to f16 in chunks, and ggml's own flash attention kernel reads those.
#pragma once

#include "combine.cuh"
#include "scratch.h"

namespace kvtc {

bool prefill_supports(float softcap, int d);

void prefill(ggml_backend_cuda_context & ctx, const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const output & dst);

// the same on sm_90a; exact: rows of the batch's tokens that are written too, behind all that read what they replace
void prefill_sm90(ggml_backend_cuda_context & ctx, const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const tiles_plan & p, const exact_rows & exact,
    const output & dst);

// most exact rows that one stream has
inline int count_exact(const attn_args & a, const attn_shape & s) {
    return a.n_slots > 0 || a.batch[0] || a.batch[1] ? a.n_slots + s.n_tokens*s.n_stream : 0;
}

// cells of the cache, of which a.n_kv are filled
inline int count_cells(const attn_args & a) {
    return (int) (a.nb_stream[GGML_KVTC_K]/a.nb_row[GGML_KVTC_K]);
}

// fold the ranges of these chunks, and the sums before, into one sum for each row
void merge_sums(const attn_args & a, const partial_sums & p, int d, int64_t n_row, float * values, float2 * meta, cudaStream_t stream);

} // namespace kvtc
