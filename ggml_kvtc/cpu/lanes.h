// Sums over keys for few rows of weights, with W sums a component: components lie along the keys, as lookups leave them, so a
// product and sum wants no transposition, and the W sums are added up once, after all tiles.
#pragma once

#include "simd.h"
#include "tile.h"

#include <cstddef>

namespace kvtc {

template <int R>
inline void sum_lanes_block(int n_component, const float * weights, const float * z, size_t ld, float * lanes) {
    constexpr int N = TILE/W;
    vf w[R][N];
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < N; ++i) {
            w[r][i] = load(weights + (size_t) r*TILE + i*W);
        }
    }
    for (int c = 0; c < n_component; ++c) {
        vf x[R];
        for (int r = 0; r < R; ++r) {
            x[r] = load(lanes + r*ld + c*W);
        }
        for (int i = 0; i < N; ++i) {
            const vf y = load(z + c*TILE + i*W);
            for (int r = 0; r < R; ++r) {
                x[r] = fma(w[r][i], y, x[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            store(lanes + r*ld + c*W, x[r]);
        }
    }
}

// lanes [rows][dp][W] += weights [rows][TILE] x z [n_component][TILE]
inline void sum_lanes(int rows, int n_component, const float * weights, const float * z, int dp, float * lanes) {
    const size_t ld = (size_t) dp*W;
    int r = 0;
    for (; W == 16 && r + 3 <= rows; r += 3) { // as many as registers hold
        sum_lanes_block<3>(n_component, weights + (size_t) r*TILE, z, ld, lanes + r*ld);
    }
    for (; r < rows; ++r) {
        sum_lanes_block<1>(n_component, weights + (size_t) r*TILE, z, ld, lanes + r*ld);
    }
}

// sums [n] += what the lanes [n][W] hold
inline void fold_lanes(int n, const float * lanes, float * sums) {
    for (int i = 0; i < n; ++i) {
        sums[i] += hsum(load(lanes + (size_t) i*W));
    }
}

} // namespace kvtc
