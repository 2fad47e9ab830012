// Keys, values and masks as the flash attention kernel wants them. Keys are rebuilt as in decode.cu, but rotated to
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
    int least = INT_MAX;
    int most  = INT_MIN;
    for (int t = threadIdx.x; t < a.n_tokens; t += blockDim.x) {
        const int pos = a.query_pos[stream*a.n_tokens + t];
        least = min(least, pos);
        most  = max(most,  pos);
    }
    least = warp_min(least);
    most  = warp_max(most);
    if (threadIdx.x % 32 == 0) {
        atomicMin(&lo, least);
        atomicMax(&hi, most);
    }
    __syncthreads();
    min_pos = lo;
    max_pos = hi;
}

// cell of a column, and its exact row: in the list, all keys count exactly; elsewhere those that do for all queries
struct column_cell {
    int cell, pos, slot;
};

__device__ __forceinline__ column_cell get_cell(const attn_args & a, const columns & c, int stream, int col, int min_pos, int max_pos) {
    column_cell x;
    const bool listed = col >= c.n_cell;
    if (listed) {
        const int end = c.list_end[stream];
        x.cell = end > 0 ? c.list[(int64_t) stream*c.n_list + min(c.entry + col - c.n_cell, end - 1)] : 0;
    } else {
        x.cell = min(c.first + col, a.n_kv - 1);
    }
    const int2 info = a.info[(int64_t) stream*a.n_kv + x.cell];
    x.pos  = info.x;
    x.slot = info.x >= 0 && (listed || get_use(a, info.x, info.y, min_pos, max_pos) == USE_EXACT) ? info.y : -1;
    return x;
}

template <int D, bool in_shared>
__launch_bounds__(256, D <= 128 ? 2 : 1)
__global__ void rebuild_rows(const attn_args a, const columns c, const expand_plan p, half * keys, half * values) {
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
    const ggml_kvtc_cuda_head & vh   = get_head(base, GGML_KVTC_V, head);
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;
    const float mscale  = pack.rope_mscale;

    float    * mean   = (float *)    (smem + p.at_mean);
    uint64_t * freq   = (uint64_t *) (smem + p.at_freq);
    auto     * codes  = (ggml_kvtc_cuda_code *) (smem + p.at_codes);
    uint8_t  * tables[2] = { smem + p.at_table[0], smem + p.at_table[1] };
    uint8_t  * stage[2] = { smem + p.at_stage + 2*warp*16*p.stride, smem + p.at_stage + (2*warp + 1)*16*p.stride };
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
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const ggml_kvtc_cuda_head & h = s == 0 ? kh : vh;
        for (int i = threadIdx.x; i < (int) h.n_tables/16; i += blockDim.x) {
            copy_async<16>(tables[s] + 16*i, base + h.tables + 16*i);
        }
        for (int i = threadIdx.x; i < D/8; i += blockDim.x) {
            copy_async<8>(codes + s*(D/8) + i, base + h.codes + 8*i);
        }
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

    const int64_t first = ((int64_t) stream*a.n_head_kv + head)*c.n_all*D;
    const int     n_col = get_n_column(c, stream);

    // the warp's rows of one side, from global memory to the stage
    const auto fetch = [&](int side, const ggml_kvtc_cuda_head & h, int cell) {
        const uint8_t * rows = a.rows[side] + stream*a.nb_stream[side] + h.payload;
        const bool words = a.nb_row[side] % 4 == 0;
#pragma unroll
        for (int j = lane/8; j < 16; j += 4) {
            const uint8_t * src = rows + __shfl_sync(0xffffffff, cell, j)*a.nb_row[side];
            if (words) {
                for (int i = lane%8; i < ((int) h.n_bytes + 3)/4; i += 8) {
                    copy_async<4>(stage[side] + j*p.stride + 4*i, src + 4*i);
                }
            } else {
                for (int i = lane%8; i < (int) h.n_bytes; i += 8) {
                    stage[side][j*p.stride + i] = src[i];
                }
            }
        }
    };
    // the tile to 16 columns: 16 bytes a thread
    const auto write = [&](half * dst) {
        for (int i = lane; i < 16*(D/8); i += 32) {
            *(uint4 *) (dst + i/(D/8)*D + i%(D/8)*8) = *(const uint4 *) (tile + i/(D/8)*LD + i%(D/8)*8);
        }
        __syncwarp();
    };

    for (int col0 = (blockIdx.x*n_warp + warp)*16; col0 < n_col; col0 += gridDim.x*n_warp*16) {
        const column_cell mine = get_cell(a, c, stream, col0 + lane%16, min_pos, max_pos);
        const uint8_t * k_row = stage[0] + lane%16*p.stride;
        const uint8_t * v_row = stage[1] + lane%16*p.stride;
        fetch(GGML_KVTC_K, kh, mine.cell);
        fetch(GGML_KVTC_V, vh, mine.cell);
        copy_commit();
        copy_wait<0>();
        __syncwarp();

        decode_slab<D, LD, 16, true>(a, GGML_KVTC_V, head, v_row, codes + D/8, tables[1], get_gain(vh.gain_base, v_row[0]), mine.slot, tile);
        write(values + first + (int64_t) col0*D);
        decode_slab<D, LD, 16, true>(a, GGML_KVTC_K, head, k_row, codes, tables[0], get_gain(kh.gain_base, k_row[0]), mine.slot, tile);
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
                    const int    i  = 8*n + 4*j + q4; // pair
                    const float2 cs = get_rotation(pos[e], freq[i]);
                    const float  m  = 2*i < n_rot ? mscale : 1.0f;
                    half * to = tile + (r8 + 8*e)*LD;
                    const half2 turned = __floats2half2_rn(m*(x*cs.x - y*cs.y), m*(x*cs.y + y*cs.x));
                    if (rope_type == GGML_KVTC_ROPE_NEOX && 2*i < n_rot) { // as queries have it
                        to[i]           = turned.x;
                        to[i + n_rot/2] = turned.y;
                    } else {
                        *(half2 *) (to + 2*i) = turned;
                    }
                }
            }
        }
        __syncwarp();
        write(keys + first + (int64_t) col0*D);
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

// a block for each PREFILL_ALIGN columns and some of the tokens
__global__ void copy_mask(const attn_args a, const columns c, const int * counts, int n_block, int split, bool always, half * out) {
    const int stream = blockIdx.z;
    const int col    = blockIdx.x*blockDim.x + threadIdx.x;
    const int n_col  = get_n_column(c, stream);
    const int range  = blockIdx.x*blockDim.x/split; // a split is a multiple of a block
    if (blockIdx.x*blockDim.x >= n_col || (!always &&
            !needs_mask(c, counts + stream*n_block, a.n_kv, range*split, min(n_col, (range + 1)*split), threadIdx.x, blockDim.x))) {
        return;
    }
    int min_pos;
    int max_pos;
    get_query_range(a, stream, min_pos, max_pos);
    const bool listed = col >= c.n_cell;
    int cell = c.first + col;
    if (listed) {
        const int i = c.entry + col - c.n_cell;
        cell = i < c.list_end[stream] ? c.list[(int64_t) stream*c.n_list + i] : -1;
    }
    const bool inside = cell >= 0 && cell < a.n_kv;
    const int2 info   = inside ? a.info[(int64_t) stream*a.n_kv + cell] : make_int2(-1, -1);
    const bool some   = info.x >= 0 && get_use(a, info.x, info.y, min_pos, max_pos) == USE_EITHER;
    for (int token = blockIdx.y; token < a.n_tokens; token += gridDim.y) {
        const bool ex = some && is_exact(a, a.query_pos[stream*a.n_tokens + token], info.x);
        half value = __ushort_as_half(0xfc00);
        if (inside && (listed ? ex : !ex)) {
            value = a.mask ? a.mask[stream%a.n_mask*a.ne_m3 + token*a.ne_m1 + cell] : __ushort_as_half(0);
        }
        out[((int64_t) stream*a.n_tokens + token)*c.n_all + col] = value;
    }
}

template <int D>
void launch_rows(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * keys, half * values, cudaStream_t stream) {
    const expand_plan p = make_expand_plan(s, gpu);
    const auto kernel = p.in_shared ? rebuild_rows<D, true> : rebuild_rows<D, false>;
    allow_shared_memory((const void *) kernel, p.shared);
    const int blocks = std::max(1, std::min(ceil_div(c.n_all, 16*p.n_warp), 2*gpu.n_sm/(a.n_head_kv*a.n_stream)));
    kernel<<<dim3(blocks, a.n_head_kv, a.n_stream), 32*p.n_warp, p.shared, stream>>>(a, c, p, keys, values);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace

void expand_cells(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * keys, half * values, cudaStream_t stream) {
    switch (s.d) {
        case  64: return launch_rows< 64>(a, s, gpu, c, keys, values, stream);
        case  80: return launch_rows< 80>(a, s, gpu, c, keys, values, stream);
        case  96: return launch_rows< 96>(a, s, gpu, c, keys, values, stream);
        case 128: return launch_rows<128>(a, s, gpu, c, keys, values, stream);
        case 256: return launch_rows<256>(a, s, gpu, c, keys, values, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", s.d);
    }
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
    // enough blocks to fill a device, since each waits for its loads
    const int n_part = std::min(a.n_tokens, std::max(16, 1024/(c.n_all/PREFILL_ALIGN)));
    copy_mask<<<dim3(c.n_all/PREFILL_ALIGN, n_part, a.n_stream), PREFILL_ALIGN, 0, stream>>>(a, c, counts, n_block, split, always, out);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace kvtc
