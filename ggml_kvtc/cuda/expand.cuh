// What prefill reads in place of the codes.
#pragma once

#include "device.cuh"
#include "plan.h"

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

// on sm_90a
void rebuild_tiles(const attn_args & a, int d, const columns & c, const rebuild_plan & p, half * keys, half * values, cudaStream_t stream);

// cells whose keys are exact for some queries only: counts [stream][blocks of COUNT_CELLS], ranges, then the list, in order
void list_either(const attn_args & a, int n_max, int * counts, int2 * ranges, int * list, int * list_end, cudaStream_t stream);

// mask: f16 [stream][token][column], of the ranges of a chunk that need one of their own; of all where the mask's rows are not
// aligned to 16 bytes
void expand_mask(const attn_args & a, const columns & c, const int * counts, int split, bool aligned, half * out, cudaStream_t stream);

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
