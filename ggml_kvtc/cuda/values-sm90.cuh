// The sum of values in decode-sm90-d256.cu: the four warps of a group exchange the weights of a slab of 64 cells, and each sums a
// quarter of the components of all of them, every fourth group. A thread decodes the same eight components of every value.
#pragma once

#include "hopper-tiles.cuh"
#include "merge.cuh"
#include "nibbles.cuh"
#include "plan.h"

namespace kvtc {

constexpr int SLAB90 = 16*GROUP_WARPS; // 16 cells for each warp of a group

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// what the warps of a group exchange
struct exchange {
    uint2 weights[GROUP_WARPS][32]; // of 16 cells, as mma's operand, relative to the warp's largest logits
    float top    [GROUP_WARPS][8];  // these, of each query
    int   chosen [2][SLAB90];       // slots of values that count exactly, or -1, of this slab and the next
    int2  range  [2][GROUP_WARPS];  // of positions, in this slab and the next
    uint32_t others[2][GROUP_WARPS]; // slabs of a stretch that are not plain, and of the next
};

static_assert(sizeof(exchange) == SM90_EXCHANGE, "the plan has another size");

// The largest of a warp's logits to `top`, and with it the sums of weights that are relative to that. w[2*i + x]: of the thread's key i, query x
__device__ __forceinline__ void raise_top(const float (&w)[4], float (&top)[2], float (&sum)[2]) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        const float most = column_max(fmaxf(top[x], fmaxf(w[x], w[2 + x])));
        sum[x] *= top[x] == -INFINITY ? 0.0f : exp2f(top[x] - most);
        top[x]  = most;
    }
}

// The largest logits of the group's warps to `top`, of queries `query`, + 1, and with them the sums that are relative to these; that of
// query `row` is returned
template <int N>
__device__ __forceinline__ float raise_sums(float (&o)[N][4], float (&top)[2], const exchange & shared, int query, int row) {
    float2 most = make_float2(-INFINITY, -INFINITY);
    float  high = -INFINITY;
#pragma unroll
    for (int j = 0; j < GROUP_WARPS; ++j) {
        const float2 x = *(const float2 *) &shared.top[j][query];
        most.x = fmaxf(most.x, x.x);
        most.y = fmaxf(most.y, x.y);
        high = fmaxf(high, shared.top[j][row]);
    }
    if (__any_sync(0xffffffff, most.x > top[0] || most.y > top[1])) {
        const float fade[2] = { top[0] == -INFINITY ? 0.0f : exp2f(top[0] - most.x), top[1] == -INFINITY ? 0.0f : exp2f(top[1] - most.y) };
#pragma unroll
        for (int t = 0; t < N; ++t) {
            o[t][0] *= fade[0];
            o[t][1] *= fade[1];
            o[t][2] *= fade[0];
            o[t][3] *= fade[1];
        }
        top[0] = most.x;
        top[1] = most.y;
    }
    return high;
}

// a group of more than 4 bits, as all threads of a warp look it up
struct wide_group {
    int          owner; // the first of its own threads
    uint32_t     shift, word;
    const half * levels;
};

// D: 256, so that a warp's quarter is eight groups, one for each lane/4. ONE: one token, whose value is given where it counts exactly;
// SHORT: short code rather than many cells' speed
template <int D, bool ONE, bool SHORT>
struct value_sums {
    float       o[4][4];     // components first + 2*t, + 1, of queries 2*(lane%4), + 1
    float       top[2];      // what o is relative to
    uint32_t    levels;      // of the warp's groups, in shared memory
    pair_code   code;
    uint32_t    width;
    bool        any_spread;  // is any group of the warp's narrower than a nibble, or wider?
    bool        few_wide;    // one or two wider; SHORT: any
    const half * wide;       // levels of a wide group, in shared memory if there is room
    wide_group  shared_group; // few_wide: the warp's first
    uint32_t    other_wide;  // and its others, a bit for each: of its first thread
    half      * looked_up;   // [lane%4][component][cell/8][cell%2] of one of them
    int         first;       // of the thread's components
    int         from [4];    // slots of keys 2*q4, + 1, + 8, + 9 of 16, or -1
    uint4       exact[4];    // those of the store or of the batch's only token

    __device__ __forceinline__ void init(const char * base, const ggml_kvtc_cuda_head & head, int part, const uint4 * all_levels, uint8_t * wide_levels, bool look_up, uint8_t * of_warp) {
        static_assert(D == 64*GROUP_WARPS, "groups do not divide evenly");
        levels = (uint32_t) __cvta_generic_to_shared(all_levels) + 8*LEVEL_BYTES*part;
        const int group = threadIdx.x%32/4*GROUP_WARPS + part; // warps take turns: the first groups, of many bits, take longest
        first = 8*group;
        code  = at<pair_code>(base, head.pair_codes)[group];
        width = get_width<D>(code.shift);
        any_spread = __any_sync(0xffffffff, width < 4);
        const uint32_t of_wide = __ballot_sync(0xffffffff, width > 4);
        few_wide = of_wide != 0 && (SHORT || (look_up && __popc(of_wide) <= 2*4));
        wide = at<half>(base, head.levels) + at<uint32_t>(base, head.levels_at)[group];
        if (of_wide != 0) {
            const int end = get_wide_end(at<uint8_t>(base, head.widths), group);
            if (width > 4 && end <= SM90_WIDE) {
                uint8_t * to = wide_levels + end - (16 << width);
                copy_levels(to, wide, width, threadIdx.x%4, 4);
                wide = (const half *) to;
            }
        }
        looked_up  = (half *) of_warp;
        other_wide = of_wide & 0x11111111;
        if (few_wide) {
            shared_group = next_wide();
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            o[t][0] = o[t][1] = o[t][2] = o[t][3] = 0.0f;
        }
        top[0] = top[1] = -INFINITY;
    }

    // the first of the warp's other wide groups
    __device__ __forceinline__ wide_group next_wide() {
        const int owner = __ffs(other_wide) - 1;
        other_wide &= other_wide - 1;
        return { owner, __shfl_sync(0xffffffff, code.shift, owner), __shfl_sync(0xffffffff, code.word, owner),
                 (const half *) __shfl_sync(0xffffffff, (unsigned long long) wide, owner) };
    }

    // 16 cells' components of a wide group, of which there are few: each thread looks up four of a cell. rows: of codes, of the first
    __device__ __forceinline__ void look_up_shared(const wide_group & g, const uint8_t * rows, int stride) const {
        const int lane = threadIdx.x % 32;
        const int cell = lane/2;
        const uint32_t w      = get_width<D>(g.shift);
        const uint32_t mask   = (1u << w) - 1;
        const uint32_t bit    = g.shift%32 + lane%2*4*w;
        const uint32_t * from = (const uint32_t *) (rows + cell*stride + g.word) + bit/32;
        const uint32_t bits   = __funnelshift_r(from[0], from[1], bit);
        const half   * level  = g.levels + (lane%2*4 << w);
        half         * to     = looked_up + cell%8/2*32 + lane%2*16 + cell/8*2 + cell%2;
        half x[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            x[c] = level[(c << w) + (bits >> c*w & mask)];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            to[4*c] = x[c];
        }
    }

    // behind __syncwarp(), the group's own threads take them
    __device__ __forceinline__ void take_shared(const wide_group & g, uint32_t (&z)[8][2]) const {
        if (threadIdx.x%32/4 == g.owner/4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4 x = ((const uint4 *) looked_up)[threadIdx.x%4*4 + i];
                z[2*i]    [0] = x.x;
                z[2*i]    [1] = x.y;
                z[2*i + 1][0] = x.z;
                z[2*i + 1][1] = x.w;
            }
        }
    }

    // the values of warp j's 16 cells that count exactly are on their way. own: ONE's
    __device__ __forceinline__ void read_exact(const attn_args & a, int head, const int (&chosen)[SLAB90], const half * own, int j) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            from [n] = chosen[16*j + threadIdx.x%4*2 + n%2 + n/2*8];
            exact[n] = from[n] >= 0 ? load_exact(a, GGML_KVTC_V, D, head, from[n], first) : ONE ? *(const uint4 *) (own + first) : make_uint4(0, 0, 0, 0);
        }
    }

    // rows: of codes, from cell 2*(lane%4) on, `stride` bytes apart; any_exact: read_exact was called for warp j0; from its 16 cells
    // to those before warp j1
    __device__ __forceinline__ void add_slab(const attn_args & a, int head, const exchange & shared, const int (&chosen)[SLAB90], const uint8_t * rows, int stride, bool any_exact, const half * own, int j0, int j1) {
        const int lane = threadIdx.x % 32;
        const int q4   = lane % 4;
        const int r8   = lane / 4;
        const float high = raise_sums(o, top, shared, 2*q4, r8);
        const auto read_codes = [&](int j, uint32_t (&word)[4]) { // of keys 2*q4, + 1, + 8, + 9 of 16
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const uint32_t * words = (const uint32_t *) (rows + (16*j + n%2 + n/2*8)*stride + code.word);
                word[n] = __funnelshift_r(words[0], words[1], code.shift);
            }
        };
        uint32_t next[4];
        read_codes(j0, next);
#pragma unroll 1
        for (int j = j0; j < j1; ++j) {
            const uint8_t * rows_j = rows + (16*j - 2*q4)*stride;
            if (few_wide) { // on their way while the others are looked up
                __syncwarp();
                look_up_shared(shared_group, rows_j, stride);
            }
            uint32_t word[4] = { next[0], next[1], next[2], next[3] };
            if (j + 1 < j1) {
                read_codes(j + 1, next);
            }
            if (any_spread) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    word[n] = spread(word[n], width);
                }
            }
            uint32_t z[8][2];
            decode_four<8>(word, levels, r8*0x10101010, z);
            if (few_wide) {
                __syncwarp();
                take_shared(shared_group, z);
                const uint32_t others = other_wide;
#pragma unroll 1
                while (other_wide != 0) {
                    const wide_group g = next_wide();
                    __syncwarp();
                    look_up_shared(g, rows_j, stride);
                    __syncwarp();
                    take_shared(g, z);
                }
                other_wide = others;
            } else if (!SHORT && width > 4) {
                uint4 y[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    y[n] = look_up_wide(rows + (16*j + n%2 + n/2*8)*stride, code, wide);
                }
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    set_row(z, n, y[n]);
                }
            }
            if (any_exact) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    if (from[n] != -1) {
                        set_row(z, n, from[n] >= 0 || ONE ? exact[n] : load_exact(a, GGML_KVTC_V, D, head, from[n], first));
                    }
                }
                if (j + 1 < j1) {
                    read_exact(a, head, chosen, own, j + 1);
                }
            }
            const float part_top = shared.top[j][r8];
            const half2 f = __float2half2_rn(part_top == -INFINITY ? 0.0f : exp2f(part_top - high));
            const uint2 x = shared.weights[j][lane];
            const uint32_t b[2] = { mul_half2(x.x, f), mul_half2(x.y, f) };
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const uint32_t zv[4] = { z[2*t][0], z[2*t + 1][0], z[2*t][1], z[2*t + 1][1] };
                mma(o[t], zv, b[0], b[1]);
            }
        }
    }

    // The end of a block: the states of its groups' warps to one, and out. warp_top, sum: of the thread's queries and its warp's cells
    template <int GROUPS>
    __device__ __forceinline__ void write(const attn_args & a, uint8_t * smem, uint64_t & barrier, int group, int part, const float (&warp_top)[2], const float (&sum)[2],
                                          int head, int stream, float * values, float2 * meta) const {
        constexpr int LD = D + 8;
        const int lane = threadIdx.x % 32;
        float * all_o   = (float *) smem;         // [group][row][LD]
        float * all_top = all_o + GROUPS*8*LD;    // [group][row]
        float * all_sum = all_top + GROUPS*8;     // [group][row][warp of it]
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const float s = column_sum(sum[x]);
            const int row = group*8 + lane%4*2 + x;
            if (lane/4 == 0) { // a group's largest logit is that of its warps
                all_sum[row*GROUP_WARPS + part] = warp_top[x] == -INFINITY ? 0.0f : s*exp2f(warp_top[x] - top[x]);
                if (part == 0) {
                    all_top[row] = top[x];
                }
            }
            if (row%8 < a.n_tokens*a.group) {
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    *(float2 *) (all_o + row*LD + first + 2*t) = make_float2(o[t][x], o[t][x + 2]);
                }
            }
        }
        meet_all(barrier);
        put_sums<D, 8, GROUP_WARPS>(a, all_o, all_top, all_sum, GROUPS, head, 0, stream, blockIdx.x, gridDim.x, [](int c) { return c; }, values, meta);
    }
};
#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
