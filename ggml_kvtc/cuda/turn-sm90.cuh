// Rotation in decode-sm90.cu: of queries, back by an anchor, and of keys as a product leaves them, by their distance from it.
#pragma once

#include "device.cuh"

namespace kvtc {

// words of a position in the table of rotations
template <int D>
constexpr int TURN_WORDS = GGML_KVTC_CUDA_TURN_WORDS(D);

// two pairs of a query, 2*i, + 1, rotated back, to a row in the order of columns that wgmma leaves
__device__ __forceinline__ void put_turned(half * row, int i, const float4 & x, const float2 & c0, const float2 & c1) {
    half * to = row + i/4*16 + i%4*2;
    *(uint32_t *)  to      = pack_half2(x.x*c0.x + x.y*c0.y, x.z*c1.x + x.w*c1.y);
    *(uint32_t *) (to + 8) = pack_half2(x.y*c0.x - x.x*c0.y, x.w*c1.x - x.z*c1.y);
}

// The queries, f16, rotated back by a position; the rows of `turned` lie D + 8 apart. n threads that follow each other do it together
template <int D, int n>
__device__ __forceinline__ void turn_queries(const float * queries, half * turned, const uint64_t * freq, int pos, int n_row) {
    constexpr int UNITS = D/4; // of two pairs
    const int    i  = threadIdx.x%UNITS;
    const float2 c0 = get_rotation(pos, freq[2*i]);
    const float2 c1 = get_rotation(pos, freq[2*i + 1]);
    for (int r = threadIdx.x%n/UNITS; r < n_row; r += n/UNITS) { // the others stay zeros
        put_turned(turned + r*(D + 8), i, *(const float4 *) (queries + r*(D + 8) + 4*i), c0, c1);
    }
}

// Step u of 16 rebuilt keys of a warp, rotated, as mma's operands of rows: its first eight pairs, then the others. x: keys r8 and r8 + 8
// as wgmma leaves them; get(m, i, cos, sin): rotations of two of these pairs of a key
template <typename T>
__device__ __forceinline__ void rotate_keys(uint32_t (&k)[2][4], const uint32_t * x, const T & get) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            half2 cos, sin;
            get(m, i, cos, sin);
            const half2 x0 = *(const half2 *) &x[4*m + i];
            const half2 x1 = *(const half2 *) &x[4*m + i + 2];
            const half2 y0 = __hfma2(x0, cos, __hneg2(__hmul2(x1, sin)));
            const half2 y1 = __hfma2(x0, sin, __hmul2(x1, cos));
            k[m][i]     = *(const uint32_t *) &y0;
            k[m][i + 2] = *(const uint32_t *) &y1;
        }
    }
}

// The same for keys near the anchor. turn: where the thread's part of their rotations lies, sign: what changes their sines. SAME: keys
// r8 + 8 have the rotations of r8
template <bool SAME = false>
__device__ __forceinline__ void rotate_near(uint32_t (&k)[2][4], const uint32_t * x, int u, const uint32_t * const (&turn)[2], const uint32_t (&sign)[2]) {
    uint4 cs[2];
    cs[0] = *(const uint4 *) (turn[0] + 16*u);
    cs[1] = SAME ? cs[0] : *(const uint4 *) (turn[1] + 16*u);
    rotate_keys(k, x, [&](int m, int i, half2 & cos, half2 & sin) {
        const uint32_t cu = m == 0 ? cs[i].x : cs[i].z;
        const uint32_t su = (m == 0 ? cs[i].y : cs[i].w) ^ sign[i];
        cos = *(const half2 *) &cu;
        sin = *(const half2 *) &su;
    });
}

// w += rebuilt keys that are not near the anchor, rotated, times the queries; row: the thread's of these for ldmatrix. Rarely needed, so
// what counts is that the code, which lies between what others execute, is short: the keys take a way through memory
template <int D>
__device__ __forceinline__ void multiply_far(float (&w)[4], const uint32_t (&x)[D/4], const half * row, const int (&row_pos)[2], const uint64_t * freq) {
    uint32_t y[D/4];
#pragma unroll
    for (int i = 0; i < D/4; ++i) {
        asm volatile("mov.b32 %0, %1;" : "=r"(y[i]) : "r"(x[i])); // not before the product was waited for
    }
#pragma unroll 1
    for (int u = 0; u < D/32; ++u) {
        uint32_t q[4], k[2][4];
        ldmatrix_x4(q, row + 32*u);
        rotate_keys(k, y + 8*u, [&](int m, int i, half2 & cos, half2 & sin) {
            const int    pair = 16*u + 8*m + threadIdx.x%4*2;
            const float2 cs0  = get_rotation(row_pos[i], freq[pair]);
            const float2 cs1  = get_rotation(row_pos[i], freq[pair + 1]);
            cos = __floats2half2_rn(cs0.x, cs1.x);
            sin = __floats2half2_rn(cs0.y, cs1.y);
        });
        mma(w, k[0], q[0], q[1]);
        mma(w, k[1], q[2], q[3]);
    }
}

// the same for near ones
template <int D, bool SAME = false>
__device__ __forceinline__ void multiply_turned(float (&w)[4], const uint32_t (&x)[D/4], const half * row, const uint32_t * const (&turn)[2], const uint32_t (&sign)[2]) {
    float w2[4] = { 0.0f, 0.0f, 0.0f, 0.0f }; // of every other product, so that each waits for the one before the last
#pragma unroll
    for (int u = 0; u < D/32; ++u) {
        uint32_t q[4], k[2][4];
        ldmatrix_x4(q, row + 32*u);
        rotate_near<SAME>(k, x + 8*u, u, turn, sign);
        mma(w,  k[0], q[0], q[1]);
        mma(w2, k[1], q[2], q[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        w[i] += w2[i];
    }
}

// The same for eight queries turned back by the anchor, and eight rows on by eight positions more: w[0] and w[1]
template <int D, bool SAME>
__device__ __forceinline__ void multiply_turned_twice(float (&w)[2][4], const uint32_t (&x)[D/4], const half * row, const uint32_t * const (&turn)[2]) {
    const uint32_t sign[2] = { 0, 0 };
#pragma unroll
    for (int u = 0; u < D/32; ++u) {
        uint32_t q[2][4], k[2][4];
        ldmatrix_x4(q[0], row + 32*u);
        ldmatrix_x4(q[1], row + 8*(D + 8) + 32*u);
        rotate_near<SAME>(k, x + 8*u, u, turn, sign);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            mma(w[0], k[m], q[0][2*m], q[0][2*m + 1]);
            mma(w[1], k[m], q[1][2*m], q[1][2*m + 1]);
        }
    }
}

// all keys have positions from the anchor's on
template <int D>
__device__ __forceinline__ void multiply_turned(float (&w)[4], const uint32_t (&x)[D/4], const half * turned, const uint32_t * const (&turn)[2]) {
    const int lane = threadIdx.x % 32;
    const uint32_t sign[2] = { 0, 0 };
#pragma unroll
    for (int u = 0; u < D/32; ++u) {
        uint32_t q[4], k[2][4];
        ldmatrix_x4(q, turned + lane%8*(D + 8) + 32*u + lane/8*8);
        rotate_near(k, x + 8*u, u, turn, sign);
        mma(w, k[0], q[0], q[1]);
        mma(w, k[1], q[2], q[3]);
    }
}

} // namespace kvtc
