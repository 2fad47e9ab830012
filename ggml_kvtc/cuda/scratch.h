// What an operation asks of the device's pool: one piece, of few sizes. A pool without virtual memory management keeps a buffer of
// every size that nothing it has is enough for, and a prompt's need grows with the cells that are filled. No CUDA in here: tests run it
// anywhere.
#pragma once

#include "plan-prefill.h"

namespace kvtc {

constexpr int    SCRATCH_STEP   = 7;   // from size to size: all of them together, and the 5% that the pool adds, stay below 256 MiB
constexpr int    SCRATCH_TOKENS = 512; // of a batch, as llama.cpp cuts it: what a context will need is told from the first one on
constexpr size_t SCRATCH_ALIGN  = 256;

// The size to ask for where `need` bytes are needed now, and `most` (or 0: not known) once the cache is full
inline size_t round_scratch(const gpu_shape & gpu, size_t need, size_t most) {
    const size_t limit = gpu.scratch/9*13;
    size_t size = most > 0 ? std::min(most, limit) : limit;
    if (size < need) {
        size = std::max(need, limit); // a batch of so many tokens that the sums of one chunk are more
    }
    while (size/SCRATCH_STEP >= need) {
        size /= SCRATCH_STEP;
    }
    return (size + SCRATCH_ALIGN - 1)/SCRATCH_ALIGN*SCRATCH_ALIGN;
}

// where the parts of a prompt's piece begin
struct prefill_scratch {
    size_t keys, values, mask, classes, counts, list, ranges, sums, folded_values, folded_meta;
    size_t size = 0;

    size_t take(size_t bytes) {
        const size_t from = size;
        size += (bytes + SCRATCH_ALIGN - 1)/SCRATCH_ALIGN*SCRATCH_ALIGN;
        return from;
    }
};

// n_class: of tiles; n_sum: 8-byte units of a chunk's sums, n_kept of which wait to be merged
template <typename plan>
prefill_scratch make_scratch(const attn_shape & s, const plan & p, size_t n_class, size_t n_sum, int n_kept) {
    const size_t n_key = (size_t) s.n_stream*s.n_head_kv*p.chunk*s.d*2;
    const size_t n_row = p.n_chunk > p.n_merge ? (size_t) s.n_stream*s.n_tokens*s.n_head_kv*s.group : 0; // they are folded
    prefill_scratch x;
    x.keys    = x.take(n_key);
    x.values  = x.take(n_key);
    x.mask    = x.take((size_t) s.n_stream*s.n_tokens*p.chunk*2);
    x.classes = x.take(n_class);
    x.counts  = x.take((size_t) s.n_stream*ceil_div(s.n_kv, COUNT_CELLS)*4);
    x.list    = x.take((size_t) s.n_stream*(p.n_list + 1)*4);
    x.ranges  = x.take((size_t) s.n_stream*8);
    x.sums    = x.take(n_sum*8*n_kept);
    x.folded_values = x.take(n_row*s.d*4);
    x.folded_meta   = x.take(n_row*8);
    return x;
}

// 8-byte units of a chunk's sums
inline size_t count_sums(const attn_shape & s, const prefill_plan & p) {
    return (size_t) p.n_split*p.n_token_block*p.n_head_block*s.n_head_kv*s.n_stream*p.n_cols*(2 + s.d/2);
}

inline size_t count_meta(const attn_shape & s, const tiles_plan & p) {
    return ((size_t) s.n_stream*s.n_tokens*s.n_head_kv*s.group*p.n_split + 1)/2*2; // sums behind them are read 16 bytes at once
}

inline size_t count_sums(const attn_shape & s, const tiles_plan & p) {
    return count_meta(s, p) + (size_t) s.n_stream*s.n_tokens*s.n_head_kv*s.group*p.n_split*s.d/2;
}

inline prefill_scratch get_scratch(const attn_shape & s, const prefill_plan & p) {
    return make_scratch(s, p, 0, count_sums(s, p), std::min(p.n_chunk, p.n_merge));
}

inline prefill_scratch get_scratch(const attn_shape & s, const tiles_plan & p) {
    return make_scratch(s, p, (size_t) s.n_stream*p.n_row_block*(p.chunk/tile_keys(s.d)), count_sums(s, p), p.whole ? 0 : std::min(p.n_chunk, p.n_merge));
}

// The size to ask for where `need` bytes are needed now. n_cells: of the cache, of which s.n_kv are filled; n_exact: most exact rows of
// a stream
inline size_t get_scratch_size(const attn_shape & s, const gpu_shape & gpu, size_t need, int n_exact, int n_cells) {
    const size_t cells    = std::max(s.n_kv, n_cells);
    const size_t columns  = cells + std::min<size_t>(cells, n_exact + SCRATCH_TOKENS) + 2*PREFILL_ALIGN;
    const size_t per_cell = (size_t) s.n_stream*(s.n_head_kv*s.d*4 + std::max(s.n_tokens, SCRATCH_TOKENS)*2 + 16); // and 16 for what is small
    return round_scratch(gpu, need, columns*per_cell + gpu.scratch/18*7);
}

} // namespace kvtc
