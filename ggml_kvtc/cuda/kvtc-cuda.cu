// The CUDA backend's entry to the kvtc operations: which it serves, and by which kernels.
#include "kvtc-cuda.h"
#include "beside.h"
#include "combine.cuh"
#include "decode.cuh"
#include "exact.cuh"
#include "expand.cuh"
#include "prefill.cuh"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace kvtc {

namespace {

// Up to this many tokens the codes are read directly: rebuilding keys costs each 8 or 16 query rows as much as writing them
// out and reading them back costs all.
constexpr int MAX_DECODE_TOKENS = 16;
constexpr int MAX_DECODE_DIM    = 256; // larger heads are expanded for any number of tokens
constexpr int MAX_SIDES_ROWS    = 16;  // query rows of a kv head where keys are of another kind than kvtc's: each 8 decode them again

bool has_kernels(int d) {
    return d == 64 || d == 80 || d == 96 || d == 128 || d == 256 || d == 512;
}

// false for types that no kernel reads
bool get_kind(ggml_type type, side_kind & kind) {
    kind = ggml_kvtc_is_turbo(type) ? SIDE_TURBO : type == GGML_TYPE_F16 ? SIDE_F16 : type == GGML_TYPE_Q8_0 ? SIDE_Q8_0 : SIDE_KVTC;
    return kind != SIDE_KVTC || ggml_kvtc_is_type(type);
}

attn_shape get_shape(const ggml_tensor * dst, const ggml_kvtc_attn_params & params) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    attn_shape s;
    s.d         = (int) q->ne[0];
    s.n_kv      = (int) k->ne[1];
    s.n_tokens  = (int) q->ne[1];
    s.group     = (int) (q->ne[2]/k->ne[2]);
    s.n_head_kv = (int) k->ne[2];
    s.n_stream  = (int) q->ne[3];
    s.n_fast    = params.limits[6];
    for (int i = 0; i < 2; ++i) {
        s.row_bytes[i] = (int) dst->src[1 + i]->nb[1];
        s.bytes    [i] = params.limits[i];
        s.tables   [i] = params.limits[2 + i];
        s.pairs    [i] = params.limits[4 + i];
        get_kind(dst->src[1 + i]->type, s.kind[i]);
        if (!is_coded(s.kind[i])) {
            s.bytes[i] = (int) ggml_row_size(dst->src[1 + i]->type, s.d);
        }
    }
    return s;
}

// Are codes read directly, rather than expanded?
bool decodes(const attn_shape & s, bool can_expand) {
    if (s.d > MAX_DECODE_DIM || (has_others(s) && s.kind[GGML_KVTC_K] == SIDE_KVTC)) {
        return false;
    }
    return !can_expand || (has_others(s) ? s.n_tokens*s.group <= MAX_SIDES_ROWS : s.n_tokens <= MAX_DECODE_TOKENS);
}

#ifdef KVTC_SM90
bool is_hopper(int device) {
    return ggml_cuda_info().devices[device].cc == GGML_CUDA_CC_HOPPER;
}

bool find_tiles_plan(int device, const attn_args & a, const attn_shape & s, const gpu_shape & gpu, tiles_plan & p) {
    return !decodes(s, true) && is_hopper(device) && make_tiles_plan(s, gpu, count_exact(a, s), p);
}
#endif

gpu_shape get_gpu(int device) {
    const auto & info = ggml_cuda_info().devices[device];
    gpu_shape gpu = { info.nsm, info.smpbo };
    if (const char * mib = getenv("GGML_KVTC_SCRATCH_MIB")) { // for small cards, and for tests of many chunks
        gpu.scratch = std::min<size_t>(PREFILL_SCRATCH, (size_t) std::max(1, atoi(mib)) << 20);
    }
    return gpu;
}

attn_args get_args(const ggml_tensor * dst, const ggml_kvtc_attn_params & params) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * mask  = dst->src[3];
    const ggml_tensor * exact = dst->src[7];
    attn_args a = {};
    a.q     = (const char *) q->data;
    a.nb_q1 = q->nb[1];
    a.nb_q2 = q->nb[2];
    a.nb_q3 = q->nb[3];
    a.n_tokens  = (int) q->ne[1];
    a.n_head    = (int) q->ne[2];
    a.n_stream  = (int) q->ne[3];
    a.n_kv      = (int) dst->src[1]->ne[1];
    a.n_head_kv = (int) dst->src[1]->ne[2];
    a.group     = a.n_head/a.n_head_kv;
    for (int i = 0; i < 2; ++i) {
        const ggml_tensor * cache = dst->src[1 + i];
        const ggml_tensor * batch = dst->src[8 + i];
        a.rows     [i] = (const uint8_t *) cache->data;
        a.nb_row   [i] = cache->nb[1];
        a.nb_stream[i] = cache->nb[3];
        if (exact && ggml_kvtc_is_type(cache->type)) { // the store has coded sides alone
            const int n_before = i == GGML_KVTC_V && ggml_kvtc_is_type(dst->src[1]->type) ? params.n_slots : 0;
            a.exact[i] = (const half *) exact->data + (int64_t) n_before*a.n_head_kv*q->ne[0];
        }
        if (batch) {
            a.batch    [i] = (const char *) batch->data;
            a.nb_batch1[i] = batch->nb[1];
            a.nb_batch2[i] = batch->nb[2];
        }
    }
    if (mask) {
        a.mask   = (const half *) mask->data;
        a.ne_m1  = mask->nb[1]/sizeof(half);
        a.ne_m3  = mask->nb[3]/sizeof(half);
        a.n_mask = (int) mask->ne[3];
    }
    a.sinks     = dst->src[4] ? (const float *) dst->src[4]->data : nullptr;
    a.pack      = (const char *) dst->src[5]->data;
    a.info      = (const int2 *) dst->src[6]->data;
    a.query_pos = (const int *) dst->src[6]->data + 2*(int64_t) a.n_kv*a.n_stream;
    a.n_sink    = params.n_sink;
    a.n_window  = params.n_window;
    a.n_slots   = params.n_slots;
    a.n_span    = params.n_span;
    a.least_slot = INT_MIN;
    a.scale     = params.scale;
    a.softcap   = params.logit_softcap;
    a.max_bias  = params.max_bias;
    a.log2_heads = 1 << (int) floor(log2((double) a.n_head));
    a.slope_low  = powf(2.0f, -a.max_bias       /a.log2_heads);
    a.slope_high = powf(2.0f, -a.max_bias/2.0f/a.log2_heads);
    return a;
}

ggml_kvtc_attn_params get_params(const ggml_tensor * dst) {
    ggml_kvtc_attn_params params;
    static_assert(sizeof(params) <= GGML_MAX_OP_PARAMS, "parameters do not fit");
    memcpy(&params, dst->op_params, sizeof(params));
    return params;
}

// Heads of an ordinary type one after the other, f16 in whole pieces of 16 bytes.
bool is_plain_row(const ggml_tensor * cache) {
    const bool pieces = cache->type != GGML_TYPE_F16 || (cache->nb[1] | cache->nb[3] | cache->view_offs) % SIDE_PIECE == 0;
    return cache->ne[0] % ggml_blck_size(cache->type) == 0 && cache->nb[0] == ggml_type_size(cache->type) &&
        cache->nb[2] == ggml_row_size(cache->type, cache->ne[0]) && pieces;
}

bool supports_attn(int device, const ggml_tensor * op) {
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * k = op->src[1];
    const ggml_tensor * v = op->src[2];
    if (k->ne[0] != v->ne[0] || !has_kernels((int) k->ne[0])) {
        return false;
    }
    const ggml_kvtc_attn_params params = get_params(op);
    if (params.limits[0] == 0 && params.limits[1] == 0) { // a pack for the CPU
        return false;
    }
    for (const ggml_tensor * cache : { k, v }) {
        side_kind kind;
        if (!get_kind(cache->type, kind) || (!is_coded(kind) && !is_plain_row(cache))) {
            return false;
        }
    }
    if (q->nb[0] != sizeof(float) || q->nb[1] % 8 != 0 || q->nb[2] % 8 != 0 || q->nb[3] % 8 != 0 || q->view_offs % 8 != 0 || (op->src[3] && op->src[3]->nb[0] != sizeof(ggml_fp16_t))) {
        return false;
    }
    for (int i = 8; i < 10; ++i) {
        if (op->src[i] && (op->src[i]->nb[0] != sizeof(float))) {
            return false;
        }
    }
    const attn_shape shape = get_shape(op, params);
    if (shape.d > MAX_DECODE_DIM) {
        return ggml_cuda_info().devices[device].cc >= GGML_CUDA_CC_AMPERE && params.max_bias == 0.0f && make_expand_plan(shape, get_gpu(device)).n_warp > 0;
    }
    if (has_others(shape) && shape.kind[GGML_KVTC_K] == SIDE_KVTC) {
#ifdef KVTC_SM90
        tiles_plan tiles;
        if (is_hopper(device) && make_tiles_plan(shape, get_gpu(device), 0, tiles)) {
            return true;
        }
#endif
        return prefill_supports(params.logit_softcap, shape.d) && make_expand_plan(shape, get_gpu(device)).n_warp > 0;
    }
    decode_plan plan;
    return make_decode_plan(shape, get_gpu(device), plan);
}

// what decoding leaves to combine
struct decoded {
    std::unique_ptr<ggml_cuda_pool_alloc<char>> memory;
    float  * values  = nullptr;
    float2 * meta    = nullptr;
    int      n_split = 0;
};

decoded decode_cells(ggml_backend_cuda_context & ctx, const attn_args & args, const attn_shape & shape, const gpu_shape & gpu) {
    const cudaStream_t stream = ctx.stream();
    decoded x;
    const auto start = [&](int n_split) {
        const size_t n_sum = (size_t) args.n_stream*args.n_tokens*args.n_head*n_split;
        x.memory  = std::make_unique<ggml_cuda_pool_alloc<char>>(ctx.pool(), round_scratch(gpu, n_sum*(shape.d*sizeof(float) + sizeof(float2)), 0));
        x.values  = (float *) x.memory->get();
        x.meta    = (float2 *) (x.values + n_sum*shape.d);
        x.n_split = n_split;
    };
#ifdef KVTC_SM90
    sm90_plan plan90;
    if (is_hopper(ctx.device) && make_sm90_plan(shape, gpu, plan90)) {
        start(plan90.n_sum);
        (plan90.few ? decode_sm90_few : decode_sm90)(args, shape.d, plan90, x.values, x.meta, stream);
        return x;
    }
    sm90_slow_plan slow;
    if (is_hopper(ctx.device) && make_sm90_slow_plan(shape, gpu, slow)) {
        start(slow.n_split);
        decode_sm90_slow(args, slow, x.values, x.meta, stream);
        return x;
    }
    sm90_d256_plan plan256;
    if (is_hopper(ctx.device) && make_sm90_d256_plan(shape, gpu, plan256)) {
        start(plan256.n_split);
        decode_sm90_d256(args, plan256, x.values, x.meta, stream);
        return x;
    }
#endif
    decode_plan plan;
    GGML_ASSERT(make_decode_plan(shape, gpu, plan));
    start(plan.n_split);
    if (has_others(shape)) {
        decode_sides(args, shape, plan, x.values, x.meta, stream);
    } else {
        decode(args, shape.d, plan, x.values, x.meta, stream);
    }
    return x;
}

own_tokens get_own(const ggml_tensor * const (&x)[2], cudaStream_t made) {
    own_tokens own;
    own.made = made;
    for (int i = 0; i < 2; ++i) {
        own.x  [i] = (const char *) x[i]->data;
        own.nb1[i] = x[i]->nb[1];
        own.nb2[i] = x[i]->nb[2];
    }
    return own;
}

} // namespace

} // namespace kvtc

// exact: written by the last kernel that attends, if writes_exact
static void attend(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const kvtc::exact_rows & exact) {
    using namespace kvtc;
    const ggml_kvtc_attn_params params = get_params(dst);
    const attn_shape shape = get_shape(dst, params);
    const gpu_shape  gpu   = get_gpu(ctx.device);
    attn_args args = get_args(dst, params);

    const output     out   = { (char *) dst->data, (int64_t) dst->nb[1], (int64_t) dst->nb[2], (int64_t) dst->nb[3] };
    const ggml_tensor * own[2];
    if (is_beside(ctx, dst, own)) {
        args.least_slot = -1; // those below are the batch's own, which nothing has written yet
        args.batch[0] = args.batch[1] = nullptr;
        const decoded x = decode_cells(ctx, args, shape, gpu);
        combine(args, shape.d, x.values, x.meta, x.n_split, exact, get_own(own, end_beside(ctx)), out, ctx.stream());
        return;
    }
    ggml_cuda_pool_alloc<float> turned(ctx.pool());
    if (shape.kind[GGML_KVTC_K] == SIDE_TURBO) { // keys stay as they are stored, and queries come to them
        const int64_t n_row = (int64_t) args.n_stream*args.n_tokens*args.n_head;
        turn_queries(args, shape.d, turned.alloc(n_row*shape.d), ctx.stream());
    }
#ifdef KVTC_SM90
    tiles_plan tiles;
    if (find_tiles_plan(ctx.device, args, shape, gpu, tiles)) {
        prefill_sm90(ctx, args, shape, gpu, tiles, exact, out);
        return;
    }
#endif
    if (!decodes(shape, prefill_supports(params.logit_softcap, shape.d))) {
        prefill(ctx, args, shape, gpu, out);
        return;
    }
    const decoded x = decode_cells(ctx, args, shape, gpu);
    combine(args, shape.d, x.values, x.meta, x.n_split, exact, {}, out, ctx.stream());
}

void ggml_cuda_kvtc_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    attend(ctx, dst, {});
}

static bool writes_exact(int device, const ggml_tensor * dst, const kvtc::attn_shape & s) {
    using namespace kvtc;
#ifdef KVTC_SM90
    tiles_plan tiles;
    if (find_tiles_plan(device, get_args(dst, get_params(dst)), s, get_gpu(device), tiles)) {
        return true;
    }
#endif
    GGML_UNUSED_VARS(device, dst);
    return decodes(s, true) && combine_has_few(s);
}

bool ggml_cuda_kvtc_attn_set_exact(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const ggml_tensor * keys, const ggml_tensor * values) {
    using namespace kvtc;
    const attn_shape s = get_shape(dst, get_params(dst));
    const ggml_tensor * z = keys->src[1];
    if (z->ne[0] != s.d || z->ne[1] != s.n_tokens*s.n_stream || z->ne[2] != s.n_head_kv || !writes_exact(ctx.device, dst, s)) {
        return false;
    }
    attend(ctx, dst, { { get_exact_side(keys), get_exact_side(values) }, 2 });
    return true;
}

bool ggml_cuda_kvtc_attn_adds_own(const ggml_tensor * dst) {
    using namespace kvtc;
    const ggml_kvtc_attn_params params = get_params(dst);
    const attn_shape s = get_shape(dst, params);
    return s.n_tokens == 1 && !has_others(s) && decodes(s, true) && combine_has_few(s) && params.n_window >= 1 && params.max_bias == 0.0f;
}

bool ggml_cuda_kvtc_attn_leaves_one(int device, const ggml_tensor * dst) {
    using namespace kvtc;
#ifdef KVTC_SM90
    sm90_plan plan;
    return is_hopper(device) && make_sm90_plan(get_shape(dst, get_params(dst)), get_gpu(device), plan) && plan.n_left > 0;
#else
    GGML_UNUSED_VARS(device, dst);
    return false;
#endif
}

bool ggml_cuda_kvtc_supports_op(int device, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        case GGML_OP_KVTC_SET_ROWS:
            return ggml_cuda_info().devices[device].cc >= GGML_CUDA_CC_TURING && op->src[1]->nb[0] == sizeof(float) && op->src[1]->ne[0] % 8 == 0;
        case GGML_OP_KVTC_ATTN:
            return ggml_cuda_info().devices[device].cc >= GGML_CUDA_CC_TURING && kvtc::supports_attn(device, op);
        default:
            break;
    }
    if (ggml_kvtc_is_type(op->type)) {
        return false;
    }
    for (const ggml_tensor * src : op->src) {
        if (src && ggml_kvtc_is_type(src->type)) {
            return false;
        }
    }
    return true;
}
