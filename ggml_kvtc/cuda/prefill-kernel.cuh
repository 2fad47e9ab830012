// ggml's flash attention on expanded columns. Its kernel normalizes what it writes, which cannot be merged with other columns;
// so the device function inside it is called here, in the mode in which it leaves sums and maxima for a later pass.
#pragma once

#include "expand.cuh"

#include "fattn-mma-f16.cuh"

namespace kvtc {

struct chunk_args {
    const char   * q;             // f32
    int64_t        nb_q1, nb_q2, nb_q3; // token, head, stream
    const half   * k, * v;        // [stream][head][column][d]
    const half   * mask;          // the operation's own, or nullptr
    int64_t        ne_m1, ne_m3;
    int            n_mask;
    const half   * own_mask;      // [stream][token][column]
    const int    * counts;        // see list_either
    int            n_block;
    columns        c;
    const int2   * info;          // as in attn_args
    const int    * query_pos;
    int            n_sink, n_window;
    int            n_kv, n_head, n_head_kv, group;
    int            n_token_block, n_head_block, n_split, split;
    uint3          n_tokens;      // as fastdiv wants it
    float          scale, softcap, max_bias, slope_low, slope_high;
    uint32_t       log2_heads;
    float2       * out;           // per block: 2*cols pairs (the second half: maximum and sum), then sums [cols][d/2]
};

// Narrows columns [from, to) for the queries of block jt: entries of the list that are exact for none of them, and columns at the
// end that are masked for all. Multiples of `unit` columns; all threads of a block take part.
template <int NC1, int nthreads, int unit>
static __device__ __forceinline__ void trim(const chunk_args & a, int stream, int jt, int thread, const half * mask, int64_t ne_m1, int & from, int & to) {
    constexpr int WIDTH = PREFILL_ALIGN;
    // in the tiles' memory: memory of its own would move them off the banks that their layout is made for
    extern __shared__ half2 tile_Q[];
    int & found = *(int *) tile_Q;
    const int first = jt*NC1;
    const int n     = min(NC1, (int) a.n_tokens.z - first);
    const int n_list = min(to, a.c.n_list - a.c.at); // columns of the list
    if (from < n_list) {
        int least = INT_MAX; // a key that is exact for a later query is so for this one
        for (int t = 0; t < n; ++t) {
            least = min(least, a.query_pos[stream*a.n_tokens.z + first + t]);
        }
        if (thread == 0) {
            found = n_list;
        }
        __syncthreads();
        int mine = n_list;
        for (int col = from + thread; col < n_list && mine == n_list; col += nthreads) {
            const int cell = get_listed(a.c, stream, col);
            const int pos  = cell >= 0 ? a.info[(int64_t) stream*a.n_kv + cell].x : 0;
            if (cell >= 0 && (least - pos < a.n_window || pos < a.n_sink)) {
                mine = col;
            }
        }
        mine = warp_min(mine);
        if (thread % 32 == 0) {
            atomicMin(&found, mine);
        }
        __syncthreads();
        from = found/unit*unit;
        __syncthreads();
    }
    while (to > max(from, n_list)) {
        const int begin = max(max(from, n_list), to - WIDTH);
        if (thread == 0) {
            found = -1;
        }
        __syncthreads();
        int mine = -1;
        for (int i = thread; i < n*(WIDTH/8); i += nthreads) {
            const int col = begin + i%(WIDTH/8)*8;
            if (col < to) {
                const uint4 x = *(const uint4 *) (mask + (first + i/(WIDTH/8))*ne_m1 + col);
                if (x.x != 0xfc00fc00 || x.y != 0xfc00fc00 || x.z != 0xfc00fc00 || x.w != 0xfc00fc00) {
                    mine = max(mine, col);
                }
            }
        }
        mine = warp_max(mine);
        if (thread % 32 == 0) {
            atomicMax(&found, mine);
        }
        __syncthreads();
        const int last = found;
        __syncthreads();
        if (last >= 0) {
            to = (last/unit + 1)*unit;
            break;
        }
        to = begin;
    }
}

template <int D, int NC1, int NC2, bool softcap>
__launch_bounds__(ggml_cuda_fattn_mma_get_nthreads(D, D, NC1*NC2), ggml_cuda_fattn_mma_get_occupancy(D, D, NC1*NC2))
static __global__ void attend_chunk(const chunk_args a) {
#if defined(FLASH_ATTN_AVAILABLE) && defined(TURING_MMA_AVAILABLE)
    constexpr int ncols = NC1*NC2;
#if __CUDA_ARCH__ == GGML_CUDA_CC_TURING
    constexpr bool fits = ncols <= 32;
#else
    constexpr bool fits = ncols == 64;
#endif
    if constexpr (fits) {
        constexpr int nthreads  = ggml_cuda_fattn_mma_get_nthreads (D, D, ncols);
        constexpr int nbatch_fa = ggml_cuda_fattn_mma_get_nbatch_fa(D, D, ncols);

        int i = blockIdx.x;
        const int split  = i % a.n_split;       i /= a.n_split;
        const int jt     = i % a.n_token_block; i /= a.n_token_block;
        const int zt     = i % a.n_head_block;  i /= a.n_head_block;
        const int head   = i % a.n_head_kv;
        const int stream = i / a.n_head_kv;

        const int thread = threadIdx.y*32 + threadIdx.x;
        int from = max(split*a.split, get_first_column(a.c, stream));
        int to   = min(split*a.split + a.split, a.c.n_all);
        bool own = false;
        const half * mask = nullptr; // at the chunk's first column
        if (from < to) {
            own  = !a.mask || needs_mask(a.c, a.counts + stream*a.n_block, a.n_kv, from, to, thread, nthreads);
            mask = own ? a.own_mask + (int64_t) stream*a.n_tokens.z*a.c.n_all : a.mask + stream%a.n_mask*a.ne_m3 + a.c.at - a.c.n_list;
            trim<NC1, nthreads, nbatch_fa>(a, stream, jt, thread, mask, own ? a.c.n_all : a.ne_m1, from, to);
        }
        if (from >= to) {
            for (int i = thread; i < ncols; i += nthreads) {
                a.out[((int64_t) gridDim.x + blockIdx.x)*ncols + i] = make_float2(-INFINITY, 0.0f);
            }
            return;
        }
        const int    head_q = head*a.group + zt*NC2;
        const float2 * q = (const float2 *) (a.q + stream*a.nb_q3 + head_q*a.nb_q2);
        const int64_t  kv = ((int64_t) stream*a.n_head_kv + head)*a.c.n_all*(D/2);
        const float slope = NC2 == 1 ? get_alibi_slope(a.max_bias, head_q, a.log2_heads, a.slope_low, a.slope_high) : 1.0f;

        flash_attn_ext_f16_process_tile<D, D, NC1, NC2, nthreads/32, softcap, false, false, false, true>(
            q, (const half2 *) a.k + kv, (const half2 *) a.v + kv, mask, nullptr, nullptr, nullptr, a.out, a.scale, slope, a.softcap,
            a.n_tokens, a.n_head, a.group, a.c.n_all, (int) (a.nb_q1/sizeof(float2)), (int) (a.nb_q2/sizeof(float2)), D/2, D/2, own ? a.c.n_all : (int) a.ne_m1,
            jt, zt, from/nbatch_fa, to/nbatch_fa);
    }
#else
    GGML_UNUSED(a);
    NO_DEVICE_CODE;
#endif
}

template <int D, int NC1, int NC2, bool softcap>
static void launch_chunk(const chunk_args & a, int n_block, int cc, cudaStream_t stream) {
    constexpr int ncols = NC1*NC2;
    const int  nthreads       = ggml_cuda_fattn_mma_get_nthreads      (D, D, ncols, cc);
    const int  nbatch_fa      = ggml_cuda_fattn_mma_get_nbatch_fa     (D, D, ncols, cc);
    const int  nbatch_K2      = ggml_cuda_fattn_mma_get_nbatch_K2     (D, D, ncols, cc);
    const int  nbatch_V2      = ggml_cuda_fattn_mma_get_nbatch_V2     (D, D, ncols, cc);
    const int  nbatch_combine = ggml_cuda_fattn_mma_get_nbatch_combine(D, D, ncols, cc);
    const bool Q_in_reg       = ggml_cuda_fattn_mma_get_Q_in_reg      (D, D, ncols, cc);
    const int  nstages        = ggml_cuda_fattn_mma_get_nstages       (D, D, NC1, NC2, cc);
    const bool swizzled       = ggml_cuda_fattn_mma_get_swizzled      (D, D, NC1, NC2, cc);
    const int  cols_per_warp  = std::min(ncols, get_cols_per_warp(cc));

    // as in ggml_cuda_flash_attn_ext_mma_f16_case
    const int    stride_K  = ggml_cuda_fattn_mma_get_stride_tile(nbatch_K2, swizzled);
    const int    stride_V  = ggml_cuda_fattn_mma_get_stride_tile(nbatch_V2, swizzled);
    const size_t bytes_KV  = nbatch_fa*(nstages <= 1 ? std::max(stride_K, stride_V) : stride_K + stride_V)*sizeof(half2);
    const size_t bytes_Q   = ncols*(D/2 + 4)*sizeof(half2);
    const size_t bytes_m   = NC1*(nbatch_fa/2 + 4)*sizeof(half2);
    const size_t bytes_c   = nthreads/32*cols_per_warp*(nbatch_combine + 4)*sizeof(half2);
    const size_t shared    = std::max(bytes_c, Q_in_reg ? std::max(bytes_Q, bytes_KV + bytes_m) : bytes_Q + bytes_KV + bytes_m);
    GGML_ASSERT(PREFILL_ALIGN % nbatch_fa == 0);

    const auto kernel = attend_chunk<D, NC1, NC2, softcap>;
    allow_shared_memory((const void *) kernel, shared);
    kernel<<<n_block, dim3(32, nthreads/32), shared, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}

template <int D, int N, bool softcap>
static void launch_chunk(const chunk_args & a, int n_cols2, int n_block, int cc, cudaStream_t stream) {
    if constexpr (D <= MAX_SINGLE_HEAD) {
        if (n_cols2 == 1) {
            return launch_chunk<D, N, 1, softcap>(a, n_block, cc, stream);
        }
    }
    switch (n_cols2) {
        case 2:  return launch_chunk<D, N/2, 2, softcap>(a, n_block, cc, stream);
        case 4:  return launch_chunk<D, N/4, 4, softcap>(a, n_block, cc, stream);
        default: return launch_chunk<D, N/8, 8, softcap>(a, n_block, cc, stream);
    }
}

// one file for each D: these take long to compile
template <int D> void attend_chunk_case(const chunk_args & a, int n_cols, int n_cols2, int n_block, int cc, cudaStream_t stream);

#define KVTC_PREFILL_CASE(D, softcap_too)                                                                                            \
    namespace kvtc {                                                                                                                 \
    template <> void attend_chunk_case<D>(const chunk_args & a, int n_cols, int n_cols2, int n_block, int cc, cudaStream_t stream) { \
        if constexpr (softcap_too) {                                                                                                 \
            if (a.softcap != 0.0f) {                                                                                                 \
                return n_cols == 64 ? launch_chunk<D, 64, true>(a, n_cols2, n_block, cc, stream) :                                   \
                                      launch_chunk<D, 32, true>(a, n_cols2, n_block, cc, stream);                                    \
            }                                                                                                                        \
        }                                                                                                                            \
        return n_cols == 64 ? launch_chunk<D, 64, false>(a, n_cols2, n_block, cc, stream) :                                          \
                              launch_chunk<D, 32, false>(a, n_cols2, n_block, cc, stream);                                           \
    }                                                                                                                                \
    }

} // namespace kvtc
