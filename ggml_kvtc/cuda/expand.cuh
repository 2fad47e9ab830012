// What prefill reads in place of the codes.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace kvtc {

constexpr int COUNT_CELLS = 1024; // cells whose keys of two kinds are counted together

// The columns of a chunk: cells, then entries of a list of the cells whose keys are exact for some queries only.
struct columns {
    int         first;    // cell
    int         n_cell;   // columns of cells, a multiple of PREFILL_ALIGN
    int         n_all;    // columns in all, likewise
    int         entry;    // first entry of the list
    const int * list;     // [stream][n_list] cells
    const int * list_end; // [stream] entries in use
    int         n_list;
};

// columns that hold anything; the others are neither written nor read
__device__ __forceinline__ int get_n_column(const columns & c, int stream) {
    if (c.n_cell == c.n_all) {
        return c.n_all;
    }
    return min(c.n_all, c.n_cell + (max(0, c.list_end[stream] - c.entry) + PREFILL_ALIGN - 1)/PREFILL_ALIGN*PREFILL_ALIGN);
}

// keys, rotated, and values' coefficients: f16 [stream][head][column][d]
void expand_cells(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * keys, half * values, cudaStream_t stream);

// cells whose keys are exact for some queries only: counts [stream][blocks of COUNT_CELLS], then the list, in order
void list_either(const attn_args & a, int n_max, int * counts, int * list, int * list_end, cudaStream_t stream);

// mask: f16 [stream][token][column], of the ranges of a chunk that need one of their own
void expand_mask(const attn_args & a, const columns & c, const int * counts, int split, bool always, half * out, cudaStream_t stream);

// Do columns [from, to) need a mask of their own? They have keys of two kinds, or end beyond the cells. All threads of a block ask.
__device__ __forceinline__ bool needs_mask(const columns & c, const int * counts, int n_kv, int from, int to, int thread, int n_threads) {
    const int end = c.first + to;
    bool found = to > c.n_cell || end > n_kv;
    for (int i = (c.first + from)/COUNT_CELLS + thread; !found && i <= (end - 1)/COUNT_CELLS; i += n_threads) {
        found = found || counts[i] > 0;
    }
    return __syncthreads_or(found);
}

} // namespace kvtc
