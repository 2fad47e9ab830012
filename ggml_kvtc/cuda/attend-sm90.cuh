// Attention of many query rows on Hopper: flash attention over expanded columns that lie in the order of wgmma's operands.
#pragma once

#include "combine.cuh"
#include "plan-prefill.h"

namespace kvtc {

enum tile_class : uint8_t { TILE_HIDDEN, TILE_PLAIN, TILE_MASKED }; // for all rows of a block: masked, seen with no addend, neither

// One chunk of columns, as tiles of TILE_KEYS<d> keys.
struct tile_args {
    const half    * k;         // [stream][head][tile][d/8][key][8]
    const half    * v;         // [stream][head][tile][keys/8][d][8]: the eight are keys
    const half    * mask;      // [stream][token][column], of masked tiles
    const uint8_t * classes;   // [stream][row block][tile]
    int             n_tile;
    int             n_row_block;
    int             n_split, tiles_per_split;
    float         * values;    // [row][split][d] sums of weighted coefficients
    float2        * meta;      // [row][split] (largest logit * log2(e), sum of weights)
    bool            whole;     // these are all columns: the result goes to out instead
    output          out;
    exact_rows      exact;     // rows of the batch's tokens that are written too: no block reads what they replace
};

// rows of a kv head follow each other: token after token, heads of the group
void attend_tiles(const attn_args & a, int d, const tile_args & t, cudaStream_t stream);

} // namespace kvtc
