// Attention for few query rows of head_dim 256 on Hopper (sm_90a): as decode-sm90.cu, in the shared memory and registers that a
// matrix of 256 x 256 leaves.
//
// Four warps share a slab of 64 cells. A warp decodes the keys of 16 cells, which are wgmma's operand of rows, while those decoded
// before are rebuilt; it rotates them and multiplies them by the queries. Then the warps exchange weights: for the sum of values each
// takes all 64 cells and a quarter of the components (values-sm90.cuh), so that it needs a quarter of the sums in registers.
//
// Of the 32 components 32*s .. 32*s + 31 of a key, lane 4*r + q of a warp has the eight of group 4*s + q, of keys r and r + 8. They
// are columns 2*q, 2*q + 1 of four steps of eight, so the matrix is kept in that order.
#include "decode.cuh"
#include "block-sm90.cuh"
#include "hopper.cuh"
#include "pack-sm90.cuh"
#include "pairs.cuh"
#include "slabs.cuh"
#include "stage.cuh"
#include "turn-sm90.cuh"
#include "values-sm90.cuh"

#include <type_traits>

namespace kvtc {

namespace {

constexpr int D      = 256;
constexpr int WARPS  = GROUP_WARPS;
constexpr int GROUPS = SM90_D256_GROUPS;

// ONE: one token, whose keys either count exactly or do not
template <bool ONE>
__launch_bounds__(32*WARPS*GROUPS, 1)
__global__ void decode_cells_sm90_d256(const attn_args a, const sm90_d256_plan p, float * values, float2 * meta) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KS      = D/16;
    constexpr int LD      = D + 8;
    constexpr int THREADS = 32*WARPS*GROUPS;
    constexpr int N_WARP  = WARPS*GROUPS;
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(1024) uint8_t smem[];
    uint64_t & ready = *(uint64_t *) (smem + p.at_barrier);
    if (threadIdx.x == 0) {
        init_bring(ready, 3);
        bring_operand<D>(a, blockIdx.y, smem, ready);
        bring_turns<D>(a, smem + p.at_fine, p.n_fine, ready);
        bring_tables(a, get_head(a.pack, GGML_KVTC_K, blockIdx.y), smem + p.at_pairs, ready);
    }

    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int group = __shfl_sync(0xffffffff, warp/WARPS, 0); // known to be the same for all of a warp
    const int part  = warp % WARPS; // of the slab's cells, and of the values' components
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
    read_levels(my_levels, at<half>(base, vh.levels) + at<uint32_t>(base, vh.levels_at)[threadIdx.x/8], at<uint8_t>(base, vh.widths)[threadIdx.x/8], threadIdx.x%8);
    uint4 * levels = (uint4 *) (smem + p.at_levels); // of values
    value_sums<D> sums;
    sums.init(base, vh, part, levels, smem + p.at_wide);
    const uint64_t * pack_freq = at<uint64_t>(base, pack.freq);
    half * zeros = (half *) (smem + p.at_turned) + GROUPS*n_row*LD;
    for (int i = threadIdx.x; i < D; i += THREADS) {
        zeros[i] = __ushort_as_half(0);
        if (i < D/2) {
            freq[i] = i < n_rp ? pack_freq[i] : 0;
        }
    }
    if (threadIdx.x < D/8) {
        pair_code code = at<pair_code>(base, kh.pair_codes)[threadIdx.x];
        code.table += (uint32_t) __cvta_generic_to_shared(smem + p.at_pairs);
        codes[threadIdx.x] = code;
    }
    store_levels(levels, my_levels, threadIdx.x/8, threadIdx.x%8);
    ggml_cuda_pdl_sync(); // all before is of the pack, which no kernel writes

    load_queries<D>(a, queries, head, stream, rope_type, n_rot, pack.rope_mscale, THREADS);
    const int n_wide = (int) kh.n_wide;
    const int skew[2] = { (int) (kh.payload % p.rows.unit), (int) (vh.payload % p.rows.unit) };

    //
    // the thread's queries: columns 2*q4, 2*q4 + 1
    //
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

    float top[2] = { -INFINITY, -INFINITY }; // of this warp's cells
    float sum[2] = { 0.0f, 0.0f };
    int anchor = INT_MIN;
    const half * turned_row = (lane%8 < n_row ? turned + lane%8*LD : zeros) + lane/8*8;

    // neighbouring slabs to one group: they share an anchor
    const row_copy k_copy(a, p.rows, 0, kh, stream, skew[0], stage[0]);
    const row_copy v_copy(a, p.rows, 1, vh, stream, skew[1], stage[1]);
    const int split_end = min(p.n_slab, (int) (blockIdx.x + 1)*p.slabs_per_split);
    const int per_group = (p.slabs_per_split + GROUPS - 1)/GROUPS;
    int       slab      = blockIdx.x*p.slabs_per_split + group*per_group;
    const int slab_end  = min(split_end, slab + per_group);
    cells_ahead<ONE> next;
    k_copy.start(a, p.rows, 0, slab*SLAB90 + 16*part, slab < slab_end, slab*SLAB90 + 16*part + 16 <= a.n_kv);
    if (slab < slab_end) {
        next.load(a, info, mask, token, slab*SLAB90 + 16*part);
    }
    __syncthreads();
    barrier_wait(ready, 0);

    const uint64_t of_matrix = get_operand(smem, 16*D, 128);
    const uint64_t of_mean   = of_matrix + 2*D*KS - ((uint64_t) D << 16); // its other eight components, which count nothing, are the same
    const uint8_t * k_rows = stage[0] + skew[0] + r8*p.rows.stride[0];
    const uint8_t * v_rows = smem + p.at_stage[1] + (group*SLAB90 + 2*q4)*p.rows.stride[1] + skew[1];
    const uint8_t * v_gain = stage[1] + skew[1] + r8*p.rows.stride[1];
    const float gain_base[2] = { kh.gain_base, vh.gain_base };

#pragma unroll 1
    for (; slab < slab_end; ++slab) {
        cells_ahead<ONE> now = next;
        const int  first = slab*SLAB90 + 16*part;
        const bool more  = slab + 1 < slab_end;
        if (more) {
            next.load(a, info, mask, token, first + SLAB90);
        }
        now.hide(a, min_pos, query_pos, token);
        // empty cells are masked: any angle will do for them
        const int lowest_here  = warp_min(now.cell.x < 0 ? INT_MAX : now.cell.x);
        const int highest_here = warp_max(now.cell.x);
        if (lane == 0) {
            shared.range[slab%2][part] = make_int2(lowest_here, highest_here);
        }
        copy_wait<0>(); // the keys
        // also: they have arrived for all threads of the warp, and turned queries and values of the slab before were read by all
        if (!__any_sync(0xffffffff, meet(group, now.any_seen()))) {
            k_copy.start(a, p.rows, 0, first + SLAB90, more, first + SLAB90 + 16 <= a.n_kv);
            continue;
        }
        const int pos  = now.cell.x;
        const int slot = now.cell.y;
        const key_use use = pos < 0 ? USE_CODES : get_use(a, pos, slot, min_pos, max_pos);
        if (use != USE_CODES && slot >= 0) { // half of the lanes the keys, half the values
            const char * exact = (const char *) (a.exact[lane/16] + ((int64_t) head*a.n_slots + slot)*D);
#pragma unroll
            for (int i = 0; i < D/64; ++i) {
                asm volatile("prefetch.global.L2 [%0];" :: "l"(exact + 128*i));
            }
        }
        const uint32_t either = ONE ? 0 : __ballot_sync(0xffffffff, use == USE_EITHER);
        const bool any_either = !ONE && __any_sync(0xffffffff, meet(group, either != 0)); // the group multiplies together

        int lowest  = INT_MAX;
        int highest = -1;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            const int2 range = shared.range[slab%2][i];
            lowest  = min(lowest, range.x);
            highest = max(highest, range.y);
        }
        const int  reach  = p.n_fine - 1;
        const bool near   = n_rp > 0 && lowest != INT_MAX && highest - lowest <= 2*reach;
        const int  wanted = !near ? 0 : anchor == INT_MIN || lowest < anchor - reach || highest > anchor + reach ? lowest + reach : anchor;
        int row_pos[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row_pos[i] = __shfl_sync(0xffffffff, pos, r8 + 8*i);
        }

        bool again = false;
#pragma unroll 1
        for (int pass = 0; pass == 0 || again; ++pass) {
            // pass 0: keys that are exact for all queries, and codes; pass 1: keys that are exact for some
            const int  chosen     = (pass == 0 ? use == USE_EXACT : use == USE_EITHER) ? slot : -1;
            const bool any_chosen = __any_sync(0xffffffff, chosen != -1);
            if (pass == 1) {
                meet(group, false); // what was exchanged has been read by all
            }

            // Keys times the matrix: the product of some components runs while the next are decoded, the smallest first. The warps
            // must multiply together, so rows that are decoded otherwise take their turn in between
            uint32_t k[KS][4];
            uint32_t x[D/4]; // row r8, columns 2*q4, + 1; row r8 + 8, the same columns; next eight columns ...
            uint32_t ones[4];
            const auto put = [&k](int s, int i, const uint4 & y, half2 gain) {
                k[2*s + 0][i]     = mul_half2(y.x, gain);
                k[2*s + 0][i + 2] = mul_half2(y.y, gain);
                k[2*s + 1][i]     = mul_half2(y.z, gain);
                k[2*s + 1][i + 2] = mul_half2(y.w, gain);
            };
            const uint8_t * row[2];
            half2 gain[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                row[i]  = k_rows + 8*i*p.rows.stride[0];
                gain[i] = __float2half2_rn(get_gain(gain_base[0], row[i][0]));
            }
            set_ones(ones);
#pragma unroll
            for (int s = D/32 - 1; s >= 0; --s) {
                const pair_code code = load_code(codes + 4*s + q4);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    put(s, i, decode_eight(row[i], code), gain[i]);
                }
                if (any_chosen || 4*s < n_wide) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int from = __shfl_sync(0xffffffff, chosen, r8 + 8*i);
                        if (from != -1) {
                            put(s, i, load_exact(a, GGML_KVTC_K, D, head, from, (4*s + q4)*8), __float2half2_rn(1.0f));
                        } else if (is_wide(code)) {
                            put(s, i, decode_wide(row[i], code), gain[i]);
                        }
                    }
                }
                wgmma_fence();
                if (s == D/32 - 1) {
                    wgmma<true>(x, k[2*s + 1], of_matrix + 2*D*(2*s + 1));
                } else {
                    wgmma<false>(x, k[2*s + 1], of_matrix + 2*D*(2*s + 1));
                }
                wgmma<false>(x, k[2*s], of_matrix + 2*D*2*s);
                if (s == D/32 - 2 && pass == 0) {
                    v_copy.start(a, p.rows, 1, first, true, first + 16 <= a.n_kv);
                }
            }
            wgmma<false>(x, ones, of_mean);
            wgmma_commit();
            again = pass == 0 && any_either;
            if (wanted != anchor) {
                anchor = wanted;
                turn_queries<D, 32*WARPS>(queries, turned, freq, anchor, n_row);
                meet(group, false);
            }
            if (!again) {
                __syncwarp();
                k_copy.start(a, p.rows, 0, first + SLAB90, more, first + SLAB90 + 16 <= a.n_kv);
            }

            // rotated, times queries
            float w [4] = { 0.0f, 0.0f, 0.0f, 0.0f };
            float w2[4] = { 0.0f, 0.0f, 0.0f, 0.0f }; // of every other product, so that each waits for the one before the last
            const uint32_t * turn[2];
            uint32_t         sign[2]; // of the sines
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int away = row_pos[i] - anchor;
                turn[i] = fine + min(abs(away), reach)*TURN_WORDS<D> + 4*q4;
                sign[i] = away < 0 ? 0x80008000 : 0;
            }
            wgmma_wait();
            const auto multiply = [&](auto near) {
#pragma unroll
                for (int u = 0; u < D/32; ++u) {
                    uint32_t qf[4];
                    ldmatrix_x4(qf, turned_row + 32*u);
                    uint4 cs[2];
                    if constexpr (decltype(near)::value) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            cs[i] = *(const uint4 *) (turn[i] + 16*u);
                        }
                    }
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        uint32_t kf[4];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            half2 cos, sin;
                            if constexpr (decltype(near)::value) {
                                const uint32_t cu = m == 0 ? cs[i].x : cs[i].z;
                                const uint32_t su = (m == 0 ? cs[i].y : cs[i].w) ^ sign[i];
                                cos = *(const half2 *) &cu;
                                sin = *(const half2 *) &su;
                            } else {
                                const int    pair = 16*u + 8*m + 2*q4;
                                const float2 cs0  = get_rotation(row_pos[i], freq[pair]);
                                const float2 cs1  = get_rotation(row_pos[i], freq[pair + 1]);
                                cos = __floats2half2_rn(cs0.x, cs1.x);
                                sin = __floats2half2_rn(cs0.y, cs1.y);
                            }
                            const half2 x0 = *(const half2 *) &x[8*u + 4*m + i];
                            const half2 x1 = *(const half2 *) &x[8*u + 4*m + i + 2];
                            const half2 y0 = __hfma2(x0, cos, __hneg2(__hmul2(x1, sin)));
                            const half2 y1 = __hfma2(x0, sin, __hmul2(x1, cos));
                            kf[i]     = *(const uint32_t *) &y0;
                            kf[i + 2] = *(const uint32_t *) &y1;
                        }
                        mma(m == 0 ? w : w2, kf, qf[2*m], qf[2*m + 1]);
                    }
                }
            };
            if (near) {
                multiply(std::true_type());
            } else {
                multiply(std::false_type());
            }

#pragma unroll
            for (int i = 0; i < 4; ++i) {
                w[i] += w2[i];
            }

            // weights: w[2*i + x] is key r8 + 8*i, query 2*q4 + x
            if (a.softcap != 0.0f) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    w[i] = a.softcap*LOG2E*tanhf(w[i]);
                }
            }
            bool rises = false;
#pragma unroll
            for (int x = 0; x < 2; ++x) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float & v = w[2*i + x];
                    v += slope[x]*now.get_mask(i, x);
                    if (any_either) {
                        if (either && token[x] >= 0) {
                            const bool some = either >> (r8 + 8*i) & 1;
                            const bool ex   = some && is_exact(a, query_pos[token[x]], row_pos[i]);
                            if (pass == 0 ? ex : !ex) {
                                v = -INFINITY;
                            }
                        } else if (pass == 1) {
                            v = -INFINITY; // another warp of the group has keys for this pass
                        }
                    }
                    rises = rises || v > top[x];
                }
            }
            if (__any_sync(0xffffffff, rises)) {
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    float most = fmaxf(top[x], fmaxf(w[x], w[2 + x]));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 4));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 8));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 16));
                    sum[x] *= top[x] == -INFINITY ? 0.0f : exp2f(top[x] - most);
                    top[x]  = most;
                }
            }
            if (again) {
                copy_wait<0>();
            } else {
                copy_wait<1>(); // the values
            }
            __syncwarp();
            uint32_t mine[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool  coded = !any_chosen || __shfl_sync(0xffffffff, chosen, r8 + 8*i) == -1;
                const float g     = coded ? get_gain(gain_base[1], v_gain[8*i*p.rows.stride[1]]) : 1.0f;
                float v[2];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    v[x] = top[x] == -INFINITY ? 0.0f : exp2f(w[2*i + x] - top[x]);
                    sum[x] += v[x];
                }
                mine[i] = transpose(pack_half2(v[0]*g, v[1]*g));
            }
            shared.weights[part][lane] = make_uint2(mine[0], mine[1]);
            if (r8 == 0) {
                *(float2 *) &shared.top[part][2*q4] = make_float2(top[0], top[1]);
            }
            if (lane < 16) {
                shared.chosen[16*part + lane] = chosen;
            }
            const bool any_exact = __any_sync(0xffffffff, meet(group, any_chosen)); // all of the above, and the values, are there

            sums.add_slab(a, head, shared, v_rows, p.rows.stride[1], any_exact);
        }
    }

    //
    // the groups' and warps' states to one, and out
    //
    copy_wait<0>();
    __syncthreads();
    float * all_o     = (float *) smem;           // [group][row][LD]
    float * all_o_top = all_o + GROUPS*8*LD;      // [group][row]
    float * all_top   = all_o_top + GROUPS*8;     // [warp][row]
    float * all_sum   = all_top + N_WARP*8;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        float s = sum[x];
        s += __shfl_xor_sync(0xffffffff, s, 4);
        s += __shfl_xor_sync(0xffffffff, s, 8);
        s += __shfl_xor_sync(0xffffffff, s, 16);
        const int row = 2*q4 + x;
        if (r8 == 0) {
            all_top[warp*8 + row] = top[x];
            all_sum[warp*8 + row] = s;
            if (part == 0) {
                all_o_top[group*8 + row] = sums.top[x];
            }
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            *(float2 *) (all_o + (group*8 + row)*LD + sums.first + 2*t) = make_float2(sums.o[t][x], sums.o[t][x + 2]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_row*D; i += THREADS) {
        const int r = i/D;
        const int c = i%D;
        float most = -INFINITY;
        for (int u = 0; u < N_WARP; ++u) {
            most = fmaxf(most, all_top[u*8 + r]);
        }
        float value = 0.0f;
        float total = 0.0f;
        for (int u = 0; u < N_WARP && most != -INFINITY; ++u) {
            total += exp2f(all_top[u*8 + r] - most)*all_sum[u*8 + r];
        }
        for (int u = 0; u < GROUPS && most != -INFINITY; ++u) {
            value += exp2f(all_o_top[u*8 + r] - most)*all_o[(u*8 + r)*LD + c];
        }
        const int64_t row = ((int64_t) stream*a.n_tokens + r/a.group)*a.n_head + head*a.group + r%a.group;
        values[(row*gridDim.x + blockIdx.x)*D + c] = value;
        if (c == 0) {
            meta[row*gridDim.x + blockIdx.x] = make_float2(most, total);
        }
    }
#else
    GGML_UNUSED_VARS(a, p, values, meta);
    NO_DEVICE_CODE;
#endif
}

} // namespace

void decode_sm90_d256(const attn_args & a, const sm90_d256_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const auto kernel = a.n_tokens == 1 ? decode_cells_sm90_d256<true> : decode_cells_sm90_d256<false>;
    allow_shared_memory((const void *) kernel, p.shared);
    ggml_cuda_kernel_launch(kernel, { dim3(p.n_split, a.n_head_kv, a.n_stream), 32*WARPS*GROUPS, p.shared, stream }, a, p, values, meta);
}

} // namespace kvtc
