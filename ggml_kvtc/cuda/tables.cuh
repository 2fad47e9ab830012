// Codes to coefficients: a warp decodes a slab of rows from shared memory to shared memory. A thread takes one row, so that all
// threads read the same group: its width is known to all, and its tables are so small that lookups rarely share a bank.
#pragma once

#include "device.cuh"

namespace kvtc {

// n codes of W bits from byte `byte` of a row on; rows start at multiples of 4 and may be read 12 bytes past their end
template <int W>
__device__ __forceinline__ void load_bits(const uint8_t * row, int byte, uint32_t & lo, uint32_t & hi) {
    const uint32_t * word  = (const uint32_t *) (row + (byte & ~3));
    const int        shift = (byte & 3)*8;
    if constexpr (W <= 4) {
        lo = (byte & 3) + W <= 4 ? word[0] >> shift : __funnelshift_r(word[0], word[1], shift);
        hi = 0;
    } else {
        const uint32_t middle = word[1];
        lo = __funnelshift_r(word[0], middle, shift);
        hi = __funnelshift_r(middle, word[2], shift);
    }
}

// 8 components
template <int W>
__device__ __forceinline__ uint4 decode_group(const uint8_t * row, int byte, const uint8_t * table) {
    uint32_t lo;
    uint32_t hi;
    load_bits<W>(row, byte, lo, hi);
    uint32_t x[4];
    if constexpr (W <= 3) {
        constexpr uint32_t mask = (1u << 2*W) - 1;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            x[p] = ((const uint32_t *) table)[p*(mask + 1) + (lo >> 2*W*p & mask)];
        }
    } else {
        constexpr uint32_t mask = (1u << W) - 1;
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            uint32_t v[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int      c    = 2*p + e;
                const uint32_t code = W*c >= 32 ? hi >> (W*c - 32) : W*c + W <= 32 ? lo >> W*c : __funnelshift_r(lo, hi, W*c);
                v[e] = ((const uint16_t *) table)[c*(mask + 1) + (code & mask)];
            }
            x[p] = v[0] | v[1] << 16;
        }
    }
    return make_uint4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ float get_gain(float base, uint8_t code) {
    return code == 0 ? 0.0f : base*exp2f((float) code/GGML_KVTC_GAIN_STEPS);
}

// n groups of W bits, of which this thread takes every step-th. Loads of several groups are on their way together: the compiler
// would not move them over a store. one_table: they share it, else each has its own.
template <int W, bool with_gain, bool one_table = false>
__device__ __forceinline__ void decode_run(const uint8_t * row, int byte, const uint8_t * table, int n, int step, half2 gain, uint4 * out) {
    constexpr int U     = W <= 4 ? 4 : 2;
    constexpr int bytes = one_table ? 0 : W <= 3 ? 16 << 2*W : 16 << W; // from a group's table to the next one's
    const auto decode = [&](int i) {
        const uint4 x = decode_group<W>(row, byte + i*W, table + i*bytes);
        return with_gain ? make_uint4(mul_half2(x.x, gain), mul_half2(x.y, gain), mul_half2(x.z, gain), mul_half2(x.w, gain)) : x;
    };
    int i = step == 1 ? 0 : threadIdx.x % 32 / 16;
#pragma unroll 1
    for (; i + (U - 1)*step < n; i += U*step) {
        uint4 x[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            x[u] = decode(i + u*step);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            out[i + u*step] = x[u];
        }
    }
#pragma unroll 1
    for (; i < n; i += step) {
        out[i] = decode(i);
    }
}

// Rows that count exactly take the place of codes; LD halves lie between rows of the tile. slot: of this thread's row, -1 for codes
template <int D, int LD, int SLAB>
__device__ __forceinline__ void replace_rows(const attn_args & a, int side, int head, int slot, half * tile) {
    const int lane = threadIdx.x % 32;
    if (__any_sync(0xffffffff, slot != -1)) {
        __syncwarp();
        constexpr int N = SLAB*(D/8)/32; // pieces of 16 bytes for each thread, neighbours from one row
        constexpr int U = N % 8 == 0 ? 8 : N % 5 == 0 ? 5 : N % 6 == 0 ? 6 : 4;
        static_assert(N % U == 0, "rows do not divide evenly");
#pragma unroll 1
        for (int i0 = 0; i0 < N; i0 += U) {
            uint4 x[U];
            int   at[U];
#pragma unroll
            for (int i = 0; i < U; ++i) { // all are on their way before the first is written
                const int piece = (i0 + i)*32 + lane;
                const int key   = piece/(D/8);
                const int from  = __shfl_sync(0xffffffff, slot, key);
                at[i] = from == -1 ? -1 : key*(LD/8) + piece%(D/8);
                if (from != -1) {
                    x[i] = load_exact(a, side, D, head, from, piece%(D/8)*8);
                }
            }
#pragma unroll
            for (int i = 0; i < U; ++i) {
                if (at[i] >= 0) {
                    ((uint4 *) tile)[at[i]] = x[i];
                }
            }
        }
    }
    __syncwarp();
}

// Coefficients of SLAB rows as f16. row: this thread's. The gain is applied, unless it is 1 for all rows of every slab
// (values: it is part of their weights). Exact rows take the place of codes where slot != -1. skew: where the payload begins in the row
template <int D, int LD, int SLAB, bool with_gain>
__device__ __forceinline__ void decode_slab(const attn_args & a, int side, int head, const uint8_t * row, const ggml_kvtc_cuda_code * codes, const uint8_t * tables,
                                            float gain, int slot, half * tile, int skew = 0) {
    constexpr int step = 32/SLAB;
    const int    lane = threadIdx.x % 32;
    const half2  g2   = __floats2half2_rn(gain, gain);
    uint4      * out  = (uint4 *) tile + lane%SLAB*(LD/8);
#pragma unroll 1
    for (int g = 0; g < D/8; ) {
        const ggml_kvtc_cuda_code code = codes[g];
        const uint8_t * table = tables + code.table;
        switch (code.width) {
            case 1: decode_run<1, with_gain>(row, code.byte + skew, table, code.run, step, g2, out + g); break;
            case 2: decode_run<2, with_gain>(row, code.byte + skew, table, code.run, step, g2, out + g); break;
            case 3: decode_run<3, with_gain>(row, code.byte + skew, table, code.run, step, g2, out + g); break;
            case 4: decode_run<4, with_gain>(row, code.byte + skew, table, code.run, step, g2, out + g); break;
            case 5: decode_run<5, with_gain>(row, code.byte + skew, table, code.run, step, g2, out + g); break;
            case 6: decode_run<6, with_gain>(row, code.byte + skew, table, code.run, step, g2, out + g); break;
            case 8: decode_run<8, with_gain>(row, code.byte + skew, table, code.run, step, g2, out + g); break;
            default:
                for (int i = 0; i < code.run; ++i) {
                    out[g + i] = make_uint4(0, 0, 0, 0);
                }
                break;
        }
        g += code.run;
    }
    replace_rows<D, LD, SLAB>(a, side, head, slot, tile);
}

// 16 channels times 16 components of the decode matrix, whose rows lie in the order of pairs in shared memory (D + 8 apart), but
// not in the pack: b[0], b[1] are the B operand of the first 8 channels, b[2], b[3] that of the others
template <int D, bool in_shared>
__device__ __forceinline__ void load_matrix(uint32_t (&b)[4], const half * matrix, int channel, int component, int rope_type, int n_rot) {
    const int lane = threadIdx.x % 32;
    if constexpr (in_shared) {
        ldmatrix_x4(b, matrix + (channel + lane%8 + lane/16*8)*(D + 8) + component + lane/8%2*8);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = pair_channel(channel + i/2*8 + lane/4, rope_type, n_rot);
            b[i] = *(const uint32_t *) (matrix + c*D + component + i%2*8 + lane%4*2);
        }
    }
}

} // namespace kvtc
