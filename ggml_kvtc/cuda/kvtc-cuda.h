// Entry points of the kvtc kernels for the CUDA backend.
#pragma once

#include "kvtc.h"

#include <cuda_runtime.h>

struct ggml_backend_cuda_context;

void ggml_cuda_kvtc_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
// two writes of exact vectors of one shape, neither of which reads what the other writes
void ggml_cuda_kvtc_set_exact(ggml_backend_cuda_context & ctx, ggml_tensor * keys, ggml_tensor * values);
void ggml_cuda_kvtc_attn    (ggml_backend_cuda_context & ctx, ggml_tensor * dst);
// Attention and two such writes behind it, which its result does not cover. False, and nothing is done, if it takes many tokens.
bool ggml_cuda_kvtc_attn_set_exact(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_tensor * keys, const ggml_tensor * values);

// Can attention leave the batch's own tokens out until its end? Of one token in each stream, which counts exactly.
bool ggml_cuda_kvtc_attn_adds_own(const ggml_tensor * dst);
// Is a processor left to the write of the token's codes, and are all others taken?
bool ggml_cuda_kvtc_attn_leaves_one(int device, const ggml_tensor * dst);

// Exact for the two operations; false for every stock operation that touches a kvtc type.
bool ggml_cuda_kvtc_supports_op(int device, const ggml_tensor * op);

struct ggml_cgraph;

// One kernel for node i, the product with an encode matrix, and the sum and the write that follow it, of keys and, if they come
// next, values; or for two writes of exact vectors, which the last kernel of attention does on its way where they follow it. The
// number of nodes after i that are done with, or 0.
int ggml_cuda_kvtc_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// An executable graph whose kernels have the priorities of the streams that they were captured on.
cudaError_t ggml_cuda_kvtc_instantiate(cudaGraphExec_t * instance, cudaGraph_t graph);
