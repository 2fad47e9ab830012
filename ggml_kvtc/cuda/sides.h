// The shape of an attention, and what a side's rows may be besides kvtc's. No CUDA in here: tests run it anywhere.
#pragma once

#include <cstdint>

namespace kvtc {

// Rows of the first two hold codes; the others' values count as they are, and no exact rows stand in for them.
enum side_kind : int32_t { SIDE_KVTC, SIDE_TURBO, SIDE_F16, SIDE_Q8_0 };

constexpr bool is_coded(side_kind kind) {
    return kind == SIDE_KVTC || kind == SIDE_TURBO;
}

struct attn_shape {
    int d, n_kv, n_tokens, group, n_head_kv, n_stream;
    int row_bytes[2]; // K, V
    int bytes    [2]; // most of a head's payload
    int tables   [2]; // of its tables, in bytes
    int pairs    [2]; // of the tables of pairs made of them
    int n_fast = 0;   // rotation pairs of keys, the first ones, that do not turn slowly (kvtc-pack-cuda.h); 0: not known
    side_kind kind[2] = {};
};

// sides of another kind than kvtc's: kernels for sm_90a serve none
inline bool has_others(const attn_shape & s) {
    return s.kind[0] != SIDE_KVTC || s.kind[1] != SIDE_KVTC;
}

// How the rows of a side of another kind than SIDE_KVTC lie: the heads' n_bytes one after the other, then, of SIDE_TURBO, their gains.
struct side_rows {
    side_kind kind;
    int       n_bytes;
    int       bits;    // of a code, SIDE_TURBO
    int       gains;   // where in a row these begin, f16
};

inline side_rows make_side_rows(const attn_shape & s, int side) {
    return { s.kind[side], s.bytes[side], 8*s.bytes[side]/s.d, s.n_head_kv*s.bytes[side] };
}

// Rows begin at any byte. They are copied in pieces of memory's 16 bytes, the first of which holds a row's first byte.
constexpr int SIDE_PIECE = 16;

constexpr int count_pieces(int n_bytes) {
    return (SIDE_PIECE - 1 + n_bytes + SIDE_PIECE - 1)/SIDE_PIECE;
}

// bytes of a staged row: an odd number of pieces spreads rows over the banks
constexpr int staged_row(int n_bytes) {
    return (count_pieces(n_bytes) | 1)*SIDE_PIECE;
}

// how such rows are copied to shared memory, as plan.h's `staging`
template <typename staging>
staging stage_pieces(const int (&bytes)[2]) {
    staging p;
    p.unit = SIDE_PIECE;
    for (int i = 0; i < 2; ++i) {
        for (p.lanes[i] = 0; p.lanes[i] < 5 && 1 << p.lanes[i] < count_pieces(bytes[i]); ) {
            p.lanes[i]++;
        }
        p.stride[i] = staged_row(bytes[i]);
    }
    return p;
}

} // namespace kvtc
