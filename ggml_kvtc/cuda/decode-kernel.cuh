// Attention for few query rows (decode, speculation, parallel slots), straight from the codes.
//
// A block serves one kv head, NQ*8 query rows (tokens x heads of the group) and a range of cells. Every warp walks over slabs of
// 16*MT cells on its own; nothing is exchanged before the end:
//
//   codes -> coefficients, a thread for each row, into a tile of shared memory (tables.cuh); from there they are the A operand
//   x decode matrix (shared memory) -> keys, 32 channels at a time
//   rotate: pairs are neighbours in the accumulator, angle = (position - anchor) * frequency from a table
//   keys, as f16, are the A operand of the product with the queries, which are rotated back by the anchor
//   weights, transposed, are the B operand of the product with the values' coefficients, decoded into the same tile
//
// So no key or value ever reaches global memory. The values' sum stays in coefficient space; combine.cu turns it into channels.
// Keys of another kind than kvtc's (sides.h) are not rebuilt: what their rows hold is multiplied with the queries as they are.
#pragma once

#include "decode-block.cuh"
#include "decode.cuh"
#include "merge.cuh"
#include "sides.cuh"

#include <type_traits>

namespace kvtc {

template <int D, int NQ, int MT, bool in_shared, typename Sides>
__launch_bounds__(256, 1)
static __global__ void decode_cells(const attn_args a, const decode_plan p, float * values, float2 * meta, const Sides sides) {
    constexpr int KS   = D/16;                // steps of 16 components or channels
    constexpr int CH   = D % 32 == 0 ? 2 : 1; // steps of channels that are rebuilt at once
    constexpr int SLAB = 16*MT;
    constexpr int ROWS = 8*NQ;
    constexpr int LD   = D + 8;               // of matrix, queries and tile: rows start 4 banks apart
    constexpr int NR   = 2*MT;                // rows of a slab in a thread's operands: lane/4 + 8*i
    extern __shared__ __align__(16) uint8_t smem[];

    const int lane   = threadIdx.x % 32;
    const int warp   = threadIdx.x / 32;
    const int n_warp = blockDim.x / 32;
    const int q4     = lane % 4;
    const int r8     = lane / 4;

    const int head    = blockIdx.y % a.n_head_kv;
    const int row0    = blockIdx.y / a.n_head_kv*ROWS;
    const int stream  = blockIdx.z;
    const int n_row   = a.n_tokens*a.group;
    const int token0  = row0/a.group;
    const int token1  = min(a.n_tokens - 1, (row0 + ROWS - 1)/a.group);

    const char * base = a.pack;
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const ggml_kvtc_cuda_head & kh   = get_head(base, GGML_KVTC_K, head);
    const ggml_kvtc_cuda_head & vh   = get_head(base, GGML_KVTC_V, head);
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;
    const int n_rp      = n_rot/2; // rotated pairs

    float    * mean    = (float *)    (smem + p.at_mean);
    float    * queries = (float *)    (smem + p.at_queries);
    uint64_t * freq    = (uint64_t *) (smem + p.at_freq);
    uint2    * fine    = (uint2 *)    (smem + p.at_fine);
    auto     * codes   = (ggml_kvtc_cuda_code *) (smem + p.at_codes);
    uint8_t  * tables[2] = { smem + p.at_table[0], smem + p.at_table[1] };
    uint8_t  * stage   = smem + p.at_stage + warp*p.n_stage*SLAB*(p.stride[0] + p.stride[1]);
    half     * tile    = (half *) (smem + p.at_tile) + warp*SLAB*LD;
    const half * matrix = in_shared ? (const half *) smem : at<half>(base, kh.decode);

    load_block<D, ROWS, in_shared>(a, p, head, row0, stream, smem);
    const int skew[2] = { Sides::other ? 0 : (int) (kh.payload % p.unit), Sides::other ? 0 : (int) (vh.payload % p.unit) };

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

    float o[KS][NQ][4];
    float top[NQ][2];
    float sum[NQ][2];
    uint32_t qf[NQ][KS][2]; // queries rotated back by the anchor, as the B operand
#pragma unroll
    for (int n = 0; n < NQ; ++n) {
        top[n][0] = top[n][1] = -INFINITY;
        sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll
        for (int t = 0; t < KS; ++t) {
            o[t][n][0] = o[t][n][1] = o[t][n][2] = o[t][n][3] = 0.0f;
        }
    }
    int anchor = INT_MIN;
    const auto set_anchor = [&](int pos) {
        anchor = pos;
#pragma unroll
        for (int s = 0; s < KS; ++s) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int pair = 8*s + 4*j + q4;
                const float2 cs = get_rotation(pos, freq[pair]);
#pragma unroll
                for (int n = 0; n < NQ; ++n) {
                    const float2 x = *(const float2 *) (queries + (8*n + r8)*LD + 2*pair);
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
        if constexpr (Sides::other) {
            const side_rows & own = sides.side[s];
            source[s] = own.kind == SIDE_KVTC ? source[s] : a.rows[s] + stream*a.nb_stream[s] + head*own.n_bytes;
            n_copy[s] = own.kind == SIDE_KVTC ? (int) h.n_bytes : own.n_bytes; // bytes: rows begin anywhere
        }
    }
    // where a cell's row of a side begins
    const auto get_row = [&](int s, int cell) { return source[s] + (int64_t) min(cell, a.n_kv - 1)*(int) a.nb_row[s]; };
    const auto copy_rows = [&](auto unit, int first, int buffer) { // a power of two of threads takes a row
        constexpr int n = decltype(unit)::value;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const int       shift = p.lanes[s];
            const int       c     = lane & ((1 << shift) - 1);
            const int       bytes = (int) a.nb_row[s];
            const uint8_t * src = source[s] + c*n;
            uint8_t       * dst = stage + buffer*SLAB*(p.stride[0] + p.stride[1]) + s*SLAB*p.stride[0] + c*n;
#pragma unroll 4
            for (int j = lane >> shift; j < SLAB; j += 32 >> shift) {
                const uint8_t * from = src + (int64_t) min(first + j, a.n_kv - 1)*bytes;
                if constexpr (n == 1) {
                    for (int i = c; i < n_copy[s]; i += 1 << shift) {
                        dst[j*p.stride[s] + i - c] = from[i - c];
                    }
                } else if (c < n_copy[s]) {
                    copy_async<n>(dst + j*p.stride[s], from);
                }
            }
        }
        copy_commit();
    };
    const auto fetch = [&](int first, int buffer) {
        if constexpr (Sides::other) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const int shift = p.lanes[s];
                uint8_t * dst   = stage + buffer*SLAB*(p.stride[0] + p.stride[1]) + s*SLAB*p.stride[0];
#pragma unroll 1
                for (int j = lane >> shift; j < SLAB; j += 32 >> shift) {
                    copy_pieces(dst + j*p.stride[s], get_pieces(get_row(s, first + j), n_copy[s]), lane & ((1 << shift) - 1), 1 << shift);
                }
            }
            copy_commit();
            return;
        }
        switch (p.unit) {
            case 16: copy_rows(std::integral_constant<int, 16>(), first, buffer); break;
            case  8: copy_rows(std::integral_constant<int,  8>(), first, buffer); break;
            case  4: copy_rows(std::integral_constant<int,  4>(), first, buffer); break;
            default: copy_rows(std::integral_constant<int,  1>(), first, buffer); break;
        }
    };
    struct ahead { // what is read from global memory a slab ahead
        int2 cell;
        half mask[NR][NQ][2];
        float gain[2]; // of turbo sides: of the thread's row
    };
    const auto look = [&](int first, ahead & x) {
        x.cell = info[min(first + lane%SLAB, a.n_kv - 1)];
        if constexpr (Sides::other) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const side_rows & own = sides.side[s];
                x.gain[s] = own.kind == SIDE_TURBO ? load_gain(own, get_row(s, first + lane%SLAB) - head*own.n_bytes, head) : 1.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < NR; ++i) {
            const int cell = first + r8 + 8*i;
#pragma unroll
            for (int n = 0; n < NQ; ++n) {
                x.mask[i][n][0] = read_mask(a, mask, token[n][0], cell);
                x.mask[i][n][1] = read_mask(a, mask, token[n][1], cell);
            }
        }
    };

    // neighbouring slabs to one warp: they share an anchor
    const int split_end = min(p.n_slab, (int) (blockIdx.x + 1)*p.slabs_per_split);
    const int per_warp  = (p.slabs_per_split + n_warp - 1)/n_warp;
    int       slab      = blockIdx.x*p.slabs_per_split + warp*per_warp;
    const int slab_end  = min(split_end, slab + per_warp);
    ahead next;
    if (slab < slab_end) {
        fetch(slab*SLAB, 0);
        look (slab*SLAB, next);
    } else {
        copy_commit();
    }
    copy_wait<1>(); // all but this fetch
    __syncthreads();

#pragma unroll 1
    for (int buffer = 0; slab < slab_end; ++slab) {
        ahead now = next;
        if (p.n_stage == 2) {
            if (slab + 1 < slab_end) {
                fetch((slab + 1)*SLAB, buffer ^ 1);
                look ((slab + 1)*SLAB, next);
            } else {
                copy_commit();
            }
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncwarp();
        const uint8_t * k_row = stage + buffer*SLAB*(p.stride[0] + p.stride[1]) + lane%SLAB*p.stride[0];
        const uint8_t * v_row = stage + buffer*SLAB*(p.stride[0] + p.stride[1]) + SLAB*p.stride[0] + lane%SLAB*p.stride[1];
        int  row_skew[2]  = { skew[0], skew[1] };
        bool coded_values = true; // by kvtc
        if constexpr (Sides::other) {
            coded_values = sides.side[1].kind == SIDE_KVTC;
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                row_skew[s] = (int) ((uintptr_t) get_row(s, slab*SLAB + lane%SLAB) % SIDE_PIECE);
            }
        }

        const uint32_t left_out = __ballot_sync(0xffffffff, now.cell.y < a.least_slot);
        if (now.cell.y < a.least_slot) {
            now.cell = make_int2(-1, -1);
        }
        bool seen = false;
#pragma unroll
        for (int i = 0; i < NR; ++i) {
            const int at = __shfl_sync(0xffffffff, now.cell.x, r8 + 8*i);
#pragma unroll
            for (int e = 0; e < 2*NQ; ++e) {
                half & x = now.mask[i][e/2][e%2];
                x = left_out >> (r8 + 8*i) & 1 ? __ushort_as_half(HIDDEN) : hide_by_position(a, x, query_pos[max(0, token[e/2][e%2])], at);
                seen = seen || is_seen(x);
            }
        }
        const int pos  = now.cell.x;
        const int slot = now.cell.y;
        const key_use use = pos < 0 ? USE_CODES : get_use(a, pos, slot, min_pos, max_pos);
        const uint32_t either = __ballot_sync(0xffffffff, use == USE_EITHER);

        // empty cells are masked: any angle will do
        const int lowest  = warp_min(pos < 0 ? INT_MAX : pos);
        const int highest = warp_max(pos);
        const bool near = n_rp > 0 && highest - lowest < p.n_fine && lowest != INT_MAX;
        const int  wanted = !near ? 0 : anchor == INT_MIN || lowest < anchor || highest - anchor >= p.n_fine ? lowest : anchor;
        if (wanted != anchor) {
            set_anchor(wanted);
        }

        const bool any_seen = __any_sync(0xffffffff, seen);
#pragma unroll 1
        for (int pass = 0; any_seen && pass < (either ? 2 : 1); ++pass) {
            // pass 0: keys that are exact for all queries, and codes; pass 1: keys that are exact for some
            const int chosen = (pass == 0 ? use == USE_EXACT : use == USE_EITHER) ? slot : -1;

            int row_pos[NR];
#pragma unroll
            for (int i = 0; i < NR; ++i) {
                row_pos[i] = __shfl_sync(0xffffffff, pos, r8 + 8*i);
            }

            float w[MT][NQ][4];
            if constexpr (Sides::other) {
                decode_side<D, LD, SLAB, false>(a, sides.side[0], GGML_KVTC_K, head, k_row, row_skew[0], tables[0], 1.0f, chosen, tile);
                score_stored<D, LD, NQ, MT>(tile, qf, chosen == -1 ? now.gain[0] : 1.0f, w);
            } else {
                // keys' coefficients
                decode_slab<D, LD, SLAB, true>(a, GGML_KVTC_K, head, k_row + skew[0], codes, tables[0], get_gain(kh.gain_base, k_row[skew[0]]), chosen, tile);
                uint32_t z[MT][KS][4];
#pragma unroll
                for (int s = 0; s < KS; ++s) {
#pragma unroll
                    for (int m = 0; m < MT; ++m) {
                        ldmatrix_x4(z[m][s], tile + (16*m + lane%16)*LD + 16*s + lane/16*8);
                    }
                }
                __syncwarp(); // the tile is free for the values

                // keys, rotated, times queries
#pragma unroll
                for (int m = 0; m < MT; ++m) {
#pragma unroll
                    for (int n = 0; n < NQ; ++n) {
                        w[m][n][0] = w[m][n][1] = w[m][n][2] = w[m][n][3] = 0.0f;
                    }
                }
                const auto multiply = [&](auto near) {
                    const uint2 * row_fine[NR];
#pragma unroll
                    for (int i = 0; i < NR; ++i) {
                        row_fine[i] = fine + max(0, row_pos[i] - anchor)*(D/2 + 4) + q4;
                    }
#pragma unroll
                    for (int c0 = 0; c0 < KS; c0 += CH) {
                        float k[MT][2*CH][4];
#pragma unroll
                        for (int s = 0; s < KS; ++s) {
#pragma unroll
                            for (int c = 0; c < CH; ++c) {
                                uint32_t b[4];
                                load_matrix<D, in_shared>(b, matrix, 16*(c0 + c), 16*s, rope_type, n_rot);
#pragma unroll
                                for (int j = 0; j < 2; ++j) {
                                    const float2 start = *(const float2 *) (mean + 16*(c0 + c) + 8*j + 2*q4);
#pragma unroll
                                    for (int m = 0; m < MT; ++m) {
                                        if (s == 0) {
                                            mma(k[m][2*c + j], z[m][s], b[2*j], b[2*j + 1], start);
                                        } else {
                                            mma(k[m][2*c + j], z[m][s], b[2*j], b[2*j + 1]);
                                        }
                                    }
                                }
                            }
                        }
#pragma unroll
                        for (int c = 0; c < CH; ++c) {
#pragma unroll
                            for (int m = 0; m < MT; ++m) {
                                uint32_t kf[4];
#pragma unroll
                                for (int j = 0; j < 2; ++j) {
#pragma unroll
                                    for (int e = 0; e < 2; ++e) {
                                        const int   pair = 8*(c0 + c) + 4*j; // + q4
                                        const float x    = k[m][2*c + j][2*e];
                                        const float y    = k[m][2*c + j][2*e + 1];
                                        if constexpr (decltype(near)::value) {
                                            const uint2 f  = row_fine[2*m + e][pair];
                                            const half2 xy = __floats2half2_rn(x, y);
                                            const half2 r  = __hfma2(__low2half2(xy), *(const half2 *) &f.x, __hmul2(__high2half2(xy), *(const half2 *) &f.y));
                                            kf[2*j + e] = *(const uint32_t *) &r;
                                        } else {
                                            const float2 cs = get_rotation(row_pos[2*m + e], freq[pair + q4]);
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
                };
                if (near) {
                    multiply(std::true_type());
                } else {
                    multiply(std::false_type());
                }
            }

            // weights: w[m][n][2*e + x] is key r8 + 8*e + 16*m, query 8*n + 2*q4 + x
            bool  rises = false;
            float fade[NQ][2];
#pragma unroll
            for (int n = 0; n < NQ; ++n) {
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    float most = top[n][x];
#pragma unroll
                    for (int i = 0; i < NR; ++i) {
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
                    most = column_max(most);
                    rises      = rises || most > top[n][x];
                    fade[n][x] = top[n][x] == -INFINITY ? 0.0f : exp2f(top[n][x] - most); // 1 where nothing rises
                    top [n][x] = most;
                    sum [n][x] *= fade[n][x];
                }
            }
            if (__any_sync(0xffffffff, rises)) {
#pragma unroll
                for (int t = 0; t < KS; ++t) {
#pragma unroll
                    for (int n = 0; n < NQ; ++n) {
                        o[t][n][0] *= fade[n][0];
                        o[t][n][1] *= fade[n][1];
                        o[t][n][2] *= fade[n][0];
                        o[t][n][3] *= fade[n][1];
                    }
                }
            }
            uint32_t wt[MT][NQ][2];
            float v_gain = 1.0f;
            if (chosen == -1) {
                v_gain = Sides::other && !coded_values ? now.gain[1] : get_gain(vh.gain_base, v_row[row_skew[1]]);
            }
#pragma unroll
            for (int i = 0; i < NR; ++i) {
                const float g = __shfl_sync(0xffffffff, v_gain, r8 + 8*i);
#pragma unroll
                for (int n = 0; n < NQ; ++n) {
                    float v[2];
#pragma unroll
                    for (int x = 0; x < 2; ++x) {
                        v[x] = top[n][x] == -INFINITY ? 0.0f : exp2f(w[i/2][n][i%2*2 + x] - top[n][x]);
                        sum[n][x] += v[x];
                    }
                    wt[i/2][n][i%2] = transpose(pack_half2(v[0]*g, v[1]*g));
                }
            }

            // values' coefficients
            if constexpr (Sides::other) {
                if (coded_values) {
                    decode_slab<D, LD, SLAB, false>(a, GGML_KVTC_V, head, v_row, codes + D/8, tables[1], 1.0f, chosen, tile, row_skew[1]);
                } else {
                    decode_side<D, LD, SLAB, false>(a, sides.side[1], GGML_KVTC_V, head, v_row, row_skew[1], tables[1], 1.0f, chosen, tile);
                }
            } else {
                decode_slab<D, LD, SLAB, false>(a, GGML_KVTC_V, head, v_row + skew[1], codes + D/8, tables[1], 1.0f, chosen, tile);
            }
#pragma unroll
            for (int t = 0; t < KS; ++t) {
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    uint32_t zv[4];
                    ldmatrix_x4_trans(zv, tile + (16*m + lane%8 + lane/16*8)*LD + 16*t + lane/8%2*8);
#pragma unroll
                    for (int n = 0; n < NQ; ++n) {
                        mma(o[t][n], zv, wt[m][n][0], wt[m][n][1]);
                    }
                }
            }
            __syncwarp(); // the tile is free for the next keys
        }
        __syncwarp(); // the rows are read: the next copies may overwrite them
        if (p.n_stage == 2) {
            buffer ^= 1;
        } else if (slab + 1 < slab_end) {
            fetch((slab + 1)*SLAB, 0);
            look ((slab + 1)*SLAB, next);
        }
    }

    copy_wait<0>();
    __syncthreads();
    merge_states<D, NQ>(a, smem, o, top, sum, head, row0, stream, values, meta);
}

// kernel: decode_cells of these sides
template <typename Sides, typename Kernel>
void launch_decode(Kernel kernel, const attn_args & a, const decode_plan & p, const Sides & sides, float * values, float2 * meta, cudaStream_t stream) {
    allow_shared_memory((const void *) kernel, p.shared);
    const dim3 grid(p.n_split, a.n_head_kv*p.n_row_block, a.n_stream);
    kernel<<<grid, 32*p.n_warp, p.shared, stream>>>(a, p, values, meta, sides);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace kvtc
