// How prompts' kernels divide their work, as plan.h does for decoding.
#pragma once

#include "plan.h"

namespace kvtc {

//
// prefill: cells are expanded to f16 in chunks, and a flash attention kernel reads those
//

struct expand_plan {
    int n_warp;
    int in_shared; // the decode matrix is in shared memory
    int stride;    // bytes of a staged row
    int at_mean, at_freq, at_codes, at_table, at_stage, at_tile;
    size_t shared;
};

// of the kvtc sides
inline expand_plan make_expand_plan(const attn_shape & s, const gpu_shape & gpu) {
    expand_plan p;
    const auto most = [&s](const int (&x)[2]) { return std::max(s.kind[0] == SIDE_KVTC ? x[0] : 0, s.kind[1] == SIDE_KVTC ? x[1] : 0); };
    // groups of more than 4 bits are read a word past their end (tables.cuh): not from the next warp's rows, which may be on their way
    p.stride = 4*((ceil_div(most(s.bytes), 4) + 1) | 1);
    for (p.in_shared = 1; ; p.in_shared = 0) {
        for (p.n_warp = 8; p.n_warp > 0; p.n_warp /= 2) {
            int used = 0;
            const auto take = [&used](int n) { const int from = used; used += (n + 15)/16*16; return from; };
            take(p.in_shared*s.d*(s.d + 8)*2);
            p.at_mean  = take(s.d*4);
            p.at_freq  = take(s.d/2*8);
            p.at_codes = take(s.d/8*8);
            p.at_table = take(most(s.tables));
            p.at_stage = take(2*p.n_warp*16*p.stride + 16);
            p.at_tile  = take(p.n_warp*16*(s.d + 8)*2);
            p.shared   = used;
            if (p.shared <= gpu.shared && (p.n_warp >= 4 || !p.in_shared)) {
                return p;
            }
        }
        if (!p.in_shared) {
            p.n_warp = 0; // no room: make_decode_plan has none either
            return p;
        }
    }
}

struct chunk_plan {
    int n_column;       // the list, then the cells
    int n_list;         // most keys that are exact for some queries only: they have columns of their own
    int chunk;          // columns expanded at once
    int n_chunk;
};

struct prefill_plan : chunk_plan {
    int n_cols;         // query rows of a block
    int n_cols2;        // of these, heads of the group
    int n_token_block, n_head_block; // blocks of queries: tokens, heads of a group
    int n_split;        // ranges of a chunk
    int n_merge;        // chunks whose sums are merged at once
    int split;          // columns of a range
};

constexpr int    PREFILL_ALIGN   = 256;           // chunks and splits are multiples of this many cells
constexpr int    PREFILL_MERGE   = 8;
constexpr int    COUNT_CELLS     = 1024;          // cells whose keys of two kinds are counted together
constexpr int    MAX_SINGLE_HEAD = 256;           // above, ggml has no kernel for one head at once, as ALiBi needs it

// chunks whose sums are merged at once; sums: bytes of one's; folded: of what they are folded to where there are more
inline int get_n_merge(const gpu_shape & gpu, int n_chunk, size_t sums, size_t folded) {
    const size_t limit = gpu.scratch/18*7;
    const size_t n     = std::min<size_t>(PREFILL_MERGE, limit/sums);
    return (int) std::max<size_t>(1, n_chunk <= (int) n || limit < folded ? n : std::min(n, (limit - folded)/sums));
}

// n_exact: most exact rows of a stream
inline chunk_plan make_chunks(const attn_shape & s, const gpu_shape & gpu, int n_exact) {
    chunk_plan p;
    const int align = PREFILL_ALIGN;
    const size_t per_cell = (size_t) s.n_stream*(s.n_head_kv*s.d*4 + s.n_tokens*2);
    const int    most     = std::max<int>(1, (int) (gpu.scratch/per_cell/align))*align;
    p.n_list   = ceil_div(std::min(s.n_kv, n_exact), align)*align;
    p.n_column = ceil_div(s.n_kv, align)*align + p.n_list;
    p.chunk    = ceil_div(ceil_div(p.n_column, ceil_div(p.n_column, most)), align)*align;
    p.n_chunk  = ceil_div(p.n_column, p.chunk);
    return p;
}

// as few ranges of a chunk, at most n_most, as let `blocks` for each fill the slots
inline int get_n_range(int blocks, int slots, int n_most) {
    double best = 0.0;
    int n_range = 1;
    for (int n = 1; n <= n_most; ++n) {
        const double use = (double) blocks*n/(ceil_div(blocks*n, slots)*slots);
        if (use > best + 0.05) {
            best    = use;
            n_range = n;
        }
    }
    return n_range;
}

inline prefill_plan make_prefill_plan(const attn_shape & s, const gpu_shape & gpu, int n_exact, bool alibi, int n_cols) {
    prefill_plan p;
    (chunk_plan &) p = make_chunks(s, gpu, n_exact);
    p.n_cols  = n_cols;
    p.n_cols2 = alibi || (s.group == 1 && s.d <= MAX_SINGLE_HEAD) ? 1 : s.group <= 2 ? 2 : s.group <= 4 ? 4 : 8;
    p.n_token_block = ceil_div(s.n_tokens, p.n_cols/p.n_cols2);
    p.n_head_block  = ceil_div(s.group, p.n_cols2);

    const int blocks = p.n_token_block*p.n_head_block*s.n_head_kv*s.n_stream;
    p.n_split = get_n_range(blocks, 2*gpu.n_sm, std::min(8, p.chunk/PREFILL_ALIGN)); // two blocks on each processor
    p.split   = ceil_div(ceil_div(p.chunk, p.n_split), PREFILL_ALIGN)*PREFILL_ALIGN;
    p.n_split = ceil_div(p.chunk, p.split);
    const size_t sums = (size_t) blocks*p.n_split*n_cols*(2 + s.d/2)*8;
    p.n_merge = get_n_merge(gpu, p.n_chunk, sums, (size_t) s.n_stream*s.n_tokens*s.n_head_kv*s.group*(s.d + 2)*4);
    return p;
}

//
// prefill on sm_90a: the expanded columns lie in tiles
//

constexpr int TILE_ROWS   = 128; // query rows of a block
constexpr int TILE_STAGES = 2;

constexpr int TILE_MOST_WHOLE = 128; // head_dim up to which attention ends with the values' matrix where one block sees all columns

template <int D> constexpr int TILE_KEYS = D <= 128 ? 128 : 64;

inline int tile_keys(int d) {
    return d <= 128 ? TILE_KEYS<128> : TILE_KEYS<256>;
}

struct tiles_plan : chunk_plan {
    int n_merge; // as in prefill_plan
    int n_row_block;
    int n_split, tiles_per_split; // of a chunk
    bool whole;                   // there are no sums to merge
};

// False where this kernel does not serve the shape.
inline bool make_tiles_plan(const attn_shape & s, const gpu_shape & gpu, int n_exact, tiles_plan & p) {
    if (s.d != 64 && s.d != 128 && s.d != 256) {
        return false;
    }
    (chunk_plan &) p = make_chunks(s, gpu, n_exact);
    p.n_row_block = ceil_div(s.n_tokens*s.group, TILE_ROWS);

    const int n_tile = p.chunk/tile_keys(s.d);
    const int blocks = p.n_row_block*s.n_head_kv*s.n_stream;
    p.tiles_per_split = ceil_div(n_tile, get_n_range(blocks, gpu.n_sm, std::min(16, n_tile/2)));
    p.n_split         = ceil_div(n_tile, p.tiles_per_split);
    p.whole           = p.n_chunk == 1 && p.n_split == 1 && s.d <= TILE_MOST_WHOLE;
    const size_t rows = (size_t) s.n_stream*s.n_tokens*s.n_head_kv*s.group*(s.d + 2)*4;
    p.n_merge         = get_n_merge(gpu, p.n_chunk, rows*p.n_split, rows);
    return true;
}

template <int D> constexpr int REBUILD_GROUPS = D <= 128 ? 3 : 2; // of four warps, for slabs of 64 cells

struct rebuild_plan {
    int n_key_block, n_value_block;
    int unit, lanes, stride; // as in staging
    int at_barrier, at_table[2], at_freq, at_codes, at_stage; // keys: the decode matrix is at 0; a block has one side's tables
    size_t shared;
};

// False where matrix or tables are too large, or rows no multiple of 8 bytes, or not kvtc's: other kernels serve these.
inline bool make_rebuild_plan(const attn_shape & s, const gpu_shape & gpu, int n_column, rebuild_plan & p) {
    const int     n_group = s.d <= 128 ? REBUILD_GROUPS<128> : REBUILD_GROUPS<256>;
    const staging rows    = make_staging(s);
    if (rows.unit < 8 || has_others(s)) {
        return false;
    }
    p.unit   = rows.unit;
    p.lanes  = std::max(rows.lanes [0], rows.lanes [1]);
    p.stride = std::max(rows.stride[0], rows.stride[1]);
    int used = 0;
    const auto take = [&used](int n, int align) { const int from = align_shared(used, align); used = from + n; return from; };
    p.at_table[1] = take(s.pairs[1], SM90_TABLE);
    const int of_values = used;
    used = 0;
    take((s.d/8 + 1)*s.d*16, 128);
    p.at_table[0] = take(s.pairs[0], SM90_TABLE);
    used       = std::max(used, of_values);
    p.at_freq  = take(s.d/2*8, 128);
    p.at_codes = take(s.d/8*16, 128);
    p.at_stage = take(4*n_group*2*16*p.stride + 16, 128); // read past the end
    p.at_barrier = take(8, 8);
    p.shared   = used;
    const int most    = ceil_div(n_column, 64*n_group);
    const int blocks  = std::max(2, gpu.n_sm/(s.n_head_kv*s.n_stream));
    p.n_key_block   = std::max(1, std::min(most, blocks*3/5)); // a key costs more than a value does
    p.n_value_block = std::max(1, std::min(most, blocks - p.n_key_block));
    return p.shared <= gpu.shared;
}

} // namespace kvtc
