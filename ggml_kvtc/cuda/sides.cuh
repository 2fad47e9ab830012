// Rows of other kinds than kvtc's to coefficients: turbo's codes, or values as they are. As in tables.cuh, a thread has one row.
#pragma once

#include "sides.h"
#include "tables.cuh"

namespace kvtc {

// both sides of kvtc types
struct coded_sides {
    static constexpr bool other = false;
};

// keys of another kind, and any values
struct other_sides {
    static constexpr bool other = true;
    side_rows side[2];
};

// The pieces of memory that hold n bytes, and where in the first of them these begin.
struct row_pieces {
    const uint8_t * from;
    int skew;
    int n;
};

__device__ __forceinline__ row_pieces get_pieces(const uint8_t * at, int n_bytes) {
    const int skew = (int) ((uintptr_t) at % SIDE_PIECE);
    return { at - skew, skew, (skew + n_bytes + SIDE_PIECE - 1)/SIDE_PIECE };
}

// 2^k threads of a warp copy a row of at most `stride` bytes: this thread's pieces
__device__ __forceinline__ void copy_pieces(uint8_t * to, const row_pieces & row, int first, int step) {
#pragma unroll 1
    for (int i = first; i < row.n; i += step) {
        copy_async<SIDE_PIECE>(to + SIDE_PIECE*i, row.from + SIDE_PIECE*i);
    }
}

// The gain of a turbo row; as on the CPU, what a damaged state may hold, infinity or NaN, is taken for 0.
__device__ __forceinline__ float load_gain(const side_rows & s, const uint8_t * row, int head) {
    const uint8_t * at = row + s.gains + 2*head; // any byte
    const uint32_t bits = at[0] | (uint32_t) at[1] << 8;
    return (bits & 0x7c00) == 0x7c00 ? 0.0f : __half2float(__ushort_as_half((unsigned short) bits));
}

// all groups have the same width and the same table
template <int D, int LD, int SLAB, bool with_gain>
__device__ __forceinline__ void decode_turbo(int bits, const uint8_t * row, int byte, const uint8_t * table, float gain, half * tile) {
    constexpr int step = 32/SLAB;
    const half2  g2  = __floats2half2_rn(gain, gain);
    uint4      * out = (uint4 *) tile + threadIdx.x%SLAB*(LD/8);
    switch (bits) {
        case 2:  decode_run<2, with_gain, true>(row, byte, table, D/8, step, g2, out); break;
        case 3:  decode_run<3, with_gain, true>(row, byte, table, D/8, step, g2, out); break;
        default: decode_run<4, with_gain, true>(row, byte, table, D/8, step, g2, out); break;
    }
}

// blocks of a scale in f16 and 32 numbers of 8 bits
__device__ __forceinline__ uint4 load_q8_0(const uint8_t * row, int byte, int group) {
    constexpr int BLOCK = 34;
    const uint8_t * at = row + byte + group/4*BLOCK;
    const float scale = __half2float(__ushort_as_half((unsigned short) (at[0] | at[1] << 8)));
    uint32_t lo;
    uint32_t hi;
    load_bits<8>(row, byte + group/4*BLOCK + 2 + group%4*8, lo, hi);
    const auto pair = [&](uint32_t x, int i) {
        return pack_half2(scale*(float) (int8_t) (x >> 16*i), scale*(float) (int8_t) (x >> (16*i + 8)));
    };
    return make_uint4(pair(lo, 0), pair(lo, 1), pair(hi, 0), pair(hi, 1));
}

// Coefficients or values of SLAB rows as f16, as decode_slab leaves them. row: this thread's, staged, whose bytes begin at `byte`;
// slot: its exact row, -1 for what the row holds. The gain is applied, or else is the caller's.
template <int D, int LD, int SLAB, bool with_gain>
__device__ __forceinline__ void decode_side(const attn_args & a, const side_rows & s, int side, int head, const uint8_t * row, int byte, const uint8_t * table,
                                            float gain, int slot, half * tile) {
    constexpr int step = 32/SLAB;
    uint4 * out = (uint4 *) tile + threadIdx.x%SLAB*(LD/8);
    if (s.kind == SIDE_TURBO) {
        decode_turbo<D, LD, SLAB, with_gain>(s.bits, row, byte, table, gain, tile);
    } else if (s.kind == SIDE_F16) {
#pragma unroll 4
        for (int g = threadIdx.x%32/SLAB; g < D/8; g += step) {
            out[g] = *(const uint4 *) (row + byte + 16*g); // such rows begin with a piece
        }
    } else {
#pragma unroll 2
        for (int g = threadIdx.x%32/SLAB; g < D/8; g += step) {
            out[g] = load_q8_0(row, byte, g);
        }
    }
    replace_rows<D, LD, SLAB>(a, side, head, s.kind == SIDE_TURBO ? slot : -1, tile);
}

// Queries times keys as they are stored, whose coefficients or values lie in a warp's tile: w[m][n][2*e + x] is key r8 + 8*e + 16*m,
// query 8*n + 2*q4 + x. gain: of the thread's row. The tile is free behind it.
template <int D, int LD, int NQ, int MT>
__device__ __forceinline__ void score_stored(const half * tile, const uint32_t (&queries)[NQ][D/16][2], float gain, float (&w)[MT][NQ][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int n = 0; n < NQ; ++n) {
            w[m][n][0] = w[m][n][1] = w[m][n][2] = w[m][n][3] = 0.0f;
        }
#pragma unroll
        for (int s = 0; s < D/16; ++s) {
            uint32_t z[4];
            ldmatrix_x4(z, tile + (16*m + lane%16)*LD + 16*s + lane/16*8);
#pragma unroll
            for (int n = 0; n < NQ; ++n) {
                mma(w[m][n], z, queries[n][s][0], queries[n][s][1]);
            }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float g = __shfl_sync(0xffffffff, gain, lane/4 + 8*e + 16*m);
#pragma unroll
            for (int n = 0; n < NQ; ++n) {
                w[m][n][2*e]     *= g;
                w[m][n][2*e + 1] *= g;
            }
        }
    }
    __syncwarp();
}

} // namespace kvtc
