// Layout of a pack: everything the CPU kernels read of one layer. All offsets are bytes from the start of the pack,
// all arrays are 64-byte aligned.
//
//   +----------------+----------------+----------------+-------------+--------------------------------------+
//   | header         | K head 0 … H-1 | V head 0 … H-1 | rope tables | per head: widths, tables, matrices … |
//   +----------------+----------------+----------------+-------------+--------------------------------------+
#pragma once

#include "kvtc.h"

#include <stdint.h>

#define GGML_KVTC_PACK_MAGIC  0x4356544bu // "KTVC"
#define GGML_KVTC_CUDA_PACK_MAGIC 0x4356544cu // "LTVC", see kvtc-pack-cuda.h
#define GGML_KVTC_GROUP       8           // components that share one width
#define GGML_KVTC_GAIN_STEPS  32          // gain codes per octave
#define GGML_KVTC_PAD         16          // leading dimensions are multiples of the widest vector
#define GGML_KVTC_ROPE_STEP   64          // positions are split in digits of base 64
#define GGML_KVTC_ROPE_LEVELS 4           // digits: positions up to 64^4 = 16M

#define GGML_KVTC_PADDED(n) (((n) + GGML_KVTC_PAD - 1) / GGML_KVTC_PAD * GGML_KVTC_PAD)

struct ggml_kvtc_pack_head {
    uint32_t payload;    // byte offset of the head's gain code in a row, or of its f16 gain
    uint32_t rank;       // components with at least one bit: the first ones
    uint32_t keep_norm;  // gain rule: 0 unbiased, 1 norm keeping
    uint32_t f16_gain;   // turbo types: the row holds the gain itself
    float    gain_base;
    uint32_t widths;     // u8  [d/8]
    uint32_t bytes;      // u32 [d/8] byte offset of each group in a row
    uint32_t table;      // u32 [d/8] offset of the group's decode tables: f32 [8][max(16, 2^w)], short ones repeated
    uint32_t bounds;     // u32 [d/8] offset of the group's boundaries:    f32 [2^w - 1][8]
    uint32_t inv_scale;  // f32 [d]
    uint32_t gains;      // f32 [256]
    uint32_t mean;       // f32 [padded d]
    uint32_t decode;     // f32 K: [d][padded d] row i gives channel i;  V: [d][padded d] row c gives what component c adds
};

struct ggml_kvtc_pack_side {
    uint32_t bits;       // 0: this side is of another type
    uint32_t n_head;
    uint32_t d;
    uint32_t row_bytes;
    uint32_t heads;      // ggml_kvtc_pack_head [n_head]
};

struct ggml_kvtc_pack_header {
    uint32_t magic;
    uint32_t version;
    uint64_t size;
    struct ggml_kvtc_pack_side side[2];
    uint32_t rope_type;
    uint32_t rope_n_rot;
    float    rope_mscale;
    // f32, P = n_rot/2 pairs: level l of the digits base 64 holds the rotation by digit * 64^l
    uint32_t rope_fine[2];                             // cos, sin [P][64]: level 0, with mscale, keys along the row
    uint32_t rope_base[GGML_KVTC_ROPE_LEVELS][2];      // cos, sin [64][P]: pairs along the row, without mscale
};

static inline const void * ggml_kvtc_pack_at(const void * pack, uint32_t offset) {
    return (const char *) pack + offset;
}

// The f16 gain of a turbo row; what a damaged state may hold, infinity or NaN, is taken for 0: cells that nobody sees must not hurt.
static inline ggml_fp16_t ggml_kvtc_gain_bits(uint32_t bits) {
    return (ggml_fp16_t) ((bits & 0x7c00) == 0x7c00 ? 0 : bits & 0xffff);
}

// A pack for the CPU; behind one for a CUDA device, whose header begins alike, where a tensor holds both: tests have one graph on
// two backends. Devices find theirs without a look, as every read that others wait for costs them time.
static inline const void * ggml_kvtc_pack_find(const void * pack) {
    const struct ggml_kvtc_pack_header * header = (const struct ggml_kvtc_pack_header *) pack;
    return header->magic == GGML_KVTC_CUDA_PACK_MAGIC ? (const char *) pack + header->size : pack;
}

static inline const struct ggml_kvtc_pack_head * ggml_kvtc_pack_get_head(const void * pack, enum ggml_kvtc_side side, int h) {
    const struct ggml_kvtc_pack_header * header = (const struct ggml_kvtc_pack_header *) pack;
    return (const struct ggml_kvtc_pack_head *) ggml_kvtc_pack_at(pack, header->side[side].heads) + h;
}
