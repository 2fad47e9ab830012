// What prefill reads in place of the codes.
#pragma once

#include "device.cuh"
#include "plan-prefill.h"

namespace kvtc {

// The columns of a chunk. Of all columns, the first n_list are for a list of the cells whose keys are exact for some queries only,
// which fills their end; the cells follow.
struct columns {
    int         at;       // first column of the chunk
    int         n_all;    // its columns, a multiple of PREFILL_ALIGN
    int         n_list;   // likewise
    const int * list;     // [stream][n_list] cells
    const int * list_end; // [stream] entries in use
    const int2 * ranges;  // [stream] least and greatest position of the queries
};

// columns before this one, a multiple of PREFILL_ALIGN, hold nothing: they are neither written nor read
__device__ __forceinline__ int get_first_column(const columns & c, int stream) {
    return max(0, c.n_list - c.list_end[stream] - c.at)/PREFILL_ALIGN*PREFILL_ALIGN;
}

// the cell of a column of the list, or -1
__device__ __forceinline__ int get_listed(const columns & c, int stream, int col) {
    const int i = c.at + col - c.n_list + c.list_end[stream];
    return i >= 0 ? c.list[(int64_t) stream*c.n_list + i] : -1;
}

// cell of a column, and its exact row: in the list, all keys count exactly; elsewhere those that do for all queries
struct column_cell {
    int cell, pos, slot;
};

__device__ __forceinline__ column_cell get_cell(const attn_args & a, const columns & c, int stream, int col, const int2 & range) {
    column_cell x;
    const bool listed = c.at + col < c.n_list;
    x.cell = listed ? max(0, get_listed(c, stream, col)) : min(c.at + col - c.n_list, a.n_kv - 1);
    const int2 info = a.info[(int64_t) stream*a.n_kv + x.cell];
    x.pos  = info.x;
    x.slot = info.x >= 0 && (listed || get_use(a, info.x, info.y, range.x, range.y) == USE_EXACT) ? info.y : -1;
    return x;
}

// keys, rotated, and values' coefficients: f16 [stream][head][column][d]
void expand_cells(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * keys, half * values, cudaStream_t stream);

// the same in the order of tiles (attend-sm90.cuh)
void expand_tiles(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * keys, half * values, cudaStream_t stream);

// one side of another kind than kvtc's, as its rows hold it: keys are in the space of turned queries
void expand_side(const attn_args & a, const attn_shape & s, const columns & c, int side, bool tiled, half * out, cudaStream_t stream);

// f32 [stream][token][head][d]: queries in the space of turbo's keys, which then are a's
void turn_queries(attn_args & a, int d, float * out, cudaStream_t stream);

// on sm_90a
void rebuild_tiles(const attn_args & a, int d, const columns & c, const rebuild_plan & p, half * keys, half * values, cudaStream_t stream);

// cells whose keys are exact for some queries only: counts [stream][blocks of COUNT_CELLS], ranges, then the list, in order
void list_either(const attn_args & a, int n_max, int * counts, int2 * ranges, int * list, int * list_end, cudaStream_t stream);

// mask: f16 [stream][token][column], of the ranges of a chunk that need one of their own; of all where the mask's rows are not
// aligned to 16 bytes
void expand_mask(const attn_args & a, const columns & c, const int * counts, int split, bool aligned, half * out, cudaStream_t stream);

// A warp's tile of 16 rows, LD halves apart, to the columns from col on of a head's `out`. tiled: in the order that attend-sm90.cuh
// states, else column after column.
template <int D, int LD, bool tiled>
__device__ __forceinline__ void write_columns(const half * tile, half * out, int side, int col) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    if constexpr (tiled) {
        constexpr int KEYS = TILE_KEYS<D>;
        half * dst = out + (int64_t) (col/KEYS)*KEYS*D;
        const int key = col%KEYS;
        if (side == GGML_KVTC_K) {
#pragma unroll
            for (int i = lane; i < 16*(D/8); i += 32) {
                *(uint4 *) (dst + (i/16*KEYS + key + i%16)*8) = *(const uint4 *) (tile + i%16*LD + i/16*8);
            }
        } else {
#pragma unroll
            for (int c = 0; c < D; c += 16) {
                uint32_t x[4]; // of components c + lane/4 (+ 8): two neighbouring keys of the first eight, of the others
                ldmatrix_x4_trans(x, tile + lane%16*LD + c + lane/16*8);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    *(uint32_t *) (dst + ((key/8 + j%2)*D + c + j/2*8 + lane/4)*8 + lane%4*2) = x[j];
                }
            }
        }
    } else {
#pragma unroll
        for (int i = lane; i < 16*(D/8); i += 32) {
            *(uint4 *) (out + (int64_t) (col + i/(D/8))*D + i%(D/8)*8) = *(const uint4 *) (tile + i/(D/8)*LD + i%(D/8)*8);
        }
    }
    __syncwarp();
}

// Do columns [from, to) need a mask of their own? They have keys of two kinds, or end beyond the cells. All threads of a block ask.
__device__ __forceinline__ bool needs_mask(const columns & c, const int * counts, int n_kv, int from, int to, int thread, int n_threads) {
    const int first = c.at + from - c.n_list; // cells
    const int end   = c.at + to   - c.n_list;
    bool found = first < 0 || end > n_kv;
    for (int i = first/COUNT_CELLS + thread; !found && i <= (end - 1)/COUNT_CELLS; i += n_threads) {
        found = found || counts[i] > 0;
    }
    return __syncthreads_or(found);
}

} // namespace kvtc
