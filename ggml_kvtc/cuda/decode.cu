// Attention for few query rows (decode, speculation, parallel slots), straight from the codes.
//
// A block serves one kv head, NQ*8 query rows (tokens x heads of the group) and a range of cells. Every warp walks over slabs of
// 16*MT cells on its own; nothing is exchanged before the end:
//
//   codes -> coefficients, in registers as the A operand       (tables.cuh)
//   x decode matrix (shared memory) -> keys, 16 channels at a time
//   rotate: pairs are neighbours in the accumulator, angle = (position - anchor) * frequency from a table
//   keys, as f16, are the A operand of the product with the queries, which are rotated back by the anchor
//   weights, transposed, are the B operand of the product with the values' coefficients, which are decoded as the A operand
//
// So no key or value ever leaves registers. The values' sum stays in coefficient space; combine.cu turns it into channels.
#include "decode.cuh"
#include "tables.cuh"

namespace kvtc {

namespace {

template <int D, int NQ, int MT>
struct decode_kernel {
    static constexpr int KS     = D/16;               // steps of 16 components or channels
    static constexpr int CH     = D % 32 == 0 ? 2 : 1; // steps of channels that are rebuilt at once
    static constexpr int SLAB   = 16*MT;
    static constexpr int ROWS   = 8*NQ;
    static constexpr int LD     = D + 8;              // of the decode matrix and the queries: rows start 4 banks apart
    static constexpr int NR     = 2*MT;               // rows of a slab that a thread holds: lane/4 + 8*i
};

template <int D, int NQ, int MT>
__launch_bounds__(256, 1)
__global__ void decode_cells(const attn_args a, const decode_plan p, float * values, float2 * meta) {
    using C = decode_kernel<D, NQ, MT>;
    extern __shared__ __align__(16) uint8_t smem[];

    const int lane   = threadIdx.x % 32;
    const int warp   = threadIdx.x / 32;
    const int n_warp = blockDim.x / 32;
    const int q4     = lane % 4;
    const int r8     = lane / 4;

    const int head    = blockIdx.y % a.n_head_kv;
    const int row0    = blockIdx.y / a.n_head_kv*C::ROWS;
    const int stream  = blockIdx.z;
    const int n_row   = a.n_tokens*a.group;
    const int token0  = row0/a.group;
    const int token1  = min(a.n_tokens - 1, (row0 + C::ROWS - 1)/a.group);

    const char * base = find_pack(a.pack);
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const ggml_kvtc_cuda_head & kh   = get_head(base, GGML_KVTC_K, head);
    const ggml_kvtc_cuda_head & vh   = get_head(base, GGML_KVTC_V, head);
    const int n_rot = pack.rope_type == GGML_KVTC_ROPE_NONE ? 0 : pack.rope_n_rot;
    const int n_rp  = n_rot/2; // rotated pairs

    half       * matrix  = (half *)       (smem);
    float      * mean    = (float *)      (smem + p.at_mean);
    float      * queries = (float *)      (smem + p.at_queries);
    uint64_t   * freq    = (uint64_t *)   (smem + p.at_freq);
    half2      * fine    = (half2 *)      (smem + p.at_fine);
    group_code * k_codes = (group_code *) (smem + p.at_codes);
    group_code * v_codes = k_codes + D/4;
    uint8_t    * k_table = smem + p.at_k_table;
    uint8_t    * v_table = smem + p.at_v_table;
    uint8_t    * stage   = smem + p.at_stage + warp*p.n_stage*C::SLAB*(p.stride[0] + p.stride[1]);

    //
    // what the block needs of the pack
    //
    for (int i = threadIdx.x; i < D*(D/8); i += blockDim.x) {
        const int c = i/(D/8);
        copy_async<16>(matrix + c*C::LD + i%(D/8)*8, at<half>(base, kh.decode) + pair_channel(c, pack.rope_type, n_rot)*D + i%(D/8)*8);
    }
    copy_commit();
    const uint64_t * pack_freq = at<uint64_t>(base, pack.freq);
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        mean[i] = at<float>(base, kh.mean)[pair_channel(i, pack.rope_type, n_rot)];
        if (i < D/2) {
            freq[i] = i < n_rp ? pack_freq[i] : 0;
        }
    }
    const float scale = a.softcap != 0.0f ? a.scale/a.softcap : a.scale*LOG2E;
    for (int i = threadIdx.x; i < C::ROWS*D; i += blockDim.x) {
        const int r     = row0 + i/D;
        const int token = r/a.group;
        float x = 0.0f;
        if (r < n_row) {
            const int channel = pair_channel(i%D, pack.rope_type, n_rot);
            x = *(const float *) (a.q + token*a.nb_q1 + (head*a.group + r%a.group)*a.nb_q2 + stream*a.nb_q3 + channel*sizeof(float));
            x *= i%D < n_rot ? scale*pack.rope_mscale : scale;
        }
        queries[i/D*C::LD + i%D] = x;
    }
    const int skew[2] = { (int) (kh.payload % p.unit), (int) (vh.payload % p.unit) };
    make_key_tables  (base, kh, D, skew[0],        k_codes, k_table);
    make_value_tables(base, vh, D, skew[1], p.rep, v_codes, v_table);
    for (int i = threadIdx.x; i < p.n_fine*(D/2); i += blockDim.x) {
        const int pair = i%(D/2);
        const float2 cs = get_rotation(i/(D/2), pair < n_rp ? pack_freq[pair] : 0);
        fine[i/(D/2)*(D/2 + 4) + pair] = __floats2half2_rn(cs.x, cs.y);
    }
    copy_wait<0>();
    __syncthreads();

    //
    // the thread's queries: columns 2*q4, 2*q4 + 1 of every 8
    //
    const int * query_pos = a.query_pos + stream*a.n_tokens;
    int min_pos = query_pos[token0];
    int max_pos = min_pos;
    for (int t = token0 + 1; t <= token1; ++t) {
        min_pos = min(min_pos, query_pos[t]);
        max_pos = max(max_pos, query_pos[t]);
    }
    int   token[NQ][2];
    float slope[NQ][2];
#pragma unroll
    for (int n = 0; n < NQ; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int r = row0 + 8*n + 2*q4 + e;
            token[n][e] = r < n_row ? r/a.group : -1;
            slope[n][e] = LOG2E*alibi_slope(a, head*a.group + r%a.group);
        }
    }
    const half * mask = a.mask ? a.mask + stream%a.n_mask*a.ne_m3 : nullptr;
    const int2 * info = a.info + (int64_t) stream*a.n_kv;

    float o[D/16][NQ][4];
    float top[NQ][2];
    float sum[NQ][2];
    uint32_t qf[NQ][D/16][2]; // queries rotated back by the anchor, as the B operand
#pragma unroll
    for (int n = 0; n < NQ; ++n) {
        top[n][0] = top[n][1] = -INFINITY;
        sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll
        for (int t = 0; t < C::KS; ++t) {
            o[t][n][0] = o[t][n][1] = o[t][n][2] = o[t][n][3] = 0.0f;
        }
    }
    int  anchor = INT_MIN;
    const auto set_anchor = [&](int pos) {
        anchor = pos;
#pragma unroll
        for (int s = 0; s < C::KS; ++s) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int pair = 8*s + 4*j + q4;
                const float2 cs = get_rotation(pos, freq[pair]);
#pragma unroll
                for (int n = 0; n < NQ; ++n) {
                    const float2 x = *(const float2 *) (queries + (8*n + r8)*C::LD + 2*pair);
                    qf[n][s][j] = pack_half2(x.x*cs.x + x.y*cs.y, x.y*cs.x - x.x*cs.y);
                }
            }
        }
    };

    //
    // staging: rows of a slab on their way while the one before is worked on
    //
    const uint8_t * source[2];
    int n_copy[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const ggml_kvtc_cuda_head & h = s == 0 ? kh : vh;
        source[s] = a.rows[s] + stream*a.nb_stream[s] + h.payload - skew[s];
        n_copy[s] = (skew[s] + (int) h.n_bytes + p.unit - 1)/p.unit;
    }
    const auto fetch = [&](int first, int buffer) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            uint8_t * dst = stage + buffer*C::SLAB*(p.stride[0] + p.stride[1]) + s*C::SLAB*p.stride[0];
            for (int j = lane/4; j < C::SLAB; j += 8) {
                const uint8_t * src = source[s] + min(first + j, a.n_kv - 1)*a.nb_row[s];
                for (int c = q4; c < n_copy[s]; c += 4) {
                    if (p.unit == 16) {
                        copy_async<16>(dst + j*p.stride[s] + 16*c, src + 16*c);
                    } else if (p.unit == 4) {
                        copy_async<4>(dst + j*p.stride[s] + 4*c, src + 4*c);
                    } else {
                        dst[j*p.stride[s] + c] = src[c];
                    }
                }
            }
        }
        copy_commit();
    };
    struct ahead { // what is read from global memory a slab ahead
        int2 cell;
        half mask[C::NR][NQ][2];
    };
    const auto look = [&](int first, ahead & x) {
        x.cell = info[min(first + lane%C::SLAB, a.n_kv - 1)];
#pragma unroll
        for (int i = 0; i < C::NR; ++i) {
            const int cell = first + r8 + 8*i;
#pragma unroll
            for (int n = 0; n < NQ; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    x.mask[i][n][e] = cell >= a.n_kv || token[n][e] < 0 ? __ushort_as_half(0xfc00) : mask ? mask[token[n][e]*a.ne_m1 + cell] : __ushort_as_half(0);
                }
            }
        }
    };

    const int slab_end = min(p.n_slab, (int) (blockIdx.x + 1)*p.slabs_per_split);
    int slab = blockIdx.x*p.slabs_per_split + warp;
    ahead next;
    if (slab < slab_end) {
        fetch(slab*C::SLAB, 0);
        look (slab*C::SLAB, next);
    }
    for (int buffer = 0; slab < slab_end; slab += n_warp) {
        const ahead now = next;
        if (p.n_stage == 2) {
            if (slab + n_warp < slab_end) {
                fetch((slab + n_warp)*C::SLAB, buffer ^ 1);
                look ((slab + n_warp)*C::SLAB, next);
            } else {
                copy_commit();
            }
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncwarp();
        const uint8_t * k_rows = stage + buffer*C::SLAB*(p.stride[0] + p.stride[1]);
        const uint8_t * v_rows = k_rows + C::SLAB*p.stride[0];

        bool seen = false;
#pragma unroll
        for (int i = 0; i < C::NR; ++i) {
#pragma unroll
            for (int n = 0; n < NQ; ++n) {
                seen = seen || __half_as_ushort(now.mask[i][n][0]) != 0xfc00 || __half_as_ushort(now.mask[i][n][1]) != 0xfc00;
            }
        }
        const int pos  = now.cell.x;
        const int slot = now.cell.y;
        const key_use use = pos < 0 ? USE_CODES : get_use(a, pos, slot, min_pos, max_pos);
        const uint32_t either = __ballot_sync(0xffffffff, use == USE_EITHER);

        // empty cells are masked: any angle will do
        const int lowest  = warp_min(pos < 0 ? INT_MAX : pos);
        const int highest = warp_max(pos);
        bool near = true;
        if (n_rp > 0) {
            near = highest - lowest < p.n_fine && lowest != INT_MAX;
            if (near && (anchor == INT_MIN || lowest < anchor || highest - anchor >= p.n_fine)) {
                set_anchor(lowest);
            } else if (!near && anchor != 0) {
                set_anchor(0);
            }
        } else if (anchor != 0) {
            set_anchor(0);
        }

        const bool any_seen = __any_sync(0xffffffff, seen);
        for (int pass = 0; any_seen && pass < (either ? 2 : 1); ++pass) {
            // pass 0: keys that are exact for all queries, and codes; pass 1: keys that are exact for some
            const int      chosen = (pass == 0 ? use == USE_EXACT : use == USE_EITHER) ? slot : -1;
            const uint32_t exact  = __ballot_sync(0xffffffff, chosen != -1);
            const int      steps  = exact ? C::KS : (kh.rank + 15)/16;

            half2 gain[C::NR];
            float v_gain[C::NR];
            int   row_slot[C::NR];
            int   row_pos [C::NR];
#pragma unroll
            for (int i = 0; i < C::NR; ++i) {
                const int j = r8 + 8*i;
                row_slot[i] = __shfl_sync(0xffffffff, chosen, j);
                row_pos [i] = __shfl_sync(0xffffffff, pos, j);
                const float g = get_gain(kh, k_rows[j*p.stride[0] + skew[0]]);
                gain  [i] = __floats2half2_rn(g, g);
                v_gain[i] = row_slot[i] == -1 ? get_gain(vh, v_rows[j*p.stride[1] + skew[1]]) : 1.0f;
            }

            // keys' coefficients
            uint32_t z[MT][C::KS][4];
#pragma unroll
            for (int s = 0; s < C::KS; ++s) {
                const group_code code = k_codes[4*s + q4];
#pragma unroll
                for (int i = 0; i < C::NR; ++i) {
                    uint32_t lo = 0;
                    uint32_t hi = 0;
                    if (s < steps) {
                        decode_key(k_rows + (r8 + 8*i)*p.stride[0], code, k_table, lo, hi);
                        lo = mul_half2(lo, gain[i]);
                        hi = mul_half2(hi, gain[i]);
                        if (exact && row_slot[i] != -1) {
                            const uint2 x = load_exact(a, GGML_KVTC_K, D, head, row_slot[i], 16*s + 4*q4);
                            lo = x.x;
                            hi = x.y;
                        }
                    }
                    z[i/2][s][i%2]     = lo;
                    z[i/2][s][i%2 + 2] = hi;
                }
            }

            // keys, rotated, times queries
            float w[MT][NQ][4];
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int n = 0; n < NQ; ++n) {
                    w[m][n][0] = w[m][n][1] = w[m][n][2] = w[m][n][3] = 0.0f;
                }
            }
#pragma unroll
            for (int c0 = 0; c0 < C::KS; c0 += C::CH) {
                float k[MT][2*C::CH][4];
#pragma unroll
                for (int j = 0; j < 2*C::CH; ++j) {
                    const float2 x = *(const float2 *) (mean + 16*c0 + 8*j + 2*q4);
#pragma unroll
                    for (int m = 0; m < MT; ++m) {
                        k[m][j][0] = k[m][j][2] = x.x;
                        k[m][j][1] = k[m][j][3] = x.y;
                    }
                }
#pragma unroll
                for (int s = 0; s < C::KS; ++s) {
                    if (s >= steps) {
                        break;
                    }
#pragma unroll
                    for (int c = 0; c < C::CH; ++c) {
                        uint32_t b[4]; // rows 0-7, 8-15 of the first 8 components, then of the last
                        ldmatrix_x4(b, matrix + (16*(c0 + c) + lane%16)*C::LD + 16*s + lane/16*8);
#pragma unroll
                        for (int m = 0; m < MT; ++m) {
                            mma(k[m][2*c],     z[m][s], b[0], b[2]);
                            mma(k[m][2*c + 1], z[m][s], b[1], b[3]);
                        }
                    }
                }
#pragma unroll
                for (int c = 0; c < C::CH; ++c) {
#pragma unroll
                    for (int m = 0; m < MT; ++m) {
                        uint32_t kf[4];
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                const int   i    = 2*m + e;
                                const int   pair = 8*(c0 + c) + 4*j + q4;
                                const float x    = k[m][2*c + j][2*e];
                                const float y    = k[m][2*c + j][2*e + 1];
                                if (n_rp == 0) {
                                    kf[2*j + e] = pack_half2(x, y);
                                } else if (near) {
                                    const half2 cs = fine[(row_pos[i] < 0 ? 0 : row_pos[i] - anchor)*(D/2 + 4) + pair];
                                    const half2 xy = __floats2half2_rn(x, y);
                                    const half2 sc = __halves2half2(__hneg(__high2half(cs)), __low2half(cs));
                                    const half2 r  = __hfma2(__low2half2(xy), cs, __hmul2(__high2half2(xy), sc));
                                    kf[2*j + e] = *(const uint32_t *) &r;
                                } else {
                                    const float2 cs = get_rotation(row_pos[i], freq[pair]);
                                    kf[2*j + e] = pack_half2(x*cs.x - y*cs.y, x*cs.y + y*cs.x);
                                }
                            }
                        }
#pragma unroll
                        for (int n = 0; n < NQ; ++n) {
                            mma(w[m][n], kf, qf[n][c0 + c][0], qf[n][c0 + c][1]);
                        }
                    }
                }
            }

            // weights: w[m][n][2*e + x] is key r8 + 8*e + 16*m, query 8*n + 2*q4 + x
            uint32_t wt[MT][NQ][2];
            float    peak[NQ][2];
#pragma unroll
            for (int n = 0; n < NQ; ++n) {
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    float most = top[n][x];
#pragma unroll
                    for (int i = 0; i < C::NR; ++i) {
                        float & v = w[i/2][n][i%2*2 + x];
                        if (a.softcap != 0.0f) {
                            v = a.softcap*LOG2E*tanhf(v);
                        }
                        v += slope[n][x]*__half2float(now.mask[i][n][x]);
                        if (either && token[n][x] >= 0) {
                            const bool some = either >> (r8 + 8*i) & 1;
                            const bool ex   = some && is_exact(a, query_pos[token[n][x]], row_pos[i]);
                            if (pass == 0 ? ex : !ex) {
                                v = -INFINITY;
                            }
                        }
                        most = fmaxf(most, v);
                    }
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 4));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 8));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 16));
                    peak[n][x] = most;
                }
            }
            bool rises = false;
#pragma unroll
            for (int n = 0; n < NQ; ++n) {
                rises = rises || peak[n][0] > top[n][0] || peak[n][1] > top[n][1];
            }
            if (__any_sync(0xffffffff, rises)) {
#pragma unroll
                for (int n = 0; n < NQ; ++n) {
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        const float f = top[n][x] == -INFINITY ? 0.0f : exp2f(top[n][x] - peak[n][x]);
                        top[n][x]  = peak[n][x];
                        sum[n][x] *= f;
#pragma unroll
                        for (int t = 0; t < C::KS; ++t) {
                            o[t][n][x]     *= f;
                            o[t][n][x + 2] *= f;
                        }
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < NQ; ++n) {
#pragma unroll
                for (int i = 0; i < C::NR; ++i) {
                    float v[2];
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        v[x] = top[n][x] == -INFINITY ? 0.0f : exp2f(w[i/2][n][i%2*2 + x] - top[n][x]);
                        sum[n][x] += v[x];
                    }
                    wt[i/2][n][i%2] = transpose(pack_half2(v[0]*v_gain[i], v[1]*v_gain[i]));
                }
            }

            // values' coefficients: component r8 of every group, keys 2*q4, 2*q4 + 1, and those + 8
            int value_slot[2*C::NR];
#pragma unroll
            for (int j = 0; j < 2*C::NR; ++j) {
                value_slot[j] = __shfl_sync(0xffffffff, chosen, 8*(j/2) + 2*q4 + j%2);
            }
#pragma unroll
            for (int t = 0; t < C::KS; ++t) {
                uint32_t zv[MT][4];
#pragma unroll
                for (int g = 0; g < 2; ++g) {
                    const group_code code = v_codes[2*t + g];
                    const int width = code.bits >> 16;
                    const int bit   = (code.bits & 0xffff) + r8*width;
                    const uint8_t * table = v_table + code.table + (p.rep == 4 ? 4*lane : 4*r8);
#pragma unroll
                    for (int i = 0; i < C::NR; ++i) {
                        uint32_t x[2] = { 0, 0 };
                        if (width > 0) {
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                const uint8_t * row = v_rows + (8*i + 2*q4 + e)*p.stride[1] + (bit >> 3);
                                uint32_t bits = row[0];
                                if (width & (width - 1)) {
                                    bits |= (uint32_t) row[1] << 8;
                                }
                                const uint32_t v = bits >> (bit & 7) & ((1u << width) - 1);
                                x[e] = *(const uint32_t *) (table + v*32*p.rep);
                            }
                        }
                        if (exact) {
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                const int sl = value_slot[2*i + e];
                                if (sl != -1) {
                                    const uint2 y = load_exact(a, GGML_KVTC_V, D, head, sl, 16*t + 8*g + r8/4*4);
                                    x[e] = (r8 & 2 ? y.y : y.x) >> 16*(r8 & 1) & 0xffff;
                                }
                            }
                        }
                        zv[i/2][g + 2*(i%2)] = x[0] | x[1] << 16;
                    }
                }
#pragma unroll
                for (int m = 0; m < MT; ++m) {
#pragma unroll
                    for (int n = 0; n < NQ; ++n) {
                        mma(o[t][n], zv[m], wt[m][n][0], wt[m][n][1]);
                    }
                }
            }
        }
        __syncwarp(); // the rows are read: the next copies may overwrite them
        if (p.n_stage == 2) {
            buffer ^= 1;
        } else if (slab + n_warp < slab_end) {
            fetch((slab + n_warp)*C::SLAB, 0);
            look ((slab + n_warp)*C::SLAB, next);
        }
    }

    //
    // the warps' states to one, and out
    //
    copy_wait<0>();
    __syncthreads();
    float * all_o   = (float *) smem;                       // [warp][row][D + 8]
    float * all_top = all_o + n_warp*C::ROWS*C::LD;          // [warp][row]
    float * all_sum = all_top + n_warp*C::ROWS;
#pragma unroll
    for (int n = 0; n < NQ; ++n) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
            float s = sum[n][x];
            s += __shfl_xor_sync(0xffffffff, s, 4);
            s += __shfl_xor_sync(0xffffffff, s, 8);
            s += __shfl_xor_sync(0xffffffff, s, 16);
            const int row = warp*C::ROWS + 8*n + 2*q4 + x;
            if (r8 == 0) {
                all_top[row] = top[n][x];
                all_sum[row] = s;
            }
#pragma unroll
            for (int t = 0; t < C::KS; ++t) {
                all_o[row*C::LD + 16*t + r8]     = o[t][n][x];
                all_o[row*C::LD + 16*t + r8 + 8] = o[t][n][x + 2];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < C::ROWS*D; i += blockDim.x) {
        const int r = i/D;
        if (row0 + r >= n_row) {
            break;
        }
        float most = -INFINITY;
        for (int u = 0; u < n_warp; ++u) {
            most = fmaxf(most, all_top[u*C::ROWS + r]);
        }
        float value = 0.0f;
        float total = 0.0f;
        for (int u = 0; u < n_warp && most != -INFINITY; ++u) {
            const float f = exp2f(all_top[u*C::ROWS + r] - most);
            value += f*all_o[(u*C::ROWS + r)*C::LD + i%D];
            total += f*all_sum[u*C::ROWS + r];
        }
        const int     t   = (row0 + r)/a.group;
        const int64_t row = ((int64_t) stream*a.n_tokens + t)*a.n_head + head*a.group + (row0 + r)%a.group;
        values[(row*gridDim.x + blockIdx.x)*D + i%D] = value;
        if (i%D == 0) {
            meta[row*gridDim.x + blockIdx.x] = make_float2(most, total);
        }
    }
}

template <int D, int NQ, int MT>
void launch(const attn_args & a, const decode_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const auto kernel = decode_cells<D, NQ, MT>;
    allow_shared_memory((const void *) kernel, p.shared);
    const dim3 grid(p.n_split, a.n_head_kv*p.n_row_block, a.n_stream);
    kernel<<<grid, 32*p.n_warp, p.shared, stream>>>(a, p, values, meta);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace

void decode(const attn_args & a, int d, const decode_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const bool two = p.nq == 2;
    switch (d) {
        case  64: return two ? launch< 64, 2, 1>(a, p, values, meta, stream) : launch< 64, 1, 2>(a, p, values, meta, stream);
        case  80: return two ? launch< 80, 2, 1>(a, p, values, meta, stream) : launch< 80, 1, 2>(a, p, values, meta, stream);
        case  96: return two ? launch< 96, 2, 1>(a, p, values, meta, stream) : launch< 96, 1, 2>(a, p, values, meta, stream);
        case 128: return two ? launch<128, 2, 1>(a, p, values, meta, stream) : launch<128, 1, 2>(a, p, values, meta, stream);
        case 256: return launch<256, 1, 1>(a, p, values, meta, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace kvtc
