// Attention for few query rows on Hopper (sm_90a). All that decode.cu keeps in shared memory between its steps is in registers
// here: a thread decodes what it multiplies, keys as wgmma's operand of rows, values as mma's.
//
// Four warps share a slab of 64 cells for wgmma, 16 cells each, and meet there:
//
//   decode keys -> rebuild all channels (f16 sums) -> rotate, multiply by the queries -> weights -> decode values -> add
//
// Of the 32 components 32*s .. 32*s + 31 of a key, lane 4*r + q of a warp has the eight of group 4*s + q, of keys r and r + 8. They
// are columns 2*q, 2*q + 1 of four steps of eight, so the matrix is kept in that order. Its columns are eight first channels of
// rotation pairs, then their eight partners, and so on: a thread gets both of a pair, two pairs in a register.
//
// For the values' product warps do not divide keys alone: of 128 components, two warps have 64 each of the keys of both. So a warp's
// sums take half the registers, and a thread has one group of eight. Weights of the other warp's keys come by shared memory, and both
// keep to one largest logit.
//
// The mean of a channel is added by the product, last, as f16 sums are best kept small: two more components are 1 in every row,
// and the matrix has the mean's upper and lower half there.
#include "decode.cuh"
#include "ahead-sm90.cuh"
#include "block-sm90.cuh"
#include "hopper.cuh"
#include "logits-sm90.cuh"
#include "stage.cuh"
#include "turn-sm90.cuh"

namespace kvtc {

namespace {

constexpr int WARPS = GROUP_WARPS;

// ONE: one token, whose keys either count exactly or do not
template <int D, int GROUPS, bool ONE>
__launch_bounds__(32*WARPS*GROUPS, 1)
__global__ void decode_cells_sm90(const attn_args a, const sm90_plan p, float * values, float2 * meta) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KS     = D/16;
    constexpr int SLAB   = 16*WARPS;
    constexpr int LD     = D + 8;
    constexpr int N_WARP = WARPS*GROUPS;
    constexpr int SHARE  = D/64; // warps that share keys for the values' product
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(1024) uint8_t smem[];
    block_barriers & barriers = *(block_barriers *) (smem + p.at_barrier);
    const int head = blockIdx.y;
    const ggml_kvtc_cuda_head & kh = get_head(a.pack, GGML_KVTC_K, head);
    const ggml_kvtc_cuda_head & vh = get_head(a.pack, GGML_KVTC_V, head);
    if (threadIdx.x == 0) {
        bring_block<D>(a, p, smem, head, kh, vh, barriers);
    }

    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int group = __shfl_sync(0xffffffff, warp/WARPS, 0); // known to be the same for all of a warp
    const int part  = warp % WARPS; // of the slab
    const int here  = part % 2;     // of 32 cells
    const int mine  = warp % SHARE; // of the shared keys, and of the sets of eight groups of values
    const int set   = warp / SHARE;
    const int q4    = lane % 4;
    const int r8    = lane / 4;
    const int of_thread = r8 + 8*mine; // group of values

    const int stream = blockIdx.z;
    const int n_row  = a.n_tokens*a.group; // up to 8
    const char * base = a.pack;
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;

    float    * queries = (float *)    (smem + p.at_queries);
    half     * own     = (half *)     (smem + p.at_own);         // ONE: [2][D] the token's key and value
    uint64_t * freq    = (uint64_t *) (smem + p.at_freq);
    uint32_t * fine    = (uint32_t *) (smem + p.at_fine);        // [position][TURN_WORDS]
    auto     * codes   = (pair_code *) (smem + p.at_codes);      // [2][D/8]
    int2     * ranges  = (int2 *)     (smem + p.at_ranges) + group*2*WARPS; // positions of each warp's cells, of this slab and the next
    half     * turned  = (half *) (smem + p.at_turned) + group*8*LD; // queries rotated back by the anchor
    uint8_t  * stage[2] = { smem + p.at_stage[0] + warp*16*p.stride[0], smem + p.at_stage[1] + warp*16*p.stride[1] };

    load_block<D>(p, smem, base, kh, vh, n_rot);
    for (int i = threadIdx.x; i < GROUPS*8*LD/8; i += 32*N_WARP) {
        ((uint4 *) (smem + p.at_turned))[i] = make_uint4(0, 0, 0, 0); // rows without a query stay so
    }
    ggml_cuda_pdl_sync(); // all before is of the pack, which no kernel writes
    uint2  * weights = (uint2  *) (smem + p.at_weights); // [warp][lane] of its keys, as the other warp's operand
    float2 * tops    = (float2 *) (smem + p.at_tops);    // [warp][q4] largest logits
    uint4  * wide    = (uint4  *) (smem + p.at_wide) + warp*16; // [key] a group of more than 4 bits
    const auto meet_set = [&](bool x) -> bool {
        if constexpr (SHARE > 1) {
            return meet<SHARE>(1 + GROUPS + set, x);
        }
        return __any_sync(0xffffffff, x);
    };
    const int n_wide[2] = { (int) kh.n_wide, (int) vh.n_wide };
    const int skew[2] = { (int) (kh.payload % p.unit), (int) (vh.payload % p.unit) };

    // the thread's queries: columns 2*q4, 2*q4 + 1
    const int * query_pos = a.query_pos + stream*a.n_tokens;
    int min_pos = query_pos[0];
    int max_pos = min_pos;
    for (int t = 1; !ONE && t < a.n_tokens; ++t) {
        min_pos = min(min_pos, query_pos[t]);
        max_pos = max(max_pos, query_pos[t]);
    }
    int   token[2];
    float slope[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int r = 2*q4 + e;
        token[e] = r >= n_row ? -1 : ONE ? 0 : r/a.group;
        slope[e] = LOG2E*alibi_slope(a, head*a.group + r%a.group);
    }
    const half * mask = a.mask ? a.mask + stream%a.n_mask*a.ne_m3 : nullptr;
    const int2 * info = a.info + (int64_t) stream*a.n_kv;
    float o[4][4];
    float top[2] = { -INFINITY, -INFINITY };
    float sum[2] = { 0.0f, 0.0f };
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        o[t][0] = o[t][1] = o[t][2] = o[t][3] = 0.0f;
    }
    int anchor = INT_MIN;

    const row_copy copies[2] = { { a, p, 0, kh, stream, skew[0], stage[0] }, { a, p, 1, vh, stream, skew[1], stage[1] } };
    const auto fetch = [&](int s, int slab, bool inside) {
        copies[s].start(a, p, s, slab*SLAB + 16*part, inside, (slab + 1)*SLAB <= a.n_kv);
    };
    const auto look = [&](int slab, slab_ahead<ONE> & x) { x.load(a, mask, info, token, slab*SLAB, part); };

    // neighbouring slabs to one group: they share an anchor
    const int split_end = min(p.n_slab, (int) (blockIdx.x + 1)*p.slabs_per_split);
    const int per_group = (p.slabs_per_split + GROUPS - 1)/GROUPS;
    int       slab      = blockIdx.x*p.slabs_per_split + group*per_group;
    const int slab_end  = min(split_end, slab + per_group);
    slab_ahead<ONE> next;
    fetch(0, slab, slab < slab_end);
    if (slab < slab_end) {
        look(slab, next);
    }
    const float2 z_own = ONE ? read_own<D>(a, head, stream) : make_float2(0.0f, 0.0f);
    load_queries<D, ONE>(a, queries, head, stream, rope_type, n_rot, pack.rope_mscale, 32*N_WARP);
    if constexpr (ONE) {
        store_own<D>(own, z_own);
    }
    __syncthreads();
    barrier_wait(barriers.pack, 0);
    const uint64_t of_matrix = get_operand(smem, 16*D, 128);
    const uint64_t of_mean   = of_matrix + 2*D*KS - ((uint64_t) D << 16); // its other eight components, which count nothing, are the same
    const uint8_t * k_rows = stage[0] + skew[0] + r8*p.stride[0];
    const uint8_t * v_rows = stage[1] + skew[1] + 2*q4*p.stride[1]; // of the warp's own keys; values of its partner's: 16*p.stride[1] away
    const uint8_t * v_gain = stage[1] + skew[1] + r8*p.stride[1];
    const float gain_base[2] = { kh.gain_base, vh.gain_base };
#pragma unroll 1
    for (; slab < slab_end; ++slab) {
        slab_ahead<ONE> now = next;
        const bool more = slab + 1 < slab_end;
        if (more) {
            look(slab + 1, next);
        }
        now.hide(a, min_pos, query_pos, token, part);
        int lowest, highest;
        const bool seen = find_range(now, ranges + slab%2*WARPS, group, part, lowest, highest);
        if (!seen) {
            fetch(0, slab + 1, more);
            continue;
        }
        if constexpr (ONE && SHARE > 1) {
            meet_set(false); // the values of the last slab were read
        }
        fetch(1, slab, true);
        const int pos = now.cell.x;
        const key_use use = pos < 0 ? USE_CODES : get_use(a, pos, now.cell.y, min_pos, max_pos);
        if (use != USE_CODES && now.cell.y >= 0) { // one warp of two the keys, one the values
            const char * exact = (const char *) get_exact_row<D>(a, here, head, now.cell.y, nullptr);
#pragma unroll
            for (int i = 0; i < D/64; ++i) {
                asm volatile("prefetch.global.L2 [%0];" :: "l"(exact + 128*i));
            }
        }
        bool all_steps = !ONE || (int) kh.rank > D - 32; // else the last step's components have no codes, and count where keys are exact alone
        if constexpr (ONE) {
            const key_use of_other = now.other.x < 0 ? USE_CODES : get_use(a, now.other.x, now.other.y, min_pos, max_pos);
            all_steps = __any_sync(0xffffffff, all_steps || use != USE_CODES || of_other != USE_CODES); // all warps of the group find the same
        }
        const uint32_t either = ONE ? 0 : __ballot_sync(0xffffffff, use == USE_EITHER);
        const bool any_either = !ONE && __any_sync(0xffffffff, meet(group, either != 0)); // the group multiplies together

        const bool near = n_rot > 0 && highest - lowest < p.n_fine && lowest != INT_MAX;
        const int  wanted = !near ? 0 : anchor == INT_MIN || lowest < anchor || highest - anchor >= p.n_fine ? lowest : anchor;
        if (wanted != anchor) {
            if constexpr (ONE) {
                meet(group, false); // the turned queries were read by all
            }
            anchor = wanted;
            turn_queries<D, 32*WARPS>(queries, turned, freq, anchor, n_row);
            meet(group, false);
        }
        int row_pos[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row_pos[i] = __shfl_sync(0xffffffff, pos, 16*here + r8 + 8*i);
        }

        bool again = false;
#pragma unroll 1
        for (int pass = 0; pass == 0 || again; ++pass) {
            // pass 0: keys that are exact for all queries, and codes; pass 1: keys that are exact for some
            const int  chosen     = (pass == 0 ? use == USE_EXACT : use == USE_EITHER) ? now.cell.y : -1;
            const bool any_chosen = __any_sync(0xffffffff, chosen != -1);

            uint32_t k[KS][4];
            const auto put = [&k](int s, int i, const uint4 & x, half2 gain) {
                k[2*s + 0][i]     = mul_half2(x.x, gain);
                k[2*s + 0][i + 2] = mul_half2(x.y, gain);
                k[2*s + 1][i]     = mul_half2(x.z, gain);
                k[2*s + 1][i + 2] = mul_half2(x.w, gain);
            };
            const uint8_t * row[2];
            half2 k_gain[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                row[i]    = k_rows + 8*i*p.stride[0];
                k_gain[i] = __float2half2_rn(get_gain(gain_base[0], row[i][0]));
            }
#pragma unroll
            for (int s = 0; s < D/32; ++s) {
                if (s < D/32 - 1 || all_steps) {
                    const pair_code code = load_code(codes + 4*s + q4);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        put(s, i, decode_eight<D>(row[i], code), k_gain[i]);
                    }
                }
            }
            for_wide<D>(codes, n_wide[0], stage[0] + skew[0], p.stride[0], wide, [&](int g) {
                const uint4 y[2] = { wide[r8], wide[r8 + 8] };
#pragma unroll
                for (int s = 0; s < D/32; ++s) {
                    if (g == 4*s + q4) {
                        put(s, 0, y[0], k_gain[0]);
                        put(s, 1, y[1], k_gain[1]);
                    }
                }
            });
            if (any_chosen) {
                int   from[2];
                uint4 y[2][D/32]; // all on their way before the first is needed
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    from[i] = __shfl_sync(0xffffffff, chosen, 16*here + r8 + 8*i);
                    const uint4 * exact = get_exact_row<D>(a, GGML_KVTC_K, head, from[i], own) + q4;
#pragma unroll
                    for (int s = 0; s < D/32; ++s) {
                        y[i][s] = from[i] >= 0 || (ONE && from[i] != -1) ? exact[4*s] : make_uint4(0, 0, 0, 0);
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (from[i] != -1) {
#pragma unroll
                        for (int s = 0; s < D/32; ++s) {
                            put(s, i, ONE || from[i] >= 0 ? y[i][s] : load_exact(a, GGML_KVTC_K, D, head, from[i], (4*s + q4)*8), __float2half2_rn(1.0f));
                        }
                    }
                }
            }
            again = pass == 0 && any_either;
            if (again) {
                copy_wait<0>();
            } else {
                __syncwarp();
                fetch(0, slab + 1, more);
                copy_wait<1>(); // the values
            }
            __syncwarp();

            // keys, rotated, times queries
            float w[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
            const uint32_t * turn[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                turn[i] = fine + max(0, row_pos[i] - anchor)*TURN_WORDS<D> + 4*q4;
            }
            uint32_t x[D/4]; // row r8, columns 2*q4, + 1; row r8 + 8, the same columns; next eight columns ...
            uint32_t ones[4];
            set_ones(ones);
            wgmma_fence();
            if (all_steps) { // the smallest come first
                wgmma<true> (x, k[KS - 1], of_matrix + 2*D*(KS - 1));
                wgmma<false>(x, k[KS - 2], of_matrix + 2*D*(KS - 2));
            }
            wgmma(x, k[KS - 3], of_matrix + 2*D*(KS - 3), !all_steps);
#pragma unroll
            for (int s = KS - 4; s >= 0; --s) {
                wgmma<false>(x, k[s], of_matrix + 2*D*s);
            }
            wgmma<false>(x, ones, of_mean);
            wgmma_commit();
            // meanwhile, values of the warp's own keys. Group r8 + 8*mine of keys 2*q4, + 1, + 8, + 9: component c is row r8, or r8 + 8, of tile c modulo 4
            uint4 z[4];
            const pair_code code = load_code(codes + D/8 + of_thread);
            const auto decode_values = [&](const uint8_t * rows) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const uint8_t * row = rows + (n%2 + n/2*8)*p.stride[1];
                    z[n] = mine == 0 ? decode_banks<D, 0>(row, code, q4) : decode_banks<D, 1>(row, code, q4);
                }
            };
            decode_values(v_rows);
            wgmma_wait();
            if (near) {
                multiply_turned<D>(w, x, turned, turn);
            } else {
                multiply_far<D>(w, x, turned + lane%8*LD + lane/8*8, row_pos, freq);
            }

            // weights: w[2*i + x] is key r8 + 8*i, query 2*q4 + x
            const bool rises = finish_logits<ONE>(a, w, now, slope, 16*here + r8, { either, any_either, pass }, query_pos, token, row_pos, top);
            float gain[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool coded = !any_chosen || __shfl_sync(0xffffffff, chosen, 16*here + r8 + 8*i) == -1;
                gain[i] = coded ? get_gain(gain_base[1], v_gain[8*i*p.stride[1]]) : 1.0f;
            }
            float    v [4];
            uint32_t wt[SHARE][2]; // the warp's own keys', then its partner's
            const auto weigh = [&]() {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        v[2*i + x] = top[x] == -INFINITY ? 0.0f : exp2f(w[2*i + x] - top[x]);
                    }
                    wt[0][i] = transpose(pack_half2(v[2*i]*gain[i], v[2*i + 1]*gain[i]));
                }
                if constexpr (SHARE > 1) {
                    weights[32*warp + lane] = make_uint2(wt[0][0], wt[0][1]);
                }
            };
            weigh();
            if (meet_set(rises)) { // rarely: for both to have the same largest logit
                float most[2];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    most[x] = column_max(fmaxf(top[x], fmaxf(w[x], w[2 + x])));
                }
                if constexpr (SHARE > 1) {
                    if (r8 == 0) {
                        tops[4*warp + q4] = make_float2(most[0], most[1]);
                    }
                    meet_set(false);
                    const float2 other = tops[4*(warp ^ 1) + q4];
                    most[0] = fmaxf(most[0], other.x);
                    most[1] = fmaxf(most[1], other.y);
                }
                float fade[2];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    fade[x] = top[x] == -INFINITY ? 0.0f : exp2f(top[x] - most[x]);
                    top [x] = most[x];
                    sum [x] *= fade[x];
                }
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    o[t][0] *= fade[0];
                    o[t][1] *= fade[1];
                    o[t][2] *= fade[0];
                    o[t][3] *= fade[1];
                }
                weigh();
                if constexpr (SHARE > 1) {
                    meet_set(false);
                }
            }
            sum[0] += v[0] + v[2];
            sum[1] += v[1] + v[3];
            if constexpr (SHARE > 1) {
                const uint2 other = weights[32*(warp ^ 1) + lane];
                wt[1][0] = other.x;
                wt[1][1] = other.y;
            }

#pragma unroll
            for (int s = 0; s < SHARE; ++s) {
                const int first = 16*(here ^ s);
                const uint8_t * rows = v_rows + (first - 16*here)*p.stride[1];
                if (s > 0) {
                    decode_values(rows);
                }
                for_wide<D>(codes + D/8 + 8*mine, min(8, n_wide[1] - 8*mine), rows - 2*q4*p.stride[1], p.stride[1], wide, [&](int g) {
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        if (r8 == g) {
                            z[n] = wide[2*q4 + n%2 + n/2*8];
                        }
                    }
                });
                if (any_chosen) {
                    int   from[4];
                    uint4 y[4];
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        from[n] = __shfl_sync(0xffffffff, chosen, first + 2*q4 + n%2 + n/2*8);
                        y[n] = from[n] >= 0 || (ONE && from[n] != -1) ? get_exact_row<D>(a, GGML_KVTC_V, head, from[n], own)[of_thread] : make_uint4(0, 0, 0, 0);
                    }
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        if (from[n] != -1) {
                            z[n] = ONE || from[n] >= 0 ? y[n] : load_exact(a, GGML_KVTC_V, D, head, from[n], 8*of_thread);
                        }
                    }
                }
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const auto pick = [t](const uint4 & x, const uint4 & y, int i) { // component t + 4*i of two keys
                        const uint32_t a = i == 0 ? (t < 2 ? x.x : x.y) : (t < 2 ? x.z : x.w);
                        const uint32_t b = i == 0 ? (t < 2 ? y.x : y.y) : (t < 2 ? y.z : y.w);
                        return __byte_perm(a, b, t%2 == 0 ? 0x5410 : 0x7632);
                    };
                    const uint32_t zv[4] = { pick(z[0], z[1], 0), pick(z[0], z[1], 1), pick(z[2], z[3], 0), pick(z[2], z[3], 1) };
                    mma(o[t], zv, wt[s][0], wt[s][1]);
                }
            }
            if (again && SHARE > 1) {
                meet_set(false); // the weights' place is free
            }
        }
    }

    copy_wait<0>();
    __syncthreads();
    merge_warps<D, N_WARP>(a, smem + p.at_merge, barriers.sums, o, top, sum, head, stream, values, meta);
#else
    GGML_UNUSED_VARS(a, p, values, meta);
    NO_DEVICE_CODE;
#endif
}

template <int D, int GROUPS, bool ONE>
void launch(const attn_args & a, const sm90_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const auto kernel = decode_cells_sm90<D, GROUPS, ONE>;
    allow_shared_memory((const void *) kernel, p.shared);
    ggml_cuda_kernel_launch(kernel, { dim3(p.n_split, a.n_head_kv, a.n_stream), 32*WARPS*GROUPS, p.shared, stream }, a, p, values, meta);
}

} // namespace

void decode_sm90(const attn_args & a, int d, const sm90_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    switch (d) {
        case  64: return a.n_tokens == 1 ? launch< 64, SM90_GROUPS, true>(a, p, values, meta, stream) : launch< 64, SM90_GROUPS, false>(a, p, values, meta, stream);
        case 128: return a.n_tokens == 1 ? launch<128, SM90_GROUPS, true>(a, p, values, meta, stream) : launch<128, SM90_GROUPS, false>(a, p, values, meta, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace kvtc
