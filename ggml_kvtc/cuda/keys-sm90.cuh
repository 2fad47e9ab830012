// The keys of decode-sm90-d256.cu, 32 components of a warp's 16 rows in a step: lane 4*r + q has the eight of group 4*s + q, of rows
// r and r + 8. What a step needs of shared memory, and of exact rows, was asked for in the step before.
#pragma once

#include "nibbles.cuh"
#include "plan.h"

namespace kvtc {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What steps look up, as a block of D threads brings it to shared memory: tables of pairs, which the copy engine brings, or single
// levels (nibbles.cuh) and behind them those of groups of more than 4 bits, as far as there is room
template <int D, bool PAIRS>
struct key_tables {
    pair_code code;      // of group threadIdx.x, or threadIdx.x/8
    uint32_t  level[8];  // of component threadIdx.x
    uint32_t  levels;    // where all are in shared memory

    __device__ __forceinline__ void read(const char * pack, const ggml_kvtc_cuda_head & head) {
        code = at<pair_code>(pack, head.pair_codes)[PAIRS ? threadIdx.x%(D/8) : threadIdx.x/8];
        if constexpr (!PAIRS) {
            read_levels(level, pack, head);
        }
    }

    __device__ __forceinline__ void store(const char * pack, const ggml_kvtc_cuda_head & head, pair_code * codes, uint8_t * to) {
        levels = (uint32_t) __cvta_generic_to_shared(to);
        if constexpr (PAIRS) {
            code.table += levels;
            if (threadIdx.x < D/8) {
                codes[threadIdx.x] = code;
            }
        } else {
            const int group = threadIdx.x/8;
            const int end   = get_wide_end(at<uint8_t>(pack, head.widths), group);
            code.table = 0;
            const int width = get_width<D>(code.shift);
            if (width > 4 && end <= SM90_WIDE) {
                uint8_t * wide  = to + D/8*LEVEL_BYTES + end - (16 << width);
                copy_levels(wide, at<half>(pack, head.levels) + at<uint32_t>(pack, head.levels_at)[group], width, threadIdx.x%8, 8);
                code.table = (uint32_t) __cvta_generic_to_shared(wide);
            }
            if (threadIdx.x%8 == 0) {
                codes[group] = code;
            }
            store_levels<4>((uint4 *) to, level, group, threadIdx.x%8);
        }
    }
};

// Where a thread's rows r and r + 8 count exactly. ONE: one token
template <int D, bool ONE>
struct exact_keys {
    const uint4 * row [2] = { nullptr, nullptr }; // ONE: else nullptr
    int           from[2] = { -1, -1 };           // not ONE: their slots, else -1
    uint4         ahead[2];                       // the next step's components

    // chosen: slot of the lane's row if it counts exactly, or -1, the warp's from lane `base` on; own: ONE's key of its batch
    __device__ __forceinline__ void start(const attn_args & a, int head, int chosen, int base, const half * own, int last) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            from[i] = __shfl_sync(0xffffffff, chosen, base + threadIdx.x%32/4 + 8*i);
            if (ONE && from[i] != -1) {
                row[i] = threadIdx.x%4 + get_exact_row<D>(a, GGML_KVTC_K, head, from[i], own);
            }
        }
        read(a, head, last);
    }

    __device__ __forceinline__ bool is_exact(int i) const {
        return ONE ? row[i] != nullptr : from[i] != -1;
    }

    __device__ __forceinline__ void read(const attn_args & a, int head, int s) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (is_exact(i)) {
                ahead[i] = ONE ? row[i][4*s] : load_exact(a, GGML_KVTC_K, D, head, from[i], 32*s + threadIdx.x%4*8);
            }
        }
    }
};

// PAIRS: groups are looked up in tables of pairs or of single levels, else as nibbles.cuh does. EXACT: rows may count exactly. BY: of steps
// that follow each other, every BY-th
template <int D, bool ONE, bool PAIRS, bool EXACT, int BY = 1>
struct key_steps {
    const uint8_t   * row [2];
    half2             gain[2];
    const pair_code * code_at;
    pair_code         code;
    uint32_t          bits [2];

    __device__ __forceinline__ void read_step() {
        code = load_code(code_at);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t * word = (const uint32_t *) (row[i] + code.word);
            bits[i] = __funnelshift_r(word[0], word[1], code.shift);
        }
    }

    // rows: of codes, of the thread's first; codes: of all groups; last: the first step
    __device__ __forceinline__ void start(const uint8_t * rows, int stride, float gain_base, const pair_code * codes, int last) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row [i] = rows + 8*i*stride;
            gain[i] = __float2half2_rn(get_gain(gain_base, row[i][0]));
        }
        code_at = codes + 4*last + threadIdx.x%4;
        read_step();
    }

    // A step's components, without their gains. any_wide: groups of the step may have single levels; not PAIRS: table: its levels in shared
    // memory; levels, first_level: those of all groups in the pack, and where the step's begin, for what has no room there
    __device__ __forceinline__ void look_up(bool any_wide, uint32_t table, const half * levels, const uint32_t * first_level, uint4 (&y)[2]) {
        if constexpr (PAIRS) {
            if (any_wide && is_wide(code)) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    y[i] = decode_wide<D>(row[i], code);
                }
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    y[i] = decode_bits<D>(bits[i], code);
                }
            }
        } else {
            const uint32_t width = get_width<D>(code.shift);
            if (__any_sync(0xffffffff, width < 4)) {
                bits[0] = spread(bits[0], width);
                bits[1] = spread(bits[1], width);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t x[8];
                decode_nibbles<4>(bits[i], table, threadIdx.x%4*0x10101010, x);
                y[i] = make_uint4(permute(x[0], x[1], 0x5410), permute(x[2], x[3], 0x5410), permute(x[4], x[5], 0x5410), permute(x[6], x[7], 0x5410));
            }
            if (any_wide && width > 4) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    y[i] = code.table != 0 ? decode_wide<D>(row[i], code) : look_up_wide(row[i], code, levels + first_level[threadIdx.x%4]);
                }
            }
        }
    }

    // what the next step looks up, if `more` follow
    __device__ __forceinline__ void read_next(bool more) {
        code_at -= more ? 4*BY : 0;
        read_step();
    }

    // y: of step s
    __device__ __forceinline__ void finish(const attn_args & a, int head, int s, bool more, exact_keys<D, ONE> & exact, const uint4 (&y)[2], uint32_t (&k)[2][4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            k[0][i]     = mul_half2(y[i].x, gain[i]);
            k[0][i + 2] = mul_half2(y[i].y, gain[i]);
            k[1][i]     = mul_half2(y[i].z, gain[i]);
            k[1][i + 2] = mul_half2(y[i].w, gain[i]);
            if (EXACT && exact.is_exact(i)) {
                k[0][i]     = exact.ahead[i].x;
                k[0][i + 2] = exact.ahead[i].y;
                k[1][i]     = exact.ahead[i].z;
                k[1][i + 2] = exact.ahead[i].w;
            }
        }
        if constexpr (EXACT) {
            exact.read(a, head, more ? s - BY : s);
        }
    }

    // all of step s; wait: for the product that reads k
    template <typename T>
    __device__ __forceinline__ void decode(const attn_args & a, int head, int s, bool more, exact_keys<D, ONE> & exact, bool any_wide, uint32_t table, const half * levels, const uint32_t * first_level, const T & wait, uint32_t (&k)[2][4]) {
        uint4 y[2];
        look_up(any_wide, table, levels, first_level + 4*s, y);
        read_next(more);
        wait();
        finish(a, head, s, more, exact, y, k);
    }
};
#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
