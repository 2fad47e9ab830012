// The end of a block that decodes: the states of its warps, each of which has seen other cells, to one.
#pragma once

#include "device.cuh"

namespace kvtc {

// Sums of n_set sets of warps for rows row0 ... (up to ROWS) of a kv head, with their largest logits and sums of weights (SHARE of each), to
// one of each for the block, and out, as the row's sum number `split` of n_split. all_o: [set][row][D + 8], where place(c) is component
// c's; all_top: [set][row]; all_sum: [set][row][SHARE]
template <int D, int ROWS, int SHARE, typename get_place>
__device__ __forceinline__ void put_sums(const attn_args & a, const float * all_o, const float * all_top, const float * all_sum, int n_set, int head, int row0, int stream,
                                         int split, int n_split, const get_place & place, float * values, float2 * meta) {
    constexpr int LD = D + 8;
    const int n = min(ROWS, a.n_tokens*a.group - row0)*D;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const int r = i/D;
        const int c = i%D;
        float most = -INFINITY;
        for (int u = 0; u < n_set; ++u) {
            most = fmaxf(most, all_top[u*ROWS + r]);
        }
        float value = 0.0f;
        float total = 0.0f;
        for (int u = 0; u < n_set && most != -INFINITY; ++u) {
            const float f = exp2f(all_top[u*ROWS + r] - most);
            value += f*all_o[(u*ROWS + r)*LD + place(c)];
#pragma unroll
            for (int s = 0; s < SHARE; ++s) {
                total += f*all_sum[(u*ROWS + r)*SHARE + s];
            }
        }
        const int64_t token = (int64_t) stream*a.n_tokens + (row0 + r)/a.group;
        const int64_t row   = token*a.n_head + head*a.group + (row0 + r)%a.group;
        values[(row*n_split + split)*D + c] = value;
        if (c == 0) {
            meta[row*n_split + split] = make_float2(most, total);
        }
    }
}

// o: weighted sums of components as mma leaves them, [step of 16 components][8 rows]; top: largest logits; sum: the thread's part of
// the sums of weights. All of shared memory is free. values, meta: as decode() has them, of rows row0 ... of a kv head.
template <int D, int NQ>
__device__ __forceinline__ void merge_states(const attn_args & a, uint8_t * smem, const float (&o)[D/16][NQ][4], const float (&top)[NQ][2], const float (&sum)[NQ][2],
                                             int head, int row0, int stream, float * values, float2 * meta) {
    constexpr int KS   = D/16;
    constexpr int ROWS = 8*NQ;
    constexpr int LD   = D + 8;
    const int n_warp = blockDim.x / 32;
    const int warp   = threadIdx.x / 32;
    const int r8     = threadIdx.x % 32 / 4;
    const int q4     = threadIdx.x % 4;
    float * all_o   = (float *) smem;                       // [warp][row][D + 8]
    float * all_top = all_o + n_warp*ROWS*LD;          // [warp][row]
    float * all_sum = all_top + n_warp*ROWS;
#pragma unroll
    for (int n = 0; n < NQ; ++n) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const float s = column_sum(sum[n][x]);
            const int row = warp*ROWS + 8*n + 2*q4 + x;
            if (r8 == 0) {
                all_top[row] = top[n][x];
                all_sum[row] = s;
            }
#pragma unroll
            for (int t = 0; t < KS; ++t) {
                all_o[row*LD + 16*t + r8]     = o[t][n][x];
                all_o[row*LD + 16*t + r8 + 8] = o[t][n][x + 2];
            }
        }
    }
    __syncthreads();
    put_sums<D, ROWS, 1>(a, all_o, all_top, all_sum, n_warp, head, row0, stream, blockIdx.x, gridDim.x, [](int c) { return c; }, values, meta);
}

} // namespace kvtc
