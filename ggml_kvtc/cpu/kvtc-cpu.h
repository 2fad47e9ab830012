// Entry points of the kvtc kernels for the CPU backend.
#pragma once

#include "kvtc.h"

#include "ggml-backend.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void   ggml_compute_forward_kvtc_set_rows(const struct ggml_compute_params * params, struct ggml_tensor * dst);
void   ggml_compute_forward_kvtc_attn    (const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t ggml_kvtc_attn_work_size          (const struct ggml_tensor * dst, int n_tasks);

// false for every stock operation that touches a kvtc type
bool   ggml_kvtc_cpu_supports_op(const struct ggml_tensor * op);

// Rows <-> transformed vectors outside a graph: z F32 [n, n_head, head_dim] (last index fastest), rows [n, row_bytes].
GGML_BACKEND_API void ggml_kvtc_cpu_encode(const void * pack, enum ggml_kvtc_side side, int64_t n, const float * z, uint8_t * rows);
GGML_BACKEND_API void ggml_kvtc_cpu_decode(const void * pack, enum ggml_kvtc_side side, int64_t n, const uint8_t * rows, float * z);

#ifdef __cplusplus
}
#endif
