// Attention for one token of at most two query heads for each kv head, of head_dim 256, on Hopper (sm_90a), where most rotation pairs turn
// slowly: as decode-sm90-d256.cu, but of a key's columns only those of the other pairs, the first FAST, are rebuilt (slow-sm90.cuh). The
// registers that are left are for lookups of two steps of keys, and of two times 16 values, at once; the shared memory for values' levels,
// in banks (banks-sm90.cuh).
//
// Keys near an anchor are multiplied by queries that are turned back around it. Cells mostly come in the order of their positions, all seen,
// with codes only: a group of four warps asks this of stretches of four slabs at once, which share an anchor, and then nothing is read of
// single cells. Other slabs take a way of their own; where their positions lie further apart than one anchor reaches, they are rebuilt once
// for each that they need.
#include "decode.cuh"
#include "ahead-sm90.cuh"
#include "banks-sm90.cuh"
#include "block-sm90.cuh"
#include "hopper.cuh"
#include "keys-sm90.cuh"
#include "pack-sm90.cuh"
#include "pairs.cuh"
#include "row-maps-sm90.cuh"
#include "slow-sm90.cuh"
#include "turn-sm90.cuh"

#include <type_traits>

namespace kvtc {

namespace {

constexpr int D       = 256;
constexpr int WARPS   = GROUP_WARPS;
constexpr int GROUPS  = SM90_SLOW_GROUPS;
constexpr int STRETCH = 2*SM90_SLOW_REACH/SLAB90; // slabs that one anchor is enough for

// rows of codes, which the copy engine brings
struct row_barriers {
    uint64_t keys  [WARPS*GROUPS]; // a warp's are there
    uint64_t values[GROUPS];       // a group's are
};

static_assert(sizeof(row_barriers) == SM90_SLOW_BARRIERS, "the plan has another size");

// PAIRS: there is room for the keys' tables of pairs
template <bool PAIRS, int FAST>
__launch_bounds__(32*WARPS*GROUPS, 1)
__global__ void decode_cells_sm90_slow(const attn_args a, const sm90_slow_plan p, const __grid_constant__ row_maps maps, float * values, float2 * meta) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int THREADS = 32*WARPS*GROUPS;
    constexpr int TURN    = FAST/2 + 16; // words of a position's rotations
    static_assert(THREADS == D, "a thread reads what a component needs");
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(1024) uint8_t smem[];
    block_barriers & barriers = *(block_barriers *) (smem + p.at_barrier);
    const int head = blockIdx.y;
    if (threadIdx.x == 0) {
        barrier_init(barriers.sums, THREADS);
        init_bring(barriers.pack, 1 + PAIRS);
        bring_columns<D, FAST>(a, head, smem, barriers.pack);
        if constexpr (PAIRS) {
            bring_tables(a, get_head(a.pack, GGML_KVTC_K, head), smem + p.at_pairs, barriers.pack);
        }
    }

    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int group = __shfl_sync(0xffffffff, warp/WARPS, 0); // known to be the same for all of a warp
    auto & arrived = *(row_barriers *) (&barriers + 1);
    if (lane == 0) {
        init_bring(arrived.keys[warp], 1);
        if (warp%WARPS == 0) {
            init_bring(arrived.values[group], WARPS);
        }
    }
    const int part  = warp % WARPS; // of the slab's cells, and of the values' components
    const int here  = part % 2;     // of 32 cells
    const int q4    = lane % 4;
    const int r8    = lane / 4;

    const int stream = blockIdx.z;
    const int n_row  = a.group;

    const char * base = a.pack;
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const ggml_kvtc_cuda_head kh = get_head(base, GGML_KVTC_K, head); // at once: what follows keeps the order of loads
    const ggml_kvtc_cuda_head vh = get_head(base, GGML_KVTC_V, head);
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;

    float    * queries = (float *)    (smem + p.at_queries);
    half     * own     = (half *)     (smem + p.at_own); // the token's key and value
    uint64_t * freq    = (uint64_t *) (smem + p.at_freq);
    uint32_t * fine    = (uint32_t *) (smem + p.at_fine);
    auto     * codes   = (pair_code *) (smem + p.at_codes); // of keys
    half     * zeros   = (half *)     (smem + p.at_zeros);
    exchange & shared  = ((exchange *) (smem + p.at_exchange))[group];
    auto     & turned  = ((turned_queries<D, FAST> *) (smem + p.at_turned))[group];
    uint8_t  * stage[2] = { smem + p.at_stage[0] + warp*16*p.rows.stride[0], smem + p.at_stage[1] + warp*16*p.rows.stride[1] };

    //
    // what the block needs of the pack
    //
    fill_banks(smem + p.at_levels, base, vh, THREADS);
    bank_sums<D> sums;
    sums.init(base, vh, part, smem + p.at_levels, smem + p.at_wide);
    key_tables<D, PAIRS> k_tables;
    k_tables.read(base, kh);
    k_tables.store(base, kh, codes, smem + p.at_pairs);
    const uint64_t * pack_freq = at<uint64_t>(base, pack.freq);
    if (threadIdx.x < D/2) {
        freq[threadIdx.x] = (int) threadIdx.x < n_rot/2 ? pack_freq[threadIdx.x] : 0;
    }
    if (threadIdx.x < FAST + 8) {
        zeros[threadIdx.x] = __ushort_as_half(0);
    }
    constexpr int PIECES = FAST/8; // of a position's rotations of fast pairs
    const uint4 * turns = (const uint4 *) (base + GGML_KVTC_CUDA_TURNS_AT(a.n_head_kv, D));
#pragma unroll 4
    for (int i = threadIdx.x; i < (SM90_SLOW_REACH + 1)*PIECES; i += THREADS) {
        ((uint4 *) fine)[i/PIECES*(TURN/4) + i%PIECES] = turns[i/PIECES*(TURN_WORDS<D>/4) + i%PIECES];
    }
    const int n_wide  = (int) kh.n_wide;
    const int k_coded = max(2, ((int) kh.rank + 63)/64*2); // steps of 32 components, by two, behind which keys have no codes
    const int skew[2] = { (int) (kh.payload % p.rows.unit), (int) (vh.payload % p.rows.unit) };
    const uint4 * parts = (const uint4 *) (base + GGML_KVTC_CUDA_PARTS_AT(a.n_head_kv, D, head));

    //
    // the thread's queries: columns 2*q4, 2*q4 + 1
    //
    const half * mask = a.mask ? a.mask + stream%a.n_mask*a.ne_m3 : nullptr;
    const int2 * info = a.info + (int64_t) stream*a.n_kv;
    const int token[2] = { 0, 0 };
    float     slope[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        slope[e] = LOG2E*alibi_slope(a, head*a.group + (2*q4 + e)%a.group);
    }
    float top[2] = { -INFINITY, -INFINITY }; // of this warp's cells
    float sum[2] = { 0.0f, 0.0f };
    int anchor    = INT_MIN; // of this slab
    int turned_to = INT_MIN; // the first of the two around which the queries are turned

    const int from[2] = { (int) (kh.payload / 16 * 16), (int) (vh.payload / 16 * 16) };
    int parity[2] = { 0, 0 };
    const auto fetch = [&](int s, int slab) { // rows of the warp's 16 cells
        if (lane == 0) {
            bring_rows(stage[s], maps.side[s], from[s], p.rows.stride[s], slab*SLAB90 + 16*part, stream, s == 0 ? arrived.keys[warp] : arrived.values[group]);
        }
    };
    const int split_end = min(p.n_slab, (int) (blockIdx.x + 1)*p.slabs_per_split);
    const int per_group = (p.slabs_per_split + GROUPS - 1)/GROUPS;
    int       slab      = blockIdx.x*p.slabs_per_split + group*per_group; // neighbouring slabs to one group: they share an anchor
    const int slab_end  = min(split_end, slab + per_group);
    ggml_cuda_pdl_sync(); // all before is of the pack, which no kernel writes

    stretch_ahead<FAST == D/4> ahead;
    ahead.cells = (int2 *) (smem + p.at_cells) + group*STRETCH*SLAB90;
    if (slab < slab_end) {
        ahead.load(a, info, slab*SLAB90, part);
    }
    const int    query_pos = a.query_pos[stream];
    const float2 z = read_own<D>(a, head, stream);
    __syncwarp();
    if (slab < slab_end) {
        fetch(0, slab);
    }
    load_queries<D, true>(a, queries, head, stream, rope_type, n_rot, pack.rope_mscale, THREADS);
    store_own<D>(own, z);
    __syncthreads();
    barrier_wait(barriers.pack, 0);

    const uint64_t of_matrix = get_operand(smem, 16*FAST, 128);
    const uint64_t of_mean   = of_matrix + 2*FAST*(D/16) - ((uint64_t) FAST << 16); // its other eight components, which count nothing, are the same
    const uint8_t * k_rows = stage[0] + skew[0] + r8*p.rows.stride[0];
    const uint8_t * v_rows = smem + p.at_stage[1] + (group*SLAB90 + 2*q4)*p.rows.stride[1] + skew[1];
    const uint8_t * v_gain = stage[1] + skew[1] + r8*p.rows.stride[1];

    int which = 0; // of the two places for slots

    // of a slab
    bool more = false; // do others follow?
    int  row_pos[2];   // positions of cells r8, r8 + 8
    // and where it is not plain
    int  highest    = 0;                   // position that is seen
    half cell_mask  = __ushort_as_half(0); // of one of the 32 cells that hold the warp's
    int  chosen     = -1; // its slot, if it counts exactly
    bool any_chosen = false;
    bool all_near   = true;
    int2 seen       = make_int2(-1, -1); // positions of two of the slab's cells, -1 where they are not seen: any angle will do for these
    const auto find_from = [&](int from) {
        return warp_min(min(seen.x < from ? INT_MAX : seen.x, seen.y < from ? INT_MAX : seen.y));
    };
    // the queries for positions from `lowest` on; true if all up to `highest` are near enough to their anchor
    const auto choose_anchor = [&](int lowest, int highest) {
        const auto covers = [&](int x) { return lowest >= x - SM90_SLOW_REACH && highest <= x + SM90_SLOW_REACH; };
        if (anchor == INT_MIN || !covers(anchor)) {
            if (anchor != INT_MIN && covers(turned_to + 2*SM90_SLOW_REACH)) {
                anchor = turned_to + 2*SM90_SLOW_REACH;
            } else {
                anchor = turned_to = lowest + SM90_SLOW_REACH;
                turn_around(turned, queries, parts, freq, anchor, n_row, group);
            }
        }
        return highest <= anchor + SM90_SLOW_REACH;
    };
    const auto await_keys = [&] {
        barrier_wait(arrived.keys[warp], parity[0]);
        parity[0] ^= 1;
    };
    const auto fetch_next_keys = [&] { // all lanes have read these
        if (more) {
            fetch(0, slab + 1);
        }
    };

    // A slab whose values are on their way. ANY: its rows may count exactly, and positions may lie far apart; else it is plain
    const auto add_slab = [&](auto any) {
        constexpr bool ANY = decltype(any)::value;
        exact_keys<D, true> exact[2]; // of every other step
        if (ANY && any_chosen) {
            exact[0].start(a, head, chosen, 16*here, own, D/32 - 1);
            exact[1].start(a, head, chosen, 16*here, own, D/32 - 2);
        }
        exact_values<D> of_exact;
        float w[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll 1
        for (bool last = false; !last; ) { // of keys around an anchor; the others around another
            const int second = anchor != turned_to;
            // Keys times the matrix, two steps of 32 components at once. While their products run, the next are looked up
            uint32_t x[FAST/4] = {}; // row r8, columns 2*q4, + 1; row r8 + 8, the same columns; next eight columns ...
            uint32_t k[2][2][4];
            slow_logits slow = { turned.coded[second] + lane%8*turned.LD + lane/8*8 };
            key_steps<D, true, PAIRS, ANY, 2> keys[2];
            const int last_step = ANY ? D/32 - 1 : k_coded - 1;
            keys[0].start(k_rows, p.rows.stride[0], kh.gain_base, codes, last_step);
            keys[1].start(k_rows, p.rows.stride[0], kh.gain_base, codes, last_step - 1);
#pragma unroll 1
            for (int s = last_step; s > 0; s -= 2) {
                uint4 y[2][2];
#pragma unroll
                for (int b = 0; b < 2; ++b) {
                    keys[b].look_up(4*(s - b) < n_wide, k_tables.levels + 4*LEVEL_BYTES*(s - b), at<half>(base, kh.levels), at<uint32_t>(base, kh.levels_at) + 4*(s - b), y[b]);
                }
#pragma unroll
                for (int b = 0; b < 2; ++b) {
                    keys[b].read_next(s > 2);
                }
                wgmma_wait<0>();
#pragma unroll
                for (int b = 0; b < 2; ++b) {
                    keys[b].finish(a, head, s - b, s > 2, exact[b], y[b], k[b]);
                }
                wgmma_fence(k[0]);
                wgmma_fence(k[1]);
#pragma unroll
                for (int b = 0; b < 2; ++b) { // the smallest come first
                    wgmma<false>(x, k[b][1], of_matrix + 2*FAST*(2*(s - b) + 1));
                    wgmma<false>(x, k[b][0], of_matrix + 2*FAST*2*(s - b));
                }
                wgmma_commit();
                slow.add(s, k[0]);
                slow.add(s - 1, k[1]);
            }
            uint32_t ones[4];
            set_ones(ones);
            wgmma_fence();
            wgmma<false>(x, ones, of_mean);
            wgmma_commit();
            last = !ANY || all_near;
            if (last) {
                __syncwarp();
                fetch_next_keys();
                if (ANY) {
                    of_exact.read(a, head, shared.chosen[which], own, sums.group, 0);
                }
            }

            // rotated, times queries
            int away[2];
            const uint32_t * turn[2];
            uint32_t         sign[2]; // of the sines
            bool             is_near[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int distance = row_pos[i] - anchor;
                away[i]    = max(-SM90_SLOW_REACH, min(SM90_SLOW_REACH, distance));
                is_near[i] = !ANY || away[i] == distance;
                turn[i] = fine + abs(away[i])*TURN + 4*q4;
                sign[i] = away[i] < 0 ? 0x80008000 : 0;
            }
            float y[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
            const float2 mean = *(const float2 *) &turned.mean[second][2*q4];
            const half * turned_row = (lane%8 < n_row ? turned.fast[second] + lane%8*turned.LDF : zeros) + lane/8*8;
            wgmma_wait<0>();
            multiply_turned<FAST>(y, x, turned_row, turn, sign);
            slow.add_to(y, mean, away);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                w[i] = is_near[i/2] ? y[i] : w[i];
            }
            if (ANY && !last) {
                const int lowest = find_from(anchor + SM90_SLOW_REACH + 1);
                meet<WARPS>(1 + group); // the turned queries were read
                all_near = choose_anchor(lowest, highest);
                meet<WARPS>(1 + group);
                if (any_chosen) {
                    exact[0].read(a, head, D/32 - 1);
                    exact[1].read(a, head, D/32 - 2);
                }
            }
        }

        // weights: w[2*i + x] is key r8 + 8*i, query 2*q4 + x
        cap_logits(a, w);
        bool rises = false;
#pragma unroll
        for (int x = 0; x < 2; ++x) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float & v = w[2*i + x];
                if (ANY) {
                    v += slope[x]*__shfl_sync(0xffffffff, __half2float(cell_mask), 16*here + r8 + 8*i);
                }
                rises = rises || v > top[x];
            }
        }
        if (__any_sync(0xffffffff, rises)) {
            raise_top(w, top, sum);
        }
        barrier_wait(arrived.values[group], parity[1]);
        parity[1] ^= 1;
        uint32_t packed[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool  coded = !ANY || __shfl_sync(0xffffffff, chosen, 16*here + r8 + 8*i) == -1;
            const float g     = coded ? get_gain(vh.gain_base, v_gain[8*i*p.rows.stride[1]]) : 1.0f;
            float v[2];
#pragma unroll
            for (int x = 0; x < 2; ++x) {
                v[x] = ANY && top[x] == -INFINITY ? 0.0f : exp2f(w[2*i + x] - top[x]);
                sum[x] += v[x];
            }
            packed[i] = transpose(pack_half2(v[0]*g, v[1]*g));
        }
        shared.weights[part][lane] = make_uint2(packed[0], packed[1]);
        if (r8 == 0) {
            *(float2 *) &shared.top[part][2*q4] = make_float2(top[0], top[1]);
        }
        meet<WARPS>(1 + group); // all of the above, and the values, are there

        sums.add_slab<ANY>(a, head, shared, shared.chosen[which], v_rows, p.rows.stride[1], own, of_exact);
    };

    for (int stretch = 0; slab < slab_end; stretch ^= 1) {
        const int n     = min(STRETCH, slab_end - slab);
        const int start = ahead.first_pos;
        const uint32_t mine = ahead.find_others(a, mask, info, query_pos, n*SLAB90, part);
        if (lane == 0) {
            shared.others[stretch][part] = mine;
        }
        meet<WARPS>(1 + group);
        if (slab + n < slab_end) {
            ahead.load(a, info, (slab + n)*SLAB90, part);
        }
        const uint4 of_warps = *(const uint4 *) shared.others[stretch];
        const uint32_t others = of_warps.x | of_warps.y | of_warps.z | of_warps.w; // slabs that are not plain, a bit for each
        for (const int begin = slab, end = slab + n; slab < end; ) {
            const int run = min(end, slab + __ffs(others >> (slab - begin) | 1u << STRETCH) - 1);
            if (slab < run) {
                choose_anchor(start + (slab - begin)*SLAB90, start + (run - begin)*SLAB90 - 1);
            }
#pragma unroll 1
            for (; slab < run; ++slab) {
                more = slab + 1 < slab_end;
                row_pos[0] = start + (slab - begin)*SLAB90 + 16*part + r8;
                row_pos[1] = row_pos[0] + 8;
                await_keys();
                meet<WARPS>(1 + group); // turned queries are there; values and what was exchanged of the last sum have been read by all
                fetch(1, slab);
                add_slab(std::false_type());
            }
            const int other = slab + __ffs(~(others >> (slab - begin))) - 1;
#pragma unroll 1
            for (; slab < min(end, other); ++slab) {
                more = slab + 1 < slab_end;
                slab_ahead<true> now;
                now.load(a, mask, info, token, slab*SLAB90, part);
                now.hide(a, query_pos, nullptr, token, part);
                cell_mask = now.mask[0][0];
                seen    = make_int2(is_seen(now.mask[0][0]) ? now.cell.x : -1, is_seen(now.mask[0][1]) ? now.other.x : -1);
                const int lowest = find_from(0);
                highest = warp_max(max(seen.x, seen.y));
                await_keys();
                if (lowest == INT_MAX) {
                    __syncwarp();
                    fetch_next_keys();
                    continue;
                }
                const int pos  = now.cell.x;
                const int slot = now.cell.y;
                chosen     = pos >= 0 && get_use(a, pos, slot, query_pos, query_pos) == USE_EXACT ? slot : -1;
                any_chosen = __any_sync(0xffffffff, chosen != -1);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    row_pos[i] = __shfl_sync(0xffffffff, pos, 16*here + r8 + 8*i);
                }
                which ^= 1;
                if (lane/16 == here) {
                    shared.chosen[which][16*part + lane%16] = chosen;
                }
                all_near = choose_anchor(lowest, highest);
                meet<WARPS>(1 + group); // as above
                fetch(1, slab);
                add_slab(std::true_type());
            }
        }
    }

    //
    // the groups' and warps' states to one, and out
    //
    __syncthreads();
    sums.write<GROUPS>(a, smem, barriers.sums, group, part, top, sum, head, stream, values, meta);
#else
    GGML_UNUSED_VARS(a, p, maps, values, meta);
    NO_DEVICE_CODE;
#endif
}

} // namespace

void decode_sm90_slow(const attn_args & a, const sm90_slow_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const auto kernel = p.fast == 64 ? (p.pairs ? decode_cells_sm90_slow<true, 64>  : decode_cells_sm90_slow<false, 64>)
                                     : (p.pairs ? decode_cells_sm90_slow<true, 128> : decode_cells_sm90_slow<false, 128>);
    allow_shared_memory((const void *) kernel, p.shared);
    ggml_cuda_kernel_launch(kernel, { dim3(p.n_split, a.n_head_kv, a.n_stream), 32*WARPS*GROUPS, p.shared, stream }, a, p, make_row_maps(a, p.rows.stride), values, meta);
}

} // namespace kvtc
