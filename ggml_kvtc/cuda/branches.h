// The nodes before the attention of one token that may be computed beside those that make its query. Of ggml's graphs alone: tests run it
// anywhere.
#pragma once

#include "nodes.h"

#include "ggml-backend-impl.h"

#include <algorithm>

namespace kvtc {

constexpr int MAX_BESIDE = 48; // nodes from the query's product to attention

// the nodes of a graph from `first` on, before attention
struct branches {
    const ggml_cgraph * graph = nullptr;
    int  first = 0;
    int  attn  = 0;
    bool beside[MAX_BESIDE] = {}; // the key's and value's
    const ggml_tensor * x[2] = { nullptr, nullptr }; // these, before they are coded: f32 [d, token, head], keys before RoPE

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

namespace of_branches {

// is a's result what b reads or writes?
inline bool disturbs(const ggml_tensor * a, const ggml_tensor * b) {
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
inline const ggml_tensor * get_plain(const ggml_tensor * z) {
    if (!z || z->op != GGML_OP_ADD || z->src[0]->op != GGML_OP_MUL_MAT) {
        return nullptr;
    }
    const ggml_tensor * x = z->src[0]->src[1];
    return x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) ? x : nullptr;
}

// The nodes behind attention that write exact rows keep the memory of x until then.
inline bool is_kept(const branches & b, const ggml_tensor * z, const ggml_tensor * x) {
    for (int i = b.attn + 1; i < std::min(b.graph->n_nodes, b.attn + MAX_BESIDE); ++i) {
        const ggml_tensor * node = b.graph->nodes[i];
        if (is_exact_write(node) && node->src[1] == z) {
            return get_root(node->src[4]) == get_root(x);
        }
    }
    return false;
}

// Divides the nodes: those that the query is made of, and all others. False if one of these reads one of those, or the other way round.
inline bool divide(branches & b) {
    bool query[MAX_BESIDE] = {};
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
inline bool is_apart(const branches & b, ggml_backend_buffer_type_t own) {
    const ggml_tensor * dst = b.dst();
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
inline bool has_begun(const ggml_cgraph * graph, int i, int attn) {
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

} // namespace of_branches

// Finds them where node i is the first of them or of the query's, if there are any whose order does not matter. own: the buffers of the
// device
inline bool find_branches(const ggml_cgraph * graph, int i, ggml_backend_buffer_type_t own, branches & b) {
    using namespace of_branches;
    b.graph = graph;
    b.first = i;
    b.attn  = i + 1;
    while (b.attn < graph->n_nodes && b.size() < MAX_BESIDE && graph->nodes[b.attn]->op != GGML_OP_KVTC_ATTN) {
        ++b.attn;
    }
    if (b.attn >= graph->n_nodes || b.dst()->op != GGML_OP_KVTC_ATTN) {
        return false;
    }
    const ggml_tensor * dst = b.dst();
    const bool has_mask = dst->src[3]; // which might hide the token from itself
    if (dst->src[0]->ne[1] != 1 || has_mask || !dst->src[7] || (dst->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || !has_begun(graph, i, b.attn)) {
        return false;
    }
    for (int s = 0; s < 2; ++s) {
        b.x[s] = get_plain(dst->src[8 + s]);
        if (!b.x[s] || !is_kept(b, dst->src[8 + s], b.x[s])) {
            return false;
        }
    }
    return divide(b) && is_apart(b, own);
}

} // namespace kvtc
