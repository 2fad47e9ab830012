// Layout of a pack for CUDA devices: what the kernels in cuda/ read of one layer, apart from the rows. All offsets are bytes
// from the start of the pack, all arrays are 16-byte aligned.
//
//   +--------+----------+----------+----------+----------+---+-----------+-------+-------+---------------------------------------+------+
//   | header | K head 0 | V head 0 | K head 1 | V head 1 | … | operands  | turns | parts | per head: levels, bounds, matrices, … | freq |
//   +--------+----------+----------+----------+----------+---+-----------+-------+-------+---------------------------------------+------+
//
// Where a head is described follows from its number, and what its writing needs first lies there too: each read that must wait for
// another costs a kernel of few blocks the latency of the device's memory. A side of another type has heads of a matrix of ones alone.
// Tables and matrices are f16, as the calibration file has them. The heads of a turbo side share all but their payloads' places, their
// groups one table; there are neither pairs nor operands nor turns for it.
#pragma once

#include "kvtc-pack.h"

#include <stdint.h>

#define GGML_KVTC_CUDA_TURNS  256
#define GGML_KVTC_CUDA_COLUMN(d) ((d) < 256 ? 4096 : 1024) // bytes from a group's table of pairs to its next one: the largest that has such
#define GGML_KVTC_CUDA_LEVEL  128         // bytes of all banks: what values' tables have of one index
#define GGML_KVTC_CUDA_SINGLE 128         // of a pair code's shift: the group has single levels
#define GGML_KVTC_CUDA_MOST_PAIRS 18432   // bytes of a key's tables of 256 components: of those of 4 bits, 4 KiB each, the first have single levels instead
// Below 256 components keys' groups of 5 bits have pairs, 16 KiB each, as far as a block has room: rows and tables of both sides may take
// MOST_BLOCK bytes
#define GGML_KVTC_CUDA_MOST_BLOCK 155648
#define GGML_KVTC_CUDA_STAGED     192     // rows of a side that a block has in shared memory
// A rotation pair turns slowly if it turns by at most SLOW_ANGLE radians in SLOW_REACH positions. A polynomial of third degree follows it that
// far to both sides to within 5e-4 (Chebyshev's bound, angle^4/4!/8)
#define GGML_KVTC_CUDA_SLOW_REACH 128
#define GGML_KVTC_CUDA_SLOW_ANGLE 0.55

// How to read one group.
struct ggml_kvtc_cuda_code {
    uint16_t byte;       // first byte, counted from the payload's start
    uint8_t  width;
    uint8_t  run;        // groups of this width from here on
    uint32_t table;      // byte offset in the head's tables
};

struct ggml_kvtc_cuda_head {
    uint32_t payload;    // byte offset of the head's gain code in a row, a multiple of 4; turbo: of its codes, any number
    uint32_t n_bytes;    // of the payload: 1 + the sum of the widths; turbo: the codes alone
    uint32_t rank;       // components with at least one bit: the first ones, a multiple of 8
    uint32_t keep_norm;  // gain rule: 0 unbiased, 1 norm keeping
    float    gain_base;
    uint32_t widths;     // u8  [d/8]
    uint32_t levels_at;  // u32 [d/8] first entry of each group in levels
    uint32_t levels;     // f16 per group of width w > 0: [8][2^w]
    uint32_t bounds_at;  // u32 [d/8] first entry of each group in bounds
    uint32_t bounds;     // f32 per group of width w > 0: [2^w - 1][8], midpoints of neighbouring levels
    uint32_t inv_scale;  // f32 [d]
    uint32_t mean;       // f32 [d]
    uint32_t decode;     // f16 K: [d channels][d components];  V: [d components][d channels]
    uint32_t codes;      // ggml_kvtc_cuda_code [d/8]
    uint32_t tables;     // of all groups, one after the other: for widths up to 3, [4][4^w] pairs of two components' f16, the
                         // index being code | next code << w; for wider groups [8][2^w] f16
    uint32_t n_tables;   // bytes of these, a multiple of 16
    uint32_t pair_codes; // ggml_kvtc_cuda_pair_code [d/8]
    uint32_t pairs;      // the same tables with pairs for widths up to 5 (not all of the widest), or values' banks, for kernels that look up
                         // without a branch
    uint32_t n_pairs;    // bytes of these, a multiple of 16
    uint32_t n_wide;     // groups, the first ones, of which one may have single levels there
    // what codes, bounds_at, levels_at and inv_scale point to
    struct ggml_kvtc_cuda_code group_code[GGML_KVTC_MAX_DIM/8];
    uint32_t first_bound  [GGML_KVTC_MAX_DIM/8];
    uint32_t first_level  [GGML_KVTC_MAX_DIM/8];
    float    inverse_scale[GGML_KVTC_MAX_DIM];
};

// The same for lookups in pairs. Four tables for a group, [4^w] pairs each, GGML_KVTC_CUDA_COLUMN bytes apart and aligned to their
// size; for more bits than such a table has room for, and where all groups' would take too much, one of single levels, [8][2^w] f16.
// Groups without bits have a pair of zeros in each place.
//
// Values below 256 components have other tables: of eight groups each has four of shared memory's 32 banks, and the four lanes that decode
// one, of different rows, one each. So no two lanes meet in a bank. The first eight groups have levels, of up to 5 bits; lanes look up one
// by one, all in the same pair of components, whose tables are GGML_KVTC_CUDA_COLUMN bytes apart:
//
//             bank 0 … 3                                        4 … 7       31
//   code 0    | group 0: both levels of the pair, four times | group 1 | … |
//   code 1    | …
//
// The others have pairs, of up to 4 bits (3 where those of both sides would take too much); each lane begins with another one:
//
//             bank 0   1        2        3        4 … 7       31
//   codes 0   | pair 0 | pair 1 | pair 2 | pair 3 | group 9 | … |
//   codes 1   | …
struct ggml_kvtc_cuda_pair_code {
    uint32_t table;      // byte offset of the group's first table in pairs, and what its indices are changed by (exclusive or); banks: of
                         // the first one's code 0
    uint32_t word;       // byte offset of the first code's word in the payload, a multiple of 4
    uint32_t shift;      // bits from there to the first code | GGML_KVTC_CUDA_SINGLE | 2*width << 8 | (pairs below 256 components: to two before the last;
                         // banks: to the fifth code) << 16
    uint32_t mask;       // of a pair's index, times 4; banks: of an index, times GGML_KVTC_CUDA_LEVEL; 0 for single levels
};

struct ggml_kvtc_cuda_side {
    uint32_t bits;       // 0: this side is of another type
    uint32_t n_head;
    uint32_t d;
    uint32_t row_bytes;
};

struct ggml_kvtc_cuda_pack {
    uint32_t magic;
    uint32_t version;
    uint64_t size;
    struct ggml_kvtc_cuda_side side[2];
    uint32_t rope_type;  // enum ggml_kvtc_rope_type
    uint32_t rope_n_rot;
    float    rope_mscale;
    uint32_t operands;   // the pack holds operands and turns
    uint32_t pad[3];
    uint32_t freq;       // u64 [d_k/2] turns per position in units of 2^-64, modulo 1: angle = 2*pi * (position * freq mod 2^64) / 2^64
};

// Where head h of a side is described.
#define GGML_KVTC_CUDA_HEAD_AT(side, h) (sizeof(struct ggml_kvtc_cuda_pack) + (2*(size_t) (h) + (side))*sizeof(struct ggml_kvtc_cuda_head))

// What Hopper's kernels copy to shared memory as it is, for keys of 64, 128 or 256 channels (GGML_KVTC_CUDA_HAS_OPERAND).
//
// Operands: for each head f16 [d/8 + 1][d columns][8], wgmma's operand without swizzle. Columns are eight first channels of rotation
// pairs, then their partners, and so on. Of 32 components, group 4*b + j has 2*j, 2*j + 1 of each eight. Behind them come the mean's
// upper and lower half and zeros.
//
// Turns: u32 [GGML_KVTC_CUDA_TURNS][d/2 + 16], for each position (cos, cos) and (sin, sin) of pairs 16*u + 2*q, + 1, then of + 8, + 9,
// at word 16*u + 4*q; neighbouring positions do not share banks.
//
// Parts: for 256 channels, the operands as mma's, of columns times components: for each head u32 [d/8 + 1][d/32][32 lanes][4]. Of eight
// components and 32 columns, lane 4*r + q has component r in columns 8*j + 2*q, + 1.
#define GGML_KVTC_CUDA_HAS_OPERAND(d)           ((d) == 64 || (d) == 128 || (d) == 256)
#define GGML_KVTC_CUDA_OPERAND_BYTES(d)         (((size_t) (d)/8 + 1)*(d)*16)
#define GGML_KVTC_CUDA_OPERAND_AT(n_head, d, h) (GGML_KVTC_CUDA_HEAD_AT(0, n_head) + (h)*GGML_KVTC_CUDA_OPERAND_BYTES(d))
#define GGML_KVTC_CUDA_TURN_WORDS(d)            ((d)/2 + 16)
#define GGML_KVTC_CUDA_TURNS_AT(n_head, d)      GGML_KVTC_CUDA_OPERAND_AT(n_head, d, n_head)
#define GGML_KVTC_CUDA_TURNS_BYTES(d)           ((size_t) GGML_KVTC_CUDA_TURNS*GGML_KVTC_CUDA_TURN_WORDS(d)*4)
#define GGML_KVTC_CUDA_HAS_PARTS(d)             ((d) == 256)
#define GGML_KVTC_CUDA_PARTS_AT(n_head, d, h)   (GGML_KVTC_CUDA_TURNS_AT(n_head, d) + GGML_KVTC_CUDA_TURNS_BYTES(d) + (h)*GGML_KVTC_CUDA_OPERAND_BYTES(d))

// Sizes that a kernel's launch needs and the host cannot read from a pack on the device: the most of any head.
struct ggml_kvtc_cuda_limits {
    int32_t bytes [2];  // payload (n_bytes), K and V
    int32_t tables[2];  // n_tables
    int32_t pairs [2];  // n_pairs
    int32_t fast;       // rotation pairs of keys, the first ones, that do not turn slowly
};
