// The CUDA kernels' planning as plain C, for tests/cuda/test_plan.py.
#include "cuda/scratch.h"

#include <iterator>

using namespace kvtc;

extern "C" {

// shape: d, n_kv, n_tokens, group, n_head_kv, n_stream, row_bytes[2], bytes[2], tables[2], pairs[2], n_fast
static attn_shape get_shape(const int * x) {
    return { x[0], x[1], x[2], x[3], x[4], x[5], { x[6], x[7] }, { x[8], x[9] }, { x[10], x[11] }, { x[12], x[13] }, x[14] };
}

// the same with kinds of sides (sides.h), which the payloads' sizes are made for
int plan_decode_sides(const int * shape, const int * kinds, int n_sm, long shared, long * out) {
    attn_shape s = get_shape(shape);
    s.kind[0] = (side_kind) kinds[0];
    s.kind[1] = (side_kind) kinds[1];
    decode_plan p = {};
    const bool ok = make_decode_plan(s, { n_sm, (size_t) shared }, p);
    const long values[] = { p.n_slab, p.slab, p.slabs_per_split, p.n_split, p.n_row_block, p.nq, (long) p.shared,
        p.at_mean, p.at_queries, p.at_freq, p.at_fine, p.at_codes, p.at_table[0], p.at_table[1], p.at_stage, p.at_tile,
        p.stride[0], p.stride[1], p.lanes[0], p.lanes[1], p.n_fine, p.in_shared };
    std::copy(std::begin(values), std::end(values), out);
    return ok;
}

// do kernels of sm_90a serve the shape with these kinds?
int plan_sm90_sides(const int * shape, const int * kinds) {
    attn_shape s = get_shape(shape);
    s.kind[0] = (side_kind) kinds[0];
    s.kind[1] = (side_kind) kinds[1];
    const gpu_shape gpu = { 132, 227 << 10 };
    sm90_plan a = {};
    sm90_d256_plan b = {};
    rebuild_plan c = {};
    return make_sm90_plan(s, gpu, a) || make_sm90_d256_plan(s, gpu, b) || make_rebuild_plan(s, gpu, 256, c);
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
        p.at_freq, p.at_codes, p.at_table[0], p.at_table[1], p.at_queries, p.at_turned, p.at_own, p.at_fine, p.at_cells, p.at_gains, p.at_ranges, p.at_weights, p.at_tops, p.at_wide, p.at_stage[0], p.at_stage[1], p.at_barrier };
    std::copy(std::begin(values), std::end(values), out);
    return ok ? 1 + p.few : 0;
}

// out: blocks of a stream, if heads get unequal numbers of them, else 0; sums of a row; splits; slabs of a split; processors left
void plan_sm90_parts(const int * shape, int n_sm, long shared, int * out) {
    sm90_plan p = {};
    make_sm90_plan(get_shape(shape), { n_sm, (size_t) shared }, p);
    const int values[] = { p.n_block, p.n_sum, p.n_split, p.slabs_per_split, p.n_left };
    std::copy(std::begin(values), std::end(values), out);
}

int get_slab(int n_slab, int n_fine, int i, int n_part) {
    return get_first_slab(n_slab, n_fine, i, n_part);
}

int plan_sm90_d256(const int * shape, int n_sm, long shared, long * out) {
    sm90_d256_plan p = {};
    const bool ok = make_sm90_d256_plan(get_shape(shape), { n_sm, (size_t) shared }, p);
    const long values[] = { p.n_slab, 64, p.slabs_per_split, p.n_split, 1, 1, (long) p.shared,
        p.at_pairs, p.at_queries, p.at_turned, p.at_freq, p.at_fine, p.at_codes, p.at_levels, p.at_wide, p.at_looked_up, p.at_exchange, p.at_stage[0], p.at_stage[1], p.at_own, p.at_parts };
    std::copy(std::begin(values), std::end(values), out);
    return ok;
}

// the same, then the columns of keys that are rebuilt
int plan_sm90_slow(const int * shape, int n_sm, long shared, long * out) {
    sm90_slow_plan p = {};
    const bool ok = make_sm90_slow_plan(get_shape(shape), { n_sm, (size_t) shared }, p);
    const long values[] = { p.n_slab, 64, p.slabs_per_split, p.n_split, 1, 1, (long) p.shared,
        p.at_pairs, p.at_queries, p.at_turned, p.at_freq, p.at_fine, p.at_codes, p.at_levels, p.at_wide, p.at_exchange, p.at_stage[0], p.at_stage[1], p.at_own, p.at_zeros, p.at_cells, p.at_barrier, p.fast, std::max(p.rows.stride[0], p.rows.stride[1]) };
    std::copy(std::begin(values), std::end(values), out);
    return ok;
}

// what a slow rotation pair is interpolated by: positions from an anchor, those of the nodes, and the angle of the fastest such pair
void get_slow_nodes(int * out, double * angle) {
    const int values[] = { SM90_SLOW_REACH, -SM90_SLOW_FAR, -SM90_SLOW_NEAR, SM90_SLOW_NEAR, SM90_SLOW_FAR };
    std::copy(std::begin(values), std::end(values), out);
    *angle = GGML_KVTC_CUDA_SLOW_ANGLE;
}

// out: chunk, n_list, n_split, split, n_merge, n_token_block, n_head_block, n_cols2, n_column, n_chunk, bytes of scratch
void plan_prefill(const int * shape, int n_sm, long scratch, int n_exact, int n_cols, long * out) {
    const attn_shape s = get_shape(shape);
    const prefill_plan p = make_prefill_plan(s, { n_sm, 0, (size_t) scratch }, n_exact, false, n_cols);
    const long values[] = { p.chunk, p.n_list, p.n_split, p.split, p.n_merge, p.n_token_block, p.n_head_block, p.n_cols2, p.n_column, p.n_chunk, (long) get_scratch(s, p).size };
    std::copy(std::begin(values), std::end(values), out);
}

// out: chunk, n_list, n_column, n_chunk, n_merge, n_row_block, n_split, tiles_per_split, keys of a tile, bytes of scratch; true where served
int plan_tiles(const int * shape, int n_sm, long scratch, int n_exact, long * out) {
    const attn_shape s = get_shape(shape);
    tiles_plan p = {};
    const bool ok = make_tiles_plan(s, { n_sm, 0, (size_t) scratch }, n_exact, p);
    const long values[] = { p.chunk, p.n_list, p.n_column, p.n_chunk, p.n_merge, p.n_row_block, p.n_split, p.tiles_per_split, tile_keys(s.d), (long) get_scratch(s, p).size };
    std::copy(std::begin(values), std::end(values), out);
    return ok;
}

// What a prompt asks of the pool, of a cache of n_cells; tiles: by plan_tiles, else plan_prefill of 64 columns
long scratch_size(const int * shape, int n_sm, long scratch, int n_exact, int n_cells, int tiles) {
    const attn_shape s = get_shape(shape);
    const gpu_shape gpu = { n_sm, 0, (size_t) scratch };
    tiles_plan p = {};
    const size_t need = tiles && make_tiles_plan(s, gpu, n_exact, p) ? get_scratch(s, p).size : get_scratch(s, make_prefill_plan(s, gpu, n_exact, false, 64)).size;
    return (long) get_scratch_size(s, gpu, need, n_exact, n_cells);
}

// and a decoded token, of so many bytes of sums
long decode_scratch_size(long scratch, long need) {
    return (long) round_scratch({ 132, 0, (size_t) scratch }, (size_t) need, 0);
}

}
