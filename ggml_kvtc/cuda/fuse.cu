// Nodes of a graph that one kernel does at once: product, sum and write of codes, of keys and values; attention and the writes of
// exact rows behind it; or these writes alone.
#include "kvtc-cuda.h"
#include "beside.h"
#include "encode.cuh"
#include "nodes.h"

namespace kvtc {

namespace {

constexpr int MAX_FEW_TOKENS = 16; // that have a block for each; more go to encode-many.cu

// the node after i that computes something
int next_node(const ggml_cgraph * graph, int i) {
    do {
        ++i;
    } while (i < graph->n_nodes && !computes(graph->nodes[i]));
    return i;
}

// whether the result of a node covers what a write of rows reads or writes: one kernel does both in any order
bool writes_over(const ggml_tensor * node, const ggml_tensor * write) {
    return overlap(node, write) || overlap(node, write->src[1]) || overlap(node, write->src[2]);
}

// the second of two writes of exact rows, of keys and values, of which the first is node i; 0 if one kernel may not do both
int find_exact_writes(const ggml_cgraph * graph, int i) {
    const int j = i < graph->n_nodes ? next_node(graph, i) : i;
    if (j >= graph->n_nodes || !is_exact_write(graph->nodes[i]) || !is_exact_write(graph->nodes[j])) {
        return 0;
    }
    const ggml_tensor * keys   = graph->nodes[i];
    const ggml_tensor * values = graph->nodes[j];
    return ggml_are_same_shape(keys->src[1], values->src[1]) && !writes_over(keys, values) && !writes_over(values, keys) ? j : 0;
}

bool has_kernel(int cc, int d, int64_t n_tokens, bool turbo) {
    const bool few = n_tokens <= MAX_FEW_TOKENS;
    return turbo ? few && encode_few_supports_turbo(cc, d) : few || encode_many_supports(cc, d);
}

struct fused_nodes {
    const ggml_tensor * product;
    const ggml_tensor * sum;
    ggml_tensor       * write;
    int last;
};

// product, sum and write of codes from node i on, if a kernel may do them at once
bool find_write(const ggml_cgraph * graph, int i, int cc, fused_nodes & f) {
    if (i >= graph->n_nodes) {
        return false;
    }
    f.product = graph->nodes[i];
    if (f.product->op != GGML_OP_MUL_MAT || f.product->src[0]->type != GGML_TYPE_F32) {
        return false;
    }
    const int i_sum = next_node(graph, i);
    f.last = next_node(graph, i_sum);
    if (f.last >= graph->n_nodes) {
        return false;
    }
    f.sum   = graph->nodes[i_sum];
    f.write = graph->nodes[f.last];
    if (f.sum->op != GGML_OP_ADD || f.sum->src[0] != f.product || f.write->op != GGML_OP_KVTC_SET_ROWS || f.write->src[1] != f.sum ||
            !ggml_kvtc_is_type(f.write->type)) {
        return false;
    }
    const ggml_tensor * encode = f.product->src[0];
    const ggml_tensor * x      = f.product->src[1];
    const ggml_tensor * bias   = f.sum->src[1];
    const int64_t d = encode->ne[0];
    // Nothing else may read the product, which is not written. The sum is written while other blocks still read x: a graph's allocator
    // may have given it the memory of x.
    return ggml_node_get_use_count(graph, i) == 1 && !(f.product->flags & GGML_TENSOR_FLAG_OUTPUT) &&
        encode->ne[1] == d && d <= GGML_KVTC_MAX_DIM && d % 16 == 0 && ggml_is_contiguous(encode) && f.product->ne[3] == 1 && x->ne[2] == encode->ne[2] &&
        has_kernel(cc, (int) d, f.product->ne[1], ggml_kvtc_is_turbo(f.write->type)) &&
        x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) && bias->type == GGML_TYPE_F32 && ggml_is_contiguous(bias) &&
        bias->ne[0] == d && bias->ne[1] == 1 && bias->ne[2] == encode->ne[2] && !overlap(x, f.sum);
}

// whether f's sum covers what g reads. Both come from a graph's allocator, which knows only that g's nodes follow f's.
bool touches(const fused_nodes & f, const fused_nodes & g) {
    return overlap(f.sum, g.product->src[1]) || overlap(f.sum, g.write->src[2]);
}

fused_side get_side(const fused_nodes & f) {
    const ggml_tensor * x = f.product->src[1];
    fused_side a;
    a.x      = (const char *) x->data;
    a.nb_x1  = x->nb[1];
    a.nb_x2  = x->nb[2];
    a.encode = (const float *) f.product->src[0]->data;
    a.bias   = (const float *) f.sum->src[1]->data;
    a.z      = (char *) f.sum->data;
    a.nb_z1  = f.sum->nb[1];
    a.nb_z2  = f.sum->nb[2];
    a.idxs   = (const int64_t *) f.write->src[2]->data;
    a.pack   = (const char *) f.write->src[3]->data;
    a.rows   = (uint8_t *) f.write->data;
    a.nb_row = f.write->nb[1];
    return a;
}

} // namespace

} // namespace kvtc

int ggml_cuda_kvtc_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    using namespace kvtc;
    ggml_tensor * node = graph->nodes[i];
    choose_stream(ctx, graph, i);
    if (node->op == GGML_OP_KVTC_ATTN) {
        const int j = next_node(graph, i);
        const int k = find_exact_writes(graph, j);
        return k > 0 && !writes_over(node, graph->nodes[j]) && !writes_over(node, graph->nodes[k]) &&
            ggml_cuda_kvtc_attn_set_exact(ctx, node, graph->nodes[j], graph->nodes[k]) ? k - i : 0;
    }
    if (const int k = find_exact_writes(graph, i)) {
        ggml_cuda_kvtc_set_exact(ctx, node, graph->nodes[k]);
        return k - i;
    }
    const int cc = ggml_cuda_info().devices[ctx.device].cc;
    fused_nodes f;
    if (!find_write(graph, i, cc, f)) {
        return 0;
    }
    fused_args a;
    a.d      = (int) f.product->src[0]->ne[0];
    a.inv_d  = 1.0/a.d;
    a.n_head = (int) f.product->src[0]->ne[2];
    a.turbo  = ggml_kvtc_is_turbo(f.write->type);
    a.side [0] = a.side [1] = get_side(f);
    a.index[0] = a.index[1] = ggml_get_op_params_i32(f.write, 0);
    fused_nodes g;
    const bool both = find_write(graph, next_node(graph, f.last), cc, g) && g.product->src[0]->ne[0] == a.d && g.product->src[0]->ne[2] == a.n_head &&
        g.product->ne[1] == f.product->ne[1] && ggml_kvtc_is_turbo(g.write->type) == a.turbo && !touches(f, g) && !touches(g, f) && !overlap(f.sum, g.sum);
    if (both) {
        a.side [1] = get_side(g);
        a.index[1] = ggml_get_op_params_i32(g.write, 0);
    }
    a.n_side   = both ? 2 : 1;
    a.n_tokens = (int) f.product->ne[1];
    if (a.n_tokens > MAX_FEW_TOKENS) {
        encode_many(a, ctx.stream());
    } else if (!both || !keep_write(ctx, a)) {
        encode_few(a, cc, ctx.stream());
    }
    return (both ? g.last : f.last) - i;
}
