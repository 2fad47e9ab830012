// What prefill reads in place of the codes.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace kvtc {

constexpr int COUNT_CELLS = 1024; // cells whose keys of two kinds are counted together

// The columns of a chunk: cells from `first` on, or, where keys are exact for some queries only, entries of a list of cells.
struct columns {
    int         first;    // cell, or entry of the list
    int         n_all;    // columns written, a multiple of PREFILL_ALIGN
    const int * list;     // [stream][n_list] cells, or nullptr
    const int * list_end; // [stream] entries in use
    int         n_list;
};

// columns that hold anything; the others are neither written nor read
__device__ __forceinline__ int get_n_column(const columns & c, int stream) {
    if (!c.list) {
        return c.n_all;
    }
    return min(c.n_all, (max(0, c.list_end[stream] - c.first) + PREFILL_ALIGN - 1)/PREFILL_ALIGN*PREFILL_ALIGN);
}

// queries: f32 [stream][token][head][d], rotation pairs side by side
void expand_queries(const attn_args & a, int d, float * out, cudaStream_t stream);

// keys, rotated, pairs side by side, and values' coefficients: f16 [stream][head][column][d]
void expand_cells(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * keys, half * values, cudaStream_t stream);

// cells whose keys are exact for some queries only: counts [stream][blocks of COUNT_CELLS], then the list, in order
void list_either(const attn_args & a, int n_max, int * counts, int * list, int * list_end, cudaStream_t stream);

// mask: f16 [stream][token][column], of the ranges of a chunk that need one of their own
void expand_mask(const attn_args & a, const columns & c, const int * counts, int split, bool always, half * out, cudaStream_t stream);

// Does a range of cells need a mask of its own? It has keys of two kinds, or ends beyond the cells. All threads of a block ask.
__device__ __forceinline__ bool needs_mask(const int * counts, int n_kv, int first, int end, int thread, int n_threads) {
    bool found = end > n_kv;
    for (int i = first/COUNT_CELLS + thread; i <= (min(end, n_kv) - 1)/COUNT_CELLS; i += n_threads) {
        found = found || counts[i] > 0;
    }
    return __syncthreads_or(found);
}

} // namespace kvtc
