// Attention of one token beside the nodes that make the token's key and value. The token counts exactly, so attention can leave it out
// and add it at the end, as it is before it is coded: of these nodes it needs nothing until then. They go to a stream of their own, and
// run while the query is made and other cells are attended to:
//
//   norm -+-> query's product -> RoPE -> attention of other cells -+-> combine, the token
//         +-> key's, value's products -> transform and write ------+
#include "beside.h"
#include "join.cuh"
#include "kvtc-cuda.h"

#include "ggml-backend-impl.h"
#include "ggml-cuda.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstdlib>

namespace kvtc {

namespace {

constexpr int MAX_NODES   = 48;                      // from the query's product to attention
constexpr int SIDE_STREAM = GGML_CUDA_MAX_STREAMS - 1; // of the context's, which uses the first ones where it runs branches itself

// the nodes of a graph from `first` on, before attention
struct branches {
    const ggml_backend_cuda_context * ctx   = nullptr; // nullptr: there are none
    const ggml_cgraph               * graph = nullptr;
    int  first  = 0;
    int  attn   = 0;
    bool beside[MAX_NODES] = {}; // the key's and value's
    const ggml_tensor * x[2] = { nullptr, nullptr };

    const ggml_tensor * node(int i) const { return graph->nodes[first + i]; }
    const ggml_tensor * dst()       const { return graph->nodes[attn]; }
    int size() const { return attn - first; }

    int find(const ggml_tensor * t) const {
        int i = size() - 1;
        while (i >= 0 && node(i) != t) {
            --i;
        }
        return i;
    }
};

thread_local branches now; // a thread computes one graph at a time

const ggml_tensor * get_root(const ggml_tensor * t) {
    while (t && t->view_src) {
        t = t->view_src;
    }
    return t;
}

bool computes(const ggml_tensor * node) {
    return !ggml_op_is_empty(node->op);
}

bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * pa = (const char *) a->data;
    const char * pb = (const char *) b->data;
    return pa < pb + ggml_nbytes(b) && pb < pa + ggml_nbytes(a);
}

// is a's result what b reads or writes?
bool disturbs(const ggml_tensor * a, const ggml_tensor * b) {
    if (overlap(a, b)) {
        return true;
    }
    for (const ggml_tensor * src : b->src) {
        if (src && overlap(a, src)) {
            return true;
        }
    }
    return false;
}

// what is written for a side, before it is coded; nullptr where z is no product with an encode matrix and a sum
const ggml_tensor * get_plain(const ggml_tensor * z) {
    if (!z || z->op != GGML_OP_ADD || z->src[0]->op != GGML_OP_MUL_MAT) {
        return nullptr;
    }
    const ggml_tensor * x = z->src[0]->src[1];
    return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) ? x : nullptr;
}

// The nodes behind attention that write exact rows keep the memory of x until then.
bool is_kept(const branches & b, const ggml_tensor * z, const ggml_tensor * x) {
    for (int i = b.attn + 1; i < std::min(b.graph->n_nodes, b.attn + MAX_NODES); ++i) {
        const ggml_tensor * node = b.graph->nodes[i];
        if (node->op == GGML_OP_KVTC_SET_ROWS && !ggml_kvtc_is_type(node->type) && node->src[1] == z) {
            return get_root(node->src[4]) == get_root(x);
        }
    }
    return false;
}

// Divides the nodes: those that the query is made of, and all others. False if one of these reads one of those, or the other way round.
bool divide(branches & b) {
    bool query[MAX_NODES] = {};
    const auto mark = [&](const ggml_tensor * t) {
        const int i = t ? b.find(t) : -1;
        if (i >= 0) {
            query[i] = true;
        }
    };
    const ggml_tensor * dst = b.dst();
    mark(dst->src[0]);
    for (int i = b.size() - 1; i >= 0; --i) {
        b.beside[i] = !query[i];
        if (query[i]) {
            mark(b.node(i)->view_src);
            for (const ggml_tensor * src : b.node(i)->src) {
                mark(src);
            }
        }
    }
    for (int i = 0; i < b.size(); ++i) {
        for (const ggml_tensor * src : b.node(i)->src) {
            const int from = b.beside[i] && src ? b.find(src) : -1;
            if (from >= 0 && !b.beside[from]) {
                return false;
            }
        }
    }
    return true;
}

// Is the memory of both such that their order does not matter? A graph's allocator knows one order only.
bool is_apart(const ggml_backend_cuda_context & ctx, const branches & b) {
    const ggml_tensor * dst = b.dst();
    const ggml_backend_buffer_type_t own = ggml_backend_cuda_buffer_type(ctx.device);
    int n_write = 0;
    for (int i = 0; i < b.size(); ++i) {
        const ggml_tensor * node = b.node(i);
        if (!b.beside[i] || !computes(node)) {
            continue;
        }
        for (const ggml_tensor * src : node->src) { // not split over several devices
            const ggml_tensor * root = get_root(src);
            if (root && (!root->buffer || root->buffer->buft != own)) {
                return false;
            }
        }
        const bool writes = node->op == GGML_OP_KVTC_SET_ROWS && ((node->src[1] == dst->src[8] && get_root(node) == get_root(dst->src[1])) ||
                                                                  (node->src[1] == dst->src[9] && get_root(node) == get_root(dst->src[2])));
        if (writes) { // rows of its own: attention reads others
            ++n_write;
            continue;
        }
        for (int s = 0; s < 8; ++s) {
            if (dst->src[s] && overlap(node, dst->src[s])) {
                return false;
            }
        }
        for (int k = 0; k < b.size(); ++k) {
            const ggml_tensor * other = b.node(k);
            if (!b.beside[k] && computes(other) && (disturbs(node, other) || disturbs(other, node))) {
                return false;
            }
        }
    }
    return n_write == 2;
}

// whether node i is the query's product or behind it
bool has_begun(const ggml_cgraph * graph, int i, int attn) {
    const ggml_tensor * t = graph->nodes[attn]->src[0];
    while (t && t->op != GGML_OP_MUL_MAT && t->src[0]) {
        t = t->src[0];
    }
    for (++i; i < attn; ++i) {
        if (graph->nodes[i] == t) {
            return false;
        }
    }
    return true;
}

bool find_branches(const ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i, branches & b) {
    b.graph = graph;
    b.first = i;
    b.attn  = i + 1;
    while (b.attn < graph->n_nodes && b.size() < MAX_NODES && graph->nodes[b.attn]->op != GGML_OP_KVTC_ATTN) {
        ++b.attn;
    }
    if (b.attn >= graph->n_nodes || b.dst()->op != GGML_OP_KVTC_ATTN) {
        return false;
    }
    const ggml_tensor * dst = b.dst();
    const bool has_mask = dst->src[3]; // which might hide the token from itself
    if (has_mask || !dst->src[7] || (dst->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || !has_begun(graph, i, b.attn) || !ggml_cuda_kvtc_attn_adds_own(dst)) {
        return false;
    }
    for (int s = 0; s < 2; ++s) {
        b.x[s] = get_plain(dst->src[8 + s]);
        if (!b.x[s] || !is_kept(b, dst->src[8 + s], b.x[s])) {
            return false;
        }
    }
    if (const char * beside = getenv("GGML_KVTC_BESIDE"); beside && atoi(beside) == 0) { // for measurements and tests
        return false;
    }
    return divide(b) && is_apart(ctx, b);
}

} // namespace

void choose_stream(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    if (now.ctx == &ctx && now.graph == graph && i >= now.first && i <= now.attn) {
        ctx.curr_stream_no = i < now.attn && now.beside[i - now.first] ? SIDE_STREAM : 0;
        return;
    }
    now.ctx = nullptr;
    if (graph->nodes[i]->op != GGML_OP_MUL_MAT || ctx.curr_stream_no != 0 || !ctx.stream_context().concurrent_events.empty()) {
        return;
    }
    branches b;
    if (find_branches(ctx, graph, i, b)) {
        b.ctx = &ctx;
        now = b;
        follow(ctx.stream(), ctx.stream(ctx.device, SIDE_STREAM));
        choose_stream(ctx, graph, i);
    }
}

bool is_beside(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * (&x)[2]) {
    std::copy(now.x, now.x + 2, x);
    return now.ctx == &ctx && now.dst() == dst;
}

cudaStream_t end_beside(ggml_backend_cuda_context & ctx) {
    now.ctx = nullptr;
    return ctx.stream(ctx.device, SIDE_STREAM);
}

} // namespace kvtc
