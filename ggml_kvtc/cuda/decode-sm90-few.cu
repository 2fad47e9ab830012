// Attention for one token of at most eight query heads for each kv head on Hopper (sm_90a): as decode-sm90.cu, with what one token
// allows.
//
// Cells mostly come in the order of their positions, all seen, with codes only. A group of four warps asks this of stretches of up to
// 256 cells at once: then nothing is read of single cells, and a key's place is its distance from the queries' anchor.
//
// Each query is there twice: of up to four, in mma's eight columns; of more, in two products. For logits, turned back by the anchor and
// by eight positions more: of 16 positions from the anchor on, keys of the last eight are rotated as those of the first. For the sum of
// values, the even and the odd components: the products' inner dimension is (key, parity), two neighbouring components of a key are one
// register, as they are looked up, and the weights' operand has zeros for the other parity.
//
// A key's gain is applied to its logit; the mean, which has none, is added over it.
#include "decode.cuh"
#include "block-sm90.cuh"
#include "few-sm90.cuh"
#include "hopper-tiles.cuh"
#include "row-maps-sm90.cuh"

#include <type_traits>

namespace kvtc {

namespace {

constexpr int WARPS  = GROUP_WARPS;
constexpr int SLAB   = 16*WARPS;
constexpr int GROUPS = SM90_GROUPS;

// What a group of warps executes for a slab: all four must be in the same code, for wgmma is theirs together, so this does not depend on
// what a warp finds in its own rows. N_STEP: of 32 components that keys have codes of, in plain slabs; else 0. IS_CLEAN: no group of the
// head has single levels
template <int N_STEP, bool IS_CLEAN>
struct slab_kind {
    static constexpr int  STEPS = N_STEP;
    static constexpr bool CLEAN = IS_CLEAN;
};

// ROWS: of queries, 4 or 8. UNEVEN: a grid of p.n_block blocks, of which heads get as many as they cost; else p.n_split for each head.
// SHORT: so few cells that a block executes most of its code once, and fetching it is much of what that takes: plain slabs have no code
// of their own
template <int D, int ROWS, bool UNEVEN, bool SHORT>
__launch_bounds__(32*WARPS*GROUPS, 1)
__global__ void decode_cells_sm90_few(const attn_args a, const sm90_plan p, const __grid_constant__ row_maps maps, float * values, float2 * meta) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KS     = D/16;
    constexpr int LD     = D + 8;
    constexpr int N_WARP = WARPS*GROUPS;
    constexpr int KEYS   = ROWS/4; // whose logits a thread has
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(1024) uint8_t smem[];
    block_barriers & barriers = *(block_barriers *) (smem + p.at_barrier);
    block_share share = { (int) blockIdx.y, (int) blockIdx.x, p.n_split };
    if constexpr (UNEVEN) {
        const int lane = threadIdx.x % 32;
        share = find_share(lane < a.n_head_kv ? get_cost<D, ROWS>(a.pack, lane) : 0.0f, a.n_head_kv, p.n_block, p.n_sum);
        if (share.head >= a.n_head_kv) {
            return;
        }
    }
    const int head = share.head;
    const ggml_kvtc_cuda_head & kh = get_head(a.pack, GGML_KVTC_K, head);
    const ggml_kvtc_cuda_head & vh = get_head(a.pack, GGML_KVTC_V, head);
    if (threadIdx.x == 0) {
        bring_block<D, true>(a, p, smem, head, kh, vh, barriers);
    }

    const int lane  = threadIdx.x % 32;
    const int warp  = __shfl_sync(0xffffffff, (int) threadIdx.x/32, 0); // known to be the same for all of a warp, as what follows from it
    const int group = warp/WARPS;
    const int part  = warp % WARPS; // of the slab
    const int q4    = lane % 4;
    const int r8    = lane / 4;

    const int stream = blockIdx.z;
    const int n_row  = a.group;
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) a.pack;
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;

    float    * queries = (float *)    (smem + p.at_queries);
    half     * own     = (half *)     (smem + p.at_own);    // [2][D] the token's key and value
    uint64_t * freq    = (uint64_t *) (smem + p.at_freq);
    uint32_t * fine    = (uint32_t *) (smem + p.at_fine);   // [position][TURN_WORDS]
    auto     * codes   = (pair_code *) (smem + p.at_codes); // [2][D/8]
    half     * turned  = (half *) (smem + p.at_turned) + group*p.n_turned*2*ROWS*LD; // [n_turned] queries turned back by an anchor, and by eight positions more
    uint4    * wide    = (uint4  *) (smem + p.at_wide) + warp*16; // [key] a group of single levels
    uint8_t  * stage[2] = { smem + p.at_stage[0] + warp*16*p.stride[0], smem + p.at_stage[1] + warp*16*p.stride[1] };
    few_gains & gains = *(few_gains *) (smem + p.at_gains);
    load_block<D>(p, smem, a.pack, kh, vh, n_rot);
    make_gains(gains, kh, vh, 32*N_WARP);
    for (int i = threadIdx.x; i < GROUPS*p.n_turned*2*ROWS*LD/8; i += 32*N_WARP) {
        ((uint4 *) (smem + p.at_turned))[i] = make_uint4(0, 0, 0, 0); // rows without a query stay so
    }
    ggml_cuda_pdl_sync(); // all before is of the pack, which no kernel writes
    const int n_wide[2] = { (int) kh.n_wide, (int) vh.n_wide };
    const int  n_steps  = get_steps(kh);
    const bool any_wide = n_wide[0] > 0 || n_wide[1] > 0;
    uint64_t * arrived = (uint64_t *) (&barriers + 1) + 2*warp; // the warp's keys and values
    if (lane == 0) {
        init_bring(arrived[0], 1);
        init_bring(arrived[1], 1);
    }
    __syncwarp();
    int parity[2] = { 0, 0 };
    const float slack = get_gain(vh.gain_base, 255)*exp2f(MOST_SLACK) < 32768.0f ? MOST_SLACK : 0.0f;
    const int from[2] = { (int) (kh.payload / 16 * 16), (int) (vh.payload / 16 * 16) };
    const int skew[2] = { (int) (kh.payload % p.unit), (int) (vh.payload % p.unit) };

    const int query_pos = a.query_pos[stream];
    few_sums<D, ROWS> sums;
    sums.init();

    const auto fetch = [&](int s, int slab) {
        if (lane == 0) {
            bring_rows(stage[s], maps.side[s], from[s], p.stride[s], slab*SLAB + 16*part, stream, arrived[s]);
        }
    };
    stretch_cells of_stretch;
    uint8_t * const cells = smem + p.at_cells + group*p.n_fine*SM90_FEW_CELL;
    const auto look = [&](int slab) { of_stretch.look(a, cells, p.n_fine, stream, slab*SLAB, 32*part + lane); };

    // neighbouring slabs to one group
    const int2 slabs = get_slabs<UNEVEN>(p, share, group);
    const int  slab_end = __shfl_sync(0xffffffff, slabs.y, 0);
    int        slab     = __shfl_sync(0xffffffff, slabs.x, 0);
    const int stretch = p.n_fine/SLAB;
    if (slab < slab_end) {
        fetch(0, slab);
        look(slab);
    }
    const float2 z_own = read_own<D>(a, head, stream);
    load_queries<D, true>(a, queries, head, stream, rope_type, n_rot, pack.rope_mscale, 32*N_WARP);
    store_own<D>(own, z_own);
    __syncthreads();
    barrier_wait(barriers.pack, 0);
    const uint64_t of_matrix = get_operand(smem, 16*D, 128);
    const uint64_t of_mean   = of_matrix + 2*D*KS - ((uint64_t) D << 16); // its other eight components, which count nothing, are the same
    const uint8_t * k_rows = stage[0] + skew[0] + r8*p.stride[0];
    const uint8_t * v_rows = stage[1] + skew[1] + 2*q4*p.stride[1];
    const int my_key = KEYS == 1 ? r8 + q4/2*8 : r8; // whose logits the thread has, and if of two keys, of that plus eight
    const uint8_t * v_gain = stage[1] + skew[1] + my_key*p.stride[1];

    for (int odd = 0; slab < slab_end; odd ^= 1) {
        const int n     = min(stretch, slab_end - slab);
        const int start = of_stretch.first_pos;
        if (p.n_turned == 1) {
            meet(group, false); // those of the last stretch were read
        }
        half * anchored = turned + (odd & (p.n_turned - 1))*2*ROWS*LD;
        const bool plain = of_stretch.start(a, cells, p.n_fine, stream, slab*SLAB, n*SLAB, 32*part + lane, query_pos);
        turn_twice<D, ROWS>(queries, anchored, freq, start, n_row);
        const bool all_plain = !__any_sync(0xffffffff, meet(group, !plain)) && !SHORT && n_rot > 0 && start >= 0;
        if (all_plain && slab + n < slab_end) {
            look(slab + n); // of a plain stretch, each thread has read its own cells
        }
        int anchor = start < 0 ? INT_MIN : start; // of an empty cell: none

        const auto turn_again = [&] {
            meet(group, false); // the turned queries were read by all
            turn_twice<D, ROWS>(queries, anchored, freq, anchor, n_row);
            meet(group, false);
        };
        // keys' gains, when their rows are there
        const uint8_t * const row[2] = { k_rows, k_rows + 8*p.stride[0] };
        uint32_t ones[4] = { 0, 0, 0, 0 }; // the components that count the mean
        float    gain[2];
        bool     any_small;
        const auto await_keys = [&] {
            barrier_wait(arrived[0], parity[0]);
            parity[0] ^= 1;
            __syncwarp(); // the values of the last slab were read
        };
        const auto read_gains = [&] {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint2 g = gains.key[row[i][0]];
                ones[i] = q4 == 0 ? g.x : 0;
                gain[i] = __uint_as_float(g.y);
            }
            any_small = __any_sync(0xffffffff, gain[0] <= 0.0f || gain[1] <= 0.0f);
        };
        const auto add_slab = [&](auto kind, int s) {
            constexpr int  STEPS = decltype(kind)::STEPS; // of 32 components, that keys of plain slabs have codes of; 0: not plain
            constexpr bool CLEAN = decltype(kind)::CLEAN;
            constexpr bool PLAIN = STEPS > 0;
            const bool more = slab + 1 < slab_end;
            const int2 * slab_cell = of_stretch.cell + s*SLAB;
            const half * slab_mask = of_stretch.mask + s*SLAB;
            if (!PLAIN && !__any_sync(0xffffffff, is_seen(slab_mask[lane]) || is_seen(slab_mask[lane + 32]))) {
                if (more) {
                    fetch(0, slab + 1);
                }
                return;
            }
            slab_view view;
            if constexpr (!PLAIN) {
                fetch(1, slab);
                read_gains();
                const int lowest = view.look(a, slab_cell, slab_mask, part, query_pos, n_rot > 0);
                if (view.choose_anchor(anchor, lowest, p.n_fine)) {
                    turn_again();
                }
            }

            // keys
            uint32_t k[KS][4];
            const auto put = [&k](int s, int i, const uint4 & x) {
                k[2*s + 0][i]     = x.x;
                k[2*s + 0][i + 2] = x.y;
                k[2*s + 1][i]     = x.z;
                k[2*s + 1][i + 2] = x.w;
            };
            const auto shrink_keys = [&](int s) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (gain[i] <= 0.0f) {
                        const half2 g = __float2half2_rn(-gain[i]);
#pragma unroll
                        for (int j = 2*s; j < 2*s + 2; ++j) {
                            k[j][i]     = mul_half2(k[j][i],     g);
                            k[j][i + 2] = mul_half2(k[j][i + 2], g);
                        }
                    }
                }
            };
            uint32_t x[D/4]; // row r8, columns 2*q4, + 1; row r8 + 8, the same columns; next eight columns ...
            const auto multiply = [&](int s, bool first) { // the smallest come first
                wgmma(x, k[2*s + 1], of_matrix + 2*D*(2*s + 1), first);
                wgmma<false>(x, k[2*s], of_matrix + 2*D*2*s);
            };
            if constexpr (PLAIN) {
                hold_registers(ones);
                // each step's words are on their way two steps before its product, its lookups one
                pair_code code;
                uint2     words[2];
                const auto load_step = [&](int s) {
                    code = load_code(codes + 4*s + q4);
                    words[0] = load_words(row[0], code);
                    words[1] = load_words(row[1], code);
                };
                const auto look_up_step = [&](int s) {
                    const pair_code now = code;
                    const uint2 of_now[2] = { words[0], words[1] };
                    if (s > 0) {
                        load_step(s - 1);
                    }
                    const bool wide_step = !CLEAN && 4*s < n_wide[0]; // all its groups have single levels
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        put(s, i, wide_step ? decode_wide<D>(row[i], now) : decode_words<D>(of_now[i], now));
                    }
                };
                load_step(STEPS - 1);
                look_up_step(STEPS - 1);
#pragma unroll
                for (int s = STEPS - 1; s >= 0; --s) {
                    if (s > 0) {
                        look_up_step(s - 1);
                    }
                    if (any_small) { // rarely
                        shrink_keys(s);
                    }
                    wgmma_fence();
                    multiply(s, s == STEPS - 1);
                    if (s == 0) {
                        wgmma<false>(x, ones, of_mean);
                    }
                    wgmma_commit();
                }
                __syncwarp();
                if (more) {
                    fetch(0, slab + 1);
                }
                barrier_wait(arrived[1], parity[1]); // the values
                parity[1] ^= 1;
            } else {
#pragma unroll
                for (int s = 0; s < D/32; ++s) {
                    const pair_code code = load_code(codes + 4*s + q4);
                    put(s, 0, decode_eight<D>(row[0], code));
                    put(s, 1, decode_eight<D>(row[1], code));
                }
                for_wide<D>(codes, n_wide[0], stage[0] + skew[0], p.stride[0], wide, [&](int g) {
                    const uint4 y[2] = { wide[r8], wide[r8 + 8] };
#pragma unroll
                    for (int s = 0; s < D/32; ++s) {
                        if (g == 4*s + q4) {
                            put(s, 0, y[0]);
                            put(s, 1, y[1]);
                        }
                    }
                });
                if (any_small) {
#pragma unroll
                    for (int s = 0; s < D/32; ++s) {
                        shrink_keys(s);
                    }
                }
                if (view.any_chosen) {
                    const uint4 * exact[2];
                    uint4 y[2][D/32]; // all on their way before the first is needed
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int from = __shfl_sync(0xffffffff, view.chosen, r8 + 8*i);
                        exact[i] = from == -1 ? nullptr : get_exact_row<D>(a, GGML_KVTC_K, head, from, own) + q4;
#pragma unroll
                        for (int s = 0; s < D/32; ++s) {
                            y[i][s] = exact[i] ? exact[i][4*s] : make_uint4(0, 0, 0, 0);
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        if (exact[i]) {
                            gain[i] = 1.0f;
                            ones[i] = q4 == 0 ? 0x3c003c00 : 0;
#pragma unroll
                            for (int s = 0; s < D/32; ++s) {
                                put(s, i, y[i][s]);
                            }
                        }
                    }
                }
                hold_registers(ones);
                __syncwarp();
                if (more) {
                    fetch(0, slab + 1);
                }
                barrier_wait(arrived[1], parity[1]); // the values
                parity[1] ^= 1;
                wgmma_fence();
#pragma unroll
                for (int s = D/32 - 1; s >= 0; --s) {
                    multiply(s, s == D/32 - 1);
                }
                wgmma<false>(x, ones, of_mean);
                wgmma_commit();
            }
            // meanwhile, some of the values: group r8 + 8*h of keys 2*q4, + 1, + 8, + 9
            uint4 z[4];
            const auto decode_values = [&](auto set) {
                int bank = q4;
                asm volatile("" : "+r"(bank)); // what follows from it is not kept from slab to slab: there are no registers left
                const pair_code code = load_code(codes + D/8 + r8 + 8*set.value);
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    z[n] = decode_banks<D, set.value>(v_rows + (n%2 + n/2*8)*p.stride[1], code, bank);
                }
            };
            decode_values(std::integral_constant<int, 0>());
            wgmma_wait();

            // logits of queries 2*(q4%(ROWS/2)) + x
            float of_key[KEYS][2] = {};
            const uint32_t sign[2] = { 0, 0 }; // all keys have positions from the anchor's on
            const half * row_of_query = anchored + lane%8*LD + lane/8*8;
#pragma unroll 1
            for (bool rest = true; rest; ) { // of keys as far from the anchor as the table goes; the others with another
                const uint32_t * turn[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int at = min(max(0, view.row_pos[i] - anchor), p.n_fine - 1);
                    turn[i] = fine + (PLAIN ? s*SLAB/2 + 8*part + r8 : at/16*8 + at%8)*TURN_WORDS<D> + 4*q4;
                }
                if constexpr (KEYS == 1) {
                    float w[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
                    multiply_turned<D, PLAIN>(w, x, row_of_query, turn, sign);
                    const int  my_pos = q4 < 2 ? view.row_pos[0] : view.row_pos[1];
                    const bool later  = (my_pos - anchor & 8) != 0;
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        const float mine = q4 < 2 ? w[x] : w[2 + x];
                        if constexpr (PLAIN) {
                            of_key[0][x] = mine;
                        } else { // of other positions, the lane that has the query's other column
                            const float other = __shfl_xor_sync(0xffffffff, q4 < 2 ? w[2 + x] : w[x], 2);
                            if ((uint32_t) (my_pos - anchor) < (uint32_t) p.n_fine) {
                                of_key[0][x] = later == (q4 >= 2) ? mine : other;
                            }
                        }
                    }
                } else {
                    float w[2][4] = {};
                    multiply_turned_twice<D, PLAIN>(w, x, row_of_query, turn);
#pragma unroll
                    for (int i = 0; i < KEYS; ++i) {
                        const int  away  = view.row_pos[i] - anchor;
                        const bool later = PLAIN ? i == 1 : (away & 8) != 0;
#pragma unroll
                        for (int x = 0; x < 2; ++x) {
                            if (PLAIN || (uint32_t) away < (uint32_t) p.n_fine) {
                                of_key[i][x] = later ? w[1][2*i + x] : w[0][2*i + x];
                            }
                        }
                    }
                }
                const int from = PLAIN ? INT_MAX : view.min_from(anchor + p.n_fine);
                rest = from != INT_MAX;
                if (rest) {
                    anchor = from;
                    turn_again();
                }
            }

            float logit[KEYS][2];
            bool  rises = false;
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                const float of_gain = KEYS == 1 ? (q4 < 2 ? gain[0] : gain[1]) : gain[i];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    logit[i][x] = of_key[i][x]*(of_gain <= 0.0f ? 1.0f : of_gain);
                    if (a.softcap != 0.0f) {
                        logit[i][x] = a.softcap*LOG2E*tanhf(logit[i][x]);
                    }
                    if constexpr (!PLAIN) {
                        const int   r     = 2*(q4%(ROWS/2)) + x;
                        const float slope = LOG2E*alibi_slope(a, head*a.group + r%a.group);
                        logit[i][x] += slope*__half2float(slab_mask[16*part + my_key + 8*i]);
                    }
                    rises = rises || logit[i][x] - sums.top[x] > slack;
                }
            }
            if (__any_sync(0xffffffff, rises)) { // rarely
                sums.raise(logit);
            }
            uint32_t of_queries[KEYS];
#pragma unroll
            for (int i = 0; i < KEYS; ++i) {
                const bool  coded = !view.any_chosen || __shfl_sync(0xffffffff, view.chosen, my_key + 8*i) == -1;
                const float g     = coded ? gains.value[v_gain[8*i*p.stride[1]]] : 1.0f;
                float v[2];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    v[x] = !PLAIN && sums.top[x] == -INFINITY ? 0.0f : exp2f(logit[i][x] - sums.top[x]);
                    sums.sum[x] += v[x];
                }
                of_queries[i] = transpose(pack_half2(v[0]*g, v[1]*g));
            }
            // of query r8%ROWS: keys 2*q4, + 1 of the first eight, and of the others
            uint32_t wt[2] = { of_queries[0], of_queries[KEYS - 1] };
            if constexpr (KEYS == 1) {
                const uint32_t other = __shfl_xor_sync(0xffffffff, of_queries[0], 16);
                wt[0] = r8 < 4 ? of_queries[0] : other;
                wt[1] = r8 < 4 ? other : of_queries[0];
            }

#pragma unroll
            for (int h = 0; h < D/64; ++h) {
                if (h > 0) {
                    decode_values(std::integral_constant<int, D/64 - 1>());
                }
                if constexpr (!CLEAN) {
                    for_wide<D>(codes + D/8 + 8*h, min(8, n_wide[1] - 8*h), stage[1] + skew[1], p.stride[1], wide, [&](int g) {
                        if (r8 == g) {
#pragma unroll
                            for (int n = 0; n < 4; ++n) {
                                z[n] = wide[2*q4 + n%2 + n/2*8];
                            }
                        }
                    });
                }
                if (!PLAIN && view.any_chosen) {
                    view.take_exact<D>(a, head, r8 + 8*h, own, z);
                }
                sums.add(h, z, wt);
            }
        };

        const auto add_slabs = [&](auto kind) {
#pragma unroll 1
            for (int s = 0; s < n; ++s, ++slab) {
                await_keys();
                if constexpr (decltype(kind)::STEPS > 0) {
                    fetch(1, slab);
                    read_gains();
                }
                add_slab(kind, s);
            }
        };
        // not in each slab: code that lies apart is slow to reach
        if (!all_plain) {
            add_slabs(slab_kind<0, false>());
            if (slab < slab_end) {
                meet(group, false); // all have read the cells
                look(slab);
            }
        } else if constexpr (!SHORT && D == 128) {
            if (any_wide) {
                if (n_steps <= 3) {
                    add_slabs(slab_kind<3, false>());
                } else {
                    add_slabs(slab_kind<4, false>());
                }
            } else if (n_steps == 2) {
                add_slabs(slab_kind<2, true>());
            } else if (n_steps == 3) {
                add_slabs(slab_kind<3, true>());
            } else {
                add_slabs(slab_kind<4, true>());
            }
        } else if constexpr (!SHORT) {
            if (any_wide) {
                add_slabs(slab_kind<D/32, false>());
            } else {
                add_slabs(slab_kind<D/32, true>());
            }
        }
    }

    meet_all(barriers.sums);
    merge_few<D, ROWS, N_WARP>(a, smem + p.at_merge, barriers.sums, sums, share, stream, p.n_sum, values, meta);
    if (UNEVEN && share.split == 0) {
        clear_sums<D>(a, share, stream, p.n_sum, values, meta);
    }
#else
    GGML_UNUSED_VARS(a, p, maps, values, meta);
    NO_DEVICE_CODE;
#endif
}

template <int D, int ROWS, bool UNEVEN, bool SHORT>
void launch(const attn_args & a, const sm90_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const auto kernel = decode_cells_sm90_few<D, ROWS, UNEVEN, SHORT>;
    const row_maps maps = make_row_maps(a, p.stride);
    const dim3 grid = UNEVEN ? dim3(p.n_block, 1, a.n_stream) : dim3(p.n_split, a.n_head_kv, a.n_stream);
    allow_shared_memory((const void *) kernel, p.shared);
    ggml_cuda_kernel_launch(kernel, { grid, 32*WARPS*GROUPS, p.shared, stream }, a, p, maps, values, meta);
}

template <int D>
void launch(const attn_args & a, const sm90_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    constexpr int FEW = SM90_FEW_ROWS;
    if (p.few_rows > FEW) {
        return p.n_block > 0 ? launch<D, 2*FEW, true,  false>(a, p, values, meta, stream)
                             : launch<D, 2*FEW, false, false>(a, p, values, meta, stream);
    }
    return p.n_block > 0 ? launch<D, FEW, true,  false>(a, p, values, meta, stream)
         : p.few_slabs   ? launch<D, FEW, false, true> (a, p, values, meta, stream)
                         : launch<D, FEW, false, false>(a, p, values, meta, stream);
}

} // namespace

void decode_sm90_few(const attn_args & a, int d, const sm90_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    switch (d) {
        case  64: return launch< 64>(a, p, values, meta, stream);
        case 128: return launch<128>(a, p, values, meta, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace kvtc
