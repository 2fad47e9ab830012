// Rotation in decode-sm90.cu: of queries, back by an anchor, and of keys as a product leaves them, by their distance from it.
#pragma once

#include "device.cuh"

namespace kvtc {

// words of a position in the table of rotations
template <int D>
constexpr int TURN_WORDS = GGML_KVTC_CUDA_TURN_WORDS(D);

// The queries, f16, rotated back by a position; the rows of `turned` lie D + 8 apart. n threads that follow each other do it together
template <int D, int n>
__device__ __forceinline__ void turn_queries(const float * queries, half * turned, const uint64_t * freq, int pos, int n_row) {
    constexpr int UNITS = D/4; // of two pairs
    const int    i  = threadIdx.x%UNITS;
    const float2 c0 = get_rotation(pos, freq[2*i]);
    const float2 c1 = get_rotation(pos, freq[2*i + 1]);
    for (int r = threadIdx.x%n/UNITS; r < n_row; r += n/UNITS) { // the others stay zeros
        const float4 x = *(const float4 *) (queries + r*(D + 8) + 4*i);
        half * to = turned + r*(D + 8) + i/4*16 + i%4*2;
        *(uint32_t *)  to      = pack_half2(x.x*c0.x + x.y*c0.y, x.z*c1.x + x.w*c1.y);
        *(uint32_t *) (to + 8) = pack_half2(x.y*c0.x - x.x*c0.y, x.w*c1.x - x.z*c1.y);
    }
}

// w += 16 rebuilt keys of a warp, rotated, times the queries. x: keys r8 and r8 + 8 as wgmma leaves them; turn: where the thread's part
// of their rotations lies. Keys that are not near the anchor (0 then) have their angles computed
template <int D, bool near>
__device__ __forceinline__ void multiply_turned(float (&w)[4], const uint32_t (&x)[D/4], const half * turned, const uint32_t * const (&turn)[2],
                                                const int (&row_pos)[2], const uint64_t * freq) {
    const int lane = threadIdx.x % 32;
    const int q4   = lane % 4;
#pragma unroll
    for (int u = 0; u < D/32; ++u) {
        uint32_t qf[4];
        ldmatrix_x4(qf, turned + lane%8*(D + 8) + 32*u + lane/8*8);
        uint4 cs[2];
        if constexpr (near) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                cs[i] = *(const uint4 *) (turn[i] + 16*u);
            }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            uint32_t kf[4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                half2 cos, sin;
                if constexpr (near) {
                    const uint32_t cu = m == 0 ? cs[i].x : cs[i].z;
                    const uint32_t su = m == 0 ? cs[i].y : cs[i].w;
                    cos = *(const half2 *) &cu;
                    sin = *(const half2 *) &su;
                } else {
                    const int    pair = 16*u + 8*m + 2*q4;
                    const float2 cs0  = get_rotation(row_pos[i], freq[pair]);
                    const float2 cs1  = get_rotation(row_pos[i], freq[pair + 1]);
                    cos = __floats2half2_rn(cs0.x, cs1.x);
                    sin = __floats2half2_rn(cs0.y, cs1.y);
                }
                const half2 x0 = *(const half2 *) &x[8*u + 4*m + i];
                const half2 x1 = *(const half2 *) &x[8*u + 4*m + i + 2];
                const half2 y0 = __hfma2(x0, cos, __hneg2(__hmul2(x1, sin)));
                const half2 y1 = __hfma2(x0, sin, __hmul2(x1, cos));
                kf[i]     = *(const uint32_t *) &y0;
                kf[i + 2] = *(const uint32_t *) &y1;
            }
            mma(w, kf, qf[2*m], qf[2*m + 1]);
        }
    }
}

} // namespace kvtc
