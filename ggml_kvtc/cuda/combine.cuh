// From partial sums in coefficient space to the operation's result.
#pragma once

#include "device.cuh"

namespace kvtc {

// values, meta: as decode() leaves them, n_split of them for each row. dst: f32 [d, n_head, n_tokens, n_stream]
void combine(const attn_args & a, int d, const float * values, const float2 * meta, int n_split, char * dst, int64_t nb1, int64_t nb2, int64_t nb3, cudaStream_t stream);

} // namespace kvtc
