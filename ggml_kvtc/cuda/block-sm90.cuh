// What a block of decode-sm90.cu does before its loop and after it: the pack's part of its head to shared memory, its queries, as
// decode-sm90-d256.cu has them too, and the warps' sums to one.
#pragma once

#include "merge.cuh"
#include "pack-sm90.cuh"
#include "pairs.cuh"
#include "plan.h"
#include "turn-sm90.cuh"

namespace kvtc {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What is large of the pack's part of a head, by one thread; the block's barriers. FEW: for decode-sm90-few.cu
template <int D, bool FEW = false>
__device__ __forceinline__ void bring_block(const attn_args & a, const sm90_plan & p, uint8_t * smem, int head, const ggml_kvtc_cuda_head & kh, const ggml_kvtc_cuda_head & vh,
                                            block_barriers & barriers) {
    barrier_init(barriers.sums, blockDim.x);
    init_bring(barriers.pack, 4);
    bring_operand<D>(a, head, smem, barriers.pack);
    if constexpr (FEW) {
        bring_half_turns<D>(a, smem + p.at_fine, p.n_fine, barriers.pack);
    } else {
        bring_turns<D>(a, smem + p.at_fine, p.n_fine, barriers.pack);
    }
    bring_tables(a, kh, smem + p.at_table[0], barriers.pack);
    bring_tables(a, vh, smem + p.at_table[1], barriers.pack);
}
#endif // __CUDA_ARCH_FEAT_SM90_ALL

// what is small of it, by all
template <int D>
__device__ __forceinline__ void load_block(const sm90_plan & p, uint8_t * smem, const char * base, const ggml_kvtc_cuda_head & kh, const ggml_kvtc_cuda_head & vh, int n_rot) {
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    if (threadIdx.x < D/2) { // there are more threads
        const uint64_t freq = at<uint64_t>(base, pack.freq)[threadIdx.x];
        ((uint64_t *) (smem + p.at_freq))[threadIdx.x] = (int) threadIdx.x < n_rot/2 ? freq : 0;
    }
    if (threadIdx.x < 2*(D/8)) {
        const bool of_k = threadIdx.x < D/8;
        pair_code  code = at<pair_code>(base, (of_k ? kh : vh).pair_codes)[threadIdx.x%(D/8)];
        code.table += (uint32_t) __cvta_generic_to_shared(smem + (of_k ? p.at_table[0] : p.at_table[1]));
        ((pair_code *) (smem + p.at_codes))[threadIdx.x] = code;
    }
}

// f32 [query row][D + 8] in the order of pairs. ONE: of one token
template <int D, bool ONE>
__device__ __forceinline__ void load_queries(const attn_args & a, float * queries, int head, int stream, int rope_type, int n_rot, float mscale, int n_threads) {
    const float scale = a.softcap != 0.0f ? a.scale/a.softcap : a.scale*LOG2E;
    const int   n     = a.n_tokens*a.group*D;
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 2*n_threads) {
        float x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) { // two are on their way together, in short code
            const int j = min(i + e*n_threads, n - 1);
            const int r = j/D;
            const int token   = ONE ? 0 : r/a.group;
            const int channel = pair_channel(j%D, rope_type, n_rot);
            x[e] = *(const float *) (a.q + token*a.nb_q1 + (head*a.group + r - token*a.group)*a.nb_q2 + stream*a.nb_q3 + channel*sizeof(float));
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int j = i + e*n_threads;
            if (j < n) {
                queries[j/D*(D + 8) + j%D] = x[e]*(j%D < n_rot ? scale*mscale : scale);
            }
        }
    }
}

// Where a row of sums has component c, as mma's tiles leave them: of 64, the first of each of eight groups, then the second of each ...
struct tile_place {
    __device__ __forceinline__ int operator()(int c) const { return (c/64*8 + c%8)*8 + c/8%8; }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// The warps' sums, their largest logits and sums of weights to one of each for the block, and out. o: as mma leaves it, of tiles whose
// rows r8, r8 + 8 are components t, t + 4 of a group of eight; D/64 warps have the same largest logits and a part of the components
// each.
template <int D, int N_WARP>
__device__ __forceinline__ void merge_warps(const attn_args & a, uint8_t * to, uint64_t & barrier, const float (&o)[4][4], const float (&top)[2], const float (&sum)[2],
                                            int head, int stream, float * values, float2 * meta) {
    constexpr int LD    = D + 8;
    constexpr int SHARE = D/64;
    constexpr int N_SET = N_WARP/SHARE;
    const int own = threadIdx.x / 32 % SHARE;
    const int set = threadIdx.x / 32 / SHARE;
    const int r8  = threadIdx.x % 32 / 4;
    const int q4  = threadIdx.x % 4;
    float * all_o   = (float *) to;       // [set][row][LD]
    float * all_top = all_o + N_SET*8*LD; // [set][row]
    float * all_sum = all_top + N_SET*8;  // [set][row][warp of it]
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        const float s = column_sum(sum[x]);
        const int row = set*8 + 2*q4 + x;
        if (r8 == 0) {
            all_sum[row*SHARE + own] = s;
            if (own == 0) {
                all_top[row] = top[x];
            }
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            all_o[row*LD + 64*own + 8*t + r8]       = o[t][x];
            all_o[row*LD + 64*own + 8*(t + 4) + r8] = o[t][x + 2];
        }
    }
    meet_all(barrier);
    put_sums<D, 8, SHARE>(a, all_o, all_top, all_sum, N_SET, head, 0, stream, blockIdx.x, gridDim.x, tile_place(), values, meta);
}
#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
