// Merges the partial sums of the splits, turns coefficients into channels by the values' matrix, and divides by the sum of
// weights. The matrix is read once for R rows: one for a few, eight where there are many.
#include "combine.cuh"

namespace kvtc {

namespace {

template <int D> constexpr int N_SLICE   = 256/(D/8);      // slices of components
template <int D> constexpr int N_THREADS = N_SLICE<D>*(D/8);

template <int D, int R>
__launch_bounds__(N_THREADS<D>)
__global__ void combine_rows(const attn_args a, const float * values, const float2 * meta, int n_split, char * dst, int64_t nb1, int64_t nb2, int64_t nb3) {
    __shared__ float sums [R][D];
    __shared__ float seen [R]; // weight of the tokens over that of the tokens and the sink logit, times 1/sum
    __shared__ float part [N_SLICE<D>][D];

    // rows of a block: the heads of one kv head, token after token
    const int     head_kv = blockIdx.y;
    const int     per_kv  = a.n_tokens*a.n_stream*a.group;
    const int     first   = blockIdx.x*R;
    const int     n       = min(R, per_kv - first);
    const auto    row_of  = [&](int r) { return (int64_t) ((first + r)/a.group)*a.n_head + head_kv*a.group + (first + r)%a.group; };

    const char * pack = find_pack(a.pack);
    const ggml_kvtc_cuda_head & head = get_head(pack, GGML_KVTC_V, head_kv);

    for (int i = threadIdx.x; i < R*D; i += N_THREADS<D>) {
        const int r = i/D;
        float value = 0.0f;
        if (r < n) {
            const int64_t row = row_of(r);
            float top = -INFINITY;
            for (int s = 0; s < n_split; ++s) {
                top = fmaxf(top, meta[row*n_split + s].x);
            }
            float total = 0.0f;
            for (int s = 0; s < n_split && top != -INFINITY; ++s) {
                const float2 m = meta[row*n_split + s];
                const float  f = exp2f(m.x - top);
                total += f*m.y;
                value += f*values[(row*n_split + s)*D + i%D];
            }
            float scale = 1.0f; // of the tokens' weights, when the sink's logit is the largest
            float sink  = 0.0f;
            if (a.sinks) {
                const float logit = a.sinks[row%a.n_head]*LOG2E;
                if (logit > top) {
                    scale = exp2f(top - logit);
                    sink  = 1.0f;
                } else {
                    sink = exp2f(logit - top);
                }
            }
            const float all = scale*total + sink;
            const float inv = all > 0.0f ? scale/all : 0.0f;
            value *= inv;
            if (i%D == 0) {
                seen[r] = total*inv;
            }
        }
        sums[r][i%D] = value;
    }
    __syncthreads();

    const half * matrix  = at<half>(pack, head.decode); // [component][channel]
    const int    channel = threadIdx.x%(D/8)*8;
    const int    slice   = threadIdx.x/(D/8);
    float acc[R][8] = {};
#pragma unroll 4
    for (int c = slice; c < D; c += N_SLICE<D>) {
        const uint4   x = *(const uint4 *) (matrix + c*D + channel);
        const half2 * h = (const half2 *) &x;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 m = __half22float2(h[j]);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                acc[r][2*j]     += sums[r][c]*m.x;
                acc[r][2*j + 1] += sums[r][c]*m.y;
            }
        }
    }
    for (int r = 0; r < n; ++r) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < R; ++k) { // registers have no run-time index
            if (k == r) {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    part[slice][channel + j] = acc[k][j];
                }
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < D; i += N_THREADS<D>) {
            float sum = 0.0f;
            for (int s = 0; s < N_SLICE<D>; ++s) {
                sum += part[s][i];
            }
            const int64_t row    = row_of(r);
            const int64_t token  = row/a.n_head;
            float * out = (float *) (dst + row%a.n_head*nb1 + token%a.n_tokens*nb2 + token/a.n_tokens*nb3);
            out[i] = sum + at<float>(pack, head.mean)[i]*seen[r];
        }
    }
}

template <int D>
void launch(const attn_args & a, const float * values, const float2 * meta, int n_split, char * dst, int64_t nb1, int64_t nb2, int64_t nb3, cudaStream_t stream) {
    const int per_kv = a.n_tokens*a.n_stream*a.group;
    if (per_kv <= 64) {
        combine_rows<D, 1><<<dim3(per_kv, a.n_head_kv), N_THREADS<D>, 0, stream>>>(a, values, meta, n_split, dst, nb1, nb2, nb3);
    } else {
        combine_rows<D, 8><<<dim3((per_kv + 7)/8, a.n_head_kv), N_THREADS<D>, 0, stream>>>(a, values, meta, n_split, dst, nb1, nb2, nb3);
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
