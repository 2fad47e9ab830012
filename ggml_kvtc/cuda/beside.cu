// Attention of one token beside the nodes that make the token's key and value. The token counts exactly, so attention can leave it out
// and add it at the end, as it is before it is coded: of these nodes it needs nothing until then. They go to a stream of their own, and
// run while the query is made and other cells are attended to:
//
//   norm -+-> query's product -> RoPE -> attention of other cells -+-> combine, the token
//         +-> key's, value's products -> transform and write ------+
//
// Where attention has a block on every processor, these nodes wait for its end if they come later than it, and keep blocks of it waiting if
// they come sooner. So it leaves them one where that has the time for the write (plan.h): then the products have priority over the query's,
// and the write begins when all of attention's blocks have.
#include "beside.h"
#include "branches.h"
#include "encode.cuh"
#include "join.cuh"
#include "kvtc-cuda.h"

#include "common.cuh"

#include "ggml-cuda.h"

#include <cstdlib>
#include <optional>

namespace kvtc {

namespace {

// of the context's, which uses the first ones where it runs branches itself
constexpr int SIDE_STREAM  = GGML_CUDA_MAX_STREAMS - 1;
constexpr int FIRST_STREAM = GGML_CUDA_MAX_STREAMS - 2; // with priority

thread_local branches now; // of the graph that the thread computes
thread_local const ggml_backend_cuda_context * now_of = nullptr; // nullptr: there are none
thread_local int stream_no = SIDE_STREAM; // of `now`
thread_local std::optional<fused_args> kept; // its write of codes

// GGML_KVTC_BESIDE=0: for measurements and tests
bool is_off() {
    const char * beside = getenv("GGML_KVTC_BESIDE");
    return beside && atoi(beside) == 0;
}

cudaStream_t get_stream(ggml_backend_cuda_context & ctx) {
    cudaStream_t & stream = ctx.streams[ctx.device][stream_no]; // the context destroys it
    if (!stream && stream_no == FIRST_STREAM) {
        int least, greatest;
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
        CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
    }
    return ctx.stream(ctx.device, stream_no);
}

} // namespace

void choose_stream(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    if (now_of == &ctx && now.graph == graph && i >= now.first && i <= now.attn) {
        ctx.curr_stream_no = i < now.attn && now.beside[i - now.first] ? stream_no : 0;
        return;
    }
    now_of = nullptr;
    if (graph->nodes[i]->op != GGML_OP_MUL_MAT || ctx.curr_stream_no != 0 || !ctx.stream_context().concurrent_events.empty()) {
        return;
    }
    branches b;
    if (find_branches(graph, i, ggml_backend_cuda_buffer_type(ctx.device), b) && ggml_cuda_kvtc_attn_adds_own(b.dst()) && !is_off()) {
        now       = b;
        now_of    = &ctx;
        stream_no = ggml_cuda_kvtc_attn_leaves_one(ctx.device, b.dst()) ? FIRST_STREAM : SIDE_STREAM;
        kept.reset();
        follow(ctx.stream(), get_stream(ctx));
        choose_stream(ctx, graph, i);
    }
}

bool is_beside(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const ggml_tensor * (&x)[2]) {
    std::copy(now.x, now.x + 2, x);
    return now_of == &ctx && now.dst() == dst;
}

cudaStream_t end_beside(ggml_backend_cuda_context & ctx) {
    now_of = nullptr;
    const cudaStream_t stream = get_stream(ctx);
    if (kept) {
        encode_few(*kept, ggml_cuda_info().devices[ctx.device].cc, stream, ctx.stream());
        kept.reset();
    }
    return stream;
}

bool keep_write(const ggml_backend_cuda_context & ctx, const fused_args & write) {
    if (now_of != &ctx || ctx.curr_stream_no != FIRST_STREAM || kept) {
        return false;
    }
    kept = write;
    return true;
}

} // namespace kvtc

cudaError_t ggml_cuda_kvtc_instantiate(cudaGraphExec_t * instance, cudaGraph_t graph) {
#if CUDART_VERSION >= 11070
    return cudaGraphInstantiateWithFlags(instance, graph, cudaGraphInstantiateFlagUseNodePriority);
#else
    return cudaGraphInstantiate(instance, graph, nullptr, nullptr, 0);
#endif
}
