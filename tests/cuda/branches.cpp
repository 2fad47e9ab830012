// Graphs of one layer's attention, as llama.cpp and llama_kvtc make them, for tests/cuda/test_branches.py.
#include "cuda/branches.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <cstdio>
#include <cstring>
#include <string>

using namespace kvtc;

namespace {

constexpr int D = 64, HEADS = 2, GROUP = 2, EMBD = 256, CELLS = 64, SLOTS = 40;

enum variant {
    KEEP      = 1,  // the writes of exact rows keep what llama_kvtc has them keep
    MASK      = 2,
    FUSED     = 4,  // one product for query, key and value
    SHARED    = 8,  // the key is made of the rotated query
    TWO       = 16, // tokens
    NO_EXACT  = 32, // nothing counts exactly
    KEY_FIRST = 64, // in the graph
    OTHER     = 128 // a node between writes to the cache as well
};

struct layer {
    ggml_context * ctx;
    int what;

    bool has(variant v) const { return (what & v) != 0; }

    ggml_tensor * leaf(ggml_type type, int64_t a, int64_t b = 1, int64_t c = 1) const {
        ggml_tensor * t = ggml_new_tensor_3d(ctx, type, a, b, c);
        ggml_set_input(t);
        ggml_set_output(t); // weights, as a model has them: their memory is not given away
        return t;
    }

    ggml_cgraph * build() const {
        const int n = has(TWO) ? 2 : 1;
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_tensor * cur = ggml_mul(ctx, ggml_rms_norm(ctx, leaf(GGML_TYPE_F32, EMBD, n), 1e-6f), leaf(GGML_TYPE_F32, EMBD));
        ggml_tensor * qkv = has(FUSED) ? ggml_mul_mat(ctx, leaf(GGML_TYPE_F32, EMBD, D*HEADS*(GROUP + 2)), cur) : nullptr;
        const auto part = [&](int first, int heads) {
            if (qkv) {
                return ggml_view_3d(ctx, qkv, D, heads, n, D*sizeof(float), qkv->nb[1], first*D*sizeof(float));
            }
            return ggml_reshape_3d(ctx, ggml_mul_mat(ctx, leaf(GGML_TYPE_F32, EMBD, D*heads), cur), D, heads, n);
        };
        ggml_tensor * q = ggml_rope(ctx, part(0, HEADS*GROUP), leaf(GGML_TYPE_I32, n), D, 0);
        ggml_set_name(q, "query");
        ggml_tensor * x[2] = { part(HEADS*GROUP, HEADS), part(HEADS*(GROUP + 1), HEADS) };
        if (has(SHARED)) {
            x[0] = ggml_view_3d(ctx, q, D, HEADS, n, q->nb[1], q->nb[2], 0);
            x[0] = ggml_cont(ctx, x[0]);
        }
        for (int s = has(KEY_FIRST) ? 0 : 2; s < 2; ++s) {
            ggml_build_forward_expand(graph, x[s]);
        }
        ggml_build_forward_expand(graph, q);
        for (ggml_tensor * t : x) {
            ggml_build_forward_expand(graph, t);
        }
        ggml_tensor * pack  = leaf(GGML_TYPE_I8, 64);
        ggml_tensor * exact = has(NO_EXACT) ? nullptr : leaf(GGML_TYPE_F16, 2*D*SLOTS*HEADS);
        ggml_tensor * cache[2], * z[2];
        for (int s = 0; s < 2; ++s) {
            cache[s] = leaf(GGML_TYPE_KVTC2, ggml_kvtc_row_values(GGML_TYPE_KVTC2, HEADS, D), CELLS);
            z[s] = ggml_mul_mat(ctx, leaf(GGML_TYPE_F32, D, D, HEADS), ggml_permute(ctx, x[s], 0, 2, 1, 3));
            z[s] = ggml_add(ctx, z[s], leaf(GGML_TYPE_F32, D, 1, HEADS));
            ggml_build_forward_expand(graph, ggml_kvtc_set_rows(ctx, cache[s], z[s], leaf(GGML_TYPE_I64, n), pack, (ggml_kvtc_side) s));
        }
        if (has(OTHER)) {
            ggml_tensor * more = ggml_add(ctx, z[0], leaf(GGML_TYPE_F32, D, 1, HEADS));
            ggml_build_forward_expand(graph, ggml_kvtc_set_rows(ctx, cache[0], more, leaf(GGML_TYPE_I64, n), pack, GGML_KVTC_K));
        }
        ggml_tensor * rows[2];
        for (int s = 0; s < 2; ++s) {
            rows[s] = ggml_view_4d(ctx, cache[s], D, CELLS, HEADS, 1, cache[s]->nb[1], ggml_row_size(cache[s]->type, D), cache[s]->nb[2], 0);
        }
        ggml_tensor * mask = has(MASK) ? ggml_new_tensor_4d(ctx, GGML_TYPE_F16, CELLS, n, 1, 1) : nullptr;
        ggml_tensor * of_heads = ggml_permute(ctx, q, 0, 2, 1, 3);
        ggml_kvtc_attn_params p = {};
        p.n_window = 32;
        p.n_slots  = SLOTS;
        ggml_tensor * out = ggml_kvtc_attn(ctx, of_heads, rows[0], rows[1], mask, nullptr, pack, leaf(GGML_TYPE_I32, 2*CELLS + n), exact, z[0], z[1], p);
        ggml_build_forward_expand(graph, ggml_reshape_2d(ctx, out, D*HEADS*GROUP, n));
        for (int s = 0; exact && s < 2; ++s) {
            ggml_tensor * store = ggml_view_3d(ctx, exact, D, SLOTS, HEADS, D*2, D*SLOTS*2, (size_t) s*D*SLOTS*HEADS*2);
            ggml_tensor * write = ggml_kvtc_set_rows(ctx, store, z[s], leaf(GGML_TYPE_I64, n), pack, (ggml_kvtc_side) s);
            if (has(KEEP)) {
                ggml_kvtc_set_rows_keep(write, z[s]->src[0]->src[1]);
                ggml_kvtc_set_rows_keep(write, cur);
                if (s == 1 && !qkv) {
                    ggml_kvtc_set_rows_keep(write, q->src[0]->src[0]);
                }
            }
            ggml_build_forward_expand(graph, write);
        }
        return graph;
    }
};

} // namespace

// What is found for the first node of which something is: the number of nodes beside, or -1. first: that node's index among those that
// compute; beside: of these nodes, whether they are. n: how many there are before attention, and so in `beside`
extern "C" int find_beside(int what, int * first, int * beside, int * n) {
    ggml_context * ctx = ggml_init({ 4 << 20, nullptr, true });
    const layer l = { ctx, what };
    ggml_cgraph * graph = l.build();
    const ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
    ggml_gallocr_t allocator = ggml_gallocr_new(buft);
    int count = ggml_gallocr_alloc_graph(allocator, graph) ? -1 : -2;
    for (int i = 0; i < graph->n_nodes && count == -1; ++i) {
        graph->nodes[i]->flags |= GGML_TENSOR_FLAG_COMPUTE;
    }
    *first = -1;
    *n     = 0;
    branches b;
    for (int i = 0; i < graph->n_nodes && count == -1 && graph->nodes[i]->op != GGML_OP_KVTC_ATTN; ++i) {
        if (graph->nodes[i]->op == GGML_OP_MUL_MAT && find_branches(graph, i, buft, b)) {
            count = 0;
            *first = *n;
            for (int k = 0; k < b.size(); ++k) {
                if (computes(b.node(k))) {
                    beside[(*n)++] = b.beside[k];
                    count += b.beside[k];
                }
            }
            break;
        }
        *n += computes(graph->nodes[i]);
    }
    ggml_gallocr_free(allocator);
    ggml_free(ctx);
    return count;
}
