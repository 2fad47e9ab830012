// What the backend asks of a graph's nodes.
#pragma once

#include "kvtc.h"

#include "ggml-impl.h"

namespace kvtc {

inline const ggml_tensor * get_root(const ggml_tensor * t) {
    while (t && t->view_src) {
        t = t->view_src;
    }
    return t;
}

inline bool computes(const ggml_tensor * node) {
    return !ggml_op_is_empty(node->op);
}

inline bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * pa = (const char *) a->data;
    const char * pb = (const char *) b->data;
    return pa < pb + ggml_nbytes(b) && pb < pa + ggml_nbytes(a);
}

inline bool is_exact_write(const ggml_tensor * node) {
    return node->op == GGML_OP_KVTC_SET_ROWS && !ggml_kvtc_is_type(node->type);
}

} // namespace kvtc
