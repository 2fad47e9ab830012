// Attention for few query rows of head_dim 256 on Hopper (sm_90a): as decode-sm90.cu, in the shared memory and registers that a
// matrix of 256 x 256 leaves.
//
// Four warps share a slab of 64 cells. A warp decodes the keys of 16 cells, which are wgmma's operand of rows, 32 components in a step
// (keys-sm90.cuh): a step's product runs while the next is decoded. It rotates what the product leaves and multiplies it by the
// queries. Then the warps exchange weights: for the sum of values each takes all 64 cells and a quarter of the components
// (values-sm90.cuh), so that it needs a quarter of the sums in registers.
//
// A block has two such groups. Where there are few cells, both have the same slab: each rebuilds half of the components, whose logits
// are added, and sums the values of half of the cells.
//
// Of the 32 components 32*s .. 32*s + 31 of a key, lane 4*r + q of a warp has the eight of group 4*s + q, of keys r and r + 8. They
// are columns 2*q, 2*q + 1 of four steps of eight, so the matrix is kept in that order.
#include "decode.cuh"
#include "ahead-sm90.cuh"
#include "hopper.cuh"
#include "keys-sm90.cuh"
#include "logits-sm90.cuh"
#include "pack-sm90.cuh"
#include "pairs.cuh"
#include "stage.cuh"
#include "turn-sm90.cuh"
#include "values-sm90.cuh"

#include <type_traits>

namespace kvtc {

namespace {

constexpr int D      = 256;
constexpr int WARPS  = GROUP_WARPS;
constexpr int GROUPS = SM90_D256_GROUPS;

// ONE: one token, whose keys either count exactly or do not; PAIRS: there is room for the keys' tables of pairs; SPLIT: few cells, of
// which both groups have the same. Then a block executes its code once, and fetching it is most of what that takes: it leaves out what
// only saves time with many cells
template <bool ONE, bool PAIRS, bool SPLIT>
__launch_bounds__(32*WARPS*GROUPS, 1)
__global__ void decode_cells_sm90_d256(const attn_args a, const sm90_d256_plan p, float * values, float2 * meta) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KS      = D/16;
    constexpr int LD      = D + 8;
    constexpr int THREADS = 32*WARPS*GROUPS;
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(1024) uint8_t smem[];
    block_barriers & barriers = *(block_barriers *) (smem + p.at_barrier);
    if (threadIdx.x == 0) {
        barrier_init(barriers.sums, THREADS);
        init_bring(barriers.pack, PAIRS ? 3 : 2);
        bring_operand<D>(a, blockIdx.y, smem, barriers.pack);
        bring_turns<D>(a, smem + p.at_fine, p.n_fine, barriers.pack);
        if constexpr (PAIRS) {
            bring_tables(a, get_head(a.pack, GGML_KVTC_K, blockIdx.y), smem + p.at_pairs, barriers.pack);
        }
    }

    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int group = __shfl_sync(0xffffffff, warp/WARPS, 0); // known to be the same for all of a warp
    const int part  = warp % WARPS; // of the slab's cells, and of the values' components
    const int here  = part % 2;     // of 32 cells
    const int q4    = lane % 4;
    const int r8    = lane / 4;

    const int head   = blockIdx.y;
    const int stream = blockIdx.z;
    const int n_row  = a.n_tokens*a.group; // up to 8

    const char * base = a.pack;
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const ggml_kvtc_cuda_head kh = get_head(base, GGML_KVTC_K, head); // at once: what follows keeps the order of loads
    const ggml_kvtc_cuda_head vh = get_head(base, GGML_KVTC_V, head);
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;
    const int n_rp      = n_rot/2;

    float    * queries = (float *)    (smem + p.at_queries);
    half     * own     = (half *)     (smem + p.at_own); // ONE: the token's key and value
    half     * turned  = (half *)     (smem + p.at_turned) + group*n_row*LD; // queries rotated back by the anchor
    uint64_t * freq    = (uint64_t *) (smem + p.at_freq);
    uint32_t * fine    = (uint32_t *) (smem + p.at_fine);
    auto     * codes   = (pair_code *) (smem + p.at_codes); // of keys
    exchange & shared  = ((exchange *) (smem + p.at_exchange))[group];
    uint8_t  * stage[2] = { smem + p.at_stage[0] + warp*16*p.rows.stride[0], smem + p.at_stage[1] + warp*16*p.rows.stride[1] };

    //
    // what the block needs of the pack
    //
    static_assert(THREADS == D, "a thread reads the levels of a component");
    uint32_t my_levels[8]; // on their way before the matrix is waited for, as is what the values' sum needs
    read_levels(my_levels, base, vh);
    key_tables<D, PAIRS> k_tables;
    k_tables.read(base, kh);
    uint4 * levels = (uint4 *) (smem + p.at_levels); // of values
    value_sums<D, ONE, SPLIT> sums;
    // SPLIT: where the other group leaves its part of the logits, which this one has read by then
    uint8_t * looked_up = SPLIT ? smem + p.at_parts + (warp ^ WARPS)*32*sizeof(float4) : smem + p.at_looked_up + warp*SM90_LOOKED_UP;
    sums.init(base, vh, part, levels, smem + p.at_wide, p.look_up, looked_up);
    const uint64_t * pack_freq = at<uint64_t>(base, pack.freq);
    half * zeros = (half *) (smem + p.at_turned) + GROUPS*n_row*LD;
    for (int i = threadIdx.x; i < D; i += THREADS) {
        zeros[i] = __ushort_as_half(0);
        if (i < D/2) {
            freq[i] = i < n_rp ? pack_freq[i] : 0;
        }
    }
    k_tables.store(base, kh, codes, smem + p.at_pairs);
    store_levels<8>(levels, my_levels, threadIdx.x/8%WARPS*8 + threadIdx.x/8/WARPS, threadIdx.x%8); // of a warp's groups together
    const int n_wide  = (int) kh.n_wide;
    const int k_coded = SPLIT ? D/32 : max(2, ((int) kh.rank + 63)/64*2); // steps of 32 components, by two, behind which keys have no codes
    const int skew[2] = { (int) (kh.payload % p.rows.unit), (int) (vh.payload % p.rows.unit) };

    //
    // the thread's queries: columns 2*q4, 2*q4 + 1
    //
    const int channel = pair_channel(threadIdx.x, rope_type, n_rot); // that it reads of each
    const float scale = (a.softcap != 0.0f ? a.scale/a.softcap : a.scale*LOG2E)*((int) threadIdx.x < n_rot ? pack.rope_mscale : 1.0f);
    const half * mask = a.mask ? a.mask + stream%a.n_mask*a.ne_m3 : nullptr;
    const int2 * info = a.info + (int64_t) stream*a.n_kv;
    int   token[2];
    float slope[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int r = 2*q4 + e;
        token[e] = r >= n_row ? -1 : ONE ? 0 : r/a.group;
        slope[e] = LOG2E*alibi_slope(a, head*a.group + r%a.group);
    }
    float top[2] = { -INFINITY, -INFINITY }; // of this warp's cells
    float sum[2] = { 0.0f, 0.0f };
    int anchor = INT_MIN;
    const half * turned_row = (lane%8 < n_row ? turned + lane%8*LD : zeros) + lane/8*8;

    // Neighbouring slabs to one group: they share an anchor. Where there are few, both groups have the same one, of which each
    // rebuilds half of the components and sums half of the values
    const row_copy k_copy(a, p.rows, 0, kh, stream, skew[0], stage[0]);
    const row_copy v_copy(a, p.rows, 1, vh, stream, skew[1], stage[1]);
    static_assert(ONE || !SPLIT, "several tokens have no kernel for few cells");
    const bool mine      = !SPLIT || part/2 == group; // the values of the warp's cells
    const int  split_end = min(p.n_slab, (int) (blockIdx.x + 1)*p.slabs_per_split);
    const int  per_group = SPLIT ? 1 : (p.slabs_per_split + GROUPS - 1)/GROUPS;
    int        slab      = SPLIT ? blockIdx.x : blockIdx.x*p.slabs_per_split + group*per_group;
    const int  slab_end  = min(split_end, slab + per_group);
    const int  k_first   = SPLIT ? group*(D/64) : 0;              // of the steps of 32 components
    const int  j_first   = SPLIT ? group*(WARPS/2) : 0;           // of the warps whose cells' values are summed
    const int  k_last    = SPLIT ? k_first + D/64 - 1 : D/32 - 1;
    ggml_cuda_pdl_sync(); // all before is of the pack, which no kernel writes

    slab_ahead<ONE> next;
    if (slab < slab_end) {
        next.load(a, mask, info, token, slab*SLAB90, part);
    }
    const int * query_pos = a.query_pos + stream*a.n_tokens;
    int min_pos = query_pos[0];
    // all that is read is on its way before any of it is needed: a row of queries at least, the token's own key and value
    const auto query = [&](int r) {
        const int t = ONE ? 0 : r/a.group;
        const int h = ONE ? r : r%a.group;
        return *(const float *) (a.q + t*a.nb_q1 + (head*a.group + h)*a.nb_q2 + stream*a.nb_q3 + channel*sizeof(float));
    };
    const float q0 = query(0);
    const float q1 = query(min(1, n_row - 1));
    const int   side = threadIdx.x/(D/2);
    float2 z = make_float2(0.0f, 0.0f);
    if (ONE && a.batch[side]) {
        const float * of_token = (const float *) (a.batch[side] + stream*a.nb_batch1[side] + head*a.nb_batch2[side]) + threadIdx.x%(D/2)*2;
        z = make_float2(of_token[0], of_token[1]);
    }
    k_copy.start(a, p.rows, 0, slab*SLAB90 + 16*part, slab < slab_end, slab*SLAB90 + 16*part + 16 <= a.n_kv);
    int max_pos = min_pos;
    for (int t = 1; !ONE && t < a.n_tokens; ++t) {
        min_pos = min(min_pos, query_pos[t]);
        max_pos = max(max_pos, query_pos[t]);
    }
    queries[threadIdx.x] = scale*q0;
    if (n_row > 1) {
        queries[LD + threadIdx.x] = scale*q1;
    }
#pragma unroll 1
    for (int r = 2; r < n_row; r += 2) {
        const float x = query(r);
        const float y = query(min(r + 1, n_row - 1));
        queries[r*LD + threadIdx.x] = scale*x;
        if (r + 1 < n_row) {
            queries[(r + 1)*LD + threadIdx.x] = scale*y;
        }
    }
    if (ONE) {
        ((uint32_t *) own)[threadIdx.x] = pack_half2(z.x, z.y); // as the store will have them
    }
    __syncthreads();
    barrier_wait(barriers.pack, 0);

    const uint64_t of_matrix = get_operand(smem, 16*D, 128);
    const uint64_t of_mean   = of_matrix + 2*D*KS - ((uint64_t) D << 16); // its other eight components, which count nothing, are the same
    const uint8_t * k_rows = stage[0] + skew[0] + r8*p.rows.stride[0];
    const uint8_t * v_rows = smem + p.at_stage[1] + (group*SLAB90 + 2*q4)*p.rows.stride[1] + skew[1];
    const uint8_t * v_gain = stage[1] + skew[1] + r8*p.rows.stride[1];
    const float gain_base[2] = { kh.gain_base, vh.gain_base };

    int which = 0; // of the two places for slots

#pragma unroll 1
    for (; slab < slab_end; slab = SPLIT ? slab_end : slab + 1) {
        slab_ahead<ONE> now = next;
        const int  first = slab*SLAB90 + 16*part;
        const bool more  = !SPLIT && slab + 1 < slab_end;
        if (more) {
            next.load(a, mask, info, token, (slab + 1)*SLAB90, part);
        }
        now.hide(a, min_pos, query_pos, token, part);
        int lowest, highest;
        const bool seen = find_range(now, shared.range[slab%2], group, part, lowest, highest);
        if (!seen) {
            k_copy.start(a, p.rows, 0, first + SLAB90, more, first + SLAB90 + 16 <= a.n_kv);
            continue;
        }
        const int pos  = now.cell.x;
        const int slot = now.cell.y;
        const key_use use = pos < 0 ? USE_CODES : get_use(a, pos, slot, min_pos, max_pos);
        const uint32_t either = ONE ? 0 : __ballot_sync(0xffffffff, use == USE_EITHER);
        const bool any_either = !ONE && __any_sync(0xffffffff, meet(group, either != 0)); // the group multiplies together

        const int  reach  = p.n_fine - 1;
        const bool near   = n_rp > 0 && lowest != INT_MAX && highest - lowest <= 2*reach;
        const int  wanted = !near ? 0 : anchor == INT_MIN || lowest < anchor - reach || highest > anchor + reach ? lowest + reach : anchor;
        int row_pos[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row_pos[i] = __shfl_sync(0xffffffff, pos, 16*here + r8 + 8*i);
        }

        bool again = false;
#pragma unroll 1
        for (int pass = 0; pass == 0 || again; ++pass) {
            // pass 0: keys that are exact for all queries, and codes; pass 1: keys that are exact for some
            const int  chosen     = (pass == 0 ? use == USE_EXACT : use == USE_EITHER) ? slot : -1;
            const bool any_chosen = __any_sync(0xffffffff, chosen != -1);
            // Keys times the matrix, 32 components in a step. While a step's product runs, the next is decoded to other registers
            uint32_t x[D/4] = {}; // row r8, columns 2*q4, + 1; row r8 + 8, the same columns; next eight columns ...
            uint32_t k[2][2][4];
            exact_keys<D, ONE> exact;
            if (any_chosen) {
                exact.start(a, head, chosen, 16*here, own, k_last);
            }
            which ^= 1;
            if (lane/16 == here) {
                shared.chosen[which][16*part + lane%16] = chosen;
            }
            if (wanted != anchor) {
                anchor = wanted;
                turn_queries<D, 32*WARPS>(queries, turned, freq, anchor, n_row);
            }
            // turned queries are there; values and what was exchanged of the last sum have been read by all
            const bool any_exact = __any_sync(0xffffffff, meet(group, any_chosen)); // of the group, whose products are the same instructions
            if (pass == 0) {
                v_copy.start(a, p.rows, 1, first, mine, first + 16 <= a.n_kv);
            }
            const auto rebuild = [&](auto with_exact) {
                constexpr bool EXACT = decltype(with_exact)::value;
                const int last = EXACT ? k_last : k_coded - 1;
                key_steps<D, ONE, PAIRS, EXACT> keys;
                keys.start(k_rows, p.rows.stride[0], gain_base[0], codes, last);
#pragma unroll 1
                for (int s0 = last; s0 >= k_first; s0 -= 2) {
#pragma unroll
                    for (int b = 0; b < 2; ++b) {
                        const int s = s0 - b;
                        keys.decode(a, head, s, s > k_first, exact, 4*s < n_wide, k_tables.levels + 4*LEVEL_BYTES*s, at<half>(base, kh.levels), at<uint32_t>(base, kh.levels_at), [] { wgmma_wait<1>(); }, k[b]);
                        wgmma_fence(k[b]);
                        wgmma<false>(x, k[b][1], of_matrix + 2*D*(2*s + 1)); // the smallest come first
                        wgmma<false>(x, k[b][0], of_matrix + 2*D*2*s);
                        wgmma_commit();
                    }
                }
            };
            if (SPLIT || any_exact) {
                rebuild(std::true_type());
            } else {
                rebuild(std::false_type());
            }
            uint32_t ones[4];
            set_ones(ones, k_first == 0); // the mean counts once
            wgmma_fence();
            wgmma<false>(x, ones, of_mean);
            wgmma_commit();
            again = pass == 0 && any_either;
            if (!SPLIT && !again) {
                __syncwarp();
                k_copy.start(a, p.rows, 0, first + SLAB90, more, first + SLAB90 + 16 <= a.n_kv);
            }
            if (any_exact) {
                sums.read_exact(a, head, shared.chosen[which], ONE ? own + D : nullptr, j_first);
            }

            // rotated, times queries
            float w [4] = { 0.0f, 0.0f, 0.0f, 0.0f };
            const uint32_t * turn[2];
            uint32_t         sign[2]; // of the sines
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int away = row_pos[i] - anchor;
                turn[i] = fine + min(abs(away), reach)*TURN_WORDS<D> + 4*q4;
                sign[i] = away < 0 ? 0x80008000 : 0;
            }
            wgmma_wait<0>();
            if (near) {
                multiply_turned<D>(w, x, turned_row, turn, sign);
            } else {
                multiply_far<D>(w, x, turned_row, row_pos, freq);
            }
            if constexpr (SPLIT) { // the other half of the components
                float4 * parts = (float4 *) (smem + p.at_parts);
                parts[threadIdx.x] = make_float4(w[0], w[1], w[2], w[3]);
                meet<WARPS*GROUPS>(1 + GROUPS);
                const float4 y = parts[threadIdx.x ^ 32*WARPS];
                w[0] += y.x;
                w[1] += y.y;
                w[2] += y.z;
                w[3] += y.w;
            }

            // weights: w[2*i + x] is key r8 + 8*i, query 2*q4 + x
            const bool rises = finish_logits<ONE>(a, w, now, slope, 16*here + r8, { either, any_either, pass }, query_pos, token, row_pos, top);
            if (__any_sync(0xffffffff, rises)) {
                raise_top(w, top, sum);
            }
            if (again) {
                copy_wait<0>();
            } else {
                copy_wait<SPLIT ? 0 : 1>(); // the values
            }
            __syncwarp();
            uint32_t packed[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool  coded = !any_chosen || __shfl_sync(0xffffffff, chosen, 16*here + r8 + 8*i) == -1;
                const float g     = coded ? get_gain(gain_base[1], v_gain[8*i*p.rows.stride[1]]) : 1.0f;
                float v[2];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    v[x] = top[x] == -INFINITY ? 0.0f : exp2f(w[2*i + x] - top[x]);
                    sum[x] += mine ? v[x] : 0.0f;
                }
                packed[i] = transpose(pack_half2(v[0]*g, v[1]*g));
            }
            shared.weights[part][lane] = make_uint2(packed[0], packed[1]);
            if (r8 == 0) {
                *(float2 *) &shared.top[part][2*q4] = make_float2(top[0], top[1]);
            }
            meet<WARPS>(1 + group); // all of the above, and the values, are there

            sums.add_slab(a, head, shared, shared.chosen[which], v_rows, p.rows.stride[1], any_exact, ONE ? own + D : nullptr, j_first, SPLIT ? j_first + WARPS/2 : WARPS);
        }
    }

    //
    // the groups' and warps' states to one, and out
    //
    copy_wait<0>();
    __syncthreads();
    sums.write<GROUPS>(a, smem, barriers.sums, group, part, top, sum, head, stream, values, meta);
#else
    GGML_UNUSED_VARS(a, p, values, meta);
    NO_DEVICE_CODE;
#endif
}

} // namespace

void decode_sm90_d256(const attn_args & a, const sm90_d256_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const auto kernel = a.n_tokens > 1 ? (p.pairs ? decode_cells_sm90_d256<false, true, false> : decode_cells_sm90_d256<false, false, false>)
                      : p.split        ? (p.pairs ? decode_cells_sm90_d256<true,  true, true>  : decode_cells_sm90_d256<true,  false, true>)
                                       : (p.pairs ? decode_cells_sm90_d256<true,  true, false> : decode_cells_sm90_d256<true,  false, false>);
    allow_shared_memory((const void *) kernel, p.shared);
    ggml_cuda_kernel_launch(kernel, { dim3(p.n_split, a.n_head_kv, a.n_stream), 32*WARPS*GROUPS, p.shared, stream }, a, p, values, meta);
}

} // namespace kvtc
