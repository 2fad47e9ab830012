// Parts of decode-sm90-few.cu: what a stretch of cells and gains are made into, queries turned to two anchors, what cells that are not
// plain need, and the warps' sums to one.
#pragma once

#include "block-sm90.cuh"
#include "hopper.cuh"
#include "nibbles.cuh"
#include "plan.h"
#include "share-sm90.cuh"
#include "tables.cuh"
#include "turn-sm90.cuh"

namespace kvtc {

// of gains, by their codes
struct few_gains {
    uint2 key[256];   // what the mean's components are, f16 twice; f32, what the logit is multiplied by; so that their product is 1
    float value[256];
};

static_assert(sizeof(int2) + sizeof(half) == SM90_FEW_CELL && sizeof(few_gains) == SM90_FEW_GAINS, "the plan has another size");

constexpr float MOST_OVER = 8.0f; // keys with a smaller gain than 1/8 are multiplied by it before the product: the mean over it may be large

constexpr float MOST_SLACK = 4.0f; // log2 of how far weights may exceed 1 before their scale changes, if their f16 products with gains allow it

__device__ __forceinline__ void make_gains(few_gains & gains, const ggml_kvtc_cuda_head & kh, const ggml_kvtc_cuda_head & vh, int n_threads) {
    for (int i = threadIdx.x; i < 256; i += n_threads) {
        const float gain = get_gain(kh.gain_base, (uint8_t) i);
        const bool  over = gain >= 1.0f/MOST_OVER;
        const half  h    = __float2half_rn(over ? 1.0f/gain : 1.0f);
        const half2 both = __half2half2(h);
        gains.key[i]   = make_uint2(*(const uint32_t *) &both, __float_as_uint(over ? 1.0f/__half2float(h) : -gain)); // < 0 or -0: not applied yet
        gains.value[i] = get_gain(vh.gain_base, (uint8_t) i);
    }
}

// The cells of a stretch, up to 256, of which a group's thread has one or two. They are on their way while the stretch before is
// processed, without registers: the compiler would wait for them to put them aside
struct stretch_cells {
    int first_pos = 0; // of the next one

    // in shared memory, of this one
    int2 * cell;   // (position, slot)
    half * mask;   // as positions leave it

    // first: cell; mine: the thread's, from it on, and 32*GROUP_WARPS more
    __device__ __forceinline__ void look(const attn_args & a, uint8_t * to, int most, int stream, int first, int mine) {
        const int2 * info = a.info + (int64_t) stream*a.n_kv;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int i = mine + 32*GROUP_WARPS*j;
            if (i < most) {
                copy_async<8>((int2 *) to + i, info + min(first + i, a.n_kv - 1));
            }
        }
        copy_commit();
        first_pos = info[first].x;
    }

    // n of at most `most` cells; true where the thread's come in the order of their positions, all seen, with codes only
    __device__ __forceinline__ bool start(const attn_args & a, uint8_t * to, int most, int stream, int first, int n, int mine, int query_pos) {
        const half * of_mask = a.mask ? a.mask + stream%a.n_mask*a.ne_m3 : nullptr;
        cell = (int2 *) to;
        mask = (half *) (cell + most);
        bool plain = true;
        copy_wait<0>();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int i = mine + 32*GROUP_WARPS*j;
            if (i < n) {
                int2 x = cell[i];
                const half seen = hide_cell(a, read_mask(a, of_mask, 0, first + i), query_pos, x);
                cell[i] = x;
                mask[i] = seen;
                plain = plain && is_plain(a, x, seen, first_pos + i, query_pos);
            }
        }
        return plain;
    }
};

// Steps of 32 components that keys have codes of, at least LEAST_STEPS: in most heads at two bits the last components have none
constexpr int LEAST_STEPS = 2;

__device__ __forceinline__ int get_steps(const ggml_kvtc_cuda_head & kh) {
    return max(LEAST_STEPS, ((int) kh.rank + 31)/32);
}

// What a head's cells take, roughly: groups of single levels, of which n_wide tells, have paths of their own, those of keys four together
template <int D, int ROWS>
__device__ __forceinline__ float get_cost(const char * pack, int head) {
    constexpr float OF_STEP = ROWS > SM90_FEW_ROWS ? 9.5f : 10.5f;
    const ggml_kvtc_cuda_head & kh = get_head(pack, GGML_KVTC_K, head);
    const ggml_kvtc_cuda_head & vh = get_head(pack, GGML_KVTC_V, head);
    return 100.0f - OF_STEP*(D/32 - get_steps(kh)) + 18.0f*((kh.n_wide + 3)/4) + 5.0f*vh.n_wide;
}

// the slabs of a group of the block's warps: from x on, before y
template <bool UNEVEN>
__device__ __forceinline__ int2 get_slabs(const sm90_plan & p, const block_share & share, int group) {
    if constexpr (UNEVEN) {
        return find_slabs(p.n_slab, p.n_fine, share, group);
    } else {
        const int end       = min(p.n_slab, (share.split + 1)*p.slabs_per_split);
        const int per_group = (p.slabs_per_split + SM90_GROUPS - 1)/SM90_GROUPS;
        const int first     = share.split*p.slabs_per_split + group*per_group;
        return make_int2(first, min(end, first + per_group));
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What a warp has of its cells. ROWS: queries, 4 or 8: of those that are two columns of a product one is for even components, of eight
// each has two products. A thread has logits of KEYS keys and queries 2*(lane%4%(ROWS/2)), + 1
template <int D, int ROWS>
struct few_sums {
    static constexpr int KEYS = ROWS/4;
    float    o[D/64][2][KEYS][4]; // values: [64 components][part of them][product][row lane/4, + 8][query]
    float    top[2];              // logits that weights are relative to
    float    sum[2];              // the thread's part of weights
    uint32_t pick[KEYS][2];       // permutations that leave a key's weight for the column's parity

    __device__ __forceinline__ void init() {
#pragma unroll
        for (int i = 0; i < KEYS; ++i) {
            pick_parity(pick[i], KEYS > 1 ? i == 0 : threadIdx.x%32/4 < 4);
        }
        top[0] = top[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int h = 0; h < D/64; ++h) {
#pragma unroll
            for (int t = 0; t < 2*KEYS; ++t) {
                float (&x)[4] = o[h][t/KEYS][t%KEYS];
                x[0] = x[1] = x[2] = x[3] = 0.0f;
            }
        }
    }

    // the largest of these logits to `top`, with all sums
    __device__ __forceinline__ void raise(const float (&logit)[KEYS][2]) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            float most = fmaxf(top[x], fmaxf(logit[0][x], logit[KEYS - 1][x]));
#pragma unroll
            for (int i = ROWS/2; i < 32; i *= 2) {
                most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, i));
            }
            const float fade = top[x] == -INFINITY ? 0.0f : exp2f(top[x] - most);
            top[x]  = most;
            sum[x] *= fade;
#pragma unroll
            for (int h = 0; h < D/64; ++h) {
#pragma unroll
                for (int t = 0; t < 2*KEYS; ++t) {
                    o[h][t/KEYS][t%KEYS][x]     *= fade;
                    o[h][t/KEYS][t%KEYS][x + 2] *= fade;
                }
            }
        }
    }

    // weights: of query lane/4%ROWS
    __device__ __forceinline__ void add(int h, const uint4 (&z)[4], const uint32_t (&weights)[2]) {
        add_pairs(o[h], z, weights, pick);
    }
};

// Warps' sums, largest logits and sums of weights to one of each for the block, and out; all threads have met at the barrier once
template <int D, int ROWS, int N_WARP>
__device__ __forceinline__ void merge_few(const attn_args & a, uint8_t * to, uint64_t & barrier, const few_sums<D, ROWS> & sums, const block_share & share, int stream, int n_sum, float * values, float2 * meta) {
    constexpr int LD   = D + 8;
    constexpr int KEYS = ROWS/4;
    const int warp = threadIdx.x / 32;
    const int r8   = threadIdx.x % 32 / 4;
    const int q4   = threadIdx.x % 4;
    float * all_o   = (float *) to;           // [warp][row][LD]
    float * all_top = all_o + N_WARP*ROWS*LD; // [warp][row]
    float * all_sum = all_top + N_WARP*ROWS;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        float s = sums.sum[x];
        if constexpr (KEYS == 1) {
            s += __shfl_xor_sync(0xffffffff, s, 2);
        }
        s = column_sum(s);
        const int row = warp*ROWS + 2*(q4%(ROWS/2)) + x;
        if (r8 == 0 && q4 < ROWS/2) {
            all_top[row] = sums.top[x];
            all_sum[row] = s;
        }
#pragma unroll
        for (int h = 0; h < D/64; ++h) {
#pragma unroll
            for (int t = 0; t < 2; ++t) {
#pragma unroll
                for (int j = 0; j < KEYS; ++j) {
                    const int odd = KEYS == 1 ? q4/2 : j;
                    all_o[row*LD + 64*h + 8*(2*t + odd) + r8]     = sums.o[h][t][j][x];
                    all_o[row*LD + 64*h + 8*(2*t + odd + 4) + r8] = sums.o[h][t][j][x + 2];
                }
            }
        }
    }
    meet_all(barrier, 1);
    for (int i = threadIdx.x; i < a.group*D; i += 32*N_WARP) {
        const int r = i/D;
        const int c = i%D;
        float top = -INFINITY;
#pragma unroll
        for (int u = 0; u < N_WARP; ++u) {
            top = fmaxf(top, all_top[u*ROWS + r]);
        }
        const float base = top == -INFINITY ? 0.0f : top; // no cell is seen: all weights are 0
        float value = 0.0f;
        float total = 0.0f;
#pragma unroll
        for (int u = 0; u < N_WARP; ++u) {
            const float f = exp2f(all_top[u*ROWS + r] - base);
            value += f*all_o[(u*ROWS + r)*LD + tile_place()(c)];
            total += f*all_sum[u*ROWS + r];
        }
        const int64_t at = ((int64_t) stream*a.n_head + share.head*a.group + r)*n_sum + share.split;
        values[at*D + c] = value;
        if (c == 0) {
            meta[at] = make_float2(top, total);
        }
    }
}
#endif // __CUDA_ARCH_FEAT_SM90_ALL

// The queries, f16, turned back by a position, and ROWS rows on by eight more; the threads of a group do it together
template <int D, int ROWS>
__device__ __forceinline__ void turn_twice(const float * queries, half * turned, const uint64_t * freq, int pos, int n_row) {
    constexpr int UNITS = D/4; // of two pairs
    constexpr int AT_ONCE = 32*GROUP_WARPS/UNITS; // rows
    const int i = threadIdx.x%UNITS;
    const int first = threadIdx.x%(32*GROUP_WARPS)/UNITS;
    if (first < n_row) {
        const ulonglong2 f = *(const ulonglong2 *) (freq + 2*i);
        float2 c[2][2]; // both before the first is written
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            c[e][0] = get_rotation(pos + 8*e, f.x);
            c[e][1] = get_rotation(pos + 8*e, f.y);
        }
#pragma unroll
        for (int r = first; r < ROWS; r += AT_ONCE) {
            if (r < n_row) {
                const float4 x = *(const float4 *) (queries + r*(D + 8) + 4*i);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    put_turned(turned + (r + e*ROWS)*(D + 8), i, x, c[e][0], c[e][1]);
                }
            }
        }
    }
}

// What a slab that is not plain needs of its cells; a plain one's is known
struct slab_view {
    int  chosen     = -1;       // slot of one of the warp's 16 cells, the lane's, if it counts exactly; else -1
    bool any_chosen = false;
    int  pos[2]     = { 0, 0 }; // positions of the lane's two of the slab's cells; -1: not seen
    int  highest    = 0;        // of all
    int  row_pos[2] = { 0, 0 }; // positions of keys lane/4, + 8

    // cells: (position, slot) of the slab's; mask: theirs; turns: whether positions count. The lowest position that is seen
    __device__ __forceinline__ int look(const attn_args & a, const int2 * cells, const half * mask, int part, int query_pos, bool turns) {
        const int lane = threadIdx.x % 32;
        const int2 x = cells[16*part + lane%16];
        const key_use use = x.x < 0 ? USE_CODES : get_use(a, x.x, x.y, query_pos, query_pos);
        chosen     = use == USE_EXACT ? x.y : -1;
        any_chosen = __any_sync(0xffffffff, chosen != -1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            pos[i]     = !is_seen(mask[lane + 32*i]) ? -1 : turns ? cells[lane + 32*i].x : 0;
            row_pos[i] = turns ? cells[16*part + lane/4 + 8*i].x : 0;
        }
        highest = warp_max(max(pos[0], pos[1]));
        return min_from(0);
    }

    // the lowest position that is seen from `from` on, or INT_MAX
    __device__ __forceinline__ int min_from(int from) const {
        return warp_min(min(pos[0] < from ? INT_MAX : pos[0], pos[1] < from ? INT_MAX : pos[1]));
    }

    // a group of the values of keys 2*(lane%4), + 1, + 8, + 9, where they count exactly
    template <int D>
    __device__ __forceinline__ void take_exact(const attn_args & a, int head, int group, const half * own, uint4 (&z)[4]) const {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int from = __shfl_sync(0xffffffff, chosen, threadIdx.x%4*2 + n%2 + n/2*8);
            if (from != -1) {
                z[n] = get_exact_row<D>(a, GGML_KVTC_V, head, from, own)[group];
            }
        }
    }

    // True where positions from `from` on need another anchor than `anchor` (INT_MIN: none), which then becomes it. The table of rotations
    // has n_fine positions
    __device__ __forceinline__ bool choose_anchor(int & anchor, int from, int n_fine) const {
        const int  wanted = anchor == INT_MIN || from < anchor || highest - anchor >= n_fine ? from : anchor;
        const bool other  = wanted != anchor;
        anchor = wanted;
        return other;
    }
};

// now, not between products, which the compiler would wait for
__device__ __forceinline__ void hold_registers(uint32_t (&x)[4]) {
    asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3]));
}

} // namespace kvtc
