// Merges the partial sums of the splits, turns coefficients into channels by the values' matrix, and divides by the sum of
// weights. Few rows: a block for each, whose threads share its components. Many: 8 channels of a row for each thread.
#include "combine.cuh"

namespace kvtc {

namespace {

template <int D> constexpr int N_SLICE   = 256/(D/8);      // slices of components
template <int D> constexpr int N_THREADS = N_SLICE<D>*(D/8);

// merged and normalized coefficients of one row, and the share of the tokens in the sum of weights (sink logits have the rest)
template <int D>
__device__ __forceinline__ void merge_row(const attn_args & a, const float * values, const float2 * meta, int n_split, int64_t row, int thread, int n_threads, float * sums, float & seen) {
    float top = -INFINITY;
    for (int s = 0; s < n_split; ++s) {
        top = fmaxf(top, meta[row*n_split + s].x);
    }
    float total = 0.0f;
    for (int s = 0; s < n_split && top != -INFINITY; ++s) {
        total += exp2f(meta[row*n_split + s].x - top)*meta[row*n_split + s].y;
    }
    float scale = 1.0f; // of the tokens' weights, when the sink's logit is the largest
    float sink  = 0.0f;
    if (a.sinks) {
        const float logit = a.sinks[row%a.n_head]*LOG2E;
        scale = logit > top ? exp2f(top - logit) : 1.0f;
        sink  = logit > top ? 1.0f : exp2f(logit - top);
    }
    const float all = scale*total + sink;
    const float inv = all > 0.0f ? scale/all : 0.0f;
    for (int c = thread; c < D; c += n_threads) {
        float value = 0.0f;
        for (int s = 0; s < n_split && top != -INFINITY; ++s) {
            value += exp2f(meta[row*n_split + s].x - top)*values[(row*n_split + s)*D + c];
        }
        sums[c] = value*inv;
    }
    seen = total*inv;
}

// the rows of one kv head, token after token
__device__ __forceinline__ int64_t get_row(const attn_args & a, int head_kv, int i) {
    return (int64_t) (i/a.group)*a.n_head + head_kv*a.group + i%a.group;
}

struct output {
    char  * dst;
    int64_t nb1, nb2, nb3;

    __device__ float * at(const attn_args & a, int64_t row) const {
        const int64_t token = row/a.n_head;
        return (float *) (dst + row%a.n_head*nb1 + token%a.n_tokens*nb2 + token/a.n_tokens*nb3);
    }
};

template <int D>
__device__ __forceinline__ void add_component(const half * matrix, int c, int channel, float x, float (&acc)[8]) {
    const uint4   m = *(const uint4 *) (matrix + c*D + channel);
    const half2 * h = (const half2 *) &m;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float2 y = __half22float2(h[j]);
        acc[2*j]     += x*y.x;
        acc[2*j + 1] += x*y.y;
    }
}

template <int D>
__launch_bounds__(N_THREADS<D>)
__global__ void combine_few(const attn_args a, const float * values, const float2 * meta, int n_split, const output out) {
    __shared__ float sums[D];
    __shared__ float part[N_SLICE<D>][D];
    const int64_t row = get_row(a, blockIdx.y, blockIdx.x);
    float seen;
    merge_row<D>(a, values, meta, n_split, row, threadIdx.x, N_THREADS<D>, sums, seen);
    __syncthreads();

    const char * pack    = find_pack(a.pack);
    const ggml_kvtc_cuda_head & head = get_head(pack, GGML_KVTC_V, blockIdx.y);
    const half * matrix  = at<half>(pack, head.decode); // [component][channel]
    const int    channel = threadIdx.x%(D/8)*8;
    const int    slice   = threadIdx.x/(D/8);
    float acc[8] = {};
#pragma unroll 8
    for (int c = slice; c < D; c += N_SLICE<D>) {
        add_component<D>(matrix, c, channel, sums[c], acc);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        part[slice][channel + j] = acc[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < D; i += N_THREADS<D>) {
        float sum = 0.0f;
        for (int s = 0; s < N_SLICE<D>; ++s) {
            sum += part[s][i];
        }
        out.at(a, row)[i] = sum + at<float>(pack, head.mean)[i]*seen;
    }
}

template <int D>
__launch_bounds__(N_THREADS<D>)
__global__ void combine_many(const attn_args a, const float * values, const float2 * meta, int n_split, const output out) {
    __shared__ float sums[N_SLICE<D>][D + 1];
    const int lane  = threadIdx.x%(D/8);
    const int slice = threadIdx.x/(D/8);
    const int i     = blockIdx.x*N_SLICE<D> + slice;
    const bool inside = i < a.n_tokens*a.n_stream*a.group;
    const int64_t row = inside ? get_row(a, blockIdx.y, i) : 0;
    float seen = 0.0f;
    if (inside) {
        merge_row<D>(a, values, meta, n_split, row, lane, D/8, sums[slice], seen);
    }
    __syncthreads();
    if (!inside) {
        return;
    }
    const char * pack   = find_pack(a.pack);
    const ggml_kvtc_cuda_head & head = get_head(pack, GGML_KVTC_V, blockIdx.y);
    const half * matrix = at<half>(pack, head.decode);
    float acc[8] = {};
#pragma unroll 8
    for (int c = 0; c < D; ++c) {
        add_component<D>(matrix, c, 8*lane, sums[slice][c], acc);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        out.at(a, row)[8*lane + j] = acc[j] + at<float>(pack, head.mean)[8*lane + j]*seen;
    }
}

template <int D>
void launch(const attn_args & a, const float * values, const float2 * meta, int n_split, char * dst, int64_t nb1, int64_t nb2, int64_t nb3, cudaStream_t stream) {
    const int    per_kv = a.n_tokens*a.n_stream*a.group;
    const output out    = { dst, nb1, nb2, nb3 };
    if (per_kv <= 64) {
        combine_few<D><<<dim3(per_kv, a.n_head_kv), N_THREADS<D>, 0, stream>>>(a, values, meta, n_split, out);
    } else {
        combine_many<D><<<dim3((per_kv + N_SLICE<D> - 1)/N_SLICE<D>, a.n_head_kv), N_THREADS<D>, 0, stream>>>(a, values, meta, n_split, out);
    }
    CUDA_CHECK(cudaGetLastError());
}

} // namespace

void combine(const attn_args & a, int d, const float * values, const float2 * meta, int n_split, char * dst, int64_t nb1, int64_t nb2, int64_t nb3, cudaStream_t stream) {
    switch (d) {
        case  64: return launch< 64>(a, values, meta, n_split, dst, nb1, nb2, nb3, stream);
        case  80: return launch< 80>(a, values, meta, n_split, dst, nb1, nb2, nb3, stream);
        case  96: return launch< 96>(a, values, meta, n_split, dst, nb1, nb2, nb3, stream);
        case 128: return launch<128>(a, values, meta, n_split, dst, nb1, nb2, nb3, stream);
        case 256: return launch<256>(a, values, meta, n_split, dst, nb1, nb2, nb3, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace kvtc
