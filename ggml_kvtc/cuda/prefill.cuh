// Attention for many query rows: cells are expanded to f16 in chunks, and ggml's own flash attention kernel reads those.
#pragma once

#include "combine.cuh"
#include "plan.h"

namespace kvtc {

bool prefill_supports(const attn_args & a, const attn_shape & s);

void prefill(ggml_backend_cuda_context & ctx, const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const output & dst);

} // namespace kvtc
