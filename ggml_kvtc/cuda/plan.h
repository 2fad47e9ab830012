// How the kernels divide their work, and what they keep in shared memory. It needs no CUDA: tests run it anywhere.
#pragma once

#include "kvtc-pack-cuda.h"
#include "kvtc-pack.h"
#include "sides.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define KVTC_ANYWHERE __host__ __device__
#else
#define KVTC_ANYWHERE
#endif

namespace kvtc {

constexpr size_t PREFILL_SCRATCH = 144*1024*1024; // bytes of keys, values and masks of a chunk

struct gpu_shape {
    int    n_sm;
    size_t shared;                    // bytes a block may use
    size_t scratch = PREFILL_SCRATCH; // of a prompt's chunk; sums that wait to be merged may take 7/18 of that (scratch.h)
};

//
// decode
//

struct decode_plan {
    int nq;                // query rows of a block, by 8
    int n_slab;            // slabs of 16 or 32 cells in all
    int slab;              // cells of one
    int slabs_per_split;
    int n_split;
    int n_row_block;
    int n_warp;
    int unit;              // bytes copied at once: 16, 8, 4 or 1
    int lanes[2];          // log2 of the threads that copy a row together
    int stride[2];         // bytes of a staged row
    int n_stage;
    int n_fine;            // positions in the table of rotations
    int in_shared;         // the decode matrix is in shared memory
    int at_mean, at_queries, at_freq, at_fine, at_codes, at_table[2], at_stage, at_tile;
    size_t shared;
};

inline int ceil_div(int a, int b) {
    return (a + b - 1)/b;
}

// How rows of codes are copied to shared memory.
struct staging {
    int unit;
    int lanes[2];
    int stride[2];
};

inline staging make_staging(const attn_shape & s) {
    staging p;
    // one copy for each thread of a row, so the unit grows with the payload; payloads start at multiples of 4
    if (has_others(s)) {
        return stage_pieces<staging>(s.bytes);
    }
    const auto n_copy = [&s](int i, int unit) { return ceil_div(s.bytes[i] + unit - std::min(4, unit), unit); };
    p.unit = 16;
    for (int i = 0; i < 2; ++i) {
        while (s.row_bytes[i] % p.unit != 0 || (p.unit == 8 && n_copy(i, 8) > 32)) {
            p.unit = p.unit > 4 ? p.unit/2 : 1;
        }
    }
    if (p.unit == 4 && std::max(n_copy(0, 4), n_copy(1, 4)) > 32) {
        p.unit = 1;
    }
    for (int i = 0; i < 2; ++i) {
        for (p.lanes[i] = 0; p.lanes[i] < 5 && 1 << p.lanes[i] < n_copy(i, p.unit); ) {
            p.lanes[i]++;
        }
        // an odd number of units spreads rows over the banks; words may be read past the end of the codes
        const int step = std::max(4, p.unit);
        p.stride[i] = (ceil_div(n_copy(i, p.unit)*p.unit, step) | 1)*step;
    }
    return p;
}

// Does the copy engine bring such rows? Its boxes have up to 256 bytes of a row, multiples of 16
inline bool fit_boxes(const staging & rows) {
    return rows.unit == 16 && std::max(rows.stride[0], rows.stride[1]) <= 256;
}

// Not for values of another kind beside kvtc's keys. Blocks read whole tables and matrices before they start, so a split has enough slabs for each warp to have one.
inline bool make_decode_plan(const attn_shape & s, const gpu_shape & gpu, decode_plan & p) {
    const int n_row = s.n_tokens*s.group;
    p.nq   = n_row > 8 && s.d <= 128 && !has_others(s) ? 2 : 1;
    p.slab = p.nq == 1 && s.d <= 128 ? 32 : 16;
    const staging rows = make_staging(s);
    p.unit = rows.unit;
    for (int i = 0; i < 2; ++i) {
        p.lanes [i] = rows.lanes [i];
        p.stride[i] = rows.stride[i];
    }

    struct option { int n_warp, n_fine, n_stage, in_shared; };
    std::vector<option> options = {
        { 8, 64, 2, 1 }, { 8, 32, 2, 1 }, { 4, 64, 2, 1 }, { 4, 32, 2, 1 }, { 4, 16, 1, 1 }, { 4, 32, 2, 0 }, { 4, 0, 1, 0 }, { 2, 0, 1, 0 }, { 1, 0, 1, 0 },
    };
    if (has_others(s)) { // keys are neither rebuilt nor rotated
        options = { { 8, 0, 2, 0 }, { 4, 0, 2, 0 }, { 4, 0, 1, 0 }, { 2, 0, 1, 0 }, { 1, 0, 1, 0 } };
    }
    for (const option & o : options) {
        int used = 0;
        const auto take = [&used](int n) { const int from = used; used += (n + 15)/16*16; return from; };
        p.n_warp    = o.n_warp;
        p.n_fine    = o.n_fine;
        p.n_stage   = o.n_stage;
        p.in_shared = o.in_shared;
        take(o.in_shared*s.d*(s.d + 8)*2); // the decode matrix
        p.at_mean     = take(s.d*4);
        p.at_queries  = take(8*p.nq*(s.d + 8)*4);
        p.at_freq     = take(s.d/2*8);
        p.at_fine     = take(p.n_fine*(s.d/2 + 4)*8);
        p.at_codes    = take(2*(s.d/8)*8);
        p.at_table[0] = take(s.tables[0]);
        p.at_table[1] = take(s.tables[1]);
        p.at_stage    = take(p.n_warp*p.n_stage*p.slab*(p.stride[0] + p.stride[1]) + 16); // read past the end, see tables.cuh
        p.at_tile     = take(p.n_warp*p.slab*(s.d + 8)*2);
        const int merge = p.n_warp*8*p.nq*(s.d + 8 + 2)*4;
        p.shared = std::max(used, merge);
        if ((size_t) p.shared <= gpu.shared) {
            const int blocks = s.n_head_kv*ceil_div(n_row, 8*p.nq)*s.n_stream;
            const int fit    = std::max<int>(1, (int) (gpu.shared/p.shared));
            p.n_row_block     = ceil_div(n_row, 8*p.nq);
            p.n_slab          = ceil_div(s.n_kv, p.slab);
            const int most    = ceil_div(p.n_slab, p.n_warp);
            const int wanted  = std::max(1, gpu.n_sm*fit/blocks);
            p.slabs_per_split = ceil_div(p.n_slab, std::min(most, wanted));
            p.n_split         = ceil_div(p.n_slab, p.slabs_per_split);
            return true;
        }
    }
    return false;
}

//
// decode on sm_90a: groups of four warps share slabs of 64 cells
//

constexpr int SM90_GROUPS    = 3;
constexpr int SM90_FEW_ROWS  = 4;      // query rows of one token that decode-sm90-few.cu serves, and twice as many
constexpr int SM90_FEW_GAINS = 256*12; // bytes of what it makes of gains' codes
constexpr int SM90_FEW_CELL  = 10;     // and of (position, slot) and mask of each of a stretch's cells
constexpr int SM90_FEW_SLABS = 2*SM90_GROUPS; // of a split, up to which it has short code for at most SM90_FEW_ROWS
constexpr int SM90_START     = 1024;   // of shared memory, the first KiB is the system's: a block's offsets count from there
constexpr int SM90_TABLE     = GGML_KVTC_CUDA_COLUMN(128); // to which tables of pairs are aligned, by their addresses: the largest one's size
constexpr int SM90_BARRIERS  = 16;     // bytes of those of all of a block
constexpr int SM90_UNEVEN    = 16;     // slabs of a split from which on its heads get unequal numbers of blocks
constexpr int SM90_WRITE     = 18;     // slabs of a split, for each head, that take as long as one processor needs for a token's codes
constexpr int SM90_WRITE_8   = 15;     // of more than SM90_FEW_ROWS query rows, which take longer

struct sm90_plan {
    int n_slab;
    int slabs_per_split;
    int n_split;
    bool few;              // decode-sm90-few.cu
    int few_rows;          // few: for at most 4 query rows, or 8
    bool few_slabs;        // few: so few for each block that short code is faster than that for many
    int n_left;            // processors that are left to the write of the token's codes, which runs beside (beside.cu)
    int n_block;           // few, so many slabs that heads get blocks by what they cost: of a stream; else 0, and each head has n_split
    int n_sum;             // sums of a row, for combine
    int unit;              // as in decode_plan
    int lanes[2];
    int stride[2];
    int n_fine;            // positions from an anchor on that slabs share; few: the table of rotations has the first eight of each 16
    int n_turned;          // few: 2 where there is room for the next stretch's queries beside this one's
    int at_own, at_barrier, at_queries, at_turned, at_freq, at_fine, at_codes, at_ranges, at_weights, at_tops, at_wide, at_table[2], at_stage[2]; // the decode matrix is at 0
    int at_cells, at_gains; // few
    int at_merge;          // of the warps' sums: a place of its own where there is room
    size_t shared;
};

// Where heads get unequal numbers of blocks: the first slab of the i-th of a head's n_part groups of warps. A head's first slab and its last
// ones mostly hold exact rows. With them their whole stretches of n_fine cells take longer, as if there were that many more slabs, as measured
KVTC_ANYWHERE inline int get_first_slab(int n_slab, int n_fine, int i, int n_part) {
    const int before = n_fine/64;
    const int behind = n_fine/128 + 3;
    const int slab   = (n_slab + before + behind)*i/n_part - before;
    const int begun  = slab > 0 ? slab : 0;
    return begun < n_slab ? begun : n_slab;
}

// the first offset from `used` on whose address is a multiple of `align`
inline int align_shared(int used, int align) {
    return ceil_div(used + SM90_START, align)*align - SM90_START;
}

// False where these kernels do not serve the shape, and decode_plan's does.
inline bool make_sm90_plan(const attn_shape & s, const gpu_shape & gpu, sm90_plan & p) {
    if (s.n_tokens*s.group > 8 || (s.d != 64 && s.d != 128) || has_others(s)) {
        return false;
    }
    const staging rows = make_staging(s);
    if (rows.unit == 1) {
        return false;
    }
    p.unit = rows.unit;
    for (int i = 0; i < 2; ++i) {
        p.lanes [i] = rows.lanes [i];
        p.stride[i] = rows.stride[i];
    }
    constexpr int SLAB   = 64;
    constexpr int n_warp = 4*SM90_GROUPS;
    const int blocks  = s.n_head_kv*s.n_stream;
    p.n_slab          = ceil_div(s.n_kv, SLAB);
    const int most    = ceil_div(p.n_slab, SM90_GROUPS);
    p.slabs_per_split = ceil_div(p.n_slab, std::min(most, std::max(1, gpu.n_sm/blocks)));
    p.n_split         = ceil_div(p.n_slab, p.slabs_per_split);
    for (const bool few : { true, false }) {
        if (few && (s.n_tokens > 1 || !fit_boxes(rows))) {
            continue;
        }
        p.few       = few;
        p.few_rows  = s.group <= SM90_FEW_ROWS ? SM90_FEW_ROWS : 2*SM90_FEW_ROWS;
        p.few_slabs = p.few_rows <= SM90_FEW_ROWS && p.slabs_per_split <= SM90_FEW_SLABS;
        // where it pays that no processor is left without a block, or but one, and that each block finds its part
        const int  write   = (p.few_rows > SM90_FEW_ROWS ? SM90_WRITE_8 : SM90_WRITE)*s.n_head_kv;
        const int  n_left  = s.n_stream == 1 && p.slabs_per_split >= write;
        const int  n_block = (gpu.n_sm - n_left)/s.n_stream;
        const bool uneven  = few && p.slabs_per_split >= SM90_UNEVEN && s.n_head_kv <= 32 && n_block >= 4*s.n_head_kv;
        p.n_left  = uneven ? n_left : 0;
        p.n_block = uneven ? n_block : 0;
        p.n_sum   = uneven ? n_block/s.n_head_kv + 3 : p.n_split;
        const struct { int n_fine, n_turned; } options[] = { { 256, 2 }, { 256, 1 }, { 128, 2 }, { 128, 1 }, { 64, 2 }, { 64, 1 } };
        for (const auto & o : options) {
            if (o.n_fine > 64 && (p.slabs_per_split < o.n_fine/32*SM90_GROUPS || (o.n_fine > 128 && !few))) {
                continue; // a block that short would not use them
            }
            p.n_fine   = o.n_fine;
            p.n_turned = few ? o.n_turned : 1;
            int used = 0;
            const auto take = [&used](int n, int align = 128) { const int from = align_shared(used, align); used = from + n; return from; };
            take((s.d/8 + 1)*s.d*16);
            p.at_freq     = take(s.d/2*8);
            p.at_codes    = take(2*(s.d/8)*16);
            p.at_table[0] = take(s.pairs[0], SM90_TABLE);
            p.at_table[1] = take(s.pairs[1], SM90_TABLE);
            p.at_queries  = take((few ? p.few_rows : 8)*(s.d + 8)*4);
            p.at_turned   = take(p.n_turned*SM90_GROUPS*(few ? 2*p.few_rows : 8)*(s.d + 8)*2);
            p.at_own      = take(s.n_tokens == 1 ? 2*s.d*2 : 0);
            p.at_fine     = take(p.n_fine/(few ? 2 : 1)*(s.d/2 + 16)*4);
            p.at_cells    = take(few ? SM90_GROUPS*p.n_fine*SM90_FEW_CELL : 0);
            p.at_gains    = take(few ? SM90_FEW_GAINS : 0);
            p.at_ranges   = take(few ? 0 : 2*n_warp*8);
            p.at_weights  = take(few ? 0 : n_warp*32*8);
            p.at_tops     = take(few ? 0 : n_warp*4*8);
            p.at_wide     = take(n_warp*16*16);
            p.at_stage[0] = take(n_warp*16*p.stride[0] + 16); // read past the end
            p.at_stage[1] = take(n_warp*16*p.stride[1] + 16);
            p.at_barrier  = take(SM90_BARRIERS + (few ? 2*8*n_warp : 0));
            const int merge = few ? n_warp*p.few_rows*(s.d + 8 + 2)*4 : n_warp*64/s.d*8*(s.d + 8 + 1 + s.d/64)*4;
            p.at_merge    = (size_t) used + 127 + merge <= gpu.shared ? take(merge) : 0;
            p.shared      = std::max(used, merge);
            if ((size_t) p.shared <= gpu.shared) {
                return true;
            }
        }
    }
    return false;
}

//
// decode on sm_90a, head_dim 256: the same slabs. The decode matrix takes 132 KiB, so there are fewer groups, no tables of pairs for
// values and for wide keys (nibbles.cuh), and the table of rotations is read in both directions from an anchor
//

constexpr int SM90_D256_GROUPS = 2;

struct sm90_d256_plan {
    int n_slab;
    int slabs_per_split;
    int n_split;
    int pairs;             // there is room for the keys' tables of pairs
    int split;             // both groups of a block have the same slab, one for each block
    int look_up;           // there is room for what a warp looks up of wide groups of values together
    staging rows;
    int n_fine;            // positions in the table of rotations: slabs less than that far from an anchor share it
    int at_own, at_parts, at_barrier, at_pairs, at_queries, at_turned, at_freq, at_fine, at_codes, at_levels, at_wide, at_looked_up, at_exchange, at_stage[2]; // the decode matrix is at 0
    size_t shared;
};

constexpr int SM90_EXCHANGE = 4*(32*8 + 8*4 + 2*16*4 + 2*8 + 2*4); // bytes that a group's warps exchange: weights, largest logits, slots, ranges, slabs
constexpr int SM90_LOOKED_UP = 256; // bytes of one of these groups of 16 cells, for each warp
constexpr int SM90_WIDE     = 4096; // bytes for the levels of a side's groups of more than 4 bits; what has no room is read from the pack

inline bool make_sm90_d256_plan(const attn_shape & s, const gpu_shape & gpu, sm90_d256_plan & p) {
    const int n_row = s.n_tokens*s.group;
    p.rows = make_staging(s);
    if (n_row > 8 || s.d != 256 || p.rows.unit == 1 || has_others(s)) {
        return false;
    }
    constexpr int SLAB   = 64;
    constexpr int GROUPS = SM90_D256_GROUPS;
    const int blocks  = s.n_head_kv*s.n_stream;
    p.n_slab          = ceil_div(s.n_kv, SLAB);
    const int most = std::max(1, gpu.n_sm/blocks); // splits that have a processor each
    const struct { int pairs, split; } options[] = { { 1, 1 }, { 0, 1 }, { 1, 0 }, { 0, 0 } }; // what is best comes first
    for (const auto & option : options) {
        p.pairs = option.pairs;
        p.split = option.split;
        if (p.split && (s.n_tokens > 1 || p.n_slab > most)) {
            continue;
        }
        p.slabs_per_split = ceil_div(p.n_slab, std::min(ceil_div(p.n_slab, p.split ? 1 : GROUPS), most));
        p.n_split         = ceil_div(p.n_slab, p.slabs_per_split);
        const struct { int n_fine; bool look_up; } rooms[] = { { 128, true }, { 65, true }, { 33, true }, { 33, false } };
        for (const auto & room : rooms) {
            if (room.n_fine > 33 && p.slabs_per_split < 4*GROUPS) {
                continue; // a block that short would not use them
            }
            int used = 0;
            const auto take = [&used](int n, int align = 128) { const int from = align_shared(used, align); used = from + n; return from; };
            p.n_fine  = room.n_fine;
            p.look_up = room.look_up;
            take((s.d/8 + 1)*s.d*16);
            p.at_pairs    = take(p.pairs ? s.pairs[0] : s.d/8*256 + SM90_WIDE, 1024); // tables are aligned to their size; or levels
            p.at_queries  = take(n_row*(s.d + 8)*4);
            p.at_turned   = take((GROUPS*n_row + 1)*(s.d + 8)*2); // and a row of zeros
            p.at_freq     = take(s.d/2*8);
            p.at_fine     = take(p.n_fine*(s.d/2 + 16)*4);
            p.at_codes    = take(s.d/8*16);
            p.at_levels   = take(s.d/8*256, 256); // as nibbles.cuh has them
            p.at_wide     = take(SM90_WIDE);
            p.at_looked_up = take(p.look_up && !p.split ? 4*GROUPS*SM90_LOOKED_UP : 0); // split: in at_parts
            p.at_exchange = take(GROUPS*SM90_EXCHANGE);
            p.at_stage[0] = take(GROUPS*SLAB*p.rows.stride[0] + 16); // read past the end
            p.at_stage[1] = take(GROUPS*SLAB*p.rows.stride[1] + 16);
            p.at_own      = take(s.n_tokens == 1 ? 2*s.d*2 : 0);
            p.at_parts    = take(p.split ? 4*32*GROUPS*16 : 0);
            p.at_barrier  = take(SM90_BARRIERS);
            p.shared      = std::max(used, GROUPS*8*(s.d + 8 + 1 + 8)*4);
            if ((size_t) p.shared <= gpu.shared) {
                return true;
            }
        }
    }
    return false;
}

//
// the same for one token of few query heads, where most pairs of channels turn slowly (slow-sm90.cuh): of the decode matrix `fast` columns
//

constexpr int SM90_SLOW_GROUPS  = 2;
constexpr int SM90_SLOW_REACH   = GGML_KVTC_CUDA_SLOW_REACH; // positions from an anchor that share it
constexpr int SM90_SLOW_NODES   = 4;
constexpr int SM90_SLOW_FAR     = 118; // and positions from it to these: REACH times the cosines of pi/8 and 3*pi/8, to both sides
constexpr int SM90_SLOW_NEAR    = 49;
constexpr int SM90_SLOW_QUERIES = 2;
constexpr int SM90_SLOW_BARRIERS = 8*5*SM90_SLOW_GROUPS; // bytes, of rows
constexpr int SM90_SLOW_LEAST   = 2*SM90_SLOW_GROUPS; // slabs of a split from which on it pays
constexpr int SM90_BANK_COLUMN  = (32 + 3*16)*GGML_KVTC_CUDA_LEVEL; // bytes of values' tables of one pair of components (banks-sm90.cuh)

// of a group's turned queries, around two anchors
constexpr int get_slow_bytes(int fast) {
    constexpr int ROWS = SM90_SLOW_NODES*SM90_SLOW_QUERIES;
    return 2*(2*(ROWS*(256 + 8) + SM90_SLOW_QUERIES*(fast + 8)) + 4*ROWS);
}

struct sm90_slow_plan {
    int n_slab;
    int slabs_per_split;
    int n_split;
    int pairs;             // as in sm90_d256_plan
    int fast;              // columns: 64 or 128
    staging rows;
    int at_pairs, at_queries, at_turned, at_freq, at_fine, at_codes, at_levels, at_wide, at_exchange, at_stage[2], at_own, at_zeros, at_cells, at_barrier; // the decode matrix is at 0
    size_t shared;
};

inline bool make_sm90_slow_plan(const attn_shape & s, const gpu_shape & gpu, sm90_slow_plan & p) {
    constexpr int SLAB   = 64;
    constexpr int GROUPS = SM90_SLOW_GROUPS;
    p.rows = make_staging(s);
    if (s.n_tokens > 1 || s.group > SM90_SLOW_QUERIES || s.d != 256 || !fit_boxes(p.rows) || has_others(s) || s.n_fast == 0 || s.n_fast > s.d/4) {
        return false;
    }
    p.fast   = s.n_fast > s.d/8 ? s.d/2 : s.d/4;
    p.n_slab = ceil_div(s.n_kv, SLAB);
    p.slabs_per_split = ceil_div(p.n_slab, std::max(1, gpu.n_sm/(s.n_head_kv*s.n_stream)));
    p.n_split         = ceil_div(p.n_slab, p.slabs_per_split);
    if (p.slabs_per_split < SM90_SLOW_LEAST) {
        return false;
    }
    for (const int pairs : { 1, 0 }) {
        int used = 0;
        const auto take = [&used](int n, int align = 128) { const int from = align_shared(used, align); used = from + n; return from; };
        p.pairs = pairs;
        take((s.d/8 + 1)*p.fast*16);
        p.at_pairs    = take(p.pairs ? s.pairs[0] : s.d/8*256 + SM90_WIDE, 1024);
        p.at_queries  = take(SM90_SLOW_QUERIES*(s.d + 8)*4);
        p.at_turned   = take(GROUPS*get_slow_bytes(p.fast));
        p.at_freq     = take(s.d/2*8);
        p.at_fine     = take((SM90_SLOW_REACH + 1)*(p.fast/2 + 16)*4);
        p.at_codes    = take(s.d/8*16);
        p.at_levels   = take(4*SM90_BANK_COLUMN, 4096); // aligned to a table's size
        p.at_wide     = take(SM90_WIDE);
        p.at_exchange = take(GROUPS*SM90_EXCHANGE);
        p.at_stage[0] = take(GROUPS*SLAB*p.rows.stride[0] + 16); // read past the end
        p.at_stage[1] = take(GROUPS*SLAB*p.rows.stride[1] + 16);
        p.at_own      = take(2*s.d*2);
        p.at_zeros    = take((p.fast + 8)*2);
        p.at_cells    = take(p.fast == s.d/4 ? GROUPS*2*SM90_SLOW_REACH*8 : 0); // with more columns there is no room
        p.at_barrier  = take(SM90_BARRIERS + SM90_SLOW_BARRIERS);
        p.shared      = std::max(used, GROUPS*8*(s.d + 8 + 1 + 4)*4);
        if ((size_t) p.shared <= gpu.shared) {
            return true;
        }
    }
    return false;
}

} // namespace kvtc
