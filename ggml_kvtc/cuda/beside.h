// Attention of one token beside the nodes that make the token's key and value.
#pragma once

#include <cuda_runtime.h>

struct ggml_backend_cuda_context;
struct ggml_cgraph;
struct ggml_tensor;

namespace kvtc {

struct fused_args;

// Of each node that is to be computed, first: on which stream it goes. May put nodes before the next attention on another one.
void choose_stream(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// Have the nodes of dst's key and value gone to another stream? x: both as they were before they are coded, f32 [d, token, head], keys
// before RoPE
bool is_beside(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * (&x)[2]);
// Attention has been launched. Their stream, which the caller waits for
cudaStream_t end_beside(ggml_backend_cuda_context & ctx);

// The write of the token's codes, if it is to begin when attention has: false where it is the caller's now
bool keep_write(const ggml_backend_cuda_context & ctx, const fused_args & write);

} // namespace kvtc
