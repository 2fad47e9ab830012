// Attention for few query rows on Hopper (sm_90a): as in decode.cu, but keys are rebuilt by wgmma, which reads coefficients and
// matrix from shared memory itself. That leaves registers for twice the warps, and they hide each other's waits.
//
// Four warps share a slab of 64 cells for that product. All else a warp does on its own 16 cells of it:
//
//   decode keys -> [all four] rebuild 64 channels, rotate, multiply by the queries; twice -> weights -> decode values -> add
//
// The mean of a channel is added by the product itself: two more components are 1 in every row, and the matrix has the mean's
// upper and lower half there.
#include "decode.cuh"
#include "pairs.cuh"

#include <type_traits>

namespace kvtc {

namespace {

constexpr int WARPS = 4; // of a group

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// K-major operand without swizzle: cores of 8 rows x 16 bytes; `next_k`, `next_row` bytes apart
__device__ __forceinline__ uint64_t get_operand(const void * at, int next_k, int next_row) {
    const uint32_t address = (uint32_t) __cvta_generic_to_shared(at);
    return (uint64_t) ((address & 0x3ffff) >> 4) | (uint64_t) (next_k >> 4) << 16 | (uint64_t) (next_row >> 4) << 32;
}

__device__ __forceinline__ void wgmma_fence()  { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait()   { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// 64 rows x 64 columns += 64 x 16 times 16 x 64
template <bool start>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.s32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n"
        "}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "n"(start ? 0 : 1));
}

// the four warps of a group meet; true where it is true for any thread
__device__ __forceinline__ bool meet(int group, bool x) {
    int any;
    asm volatile(
        "{\n"
        ".reg .pred p, q;\n"
        "setp.ne.s32 p, %1, 0;\n"
        "barrier.cta.red.or.pred.aligned q, %2, %3, p;\n"
        "selp.s32 %0, 1, 0, q;\n"
        "}\n"
        : "=r"(any) : "r"((int) x), "r"(group + 1), "n"(32*WARPS) : "memory");
    return any != 0;
}
#endif // __CUDA_ARCH_FEAT_SM90_ALL

template <int D, int GROUPS>
__launch_bounds__(32*WARPS*GROUPS, 1)
__global__ void decode_cells_sm90(const attn_args a, const sm90_plan p, float * values, float2 * meta) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KS      = D/16;
    constexpr int SLAB    = 16*WARPS;
    constexpr int LD      = D + 8;
    constexpr int THREADS = 32*WARPS*GROUPS;
    constexpr int N_WARP  = WARPS*GROUPS;
    using tile_t = core_tile<SLAB>;
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(1024) uint8_t smem[];

    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int group = __shfl_sync(0xffffffff, warp/WARPS, 0); // known to be the same for all of a warp
    const int part  = warp % WARPS; // of the slab
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

    half     * matrix  = (half *)     smem;                      // [D/8 + 2 groups of components][D channels][8]
    half     * ones    = (half *)     (smem + p.at_ones);        // [2][8 rows][8]: for all rows
    float    * queries = (float *)    (smem + p.at_queries);
    uint64_t * freq    = (uint64_t *) (smem + p.at_freq);
    uint32_t * fine    = (uint32_t *) (smem + p.at_fine);        // [position][D/2 + 4] (cos, sin)
    auto     * codes   = (pair_code *) (smem + p.at_codes);      // [2][D/8]
    uint8_t  * tables[2] = { smem + p.at_table[0], smem + p.at_table[1] };
    half     * turned  = (half *) (smem + p.at_turned) + group*8*LD; // queries rotated back by the anchor
    uint8_t  * stage[2] = { smem + p.at_stage[0] + warp*16*p.stride[0], smem + p.at_stage[1] + warp*16*p.stride[1] };
    half     * tile    = (half *) (smem + p.at_tile) + group*SLAB*D; // [D/8 groups of components][SLAB cells][8]
    half     * mine    = tile + part*16*8;

    //
    // what the block needs of the pack
    //
    for (int i = threadIdx.x; i < D*(D/8); i += THREADS) {
        const int c = i/(D/8);
        copy_async<16>(matrix + (i%(D/8)*D + c)*8, at<half>(base, kh.decode) + pair_channel(c, rope_type, n_rot)*D + i%(D/8)*8);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const ggml_kvtc_cuda_head & h = s == 0 ? kh : vh;
        for (int i = threadIdx.x; i < (int) h.n_pairs/16; i += THREADS) {
            copy_async<16>(tables[s] + 16*i, base + h.pairs + 16*i);
        }
    }
    for (int i = threadIdx.x; i < SM90_FINE*(D/8); i += THREADS) {
        copy_async<16>(fine + i/(D/8)*(D/2 + 4) + i%(D/8)*4, base + pack.turns + 16*i);
    }
    copy_commit();
    const uint64_t * pack_freq = at<uint64_t>(base, pack.freq);
    for (int i = threadIdx.x; i < 2*D; i += THREADS) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (i < D) {
            const float mean  = at<float>(base, kh.mean)[pair_channel(i, rope_type, n_rot)];
            const float upper = __half2float(__float2half(mean));
            x.x = pack_half2(upper, mean - upper);
        }
        *(uint4 *) (matrix + (D/8*D + i)*8) = x;
        if (i < 2*8) {
            *(uint4 *) (ones + i*8) = make_uint4(i < 8 ? 0x3c003c00 : 0, 0, 0, 0);
        }
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
    const int n_wide[2] = { (int) (kh.n_wide + 1)/2, (int) (vh.n_wide + 1)/2 };
    const int skew[2] = { (int) (kh.payload % p.unit), (int) (vh.payload % p.unit) };

    //
    // the thread's queries: columns 2*q4, 2*q4 + 1
    //
    const int * query_pos = a.query_pos + stream*a.n_tokens;
    int min_pos = query_pos[0];
    int max_pos = min_pos;
    for (int t = 1; t < a.n_tokens; ++t) {
        min_pos = min(min_pos, query_pos[t]);
        max_pos = max(max_pos, query_pos[t]);
    }
    int   token[2];
    float slope[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int r = 2*q4 + e;
        token[e] = r < n_row ? r/a.group : -1;
        slope[e] = LOG2E*alibi_slope(a, head*a.group + r%a.group);
    }
    const half * mask = a.mask ? a.mask + stream%a.n_mask*a.ne_m3 : nullptr;
    const int2 * info = a.info + (int64_t) stream*a.n_kv;

    float o[KS][4];
    float top[2] = { -INFINITY, -INFINITY };
    float sum[2] = { 0.0f, 0.0f };
#pragma unroll
    for (int t = 0; t < KS; ++t) {
        o[t][0] = o[t][1] = o[t][2] = o[t][3] = 0.0f;
    }
    int anchor = INT_MIN;
    const auto set_anchor = [&](int pos) { // the group's threads together
        anchor = pos;
        constexpr int PAIRS = D/2;
        const int    pair = threadIdx.x%PAIRS;
        const float2 cs   = get_rotation(pos, freq[pair]);
        constexpr int STEP = 32*WARPS/PAIRS;
        const int r0 = threadIdx.x%(32*WARPS)/PAIRS;
#pragma unroll
        for (int i = 0; i < 8/STEP; ++i) {
            const int r = r0 + i*STEP;
            if (r < n_row) { // the others stay zeros
                const float2 x = *(const float2 *) (queries + r*LD + 2*pair);
                *(uint32_t *) (turned + r*LD + 2*pair) = pack_half2(x.x*cs.x + x.y*cs.y, x.y*cs.x - x.x*cs.y);
            }
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
        int       row  = slab*SLAB + 16*part + (lane >> p.lanes[s]);
        uint8_t * to   = target[s];
        const int step = 32 >> p.lanes[s];
        const int n    = inside ? n_rows[s] : 0;
#pragma unroll 1
        for (int i = 0; i < n; ++i) {
            const uint8_t * from = source[s] + (int64_t) min(row, a.n_kv - 1)*(int) a.nb_row[s];
            if (p.unit == 16) {
                copy_async<16>(to, from);
            } else if (p.unit == 8) {
                copy_async<8>(to, from);
            } else {
                copy_async<4>(to, from);
            }
            row += step;
            to  += step*p.stride[s];
        }
        copy_commit();
    };
    struct ahead { // what is read from global memory a slab ahead
        int2 cell;   // of lane % 16
        int  pos[2]; // of cells lane and lane + 32 of the slab
        half mask[2][2];
    };
    const auto look = [&](int slab, ahead & x) {
        const int first = slab*SLAB + 16*part;
        const int mine  = first + lane%16;
        x.cell   = info[min(mine, a.n_kv - 1)];
        x.pos[0] = info[min(slab*SLAB + lane,      a.n_kv - 1)].x;
        x.pos[1] = info[min(slab*SLAB + lane + 32, a.n_kv - 1)].x;
        if (a.n_tokens == 1) {
            x.mask[0][0] = mine >= a.n_kv ? __ushort_as_half(0xfc00) : mask ? mask[mine] : __ushort_as_half(0);
            return;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int cell = first + r8 + 8*i;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                x.mask[i][e] = cell >= a.n_kv || token[e] < 0 ? __ushort_as_half(0xfc00) : mask ? mask[token[e]*a.ne_m1 + cell] : __ushort_as_half(0);
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
    fetch(1, slab, slab < slab_end);
    if (slab < slab_end) {
        look(slab, next);
    }
    copy_wait<2>(); // all but these fetches
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // the matrix was written by threads, wgmma reads it
    __syncthreads();

    const uint64_t of_matrix = get_operand(matrix, 16*D, 128);
    const uint64_t of_tile   = get_operand(tile, 16*SLAB, 128);
    const uint64_t of_ones   = get_operand(ones, 16*8, 0);

#pragma unroll 1
    for (; slab < slab_end; ++slab) {
        ahead now = next;
        const bool more = slab + 1 < slab_end;
        if (more) {
            look(slab + 1, next);
        }
        bool seen;
        if (a.n_tokens == 1) {
            seen = is_seen(now.mask[0][0]);
            const half mine = now.mask[0][0];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                now.mask[i][0] = now.mask[i][1] = __shfl_sync(0xffffffff, mine, r8 + 8*i);
            }
        } else {
            seen = is_seen(now.mask[0][0]) || is_seen(now.mask[0][1]) || is_seen(now.mask[1][0]) || is_seen(now.mask[1][1]);
        }
        copy_wait<1>(); // the keys
        // also: they have arrived for all threads of the warp, and the tile is free, since all have read their values
        if (!meet(group, seen)) {
            copy_wait<0>();
            __syncwarp();
            fetch(0, slab + 1, more);
            fetch(1, slab + 1, more);
            continue;
        }
        const uint8_t * k_row = stage[0] + lane%16*p.stride[0] + skew[0];
        const uint8_t * v_row = stage[1] + lane%16*p.stride[1] + skew[1];
        const int pos  = now.cell.x;
        const int slot = now.cell.y;
        const key_use use = pos < 0 ? USE_CODES : get_use(a, pos, slot, min_pos, max_pos);
        const uint32_t either = __ballot_sync(0xffffffff, use == USE_EITHER);

        // empty cells are masked: any angle will do
        const int lowest  = warp_min(min(now.pos[0] < 0 ? INT_MAX : now.pos[0], now.pos[1] < 0 ? INT_MAX : now.pos[1]));
        const int highest = warp_max(max(now.pos[0], now.pos[1]));
        const bool near = n_rp > 0 && highest - lowest < SM90_FINE && lowest != INT_MAX;
        const int  wanted = !near ? 0 : anchor == INT_MIN || lowest < anchor || highest - anchor >= SM90_FINE ? lowest : anchor;
        if (wanted != anchor) {
            set_anchor(wanted);
        }
        int row_pos[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row_pos[i] = __shfl_sync(0xffffffff, pos, r8 + 8*i);
        }

        bool again = false;
#pragma unroll 1
        for (int pass = 0; pass == 0 || again; ++pass) {
            // pass 0: keys that are exact for all queries, and codes; pass 1: keys that are exact for some
            const int chosen = (pass == 0 ? use == USE_EXACT : use == USE_EITHER) ? slot : -1;

            decode_pairs<D, tile_t, true>(k_row, codes, n_wide[0], get_gain(kh, k_row[0]), mine);
            replace_rows<D, tile_t, 16>(a, GGML_KVTC_K, head, chosen, mine);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            again = meet(group, pass == 0 && either != 0);
            if (!again) {
                fetch(0, slab + 1, more);
            }

            // keys, rotated, times queries
            float w[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
            for (int c0 = 0; c0 < D; c0 += 64) {
                float k[32];
                const uint64_t of_half = of_matrix + c0; // 16 bytes a channel
                wgmma_fence();
                wgmma<true>(k, of_ones, of_half + D/8*D);
#pragma unroll
                for (int s = 0; s < KS; ++s) {
                    wgmma<false>(k, of_tile + 2*SLAB*s, of_half + 2*D*s);
                }
                wgmma_commit();
                wgmma_wait();
                const auto multiply = [&](auto near) {
                    const uint32_t * row_fine[2];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        row_fine[i] = fine + max(0, row_pos[i] - anchor)*(D/2 + 4) + q4;
                    }
                    uint32_t qf[4];
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        if (c % 2 == 0) {
                            ldmatrix_x4(qf, turned + lane%8*LD + c0 + 16*c + lane/8*8);
                        }
                        uint32_t kf[4];
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
#pragma unroll
                            for (int e = 0; e < 2; ++e) {
                                const int   pair = c0/2 + 8*c + 4*j; // + q4
                                const float x    = k[8*c + 4*j + 2*e];
                                const float y    = k[8*c + 4*j + 2*e + 1];
                                if constexpr (decltype(near)::value) {
                                    const half2 f = *(const half2 *) &row_fine[e][pair];
                                    const half2 r = __hfma2(__floats2half2_rn(x, y), __low2half2(f), __hmul2(__floats2half2_rn(-y, x), __high2half2(f)));
                                    kf[2*j + e] = *(const uint32_t *) &r;
                                } else {
                                    const float2 cs = get_rotation(row_pos[e], freq[pair + q4]);
                                    kf[2*j + e] = pack_half2(x*cs.x - y*cs.y, x*cs.y + y*cs.x);
                                }
                            }
                        }
                        mma(w, kf, qf[c%2*2], qf[c%2*2 + 1]);
                    }
                };
                if (near) {
                    multiply(std::true_type());
                } else {
                    multiply(std::false_type());
                }
            }

            // weights: w[2*i + x] is key r8 + 8*i, query 2*q4 + x
            bool rises = false;
#pragma unroll
            for (int x = 0; x < 2; ++x) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float & v = w[2*i + x];
                    if (a.softcap != 0.0f) {
                        v = a.softcap*LOG2E*tanhf(v);
                    }
                    v += slope[x]*__half2float(now.mask[i][x]);
                    if (either && token[x] >= 0) {
                        const bool some = either >> (r8 + 8*i) & 1;
                        const bool ex   = some && is_exact(a, query_pos[token[x]], row_pos[i]);
                        if (pass == 0 ? ex : !ex) {
                            v = -INFINITY;
                        }
                    } else if (pass == 1) {
                        v = -INFINITY; // another warp of the group has keys for this pass
                    }
                    rises = rises || v > top[x];
                }
            }
            if (__any_sync(0xffffffff, rises)) {
                float fade[2];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    float most = fmaxf(top[x], fmaxf(w[x], w[2 + x]));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 4));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 8));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 16));
                    fade[x] = top[x] == -INFINITY ? 0.0f : exp2f(top[x] - most);
                    top [x] = most;
                    sum [x] *= fade[x];
                }
#pragma unroll
                for (int t = 0; t < KS; ++t) {
                    o[t][0] *= fade[0];
                    o[t][1] *= fade[1];
                    o[t][2] *= fade[0];
                    o[t][3] *= fade[1];
                }
            }
            uint32_t wt[2];
            if (again) {
                copy_wait<0>();
            } else {
                copy_wait<1>(); // the values
            }
            meet(group, false); // all rows have arrived, and other warps' products, which read all rows of the tile, are done
            const float v_gain = chosen == -1 ? get_gain(vh, v_row[0]) : 1.0f;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float g = __shfl_sync(0xffffffff, v_gain, r8 + 8*i);
                float v[2];
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    v[x] = top[x] == -INFINITY ? 0.0f : exp2f(w[2*i + x] - top[x]);
                    sum[x] += v[x];
                }
                wt[i] = transpose(pack_half2(v[0]*g, v[1]*g));
            }

            decode_pairs<D, tile_t, false>(v_row, codes + D/8, n_wide[1], 1.0f, mine);
            replace_rows<D, tile_t, 16>(a, GGML_KVTC_V, head, chosen, mine);
            if (!again) {
                fetch(1, slab + 1, more);
            }
#pragma unroll
            for (int t = 0; t < KS; ++t) {
                uint32_t zv[4];
                ldmatrix_x4_trans(zv, mine + (2*t + lane/8%2)*8*SLAB + (lane%8 + lane/16*8)*8);
                mma(o[t], zv, wt[0], wt[1]);
            }
            __syncwarp(); // the tile is free for the next keys
        }
    }

    //
    // the warps' states to one, and out
    //
    copy_wait<0>();
    __syncthreads();
    float * all_o   = (float *) smem;         // [warp][row][D + 8]
    float * all_top = all_o + N_WARP*8*LD;    // [warp][row]
    float * all_sum = all_top + N_WARP*8;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
        float s = sum[x];
        s += __shfl_xor_sync(0xffffffff, s, 4);
        s += __shfl_xor_sync(0xffffffff, s, 8);
        s += __shfl_xor_sync(0xffffffff, s, 16);
        const int row = warp*8 + 2*q4 + x;
        if (r8 == 0) {
            all_top[row] = top[x];
            all_sum[row] = s;
        }
#pragma unroll
        for (int t = 0; t < KS; ++t) {
            all_o[row*LD + 16*t + r8]     = o[t][x];
            all_o[row*LD + 16*t + r8 + 8] = o[t][x + 2];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_row*D; i += THREADS) {
        const int r = i/D;
        float most = -INFINITY;
        for (int u = 0; u < N_WARP; ++u) {
            most = fmaxf(most, all_top[u*8 + r]);
        }
        float value = 0.0f;
        float total = 0.0f;
        for (int u = 0; u < N_WARP && most != -INFINITY; ++u) {
            const float f = exp2f(all_top[u*8 + r] - most);
            value += f*all_o[(u*8 + r)*LD + i%D];
            total += f*all_sum[u*8 + r];
        }
        const int64_t row = ((int64_t) stream*a.n_tokens + r/a.group)*a.n_head + head*a.group + r%a.group;
        values[(row*gridDim.x + blockIdx.x)*D + i%D] = value;
        if (i%D == 0) {
            meta[row*gridDim.x + blockIdx.x] = make_float2(most, total);
        }
    }
#else
    GGML_UNUSED_VARS(a, p, values, meta);
    NO_DEVICE_CODE;
#endif
}

template <int D, int GROUPS>
void launch(const attn_args & a, const sm90_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const auto kernel = decode_cells_sm90<D, GROUPS>;
    allow_shared_memory((const void *) kernel, p.shared);
    ggml_cuda_kernel_launch(kernel, { dim3(p.n_split, a.n_head_kv, a.n_stream), 32*WARPS*GROUPS, p.shared, stream }, a, p, values, meta);
}

} // namespace

void decode_sm90(const attn_args & a, int d, const sm90_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    switch (d) {
        case  64: return launch< 64, SM90_GROUPS>(a, p, values, meta, stream);
        case 128: return launch<128, SM90_GROUPS>(a, p, values, meta, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace kvtc
