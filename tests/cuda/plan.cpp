// The CUDA kernels' planning as plain C, for tests/cuda/test_plan.py.
#include "cuda/plan.h"

#include <iterator>

using namespace kvtc;

extern "C" {

// shape: d, n_kv, n_tokens, group, n_head_kv, n_stream, row_bytes[2], bytes[2], tables[2], pairs[2]
static attn_shape get_shape(const int * x) {
    return { x[0], x[1], x[2], x[3], x[4], x[5], { x[6], x[7] }, { x[8], x[9] }, { x[10], x[11] }, { x[12], x[13] } };
}

// out: n_slab, slab, slabs_per_split, n_split, n_row_block, nq, shared, then the offsets in order
int plan_decode(const int * shape, int n_sm, long shared, long * out) {
    decode_plan p = {};
    const bool ok = make_decode_plan(get_shape(shape), { n_sm, (size_t) shared }, p);
    const long values[] = { p.n_slab, p.slab, p.slabs_per_split, p.n_split, p.n_row_block, p.nq, (long) p.shared,
        p.at_mean, p.at_queries, p.at_freq, p.at_fine, p.at_codes, p.at_table[0], p.at_table[1], p.at_stage, p.at_tile };
    std::copy(std::begin(values), std::end(values), out);
    return ok;
}

// 1: decode-sm90.cu, 2: decode-sm90-few.cu
int plan_sm90(const int * shape, int n_sm, long shared, long * out) {
    sm90_plan p = {};
    const bool ok = make_sm90_plan(get_shape(shape), { n_sm, (size_t) shared }, p);
    const long values[] = { p.n_slab, 64, p.slabs_per_split, p.n_split, 1, 1, (long) p.shared,
        p.at_table[0], p.at_table[1], p.at_queries, p.at_turned, p.at_freq, p.at_fine, p.at_codes, p.at_cells, p.at_gains, p.at_ranges, p.at_weights, p.at_tops, p.at_wide, p.at_stage[0], p.at_stage[1], p.at_barrier };
    std::copy(std::begin(values), std::end(values), out);
    return ok ? 1 + p.few : 0;
}

// out: blocks of a stream, if heads get unequal numbers of them, else 0; sums of a row; splits; slabs of a split
void plan_sm90_parts(const int * shape, int n_sm, long shared, int * out) {
    sm90_plan p = {};
    make_sm90_plan(get_shape(shape), { n_sm, (size_t) shared }, p);
    const int values[] = { p.n_block, p.n_sum, p.n_split, p.slabs_per_split };
    std::copy(std::begin(values), std::end(values), out);
}

int plan_sm90_d256(const int * shape, int n_sm, long shared, long * out) {
    sm90_d256_plan p = {};
    const bool ok = make_sm90_d256_plan(get_shape(shape), { n_sm, (size_t) shared }, p);
    const long values[] = { p.n_slab, 64, p.slabs_per_split, p.n_split, 1, 1, (long) p.shared,
        p.at_pairs, p.at_queries, p.at_turned, p.at_freq, p.at_fine, p.at_codes, p.at_levels, p.at_wide, p.at_exchange, p.at_stage[0], p.at_stage[1], p.at_own, p.at_parts };
    std::copy(std::begin(values), std::end(values), out);
    return ok;
}

// out: chunk, n_list, n_split, split, n_merge, n_token_block, n_head_block, n_cols2, n_column, n_chunk, bytes of scratch
void plan_prefill(const int * shape, int n_sm, long scratch, int n_exact, int n_cols, long * out) {
    const attn_shape s = get_shape(shape);
    const prefill_plan p = make_prefill_plan(s, { n_sm, 0, (size_t) scratch }, n_exact, false, n_cols);
    const long rows  = (long) s.n_stream*s.n_tokens*s.group*s.n_head_kv;
    const long cells = (long) s.n_stream*p.chunk*(s.n_head_kv*s.d*4 + s.n_tokens*2);
    const long sums  = (long) p.n_split*p.n_token_block*p.n_head_block*s.n_head_kv*s.n_stream*p.n_cols*(2 + s.d/2)*8*std::min(p.n_chunk, p.n_merge);
    const long folded = p.n_chunk > p.n_merge ? rows*(s.d*4 + 8) : 0;
    const long values[] = { p.chunk, p.n_list, p.n_split, p.split, p.n_merge, p.n_token_block, p.n_head_block, p.n_cols2, p.n_column, p.n_chunk, folded + cells + sums };
    std::copy(std::begin(values), std::end(values), out);
}

// out: chunk, n_list, n_column, n_chunk, n_merge, n_row_block, n_split, tiles_per_split, keys of a tile, bytes of scratch; true where served
int plan_tiles(const int * shape, int n_sm, long scratch, int n_exact, long * out) {
    const attn_shape s = get_shape(shape);
    tiles_plan p = {};
    const bool ok = make_tiles_plan(s, { n_sm, 0, (size_t) scratch }, n_exact, p);
    const long rows  = (long) s.n_stream*s.n_tokens*s.group*s.n_head_kv;
    const long cells = (long) s.n_stream*p.chunk*(s.n_head_kv*s.d*4 + s.n_tokens*2);
    const long sums  = rows*p.n_split*(s.d*4 + 8)*std::min(p.n_chunk, p.n_merge);
    const long folded = p.n_chunk > p.n_merge ? rows*(s.d*4 + 8) : 0;
    const long values[] = { p.chunk, p.n_list, p.n_column, p.n_chunk, p.n_merge, p.n_row_block, p.n_split, p.tiles_per_split, tile_keys(s.d), folded + cells + sums };
    std::copy(std::begin(values), std::end(values), out);
    return ok;
}

}
