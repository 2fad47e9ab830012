// How the attention operation is cut into units of work, and the memory that takes.
#pragma once

#include "kvtc-pack.h"
#include "simd.h"
#include "tile.h"

#include "ggml.h"

#include <algorithm>
#include <cstdint>

namespace kvtc {

constexpr int MAX_ROWS    = 256; // query rows (tokens x heads of the group) that share a rebuilt tile
constexpr int SPLIT_ROWS  = 64;  // with at most this many rows in all, cells are split over threads
constexpr int FEW_ROWS    = 8;   // so few rows have their queries rotated, not the keys, and sum values along the keys

struct shape {
    int64_t dk, dv, n_kv, n_head_kv, n_head, n_tokens, n_stream, group;
    int     dkp, dvp;        // padded
    int     block;           // tokens of a query block
    int     n_block;
    int     n_split;         // ranges of cells
    int     rows;            // rows of a full block

    size_t scratch_floats() const { // of one thread
        const int dmax = std::max(dkp, dvp);
        return ((size_t) rows*(dmax + TILE + dvp + 2) + (size_t) TILE*(2*dmax + dkp + dvp) + (size_t) std::min(rows, FEW_ROWS)*dvp*W + 15)/16*16;
    }
    size_t partial_floats() const { // of one unit
        return (size_t) rows*(dvp + 2);
    }
    int64_t n_unit() const { return n_stream*n_head_kv*n_block*n_split; }
};

inline shape get_shape(const ggml_tensor * dst, int n_threads) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    shape s;
    s.dk        = k->ne[0];
    s.dv        = dst->src[2]->ne[0];
    s.n_kv      = k->ne[1];
    s.n_head_kv = k->ne[2];
    s.n_head    = q->ne[2];
    s.n_tokens  = q->ne[1];
    s.n_stream  = q->ne[3];
    s.group     = s.n_head/s.n_head_kv;
    s.dkp       = GGML_KVTC_PADDED((int) s.dk);
    s.dvp       = GGML_KVTC_PADDED((int) s.dv);
    s.block     = (int) std::max<int64_t>(1, std::min(s.n_tokens, MAX_ROWS/s.group));
    s.n_block   = (int) ((s.n_tokens + s.block - 1)/s.block);
    s.rows      = (int) (s.block*s.group);
    s.n_split   = 1;
    if (s.n_tokens*s.group <= SPLIT_ROWS && n_threads > 1) {
        const int64_t units = s.n_stream*s.n_head_kv*s.n_block;
        const int64_t most  = std::max<int64_t>(1, s.n_kv/TILE);
        s.n_split = (int) std::min<int64_t>(most, (16*n_threads + units - 1)/units);
    }
    return s;
}

} // namespace kvtc
