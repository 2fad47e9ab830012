// Attention for few query rows on Hopper (sm_90a). All that decode.cu keeps in shared memory between its steps is in registers
// here: a thread decodes what it multiplies, keys as wgmma's operand of rows, values as mma's.
//
// Four warps share a slab of 64 cells for wgmma, 16 cells each; they meet once a slab:
//
//   decode keys -> rebuild all channels (f16 sums) -> rotate, multiply by the queries -> weights -> decode values -> add
//
// Of the 32 components 32*s .. 32*s + 31 of a key, lane 4*r + q of a warp has the eight of group 4*s + q, of keys r and r + 8. They
// are columns 2*q, 2*q + 1 of four steps of eight, so the matrix is kept in that order. Its columns are eight first channels of
// rotation pairs, then their eight partners, and so on: a thread gets both of a pair, two pairs in a register.
//
// The mean of a channel is added by the product, last, as f16 sums are best kept small: two more components are 1 in every row,
// and the matrix has the mean's upper and lower half there.
#include "decode.cuh"
#include "hopper.cuh"
#include "pairs.cuh"

#include <type_traits>

namespace kvtc {

namespace {

constexpr int WARPS = GROUP_WARPS;

// ONE: one token, whose keys either count exactly or do not
template <int D, int GROUPS, bool ONE>
__launch_bounds__(32*WARPS*GROUPS, 1)
__global__ void decode_cells_sm90(const attn_args a, const sm90_plan p, float * values, float2 * meta) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KS      = D/16;
    constexpr int SLAB    = 16*WARPS;
    constexpr int LD      = D + 8;
    constexpr int THREADS = 32*WARPS*GROUPS;
    constexpr int N_WARP  = WARPS*GROUPS;
    constexpr int SHARE   = D/64;              // warps that share keys for the values' product: each has 64 components of them
    constexpr int KEYS    = 16*SHARE;
    constexpr int N_SET   = N_WARP/SHARE;
    constexpr int TURN    = D/2 + 16;          // words of a position in the table of rotations: neighbours do not share banks
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(1024) uint8_t smem[];

    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int group = __shfl_sync(0xffffffff, warp/WARPS, 0); // known to be the same for all of a warp
    const int part  = warp % WARPS; // of the slab
    const int own   = warp % SHARE; // of the shared keys
    const int set   = warp / SHARE;
    const int q4    = lane % 4;
    const int r8    = lane / 4;

    const int head   = blockIdx.y;
    const int stream = blockIdx.z;
    const int n_row  = a.n_tokens*a.group; // up to 8

    const char * base = find_pack(a.pack);
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const ggml_kvtc_cuda_head & kh   = get_head(base, GGML_KVTC_K, head);
    const ggml_kvtc_cuda_head & vh   = get_head(base, GGML_KVTC_V, head);
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;
    const int n_rp      = n_rot/2;

    half     * matrix  = (half *)     smem;                      // [D/8 + 2 groups of components][D columns][8]
    float    * queries = (float *)    (smem + p.at_queries);
    uint64_t * freq    = (uint64_t *) (smem + p.at_freq);
    uint32_t * fine    = (uint32_t *) (smem + p.at_fine);        // [position][TURN]: four words for pairs 16*u + 2*q, + 1, + 8, + 9 at 16*u + 4*q
    auto     * codes   = (pair_code *) (smem + p.at_codes);      // [2][D/8]
    int2     * ranges  = (int2 *)     (smem + p.at_ranges) + group*2*WARPS; // positions of each warp's cells, of this slab and the next
    uint8_t  * tables[2] = { smem + p.at_table[0], smem + p.at_table[1] };
    half     * turned  = (half *) (smem + p.at_turned) + group*8*LD; // queries rotated back by the anchor
    uint8_t  * stage[2] = { smem + p.at_stage[0] + warp*16*p.stride[0], smem + p.at_stage[1] + warp*16*p.stride[1] };

    //
    // what the block needs of the pack
    //
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const ggml_kvtc_cuda_head & h = s == 0 ? kh : vh;
        for (int i = threadIdx.x; i < (int) h.n_pairs/16; i += THREADS) {
            copy_async<16>(tables[s] + 16*i, base + h.pairs + 16*i);
        }
    }
    copy_commit();
    const auto get_channel = [&](int column) {
        return pair_channel(column/16*16 + column%8*2 + column/8%2, rope_type, n_rot);
    };
#pragma unroll 2
    for (int i = threadIdx.x; i < D*(D/32); i += THREADS) {
        const int column = i%D;
        const int block  = i/D; // of 32 components
        const uint4 * from = (const uint4 *) (at<half>(base, kh.decode) + get_channel(column)*D + block*32);
        const uint4 x[4] = { from[0], from[1], from[2], from[3] };
        uint4 * to = (uint4 *) matrix + block*4*D + column;
        to[0*D] = make_uint4(x[0].x, x[1].x, x[2].x, x[3].x);
        to[1*D] = make_uint4(x[0].y, x[1].y, x[2].y, x[3].y);
        to[2*D] = make_uint4(x[0].z, x[1].z, x[2].z, x[3].z);
        to[3*D] = make_uint4(x[0].w, x[1].w, x[2].w, x[3].w);
    }
    for (int i = threadIdx.x; i < p.n_fine*(D/8); i += THREADS) {
        const uint4 x = at<uint4>(base, pack.turns)[i]; // (cos, sin) of pairs 4*j .. 4*j + 3
        const int   j = i%(D/8);
        uint32_t * to = fine + i/(D/8)*TURN + j/4*16 + j%2*8 + j/2%2*2;
        *(uint2 *)  to      = make_uint2(__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632));
        *(uint2 *) (to + 4) = make_uint2(__byte_perm(x.z, x.w, 0x5410), __byte_perm(x.z, x.w, 0x7632));
    }
    const uint64_t * pack_freq = at<uint64_t>(base, pack.freq);
    for (int i = threadIdx.x; i < 2*D; i += THREADS) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (i < D) {
            const float mean  = at<float>(base, kh.mean)[get_channel(i)];
            const float upper = __half2float(__float2half(mean));
            x.x = pack_half2(upper, mean - upper);
        }
        *(uint4 *) (matrix + (D/8*D + i)*8) = x;
        if (i < D/2) {
            freq[i] = i < n_rp ? pack_freq[i] : 0;
        }
    }
    for (int i = threadIdx.x; i < GROUPS*8*LD/8; i += THREADS) {
        ((uint4 *) (smem + p.at_turned))[i] = make_uint4(0, 0, 0, 0); // rows without a query stay so
    }
    if (threadIdx.x < 2*(D/8)) {
        const int side = threadIdx.x/(D/8);
        pair_code code = at<pair_code>(base, (side == 0 ? kh : vh).pair_codes)[threadIdx.x%(D/8)];
        code.table += (uint32_t) __cvta_generic_to_shared(tables[side]);
        codes[threadIdx.x] = code;
    }
    ggml_cuda_pdl_sync(); // all before is of the pack, which no kernel writes
    const float scale = a.softcap != 0.0f ? a.scale/a.softcap : a.scale*LOG2E;
    for (int i = threadIdx.x; i < n_row*D; i += THREADS) {
        const int r       = i/D;
        const int token   = r/a.group;
        const int channel = pair_channel(i%D, rope_type, n_rot);
        const float x = *(const float *) (a.q + token*a.nb_q1 + (head*a.group + r%a.group)*a.nb_q2 + stream*a.nb_q3 + channel*sizeof(float));
        queries[r*LD + i%D] = x*(i%D < n_rot ? scale*pack.rope_mscale : scale);
    }
    uint2  * weights = (uint2  *) (smem + p.at_weights); // [warp][lane] of the keys' last slab
    float2 * tops    = (float2 *) (smem + p.at_tops);
    uint4  * wide    = (uint4  *) (smem + p.at_wide) + warp*16; // [key] a group of more than 4 bits
    const auto meet_set = [&](bool x) {
        if constexpr (SHARE == 1) {
            return __any_sync(0xffffffff, x);
        } else {
            return meet<SHARE>(1 + GROUPS + set, x);
        }
    };
    const int n_wide[2] = { (int) kh.n_wide, (int) vh.n_wide };
    const int skew[2] = { (int) (kh.payload % p.unit), (int) (vh.payload % p.unit) };

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

    float o[4][4];
    float top[2] = { -INFINITY, -INFINITY };
    float sum[2] = { 0.0f, 0.0f };
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        o[t][0] = o[t][1] = o[t][2] = o[t][3] = 0.0f;
    }
    int anchor = INT_MIN;
    const auto set_anchor = [&](int pos) { // the group's threads together
        anchor = pos;
        constexpr int UNITS = D/4; // of two pairs
        constexpr int STEP  = 32*WARPS/UNITS;
        const int    i  = threadIdx.x%UNITS;
        const float2 c0 = get_rotation(pos, freq[2*i]);
        const float2 c1 = get_rotation(pos, freq[2*i + 1]);
        for (int r = threadIdx.x%(32*WARPS)/UNITS; r < n_row; r += STEP) { // the others stay zeros
            const float4 x = *(const float4 *) (queries + r*LD + 4*i);
            half * to = turned + r*LD + i/4*16 + i%4*2;
            *(uint32_t *)  to      = pack_half2(x.x*c0.x + x.y*c0.y, x.z*c1.x + x.w*c1.y);
            *(uint32_t *) (to + 8) = pack_half2(x.y*c0.x - x.x*c0.y, x.w*c1.x - x.z*c1.y);
        }
    };

    //
    // staging: a warp's 16 rows of a slab on their way while the one before is worked on
    //
    const uint8_t * source[2]; // of this thread's part of a row
    uint8_t       * target[2];
    int             n_rows[2]; // that it copies parts of, every 32/lanes-th
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const ggml_kvtc_cuda_head & h = s == 0 ? kh : vh;
        const int c = lane & ((1 << p.lanes[s]) - 1);
        const int j = lane >> p.lanes[s];
        const int n_copy = (skew[s] + (int) h.n_bytes + p.unit - 1)/p.unit;
        source[s] = a.rows[s] + stream*a.nb_stream[s] + h.payload - skew[s] + c*p.unit;
        target[s] = stage[s] + j*p.stride[s] + c*p.unit;
        n_rows[s] = c < n_copy && j < 16 ? max(1, (16 << p.lanes[s])/32) : 0;
    }
    const auto fetch = [&](int s, int slab, bool inside) {
        const int row  = slab*SLAB + 16*part + (lane >> p.lanes[s]);
        const int step = 32 >> p.lanes[s];
        const int n    = inside ? n_rows[s] : 0;
        uint8_t * to   = target[s];
        const uint8_t * from = source[s] + (int64_t) row*(int) a.nb_row[s];
        if (p.unit == 16 && (slab + 1)*SLAB <= a.n_kv) {
            const int jump = step*(int) a.nb_row[s];
#pragma unroll 2
            for (int i = 0; i < n; ++i) {
                copy_async<16>(to, from);
                from += jump;
                to   += step*p.stride[s];
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < n; ++i) {
                from = source[s] + (int64_t) min(row + i*step, a.n_kv - 1)*(int) a.nb_row[s];
                if (p.unit == 16) {
                    copy_async<16>(to, from);
                } else if (p.unit == 8) {
                    copy_async<8>(to, from);
                } else {
                    copy_async<4>(to, from);
                }
                to += step*p.stride[s];
            }
        }
        copy_commit();
    };
    struct ahead { // what is read from global memory a slab ahead
        int2 cell; // of lane % KEYS
        half mask[ONE ? 1 : 2][2];
    };
    const auto look = [&](int slab, ahead & x) {
        const int first = slab*SLAB + 16*part;
        const int mine  = first - 16*own + lane%KEYS;
        x.cell = info[min(mine, a.n_kv - 1)];
        if constexpr (ONE) {
            x.mask[0][0] = mine >= a.n_kv ? __ushort_as_half(0xfc00) : mask ? mask[mine] : __ushort_as_half(0);
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int cell = first + r8 + 8*i;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    x.mask[i][e] = cell >= a.n_kv || token[e] < 0 ? __ushort_as_half(0xfc00) : mask ? mask[token[e]*a.ne_m1 + cell] : __ushort_as_half(0);
                }
            }
        }
    };
    const auto is_seen = [](const half & x) { return __half_as_ushort(x) != 0xfc00; };

    // neighbouring slabs to one group: they share an anchor
    const int split_end = min(p.n_slab, (int) (blockIdx.x + 1)*p.slabs_per_split);
    const int per_group = (p.slabs_per_split + GROUPS - 1)/GROUPS;
    int       slab      = blockIdx.x*p.slabs_per_split + group*per_group;
    const int slab_end  = min(split_end, slab + per_group);
    ahead next;
    fetch(0, slab, slab < slab_end);
    if (slab < slab_end) {
        look(slab, next);
    }
    copy_wait<1>(); // all but this fetch
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // the matrix was written by threads, wgmma reads it
    __syncthreads();

    const uint64_t of_matrix = get_operand(matrix, 16*D, 128);
    const uint8_t * k_rows = stage[0] + skew[0] + r8*p.stride[0];
    const uint8_t * v_rows = stage[1] + skew[1] + 2*q4*p.stride[1]; // of the warp's own keys; values of its partner's: 16*p.stride[1] away
    const uint8_t * v_gain = stage[1] + skew[1] + r8*p.stride[1];
    const float gain_base[2] = { kh.gain_base, vh.gain_base };

#pragma unroll 1
    for (; slab < slab_end; ++slab) {
        ahead now = next;
        const bool more = slab + 1 < slab_end;
        if (more) {
            look(slab + 1, next);
        }
        bool seen = is_seen(now.mask[0][0]);
        if constexpr (!ONE) {
            seen = seen || is_seen(now.mask[0][1]) || is_seen(now.mask[1][0]) || is_seen(now.mask[1][1]);
        }
        // empty cells are masked: any angle will do for them
        const int lowest_here  = warp_min(now.cell.x < 0 ? INT_MAX : now.cell.x);
        const int highest_here = warp_max(now.cell.x);
        if (lane == 0) {
            ranges[slab%2*WARPS + part] = make_int2(lowest_here, highest_here);
        }
        copy_wait<0>(); // the keys
        // also: they have arrived for all threads of the warp, and what the last slab left is free
        if (!__any_sync(0xffffffff, meet(group, seen))) {
            fetch(0, slab + 1, more);
            continue;
        }
        fetch(1, slab, true);
        const int pos  = now.cell.x;
        const int slot = now.cell.y;
        const key_use use = pos < 0 ? USE_CODES : get_use(a, pos, slot, min_pos, max_pos);
        const uint32_t either = ONE ? 0 : __ballot_sync(0xffffffff, use == USE_EITHER);
        const bool any_either = !ONE && __any_sync(0xffffffff, meet(group, either != 0)); // the group multiplies together

        int lowest  = INT_MAX;
        int highest = -1;
#pragma unroll
        for (int i = 0; i < WARPS; i += SHARE) {
            const int2 range = ranges[slab%2*WARPS + i];
            lowest  = min(lowest, range.x);
            highest = max(highest, range.y);
        }
        const bool near = n_rp > 0 && highest - lowest < p.n_fine && lowest != INT_MAX;
        const int  wanted = !near ? 0 : anchor == INT_MIN || lowest < anchor || highest - anchor >= p.n_fine ? lowest : anchor;
        if (wanted != anchor) {
            set_anchor(wanted);
            meet(group, false);
        }
        int row_pos[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row_pos[i] = __shfl_sync(0xffffffff, pos, 16*own + r8 + 8*i);
        }

        bool again = false;
#pragma unroll 1
        for (int pass = 0; pass == 0 || again; ++pass) {
            // pass 0: keys that are exact for all queries, and codes; pass 1: keys that are exact for some
            const int  chosen     = (pass == 0 ? use == USE_EXACT : use == USE_EITHER) ? slot : -1;
            const bool any_chosen = __any_sync(0xffffffff, chosen != -1);

            uint32_t k[KS][4];
            const auto put = [&k](int s, int i, const uint4 & x, half2 gain) {
                k[2*s + 0][i]     = mul_half2(x.x, gain);
                k[2*s + 0][i + 2] = mul_half2(x.y, gain);
                k[2*s + 1][i]     = mul_half2(x.z, gain);
                k[2*s + 1][i + 2] = mul_half2(x.w, gain);
            };
            {
                const uint8_t * row[2];
                half2 gain[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    row[i]  = k_rows + 8*i*p.stride[0];
                    gain[i] = __float2half2_rn(get_gain(gain_base[0], row[i][0]));
                }
#pragma unroll
                for (int s = 0; s < D/32; ++s) {
                    const pair_code code = load_code(codes + 4*s + q4);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        put(s, i, decode_eight(row[i], code), gain[i]);
                    }
                }
                if (n_wide[0] > 0) {
#pragma unroll
                    for (int s = 0; s < D/32; ++s) {
#pragma unroll 1
                        for (int q = 0; q < min(4, n_wide[0] - 4*s); ++q) {
                            const pair_code code = load_code(codes + 4*s + q);
                            if (is_wide(code)) {
                                decode_wide_rows(stage[0] + skew[0], p.stride[0], code, wide);
                                __syncwarp();
                                if (q4 == q) {
#pragma unroll
                                    for (int i = 0; i < 2; ++i) {
                                        put(s, i, wide[r8 + 8*i], gain[i]);
                                    }
                                }
                                __syncwarp();
                            }
                        }
                    }
                }
                if (any_chosen) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int from = __shfl_sync(0xffffffff, chosen, 16*own + r8 + 8*i);
                        if (from != -1) {
#pragma unroll
                            for (int s = 0; s < D/32; ++s) {
                                put(s, i, load_exact(a, GGML_KVTC_K, D, head, from, (4*s + q4)*8), __float2half2_rn(1.0f));
                            }
                        }
                    }
                }
            }
            again = pass == 0 && any_either;
            if (!again) {
                __syncwarp();
                fetch(0, slab + 1, more);
            }

            // keys, rotated, times queries
            float w[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
            const uint32_t * turn[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                turn[i] = fine + max(0, row_pos[i] - anchor)*TURN + 4*q4;
            }
            uint32_t x[D/4]; // row r8, columns 2*q4, + 1; row r8 + 8, the same columns; next eight columns ...
            uint32_t ones[4];
            set_ones(ones);
            wgmma_fence();
            wgmma<true>(x, k[KS - 1], of_matrix + 2*D*(KS - 1)); // the smallest come first
#pragma unroll
            for (int s = KS - 2; s >= 0; --s) {
                wgmma<false>(x, k[s], of_matrix + 2*D*s);
            }
            wgmma<false>(x, ones, of_matrix + 2*D*KS);
            wgmma_commit();
            wgmma_wait();
            const auto multiply = [&](auto near) {
#pragma unroll
                for (int u = 0; u < D/32; ++u) {
                    uint32_t qf[4];
                    ldmatrix_x4(qf, turned + lane%8*LD + 32*u + lane/8*8);
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
                                const uint32_t su = m == 0 ? cs[i].y : cs[i].w;
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
                        mma(w, kf, qf[2*m], qf[2*m + 1]);
                    }
                }
            };
            if (near) {
                multiply(std::true_type());
            } else {
                multiply(std::false_type());
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
                    v += slope[x]*(ONE ? __shfl_sync(0xffffffff, __half2float(now.mask[0][0]), 16*own + r8 + 8*i) : __half2float(now.mask[ONE ? 0 : i][x]));
                    if (any_either) {
                        if (either && token[x] >= 0) {
                            const bool some = either >> (16*own + r8 + 8*i) & 1;
                            const bool ex   = some && is_exact(a, query_pos[token[x]], row_pos[i]);
                            if (pass == 0 ? ex : !ex) {
                                v = -INFINITY;
                            }
                        } else if (pass == 1) {
                            v = -INFINITY; // other warps of the group have keys for this pass
                        }
                    }
                    rises = rises || v > top[x];
                }
            }
            if (again) {
                copy_wait<0>();
            } else {
                copy_wait<1>(); // the values
            }
            __syncwarp();
            float gain[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool coded = !any_chosen || __shfl_sync(0xffffffff, chosen, 16*own + r8 + 8*i) == -1;
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
                    most[x] = fmaxf(top[x], fmaxf(w[x], w[2 + x]));
                    most[x] = fmaxf(most[x], __shfl_xor_sync(0xffffffff, most[x], 4));
                    most[x] = fmaxf(most[x], __shfl_xor_sync(0xffffffff, most[x], 8));
                    most[x] = fmaxf(most[x], __shfl_xor_sync(0xffffffff, most[x], 16));
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

            // group r8 + 8*own of keys 2*q4, + 1, + 8, + 9: its component c is row r8, or r8 + 8, of tile c modulo 4
            const pair_code code = load_code(codes + D/8 + r8 + 8*own);
#pragma unroll
            for (int s = 0; s < SHARE; ++s) {
                const int first = 16*(own ^ s);
                const uint8_t * rows = v_rows + (first - 16*own)*p.stride[1];
                uint4 z[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    z[n] = decode_eight(rows + (n%2 + n/2*8)*p.stride[1], code);
                }
#pragma unroll 1
                for (int g = 0; g < min(8, n_wide[1] - 8*own); ++g) {
                    const pair_code code = load_code(codes + D/8 + 8*own + g);
                    if (is_wide(code)) {
                        decode_wide_rows(rows - 2*q4*p.stride[1], p.stride[1], code, wide);
                        __syncwarp();
                        if (r8 == g) {
#pragma unroll
                            for (int n = 0; n < 4; ++n) {
                                z[n] = wide[2*q4 + n%2 + n/2*8];
                            }
                        }
                        __syncwarp();
                    }
                }
                if (any_chosen) {
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const int from = __shfl_sync(0xffffffff, chosen, first + 2*q4 + n%2 + n/2*8);
                        if (from != -1) {
                            z[n] = load_exact(a, GGML_KVTC_V, D, head, from, (r8 + 8*own)*8);
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

    //
    // the warps' states to one, and out
    //
    copy_wait<0>();
    __syncthreads();
    float * all_o   = (float *) smem;       // [set][row][D + 8]
    float * all_top = all_o + N_SET*8*LD;   // [set][row]
    float * all_sum = all_top + N_SET*8;    // [set][row][warp of it]
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        float s = sum[x];
        s += __shfl_xor_sync(0xffffffff, s, 4);
        s += __shfl_xor_sync(0xffffffff, s, 8);
        s += __shfl_xor_sync(0xffffffff, s, 16);
        const int row = set*8 + 2*q4 + x;
        if (r8 == 0) {
            all_top[row] = top[x];
            all_sum[row*SHARE + own] = s;
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            all_o[row*LD + 64*own + 8*t + r8]       = o[t][x];
            all_o[row*LD + 64*own + 8*(t + 4) + r8] = o[t][x + 2];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_row*D; i += THREADS) {
        const int r = i/D;
        const int c = i%D;
        const int place = (c/64*8 + c%8)*8 + c/8%8;
        float most = -INFINITY;
        for (int u = 0; u < N_SET; ++u) {
            most = fmaxf(most, all_top[u*8 + r]);
        }
        float value = 0.0f;
        float total = 0.0f;
        for (int u = 0; u < N_SET && most != -INFINITY; ++u) {
            const float f = exp2f(all_top[u*8 + r] - most);
            value += f*all_o[(u*8 + r)*LD + place];
#pragma unroll
            for (int s = 0; s < SHARE; ++s) {
                total += f*all_sum[(u*8 + r)*SHARE + s];
            }
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
