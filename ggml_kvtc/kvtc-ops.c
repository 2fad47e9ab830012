// Builders of the kvtc operations, and the registry of its types.
#include "kvtc.h"
#include "kvtc-pack.h"

#include "ggml-impl.h"

#include <string.h>

bool ggml_kvtc_is_type(enum ggml_type type) {
    return type >= GGML_TYPE_KVTC1 && type <= GGML_TYPE_TURBO4;
}

bool ggml_kvtc_is_turbo(enum ggml_type type) {
    return type >= GGML_TYPE_TURBO2 && type <= GGML_TYPE_TURBO4;
}

int ggml_kvtc_type_bits(enum ggml_type type) {
    if (ggml_kvtc_is_turbo(type)) {
        return (int) type - (int) GGML_TYPE_TURBO2 + 2;
    }
    return ggml_kvtc_is_type(type) ? (int) type - (int) GGML_TYPE_KVTC1 + 1 : 0;
}

enum ggml_type ggml_kvtc_type_from_name(const char * name) {
    for (int type = GGML_TYPE_KVTC1; type <= GGML_TYPE_TURBO4; ++type) {
        if (strcmp(name, ggml_type_name((enum ggml_type) type)) == 0) {
            return (enum ggml_type) type;
        }
    }
    return GGML_TYPE_COUNT;
}

int64_t ggml_kvtc_row_values(enum ggml_type type, int64_t n_head, int64_t head_dim) {
    if (!ggml_kvtc_is_turbo(type)) {
        return n_head*head_dim;
    }
    const int64_t bytes = n_head*(int64_t) sizeof(ggml_fp16_t);
    const int64_t size  = (int64_t) ggml_type_size(type);
    return n_head*head_dim + (bytes + size - 1)/size*ggml_blck_size(type);
}

struct ggml_tensor * ggml_kvtc_set_rows(
        struct ggml_context * ctx,
        struct ggml_tensor  * cache,
        struct ggml_tensor  * z,
        struct ggml_tensor  * idxs,
        struct ggml_tensor  * pack,
        enum ggml_kvtc_side   side) {
    GGML_ASSERT(z->type == GGML_TYPE_F32 && idxs->type == GGML_TYPE_I64 && pack->type == GGML_TYPE_I8);
    GGML_ASSERT(idxs->ne[0] == z->ne[1] && z->ne[3] == 1);
    if (ggml_kvtc_is_type(cache->type)) {
        GGML_ASSERT(cache->ne[0] == ggml_kvtc_row_values(cache->type, z->ne[2], z->ne[0]));
    } else {
        GGML_ASSERT(cache->type == GGML_TYPE_F16);
        GGML_ASSERT(cache->ne[0] == z->ne[0] && cache->ne[2] == z->ne[2]);
    }

    struct ggml_tensor * result = ggml_view_tensor(ctx, cache);
    ggml_set_op_params_i32(result, 0, side);

    result->op     = GGML_OP_KVTC_SET_ROWS;
    result->src[0] = cache;
    result->src[1] = z;
    result->src[2] = idxs;
    result->src[3] = pack;

    return result;
}

bool ggml_kvtc_set_rows_keep(struct ggml_tensor * rows, struct ggml_tensor * x) {
    GGML_ASSERT(rows->op == GGML_OP_KVTC_SET_ROWS);
    int i = 4;
    while (i < GGML_MAX_SRC && rows->src[i]) {
        ++i;
    }
    if (i < GGML_MAX_SRC) {
        rows->src[i] = x;
    }
    return i < GGML_MAX_SRC;
}

struct ggml_tensor * ggml_kvtc_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * sinks,
        struct ggml_tensor  * pack,
        struct ggml_tensor  * info,
        struct ggml_tensor  * exact,
        struct ggml_tensor  * zk,
        struct ggml_tensor  * zv,
        struct ggml_kvtc_attn_params params) {
    GGML_ASSERT(ggml_kvtc_is_type(k->type) || ggml_kvtc_is_type(v->type));
    GGML_ASSERT(q->type == GGML_TYPE_F32 && pack->type == GGML_TYPE_I8 && info->type == GGML_TYPE_I32);
    GGML_ASSERT(q->ne[0] == k->ne[0] && k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2]);
    GGML_ASSERT(q->ne[2] % k->ne[2] == 0 && q->ne[3] == k->ne[3] && q->ne[3] == v->ne[3]);
    GGML_ASSERT(q->ne[0] <= GGML_KVTC_MAX_DIM && v->ne[0] <= GGML_KVTC_MAX_DIM);
    GGML_ASSERT(ggml_nelements(info) == (2*k->ne[1] + q->ne[1])*q->ne[3]);
    GGML_ASSERT(!mask  || (mask->type == GGML_TYPE_F16 && mask->ne[0] == k->ne[1] && mask->ne[1] >= q->ne[1]));
    GGML_ASSERT(!sinks || (sinks->type == GGML_TYPE_F32 && sinks->ne[0] == q->ne[2]));
    GGML_ASSERT(!exact || exact->type == GGML_TYPE_F16);
    GGML_ASSERT(!zk || (zk->type == GGML_TYPE_F32 && zk->ne[1] == q->ne[1]*q->ne[3] && zk->ne[2] == k->ne[2]));
    GGML_ASSERT(!zv || (zv->type == GGML_TYPE_F32 && zv->ne[1] == q->ne[1]*q->ne[3] && zv->ne[2] == v->ne[2]));
    GGML_ASSERT(params.max_bias == 0.0f || mask);
    GGML_ASSERT(params.n_span >= 0 && (params.n_span == 0 || !mask));

    const int64_t ne[4] = { v->ne[0], q->ne[2], q->ne[1], q->ne[3] };
    struct ggml_tensor * result = ggml_new_tensor(ctx, GGML_TYPE_F32, 4, ne);
    ggml_set_op_params(result, &params, sizeof(params));

    result->op     = GGML_OP_KVTC_ATTN;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = v;
    result->src[3] = mask;
    result->src[4] = sinks;
    result->src[5] = pack;
    result->src[6] = info;
    result->src[7] = exact;
    result->src[8] = zk;
    result->src[9] = zv;

    return result;
}
