// The sum of values in decode-sm90-slow.cu: as values-sm90.cuh's, but each warp has eight neighbouring groups, and looks up levels in shared
// memory's banks: of a group's four, each of the four lanes that decode it, of different rows, has one of its own.
//
//             bank 0 … 3                                           4 … 7       31
//   code 0    | group 0: both levels of two components, four times | group 1 | … |
//   code 1    | …
//
// Each pair of components has such a table for each warp's groups: of 32 codes for the first, of 16 for the others. Groups of more bits are
// looked up by their own four lanes, while the others wait.
#pragma once

#include "values-sm90.cuh"

namespace kvtc {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// bits of a group that has a place in the tables
__device__ __forceinline__ int get_most_bits(int group) {
    return group < 8 ? 5 : 4;
}

// from the beginning of a pair's tables to those of a warp's groups
__device__ __forceinline__ uint32_t get_bank_table(int part) {
    return part == 0 ? 0 : (part + 1)*16*GGML_KVTC_CUDA_LEVEL;
}

// The tables of a head's values, from the pack, by n threads
__device__ __forceinline__ void fill_banks(uint8_t * to, const char * pack, const ggml_kvtc_cuda_head & head, int n) {
    constexpr int UNITS = SM90_BANK_COLUMN/GGML_KVTC_CUDA_LEVEL/4; // of four codes
    const half    * levels = at<half>(pack, head.levels);
    const uint8_t * widths = at<uint8_t>(pack, head.widths);
#pragma unroll 1
    for (int i = threadIdx.x; i < 8*4*UNITS; i += n) {
        const int g8   = i%8;
        const int pair = i/8%4;
        const int unit = i/32; // of the warps' one after the other
        const int part  = unit < 8 ? 0 : unit/4 - 1;
        const int first = unit < 8 ? 4*unit : unit%4*4; // code
        const int group = 8*part + g8;
        const int width = widths[group];
        const half * level = levels + at<uint32_t>(pack, head.levels_at)[group] + (2*pair << width);
        const bool has = width > 0 && width <= get_most_bits(group);
        uint32_t x[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int code = first + c & (1 << width) - 1;
            x[c] = has ? (uint32_t) __half_as_ushort(level[code]) | (uint32_t) __half_as_ushort(level[code + (1 << width)]) << 16 : 0;
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            *(uint4 *) (to + pair*SM90_BANK_COLUMN + get_bank_table(part) + (first + c)*GGML_KVTC_CUDA_LEVEL + 16*g8) = make_uint4(x[c], x[c], x[c], x[c]);
        }
    }
}

// Of 16 cells, a group of those values that count exactly
template <int D>
struct exact_values {
    int   from[4]; // slots of cells 2*(lane%4), + 1, + 8, + 9, or -1
    uint4 x   [4];

    // they are on their way. j: of a slab's 16 cells; own: key and value of the batch's only token
    __device__ __forceinline__ void read(const attn_args & a, int head, const int (&chosen)[SLAB90], const half * own, int group, int j) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            from[n] = chosen[16*j + threadIdx.x%4*2 + n%2 + n/2*8];
            x   [n] = from[n] != -1 ? get_exact_row<D>(a, GGML_KVTC_V, head, from[n], own)[group] : make_uint4(0, 0, 0, 0);
        }
    }
};

// D: 256. One token of at most two queries; of a product's columns the first four are queries' even components, the others their odd ones
template <int D>
struct bank_sums {
    float     o[2][1][4]; // [t][0][2*i + x]: components 2*(t + 2*i) + lane%4/2 of the thread's group, of query lane%4%2*2 + x
    float     top[2];     // of these queries, what o is relative to
    uint32_t  table;      // of the group, in shared memory, and in that the thread's bank
    uint32_t  mask;       // of an index, times GGML_KVTC_CUDA_LEVEL
    uint32_t  word, shift, width;
    uint32_t  wide;       // groups of the warp that have no place in the tables, a bit for the first thread of each
    const half * levels;  // of the thread's group, for these; in shared memory if there is room
    int       group;
    uint32_t  pick[1][2];

    __device__ __forceinline__ void init(const char * base, const ggml_kvtc_cuda_head & head, int part, const uint8_t * tables, uint8_t * wide_levels) {
        static_assert(D == 64*GROUP_WARPS, "groups do not divide evenly");
        const int lane = threadIdx.x % 32;
        group = 8*part + lane/4;
        const pair_code code = at<pair_code>(base, head.pair_codes)[group];
        word  = code.word;
        shift = code.shift;
        width = get_width<D>(code.shift);
        mask  = (int) width > get_most_bits(group) ? 0 : ((1u << width) - 1)*GGML_KVTC_CUDA_LEVEL;
        table = (uint32_t) __cvta_generic_to_shared(tables) + get_bank_table(part) + 4*lane;
        levels = at<half>(base, head.levels) + at<uint32_t>(base, head.levels_at)[group];
        wide   = __ballot_sync(0xffffffff, (int) width > get_most_bits(group)) & 0x11111111;
        if (wide != 0) {
            const int end = get_wide_end(at<uint8_t>(base, head.widths), group);
            if ((int) width > get_most_bits(group) && end <= SM90_WIDE) {
                uint8_t * to = wide_levels + end - (16 << width);
                copy_levels(to, levels, width, lane%4, 4);
                levels = (const half *) to;
            }
        }
        pick_parity(pick[0], lane < 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            o[0][0][i] = o[1][0][i] = 0.0f;
        }
        top[0] = top[1] = -INFINITY;
    }

    // rows: of codes, from cell 2*(lane%4) on, `stride` bytes apart; EXACT: exact: of the first 16 cells
    template <bool EXACT>
    __device__ __forceinline__ void add_slab(const attn_args & a, int head, const exchange & shared, const int (&chosen)[SLAB90], const uint8_t * rows, int stride, const half * own, exact_values<D> & exact) {
        const int lane = threadIdx.x % 32;
        const int q2   = lane%2*2;  // the thread's first query
        const int r4   = lane/4%4;  // the query whose weights it has
        const float high = raise_sums((float (&)[2][4]) o, top, shared, q2, r4);
        const auto read_codes = [&](int j, uint2 (&words)[4]) { // of keys 2*q4, + 1, + 8, + 9 of 16
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const uint32_t * w = (const uint32_t *) (rows + (16*j + n%2 + n/2*8)*stride + word);
                words[n] = make_uint2(w[0], w[1]);
            }
        };
        uint2 next[4];
        read_codes(0, next);
#pragma unroll 2 // two are looked up together
        for (int j = 0; j < GROUP_WARPS; ++j) {
            uint4 z[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                z[n] = look_up_levels<SM90_BANK_COLUMN>(next[n], shift, shift%32 + 4*width, width, mask, table);
            }
            if (j + 1 < GROUP_WARPS) {
                read_codes(j + 1, next);
            }
            if (wide != 0) {
                if (wide >> (lane & 28) & 1) { // the lanes of other groups wait
#pragma unroll 1
                    for (int n = 0; n < 4; ++n) {
                        const uint4 x = look_up_wide(rows + (16*j + n%2 + n/2*8)*stride, { 0, word, shift, 0 }, levels);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            z[i] = i == n ? x : z[i];
                        }
                    }
                }
                __syncwarp();
            }
            if constexpr (EXACT) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    z[n] = exact.from[n] != -1 ? exact.x[n] : z[n];
                }
                if (j + 1 < GROUP_WARPS) {
                    exact.read(a, head, chosen, own, group, j + 1);
                }
            }
            const float part_top = shared.top[j][r4];
            const half2 f = __float2half2_rn(part_top == -INFINITY ? 0.0f : exp2f(part_top - high));
            const uint2 x = shared.weights[j][lane%16];
            const uint32_t weights[2] = { mul_half2(x.x, f), mul_half2(x.y, f) };
            add_pairs(o, z, weights, pick);
        }
    }

    // The end of a block: the states of its groups' warps to one, and out. warp_top, sum: of queries 2*(lane%4), + 1 and the warp's cells
    template <int GROUPS>
    __device__ __forceinline__ void write(const attn_args & a, uint8_t * smem, uint64_t & barrier, int warp_group, int part, const float (&warp_top)[2], const float (&sum)[2],
                                          int head, int stream, float * values, float2 * meta) const {
        constexpr int LD = D + 8;
        const int lane = threadIdx.x % 32;
        const int q4   = lane % 4;
        float * all_o   = (float *) smem;         // [group of warps][row][LD]
        float * all_top = all_o + GROUPS*8*LD;    // [group of warps][row]
        float * all_sum = all_top + GROUPS*8;     // [group of warps][row][warp of it]
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            const float s = column_sum(sum[x]);
            const int row = warp_group*8 + q4%2*2 + x;
            if (lane == 0) { // a group's largest logit is that of its warps
                all_sum[row*GROUP_WARPS + part] = warp_top[x] == -INFINITY ? 0.0f : s*exp2f(warp_top[x] - top[x]);
                if (part == 0) {
                    all_top[row] = top[x];
                }
            }
            if (row%8 < a.group) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        all_o[row*LD + 8*group + 2*(t + 2*i) + q4/2] = o[t][0][2*i + x];
                    }
                }
            }
        }
        meet_all(barrier);
        put_sums<D, 8, GROUP_WARPS>(a, all_o, all_top, all_sum, GROUPS, head, 0, stream, blockIdx.x, gridDim.x, [](int c) { return c; }, values, meta);
    }
};
#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
