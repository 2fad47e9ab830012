// Cells to tiles of f16 keys and values on Hopper. As in decode-sm90.cu, a thread decodes what it multiplies: of 16 rows of a warp,
// lane 4*r + q has groups 4*s + q of rows r and r + 8. For keys that is wgmma's operand; for values, eight rows of a register
// are transposed across the warp, which gives neighbouring keys of a component as tiles have them.
//
// Four warps share a slab of 64 cells. Keys leave the product as pairs of channels that rotate together.
#include "expand.cuh"
#include "hopper.cuh"
#include "pack-sm90.cuh"
#include "pairs.cuh"

namespace kvtc {

namespace {

constexpr int WARPS  = GROUP_WARPS;
constexpr int SLAB   = 16*WARPS;
constexpr int STAGES = 2;

template <int D>
__launch_bounds__(32*WARPS*REBUILD_GROUPS<D>, 1)
__global__ void rebuild(const attn_args a, const columns c, const rebuild_plan p, half * keys, half * values) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int KS      = D/16;
    constexpr int KEYS    = TILE_KEYS<D>;
    constexpr int WIDE    = D < 128 ? D : 128;          // columns of a product
    constexpr int GROUPS  = REBUILD_GROUPS<D>;
    constexpr int THREADS = 32*WARPS*GROUPS;
    extern __shared__ __align__(1024) uint8_t smem[];
    ggml_cuda_pdl_lc();
    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int group = __shfl_sync(0xffffffff, warp/WARPS, 0);
    const int q4    = lane % 4;
    const int r8    = lane / 4;
    const int head   = blockIdx.y;
    const int stream = blockIdx.z;
    const int side   = (int) blockIdx.x < p.n_key_block ? GGML_KVTC_K : GGML_KVTC_V;
    const int block   = side == GGML_KVTC_K ? blockIdx.x    : blockIdx.x - p.n_key_block;
    const int n_block = side == GGML_KVTC_K ? p.n_key_block : gridDim.x  - p.n_key_block;

    const char * base = a.pack;
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const ggml_kvtc_cuda_head & h    = get_head(base, side, head);
    const int   rope_type = (int) pack.rope_type;
    const int   n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;
    const int   n_wide    = (int) h.n_wide;
    const float gain_base = h.gain_base;
    const int   skew      = (int) (h.payload % p.unit);

    uint64_t & ready  = *(uint64_t *) (smem + p.at_barrier);
    uint8_t  * table  = smem + (side == GGML_KVTC_K ? p.at_table[0] : p.at_table[1]);
    uint64_t * freq   = (uint64_t *)  (smem + p.at_freq);
    auto     * codes  = (pair_code *) (smem + p.at_codes);
    uint8_t  * stage  = smem + p.at_stage + warp*STAGES*16*p.stride;

    if (threadIdx.x == 0) {
        init_bring(ready, side == GGML_KVTC_K ? 2 : 1);
        if (side == GGML_KVTC_K) {
            bring_operand<D>(a, head, smem, ready);
        }
        bring_tables(a, h, table, ready);
    }
    if (threadIdx.x < D/8) {
        pair_code code = at<pair_code>(base, h.pair_codes)[threadIdx.x];
        code.table += (uint32_t) __cvta_generic_to_shared(table);
        codes[threadIdx.x] = code;
    }
    if (side == GGML_KVTC_K) {
        const uint64_t * pack_freq = at<uint64_t>(base, pack.freq);
        for (int i = threadIdx.x; i < D/2; i += THREADS) {
            freq[i] = i < n_rot/2 ? pack_freq[i] : 0;
        }
    }
    ggml_cuda_pdl_sync(); // all before is of the pack, which no kernel writes
    const int2 range = c.ranges[stream];
    half * const out = (side == GGML_KVTC_K ? keys : values) + ((int64_t) stream*a.n_head_kv + head)*c.n_all*D;

    // the warp's rows, from global memory to one of its stages
    const uint8_t * rows   = a.rows[side] + stream*a.nb_stream[side] + h.payload - skew;
    const int       n_copy = (skew + (int) h.n_bytes + p.unit - 1)/p.unit;
    const auto fetch = [&](int i, int cell) {
        const int part = lane & ((1 << p.lanes) - 1);
        const int n    = max(1, (16 << p.lanes)/32);
#pragma unroll 1
        for (int t = 0; t < n; ++t) {
            const int j = (lane >> p.lanes) + t*(32 >> p.lanes);
            const uint8_t * from = rows + (int64_t) __shfl_sync(0xffffffff, cell, j%16)*a.nb_row[side] + part*p.unit;
            uint8_t * to = stage + (i*16 + j)*p.stride + part*p.unit;
            if (part < n_copy && j < 16) {
                if (p.unit == 16) {
                    copy_async<16>(to, from);
                } else {
                    copy_async<8>(to, from);
                }
            }
        }
        copy_commit();
    };
    const auto cell = [&](int col) { return get_cell(a, c, stream, min(col, c.n_all - 16) + lane%16, range); };

    // slabs of a group follow each other by all groups
    const int step = n_block*GROUPS*SLAB;
    int col0 = get_first_column(c, stream) + (block*GROUPS + group)*SLAB + warp%WARPS*16;
    column_cell mine = cell(col0);
    column_cell next = cell(col0 + step);
    fetch(0, mine.cell);
    __syncthreads();
    barrier_wait(ready, 0);
    const uint64_t of_matrix = get_operand(smem, 16*D, 128);
    const uint64_t of_mean   = of_matrix + 2*D*KS - ((uint64_t) D << 16); // its other eight components, which count nothing, are the same

#pragma unroll 1
    for (int n = 0; col0 < c.n_all; col0 += step, n ^= 1) { // all warps of a group have as many slabs
        const column_cell after = cell(col0 + 2*step);
        fetch(n ^ 1, next.cell);
        copy_wait<1>();
        __syncwarp();

        uint32_t k[KS][4];
        const auto put = [&k](int s, int i, const uint4 & x, half2 gain) {
            k[2*s + 0][i]     = mul_half2(x.x, gain);
            k[2*s + 0][i + 2] = mul_half2(x.y, gain);
            k[2*s + 1][i]     = mul_half2(x.z, gain);
            k[2*s + 1][i + 2] = mul_half2(x.w, gain);
        };
        const uint8_t * row[2];
        half2 gain[2];
        int   pos[2];
        int   slot[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            row [i] = stage + (n*16 + r8 + 8*i)*p.stride + skew;
            gain[i] = __float2half2_rn(get_gain(gain_base, row[i][0]));
            pos [i] = __shfl_sync(0xffffffff, mine.pos,  r8 + 8*i);
            slot[i] = __shfl_sync(0xffffffff, mine.slot, r8 + 8*i);
        }
        if (D < 256 && side == GGML_KVTC_V) {
#pragma unroll
            for (int s = 0; s < D/32; ++s) {
                const pair_code code = load_code(codes + 4*s + q4);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    put(s, i, s < 2 ? decode_banks<D, 0>(row[i], code, r8 % 4) : decode_banks<D, 1>(row[i], code, r8 % 4), gain[i]);
                }
            }
        } else {
#pragma unroll
            for (int s = 0; s < D/32; ++s) {
                const pair_code code = load_code(codes + 4*s + q4);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    put(s, i, decode_eight<D>(row[i], code), gain[i]);
                }
            }
        }
        if (n_wide > 0) {
#pragma unroll
            for (int s = 0; s < D/32; ++s) {
                if (4*s < n_wide) {
                    const pair_code code = load_code(codes + 4*s + q4);
                    if (is_wide(code)) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            put(s, i, decode_wide<D>(row[i], code), gain[i]);
                        }
                    }
                }
            }
        }
        if (__any_sync(0xffffffff, mine.slot != -1)) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (slot[i] != -1) {
#pragma unroll
                    for (int s = 0; s < D/32; ++s) {
                        put(s, i, load_exact(a, side, D, head, slot[i], (4*s + q4)*8), __float2half2_rn(1.0f));
                    }
                }
            }
        }
        half * const tile = out + (int64_t) (col0/KEYS)*KEYS*D;
        const int    key  = col0%KEYS;
        if (side == GGML_KVTC_V) {
#pragma unroll
            for (int s = 0; s < KS; ++s) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    // columns of the register's eight rows: components 4*(s%2) + j/2*2, + 1 of the four groups, keys 8*(j%2) ...
                    const int comp = (s/2*4 + r8/2)*8 + s%2*4 + j/2*2 + r8%2;
                    *(uint32_t *) (tile + ((key/8 + j%2)*D + comp)*8 + 2*q4) = transpose(k[s][j]);
                }
            }
        } else {
#pragma unroll
            for (int part = 0; part < D/WIDE; ++part) {
                uint32_t x[WIDE/4]; // row r8, columns 2*q4, + 1; row r8 + 8, the same columns; next eight columns ...
                uint32_t ones[4];
                set_ones(ones);
                const uint64_t operand = of_matrix + part*WIDE;
                wgmma_fence();
                wgmma<true>(x, k[KS - 1], operand + 2*D*(KS - 1)); // the smallest come first
#pragma unroll
                for (int s = KS - 2; s >= 0; --s) {
                    wgmma<false>(x, k[s], operand + 2*D*s);
                }
                wgmma<false>(x, ones, of_mean + part*WIDE);
                wgmma_commit();
                wgmma_wait();
#pragma unroll
                for (int u = 0; u < WIDE/16; ++u) {
                    const int    pair = part*(WIDE/2) + 8*u + 2*q4; // and the next one
                    const float  m    = 2*pair < n_rot ? pack.rope_mscale : 1.0f;
                    const ulonglong2 f = *(const ulonglong2 *) (freq + pair);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float2 cs0 = get_rotation(pos[i], f.x);
                        const float2 cs1 = get_rotation(pos[i], f.y);
                        const half2  cos = __floats2half2_rn(m*cs0.x, m*cs1.x);
                        const half2  sin = __floats2half2_rn(m*cs0.y, m*cs1.y);
                        const half2  x0  = *(const half2 *) &x[4*u + i];
                        const half2  x1  = *(const half2 *) &x[4*u + i + 2];
                        const half2  y0  = __hfma2(x0, cos, __hneg2(__hmul2(x1, sin)));
                        const half2  y1  = __hfma2(x0, sin, __hmul2(x1, cos));
                        half * const to  = tile + (key + r8 + 8*i)*8;
                        const auto at = [&](int channel) { return to + channel/8*KEYS*8 + channel%8; };
                        if (rope_type == GGML_KVTC_ROPE_NEOX && n_rot == D) { // channels as queries have them
                            *(half2 *) at(pair)       = y0;
                            *(half2 *) at(pair + D/2) = y1;
                        } else {
                            *at(pair_channel(2*pair + 0, rope_type, n_rot)) = __low2half (y0);
                            *at(pair_channel(2*pair + 1, rope_type, n_rot)) = __low2half (y1);
                            *at(pair_channel(2*pair + 2, rope_type, n_rot)) = __high2half(y0);
                            *at(pair_channel(2*pair + 3, rope_type, n_rot)) = __high2half(y1);
                        }
                    }
                }
            }
        }
        __syncwarp();
        mine = next;
        next = after;
    }
    copy_wait<0>();
#else
    GGML_UNUSED_VARS(a, c, p, keys, values);
    NO_DEVICE_CODE;
#endif
}

template <int D>
void launch(const attn_args & a, const columns & c, const rebuild_plan & p, half * keys, half * values, cudaStream_t stream) {
    allow_shared_memory((const void *) rebuild<D>, p.shared);
    const dim3 grid(p.n_key_block + p.n_value_block, a.n_head_kv, a.n_stream);
    ggml_cuda_kernel_launch(rebuild<D>, { grid, 32*WARPS*REBUILD_GROUPS<D>, p.shared, stream }, a, c, p, keys, values);
}

} // namespace

void rebuild_tiles(const attn_args & a, int d, const columns & c, const rebuild_plan & p, half * keys, half * values, cudaStream_t stream) {
    switch (d) {
        case  64: return launch< 64>(a, c, p, keys, values, stream);
        case 128: return launch<128>(a, c, p, keys, values, stream);
        case 256: return launch<256>(a, c, p, keys, values, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace kvtc
