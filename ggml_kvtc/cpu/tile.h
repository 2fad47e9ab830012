// A tile: 64 cells of one kv head, decoded. Keys lie along the rows (component-major), so that one table lookup, one
// rotation or one product handles W keys at once.
#pragma once

#include "kvtc-pack.h"

#include <cstddef>
#include <cstdint>

namespace kvtc {

constexpr int TILE = 64;

// where the transformed vector of a key comes from when its codes are not used
struct exact_source {
    const ggml_fp16_t * store;   // [d] rows of the exact store for one head, or nullptr
    size_t              stride;  // elements between slots
    const char        * batch;   // F32 z of this batch for one head, or nullptr
    size_t              batch_nb; // bytes between tokens
};

// the cells of a tile
struct tile_cells {
    int     n;           // keys in the tile, <= TILE
    int32_t cell[TILE];  // cell index in the stream
    int32_t pos [TILE];
    int32_t slot[TILE];  // as in the info tensor; -1: use the codes
    bool    coded;       // some key uses its codes; then cell[] is contiguous
    bool    exact;       // some key does not
};

// z of the tile, component-major [d][TILE]. rows: first row of the stream. Returns how many components may be non-zero.
int load_components(const void * pack, ggml_kvtc_side side, int head, const tile_cells & cells,
                    const uint8_t * rows, size_t row_stride, const exact_source & exact, float * z);

// rotate keys [d][TILE] to the positions of their cells
void rotate_keys(const void * pack, const tile_cells & cells, float * keys);

// scores [rows][TILE] of queries [rows][ld] and keys that are not rotated yet: the queries are, to the first key's position,
// and each key by what lies between. False, and nothing done, unless the positions rise by one from key to key
bool score_keys(const void * pack, const tile_cells & cells, const float * keys, const float * queries, int rows, int ld, float * scores);

// [rows][TILE] -> [TILE][ld]
void transpose_tile(const float * src, int rows, float * dst, int ld);

} // namespace kvtc
