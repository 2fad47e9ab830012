// Queries, keys, values and masks as the flash attention kernel wants them. Keys are rebuilt as in decode.cu, but rotated to
// their positions, in f32, and written out.
#include "expand.cuh"
#include "tables.cuh"

namespace kvtc {

namespace {

__device__ __forceinline__ void get_query_range(const attn_args & a, int stream, int & min_pos, int & max_pos) {
    // every thread of the block takes part
    __shared__ int lo;
    __shared__ int hi;
    if (threadIdx.x == 0) {
        lo = INT_MAX;
        hi = INT_MIN;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < a.n_tokens; t += blockDim.x) {
        atomicMin(&lo, a.query_pos[stream*a.n_tokens + t]);
        atomicMax(&hi, a.query_pos[stream*a.n_tokens + t]);
    }
    __syncthreads();
    min_pos = lo;
    max_pos = hi;
}

// cell of a column, and its exact row: in a list, all keys count exactly; elsewhere those that do for all queries
struct column_cell {
    int cell, pos, slot;
};

__device__ __forceinline__ column_cell get_cell(const attn_args & a, const columns & c, int stream, int col, int min_pos, int max_pos) {
    column_cell x;
    if (c.list) {
        const int end = c.list_end[stream];
        x.cell = end > 0 ? c.list[(int64_t) stream*c.n_list + min(c.first + col, end - 1)] : 0;
    } else {
        x.cell = min(c.first + col, a.n_kv - 1);
    }
    const int2 info = a.info[(int64_t) stream*a.n_kv + x.cell];
    x.pos  = info.x;
    x.slot = info.x >= 0 && (c.list || get_use(a, info.x, info.y, min_pos, max_pos) == USE_EXACT) ? info.y : -1;
    return x;
}

__global__ void copy_queries(const attn_args a, int d, float * out) {
    const int64_t i = (int64_t) blockIdx.x*blockDim.x + threadIdx.x;
    if (i >= (int64_t) a.n_stream*a.n_tokens*a.n_head*d) {
        return;
    }
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) find_pack(a.pack);
    const int n_rot  = pack.rope_type == GGML_KVTC_ROPE_NONE ? 0 : pack.rope_n_rot;
    const int c      = (int) (i%d);
    const int head   = (int) (i/d%a.n_head);
    const int token  = (int) (i/d/a.n_head%a.n_tokens);
    const int stream = (int) (i/d/a.n_head/a.n_tokens);
    const float x = *(const float *) (a.q + token*a.nb_q1 + head*a.nb_q2 + stream*a.nb_q3 + pair_channel(c, pack.rope_type, n_rot)*sizeof(float));
    out[i] = c < n_rot ? x*pack.rope_mscale : x;
}

template <int D, bool in_shared>
__launch_bounds__(256, 1)
__global__ void rebuild_keys(const attn_args a, const columns c, const expand_plan p, half * out) {
    constexpr int KS = D/16;
    constexpr int LD = D + 8;
    extern __shared__ __align__(16) uint8_t smem[];
    const int lane   = threadIdx.x % 32;
    const int warp   = threadIdx.x / 32;
    const int n_warp = blockDim.x / 32;
    const int q4     = lane % 4;
    const int r8     = lane / 4;
    const int head   = blockIdx.y;
    const int stream = blockIdx.z;

    const char * base = find_pack(a.pack);
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const ggml_kvtc_cuda_head & kh   = get_head(base, GGML_KVTC_K, head);
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;

    float    * mean   = (float *)    (smem + p.at_mean);
    uint64_t * freq   = (uint64_t *) (smem + p.at_freq);
    auto     * codes  = (ggml_kvtc_cuda_code *) (smem + p.at_codes);
    uint8_t  * tables = smem + p.at_table;
    uint8_t  * stage  = smem + p.at_stage + warp*16*p.stride;
    half     * tile   = (half *) (smem + p.at_tile) + warp*16*LD;
    const half * matrix = in_shared ? (const half *) smem : at<half>(base, kh.decode);

    int min_pos;
    int max_pos;
    get_query_range(a, stream, min_pos, max_pos);
    if constexpr (in_shared) {
        for (int i = threadIdx.x; i < D*(D/8); i += blockDim.x) {
            const int row = i/(D/8);
            copy_async<16>((half *) smem + row*LD + i%(D/8)*8, at<half>(base, kh.decode) + pair_channel(row, rope_type, n_rot)*D + i%(D/8)*8);
        }
    }
    for (int i = threadIdx.x; i < (int) kh.n_tables/16; i += blockDim.x) {
        copy_async<16>(tables + 16*i, base + kh.tables + 16*i);
    }
    for (int i = threadIdx.x; i < D/8; i += blockDim.x) {
        copy_async<8>(codes + i, base + kh.codes + 8*i);
    }
    copy_commit();
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        mean[i] = at<float>(base, kh.mean)[pair_channel(i, rope_type, n_rot)];
        if (i < D/2) {
            freq[i] = i < n_rot/2 ? at<uint64_t>(base, pack.freq)[i] : 0;
        }
    }
    copy_wait<0>();
    __syncthreads();

    half * dst = out + ((int64_t) stream*a.n_head_kv + head)*c.n_all*D;
    const int n_col = get_n_column(c, stream);
    const uint8_t * rows = a.rows[0] + stream*a.nb_stream[0] + kh.payload;
    const bool words = a.nb_row[0] % 4 == 0;

    for (int col0 = (blockIdx.x*n_warp + warp)*16; col0 < n_col; col0 += gridDim.x*n_warp*16) {
        const column_cell mine = get_cell(a, c, stream, col0 + lane%16, min_pos, max_pos);
        for (int j = lane/8; j < 16; j += 4) {
            const uint8_t * src = rows + __shfl_sync(0xffffffff, mine.cell, j)*a.nb_row[0];
            if (words) {
                for (int i = lane%8; i < ((int) kh.n_bytes + 3)/4; i += 8) {
                    ((uint32_t *) (stage + j*p.stride))[i] = ((const uint32_t *) src)[i];
                }
            } else {
                for (int i = lane%8; i < (int) kh.n_bytes; i += 8) {
                    stage[j*p.stride + i] = src[i];
                }
            }
        }
        __syncwarp();
        const uint8_t * row = stage + lane%16*p.stride;
        decode_slab<D, LD, 16, true>(a, GGML_KVTC_K, head, row, codes, tables, get_gain(kh, row[0]), mine.slot, tile);
        uint32_t z[KS][4];
        int pos[2];
#pragma unroll
        for (int s = 0; s < KS; ++s) {
            ldmatrix_x4(z[s], tile + lane%16*LD + 16*s + lane/16*8);
        }
        __syncwarp();
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            pos[e] = __shfl_sync(0xffffffff, mine.pos, r8 + 8*e);
        }
#pragma unroll
        for (int n = 0; n < KS; ++n) {
            float k[2][4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float2 x = *(const float2 *) (mean + 16*n + 8*j + 2*q4);
                k[j][0] = k[j][2] = x.x;
                k[j][1] = k[j][3] = x.y;
            }
#pragma unroll
            for (int s = 0; s < KS; ++s) {
                uint32_t b[4];
                load_matrix<D, in_shared>(b, matrix, 16*n, 16*s, rope_type, n_rot);
                mma(k[0], z[s], b[0], b[1]);
                mma(k[1], z[s], b[2], b[3]);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float x = k[j][2*e];
                    const float y = k[j][2*e + 1];
                    const float2 cs = get_rotation(pos[e], freq[8*n + 4*j + q4]);
                    *(uint32_t *) (tile + (r8 + 8*e)*LD + 16*n + 8*j + 2*q4) = pack_half2(x*cs.x - y*cs.y, x*cs.y + y*cs.x);
                }
            }
        }
        __syncwarp();
        for (int i = lane; i < 16*(D/8); i += 32) { // whole rows: 16 bytes a thread
            *(uint4 *) (dst + (int64_t) (col0 + i/(D/8))*D + i%(D/8)*8) = *(const uint4 *) (tile + i/(D/8)*LD + i%(D/8)*8);
        }
        __syncwarp();
    }
}

// one thread for each group of a column
__global__ void rebuild_values(const attn_args a, int d, const columns c, half * out) {
    const int G      = d/8;
    const int head   = blockIdx.y;
    const int stream = blockIdx.z;
    int min_pos;
    int max_pos;
    get_query_range(a, stream, min_pos, max_pos);

    const char * base = find_pack(a.pack);
    const ggml_kvtc_cuda_head & vh = get_head(base, GGML_KVTC_V, head);
    const auto * codes     = at<ggml_kvtc_cuda_code>(base, vh.codes);
    const auto * levels_at = at<uint32_t>(base, vh.levels_at);
    const auto * levels    = at<half>    (base, vh.levels);
    half * dst = out + ((int64_t) stream*a.n_head_kv + head)*c.n_all*d;
    const int n_col = get_n_column(c, stream);

    for (int64_t i = (int64_t) blockIdx.x*blockDim.x + threadIdx.x; i < (int64_t) n_col*G; i += (int64_t) gridDim.x*blockDim.x) {
        const int g = (int) (i%G);
        const column_cell x = get_cell(a, c, stream, (int) (i/G), min_pos, max_pos);
        uint4 result = make_uint4(0, 0, 0, 0);
        if (x.slot != -1) {
            result = load_exact(a, GGML_KVTC_V, d, head, x.slot, 8*g);
        } else if (codes[g].width > 0) {
            const uint8_t * row  = a.rows[1] + stream*a.nb_stream[1] + x.cell*a.nb_row[1] + vh.payload;
            const float     gain = get_gain(vh, row[0]);
            const int       w    = codes[g].width;
            const half    * level = levels + levels_at[g];
            uint64_t word = 0;
            for (int b = 0; b < w; ++b) {
                word |= (uint64_t) row[codes[g].byte + b] << 8*b;
            }
            uint32_t v[4];
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                float y[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int l = 2*p + e;
                    y[e] = gain*__half2float(level[(l << w) + (int) (word >> l*w & ((1u << w) - 1))]);
                }
                v[p] = pack_half2(y[0], y[1]);
            }
            result = make_uint4(v[0], v[1], v[2], v[3]);
        }
        *(uint4 *) (dst + i*8) = result;
    }
}

__global__ void count_either(const attn_args a, int n_block, int * counts) {
    const int stream = blockIdx.y;
    int min_pos;
    int max_pos;
    get_query_range(a, stream, min_pos, max_pos);
    const int  cell = blockIdx.x*COUNT_CELLS + threadIdx.x;
    const int2 info = cell < a.n_kv ? a.info[(int64_t) stream*a.n_kv + cell] : make_int2(-1, -1);
    const int  n    = __syncthreads_count(info.x >= 0 && get_use(a, info.x, info.y, min_pos, max_pos) == USE_EITHER);
    if (threadIdx.x == 0) {
        counts[stream*n_block + blockIdx.x] = n;
    }
}

__global__ void write_either(const attn_args a, int n_block, int n_max, const int * counts, int * list, int * list_end) {
    __shared__ int warps[COUNT_CELLS/32];
    __shared__ int before;
    const int stream = blockIdx.y;
    int min_pos;
    int max_pos;
    get_query_range(a, stream, min_pos, max_pos);
    if (threadIdx.x == 0) {
        before = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (int) blockIdx.x; i += blockDim.x) {
        atomicAdd(&before, counts[stream*n_block + i]);
    }
    const int  cell  = blockIdx.x*COUNT_CELLS + threadIdx.x;
    const int2 info  = cell < a.n_kv ? a.info[(int64_t) stream*a.n_kv + cell] : make_int2(-1, -1);
    const bool found = info.x >= 0 && get_use(a, info.x, info.y, min_pos, max_pos) == USE_EITHER;
    const uint32_t ballot = __ballot_sync(0xffffffff, found);
    if (threadIdx.x % 32 == 0) {
        warps[threadIdx.x/32] = __popc(ballot);
    }
    __syncthreads();
    int at = before + __popc(ballot & ((1u << threadIdx.x%32) - 1));
    for (int i = 0; i < (int) threadIdx.x/32; ++i) {
        at += warps[i];
    }
    if (found && at < n_max) {
        list[(int64_t) stream*n_max + at] = cell;
    }
    if ((int) blockIdx.x == n_block - 1 && threadIdx.x == blockDim.x - 1) {
        list_end[stream] = min(at + (found ? 1 : 0), n_max);
    }
}

__global__ void copy_mask(const attn_args a, const columns c, const int * counts, int n_block, int split, bool always, half * out) {
    const int stream = blockIdx.z;
    const int token  = blockIdx.y;
    const int col    = blockIdx.x*blockDim.x + threadIdx.x;
    if (!c.list && !always) {
        const int range = blockIdx.x*blockDim.x/split; // a split is a multiple of a block
        if (!needs_mask(counts + stream*n_block, a.n_kv, c.first + range*split, c.first + min(c.n_all, (range + 1)*split))) {
            return;
        }
    }
    int min_pos;
    int max_pos;
    get_query_range(a, stream, min_pos, max_pos);
    if (col >= c.n_all) {
        return;
    }
    half value = __ushort_as_half(0xfc00);
    const int  cell  = c.list ? (c.first + col < c.list_end[stream] ? c.list[(int64_t) stream*c.n_list + c.first + col] : -1) : c.first + col;
    if (cell >= 0 && cell < a.n_kv) {
        const int2 info = a.info[(int64_t) stream*a.n_kv + cell];
        const bool some = info.x >= 0 && get_use(a, info.x, info.y, min_pos, max_pos) == USE_EITHER;
        const bool ex   = some && is_exact(a, a.query_pos[stream*a.n_tokens + token], info.x);
        if (c.list ? ex : !ex) {
            value = a.mask ? a.mask[stream%a.n_mask*a.ne_m3 + token*a.ne_m1 + cell] : __ushort_as_half(0);
        }
    }
    out[((int64_t) stream*a.n_tokens + token)*c.n_all + col] = value;
}

template <int D>
void launch_keys(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * out, cudaStream_t stream) {
    const expand_plan p = make_expand_plan(s, gpu);
    const auto kernel = p.in_shared ? rebuild_keys<D, true> : rebuild_keys<D, false>;
    allow_shared_memory((const void *) kernel, p.shared);
    const int blocks = std::max(1, std::min(ceil_div(c.n_all, 16*p.n_warp), 2*gpu.n_sm/(a.n_head_kv*a.n_stream)));
    kernel<<<dim3(blocks, a.n_head_kv, a.n_stream), 32*p.n_warp, p.shared, stream>>>(a, c, p, out);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace

void expand_queries(const attn_args & a, int d, float * out, cudaStream_t stream) {
    const int64_t n = (int64_t) a.n_stream*a.n_tokens*a.n_head*d;
    copy_queries<<<(int) ((n + 255)/256), 256, 0, stream>>>(a, d, out);
    CUDA_CHECK(cudaGetLastError());
}

void expand_keys(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * out, cudaStream_t stream) {
    switch (s.d) {
        case  64: return launch_keys< 64>(a, s, gpu, c, out, stream);
        case  80: return launch_keys< 80>(a, s, gpu, c, out, stream);
        case  96: return launch_keys< 96>(a, s, gpu, c, out, stream);
        case 128: return launch_keys<128>(a, s, gpu, c, out, stream);
        case 256: return launch_keys<256>(a, s, gpu, c, out, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", s.d);
    }
}

void expand_values(const attn_args & a, int d, const columns & c, half * out, cudaStream_t stream) {
    const int blocks = std::min(ceil_div(c.n_all*(d/8), 256), 1024);
    rebuild_values<<<dim3(blocks, a.n_head_kv, a.n_stream), 256, 0, stream>>>(a, d, c, out);
    CUDA_CHECK(cudaGetLastError());
}

void list_either(const attn_args & a, int n_max, int * counts, int * list, int * list_end, cudaStream_t stream) {
    const int n_block = ceil_div(a.n_kv, COUNT_CELLS);
    const dim3 grid(n_block, a.n_stream);
    count_either<<<grid, COUNT_CELLS, 0, stream>>>(a, n_block, counts);
    CUDA_CHECK(cudaGetLastError());
    write_either<<<grid, COUNT_CELLS, 0, stream>>>(a, n_block, n_max, counts, list, list_end);
    CUDA_CHECK(cudaGetLastError());
}

void expand_mask(const attn_args & a, const columns & c, const int * counts, int split, bool always, half * out, cudaStream_t stream) {
    const int n_block = ceil_div(a.n_kv, COUNT_CELLS);
    copy_mask<<<dim3(c.n_all/PREFILL_ALIGN, a.n_tokens, a.n_stream), PREFILL_ALIGN, 0, stream>>>(a, c, counts, n_block, split, always, out);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace kvtc
