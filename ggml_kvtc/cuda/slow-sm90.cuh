// Pairs of channels that turn slowly, in decode-sm90-slow.cu: their part of a key's logits without rebuilding them.
//
// Near an anchor such a pair turns little. A query that is turned back by some positions around it says, between these, what it would say
// turned back by any other one: logits are interpolated, by Lagrange's polynomials of third degree at Chebyshev's nodes. The query at a node,
// times the decode matrix, is in the space of codes, where a key's part is one product with its codes, as they are decoded anyway.
#pragma once

#include "hopper.cuh"
#include "plan.h"
#include "turn-sm90.cuh"

namespace kvtc {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What a group of four warps has of the queries, around two anchors, 2*SM90_SLOW_REACH positions apart. Row 2*m + r is query r at node m
template <int D, int FAST>
struct turned_queries {
    static constexpr int ROWS = SM90_SLOW_NODES*SM90_SLOW_QUERIES;
    static constexpr int LD   = D + 8;
    static constexpr int LDF  = FAST + 8;
    half  coded[2][ROWS*LD];               // slow pairs in the space of codes; components as in the operand
    half  fast [2][SM90_SLOW_QUERIES*LDF]; // the others, turned back by the anchor
    float mean [2][ROWS];                  // what the mean adds to `coded`
};

static_assert(SM90_SLOW_NODES*SM90_SLOW_QUERIES == 8, "another operand");
static_assert(sizeof(turned_queries<256, 64>) == get_slow_bytes(64) && sizeof(turned_queries<256, 128>) == get_slow_bytes(128), "the plan has another size");

// positions from the anchor to a node, in rising order
__device__ __forceinline__ int get_node(int m) {
    const int away = m == 0 || m == 3 ? SM90_SLOW_FAR : SM90_SLOW_NEAR;
    return m < 2 ? -away : away;
}

// The polynomial that is 1 at a thread's node, lane%4, and 0 at the others
__device__ __forceinline__ float weigh_node(float x) {
    const int   m     = threadIdx.x % 4;
    const float node  = (float) get_node(m);
    const float other = (float) get_node(m ^ 1); // of the other distance from the anchor
    return (x*x - other*other)*(x + node)*(1.0f/((node*node - other*other)*2.0f*node));
}

// The queries for keys around an anchor, and the next one. The threads of a group do it together; behind it they must meet. parts: the
// head's operand as the pack has it for this; group: of the block
template <int D, int FAST>
__device__ __forceinline__ void turn_around(turned_queries<D, FAST> & to, const float * queries, const uint4 * parts, const uint64_t * freq, int anchor, int n_row, int group) {
    using T = turned_queries<D, FAST>;
    static_assert(SM90_SLOW_QUERIES == 2, "another number of rows");
    constexpr int LDS   = D - FAST + 8;
    constexpr int UNITS = (D - FAST)/4; // of two pairs
    constexpr int SLOW  = 2*SM90_SLOW_NODES*UNITS;
    half * turned = to.coded[0]; // columns as in the operand
    static_assert(2*LDS <= 2*T::LD, "no room");
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int task = threadIdx.x%(32*GROUP_WARPS); task < SLOW + FAST/2; task += 32*GROUP_WARPS) {
        const bool slow = task < SLOW;
        const int  i    = slow ? task%UNITS : (task - SLOW)%(FAST/4); // of these pairs
        const int  m    = slow ? task/UNITS : (task - SLOW)/(FAST/4); // node of the two anchors, or anchor
        const int  unit = slow ? FAST/4 + i : i;
        const int  pos  = anchor + (slow ? m/SM90_SLOW_NODES*2*SM90_SLOW_REACH + get_node(m%SM90_SLOW_NODES) : m*2*SM90_SLOW_REACH);
        const float2 c0 = get_rotation(pos, freq[2*unit]);
        const float2 c1 = get_rotation(pos, freq[2*unit + 1]);
        half * row = slow ? turned + 2*m*LDS : to.fast[m];
        const float4 x = *(const float4 *) (queries + 4*unit);
        const float4 y = n_row > 1 ? *(const float4 *) (queries + T::LD + 4*unit) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        put_turned(row, i, x, c0, c1);
        put_turned(row + (slow ? LDS : T::LDF), i, y, c0, c1);
    }
    meet<GROUP_WARPS>(1 + group);

    constexpr int N = (D - FAST)/16;
    uint32_t q[N][4];
#pragma unroll
    for (int u = 0; u < N; ++u) {
        ldmatrix_x4(q[u], turned + lane%16*LDS + 16*u + lane/16*8);
    }
    meet<GROUP_WARPS>(1 + group); // all have them: the result takes their place
    // eight components 2*(lane%4), + 1, of row lane/4 around both anchors; the last group is the mean's upper and lower half
    const int part = threadIdx.x/32%GROUP_WARPS;
    const auto read = [&](int g, uint4 (&b)[N/2]) {
#pragma unroll
        for (int u = 0; u < N/2; ++u) {
            b[u] = parts[(min(g, D/8)*(D/32) + FAST/32 + u)*32 + lane];
        }
    };
    uint4 next[N/2];
    read(part, next);
#pragma unroll 1
    for (int g = part; g <= D/8; g += GROUP_WARPS) {
        uint4 b[N/2];
#pragma unroll
        for (int u = 0; u < N/2; ++u) {
            b[u] = next[u];
        }
        read(g + GROUP_WARPS, next);
        float c[2][4] = {};
#pragma unroll
        for (int u = 0; u < N/2; ++u) {
            mma(c[0], q[2*u],     b[u].x, b[u].y);
            mma(c[1], q[2*u + 1], b[u].z, b[u].w);
        }
        const float4 x = make_float4(c[0][0] + c[1][0], c[0][1] + c[1][1], c[0][2] + c[1][2], c[0][3] + c[1][3]);
        if (g < D/8) {
            const int at = lane/4*T::LD + 8*g + lane%4*2;
            *(uint32_t *) (to.coded[0] + at) = pack_half2(x.x, x.y);
            *(uint32_t *) (to.coded[1] + at) = pack_half2(x.z, x.w);
        } else if (lane%4 == 0) {
            to.mean[0][lane/4] = x.x + x.y;
            to.mean[1][lane/4] = x.z + x.w;
        }
    }
}

// Slow pairs' part of the logits of a warp's 16 keys: a thread has those of node lane%4, of keys lane/4, + 8
struct slow_logits {
    const half * row;          // the thread's of the queries, for ldmatrix
    float        w[2][4] = {}; // of every other product; [2*key + query]

    // step s of 32 components
    __device__ __forceinline__ void add(int s, const uint32_t (&k)[2][4]) {
        uint32_t q[4];
        ldmatrix_x4(q, row + 32*s);
        mma(w[0], k[0], q[0], q[1]);
        mma(w[1], k[1], q[2], q[3]);
    }

    // to the logits of queries 2*(lane%4), + 1, which are the first two. mean: of the thread's node; away: of the keys from the anchor
    __device__ __forceinline__ void add_to(float (&logit)[4], const float2 & mean, const int (&away)[2]) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float f = weigh_node((float) away[i]);
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                float part = f*(w[0][2*i + x] + w[1][2*i + x] + (x == 0 ? mean.x : mean.y));
                part += __shfl_xor_sync(0xffffffff, part, 1);
                part += __shfl_xor_sync(0xffffffff, part, 2);
                logit[2*i + x] += threadIdx.x%4 == 0 ? part : 0.0f;
            }
        }
    }
};
#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
