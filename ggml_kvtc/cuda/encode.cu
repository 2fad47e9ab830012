// The write operation: a warp codes one head vector, or a thread rounds eight components to the exact rows' f16.
#include "kvtc-cuda.h"
#include "encode.cuh"
#include "exact.cuh"

namespace kvtc {

namespace {

constexpr int THREADS = 256;

struct write_args {
    const char    * z;
    int64_t         nb_z1, nb_z2; // token, head
    const int64_t * idxs;
    const char    * pack;
    uint8_t       * dst;
    int64_t         nb_1;
    int             n_tokens, n_head, d;
};

template <bool turbo>
__global__ void write_codes(const write_args a, int side) {
    extern __shared__ float scratch[]; // [warp][3][d]: plain, whitened, levels
    const int lane   = threadIdx.x % 32;
    const int vector = (blockIdx.x*THREADS + threadIdx.x)/32;
    const int token  = vector/a.n_head;
    const int h      = vector%a.n_head;
    if (token >= a.n_tokens) {
        return; // the whole warp
    }
    const int64_t row = a.idxs[token];
    if (row < 0) {
        return;
    }
    const char  * pack  = a.pack;
    const float * z     = (const float *) (a.z + token*a.nb_z1 + h*a.nb_z2);
    float       * plain = scratch + threadIdx.x/32*3*a.d;
    for (int c = lane; c < a.d; c += 32) {
        plain[c] = z[c];
    }
    __syncwarp();
    code_vector<turbo>(pack, side, h, a.n_head, a.d, plain, plain + a.d, plain + 2*a.d, a.dst + row*a.nb_1 + get_head(pack, side, h).payload);
}

// A thread has eight components; blocks of a head and a side share its tokens.
__global__ void write_exact(const exact_rows rows, int n_tokens, int per_token) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    const int i = blockIdx.x*THREADS + threadIdx.x;
    if (i < n_tokens*per_token) {
        write_components(rows.side[blockIdx.z], i/per_token, blockIdx.y, i%per_token*8);
    }
}

} // namespace

} // namespace kvtc

static kvtc::write_args get_args(const ggml_tensor * dst) {
    const ggml_tensor * z = dst->src[1];
    kvtc::write_args a;
    a.z        = (const char *) z->data;
    a.nb_z1    = z->nb[1];
    a.nb_z2    = z->nb[2];
    a.idxs     = (const int64_t *) dst->src[2]->data;
    a.pack     = (const char *) dst->src[3]->data;
    a.dst      = (uint8_t *) dst->data;
    a.nb_1     = dst->nb[1];
    a.n_tokens = (int) z->ne[1];
    a.n_head   = (int) z->ne[2];
    a.d        = (int) z->ne[0];
    return a;
}

static void write_exact_rows(const kvtc::exact_rows & rows, const ggml_tensor * z, cudaStream_t stream) {
    using namespace kvtc;
    const int per_token = (int) z->ne[0]/8; // supports_op: d is a multiple
    const int n_tokens  = (int) z->ne[1];
    const int n_head    = (int) z->ne[2];
    if (n_tokens > 0) {
        const dim3 grid((n_tokens*per_token + THREADS - 1)/THREADS, n_head, rows.n_side);
        ggml_cuda_kernel_launch(write_exact, { grid, THREADS, 0, stream }, rows, n_tokens, per_token);
    }
}

void ggml_cuda_kvtc_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    using namespace kvtc;
    if (!ggml_kvtc_is_type(dst->type)) {
        return write_exact_rows({ { get_exact_side(dst), {} }, 1 }, dst->src[1], ctx.stream());
    }
    const write_args a = get_args(dst);
    constexpr int WARPS = THREADS/32;
    const int64_t n = (int64_t) a.n_tokens*a.n_head;
    if (n > 0) {
        const auto kernel = ggml_kvtc_is_turbo(dst->type) ? write_codes<true> : write_codes<false>;
        kernel<<<(int) ((n + WARPS - 1)/WARPS), THREADS, WARPS*3*a.d*sizeof(float), ctx.stream()>>>(a, ggml_get_op_params_i32(dst, 0));
        CUDA_CHECK(cudaGetLastError());
    }
}

void ggml_cuda_kvtc_set_exact(ggml_backend_cuda_context & ctx, ggml_tensor * keys, ggml_tensor * values) {
    write_exact_rows({ { kvtc::get_exact_side(keys), kvtc::get_exact_side(values) }, 2 }, keys->src[1], ctx.stream());
}
