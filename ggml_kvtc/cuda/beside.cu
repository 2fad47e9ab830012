// Attention of one token beside the nodes that make the token's key and value. The token counts exactly, so attention can leave it out
// and add it at the end, as it is before it is coded: of these nodes it needs nothing until then. They go to a stream of their own, and
// run while the query is made and other cells are attended to:
//
//   norm -+-> query's product -> RoPE -> attention of other cells -+-> combine, the token
//         +-> key's, value's products -> transform and write ------+
#include "beside.h"
#include "branches.h"
#include "join.cuh"
#include "kvtc-cuda.h"

#include "common.cuh"

#include "ggml-cuda.h"

#include <cstdlib>

namespace kvtc {

namespace {

constexpr int SIDE_STREAM = GGML_CUDA_MAX_STREAMS - 1; // of the context's, which uses the first ones where it runs branches itself

thread_local branches now; // of the graph that the thread computes
thread_local const ggml_backend_cuda_context * now_of = nullptr; // nullptr: there are none

// GGML_KVTC_BESIDE=0: for measurements and tests
bool is_off() {
    const char * beside = getenv("GGML_KVTC_BESIDE");
    return beside && atoi(beside) == 0;
}

} // namespace

void choose_stream(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    if (now_of == &ctx && now.graph == graph && i >= now.first && i <= now.attn) {
        ctx.curr_stream_no = i < now.attn && now.beside[i - now.first] ? SIDE_STREAM : 0;
        return;
    }
    now_of = nullptr;
    if (graph->nodes[i]->op != GGML_OP_MUL_MAT || ctx.curr_stream_no != 0 || !ctx.stream_context().concurrent_events.empty()) {
        return;
    }
    branches b;
    if (find_branches(graph, i, ggml_backend_cuda_buffer_type(ctx.device), b) && ggml_cuda_kvtc_attn_adds_own(b.dst()) && !is_off()) {
        now    = b;
        now_of = &ctx;
        follow(ctx.stream(), ctx.stream(ctx.device, SIDE_STREAM));
        choose_stream(ctx, graph, i);
    }
}

bool is_beside(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * (&x)[2]) {
    std::copy(now.x, now.x + 2, x);
    return now_of == &ctx && now.dst() == dst;
}

cudaStream_t end_beside(ggml_backend_cuda_context & ctx) {
    now_of = nullptr;
    return ctx.stream(ctx.device, SIDE_STREAM);
}

} // namespace kvtc
