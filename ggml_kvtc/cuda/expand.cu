// Keys, values and masks as the flash attention kernel wants them. Keys are rebuilt as in decode-kernel.cuh, but rotated to
// their positions, in f32, and written out.
#include "expand.cuh"
#include "tables.cuh"

namespace kvtc {

namespace {

__device__ __forceinline__ void get_query_range(const attn_args & a, int stream, int & min_pos, int & max_pos, int thread, int n_threads) {
    // every thread of the block takes part
    __shared__ int lo;
    __shared__ int hi;
    if (thread == 0) {
        lo = INT_MAX;
        hi = INT_MIN;
    }
    __syncthreads();
    int least = INT_MAX;
    int most  = INT_MIN;
    for (int t = thread; t < a.n_tokens; t += n_threads) {
        const int pos = a.query_pos[stream*a.n_tokens + t];
        least = min(least, pos);
        most  = max(most,  pos);
    }
    least = warp_min(least);
    most  = warp_max(most);
    if (thread % 32 == 0) {
        atomicMin(&lo, least);
        atomicMax(&hi, most);
    }
    __syncthreads();
    min_pos = lo;
    max_pos = hi;
}

// The first n_key_blocks blocks rebuild keys, the others decode values. Rows of a warp's next slab are on their way while it works.
// tiled: in the order that attend-sm90.cuh states, else column after column.
template <int D, bool in_shared, bool tiled>
__launch_bounds__(256, D <= 128 ? 2 : 1)
__global__ void rebuild_rows(const attn_args a, const columns c, const expand_plan p, int n_key_blocks, half * keys, half * values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != GGML_CUDA_CC_HOPPER
    if constexpr (tiled) { // its reader is for Hopper
        GGML_UNUSED_VARS(a, c, p, n_key_blocks, keys, values);
        NO_DEVICE_CODE;
        return;
    }
#endif
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
    const int side   = (int) blockIdx.x < n_key_blocks ? GGML_KVTC_K : GGML_KVTC_V;
    const int block   = side == GGML_KVTC_K ? blockIdx.x   : blockIdx.x - n_key_blocks;
    const int n_block = side == GGML_KVTC_K ? n_key_blocks : gridDim.x  - n_key_blocks;

    const char * base = a.pack;
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const ggml_kvtc_cuda_head & h    = get_head(base, side, head);
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;
    const float mscale  = pack.rope_mscale;

    float    * mean   = (float *)    (smem + p.at_mean);
    uint64_t * freq   = (uint64_t *) (smem + p.at_freq);
    auto     * codes  = (ggml_kvtc_cuda_code *) (smem + p.at_codes);
    uint8_t  * table  = smem + p.at_table;
    uint8_t  * stage  = smem + p.at_stage + 2*warp*16*p.stride;
    half     * tile   = (half *) (smem + p.at_tile) + warp*16*LD;
    const half * matrix = in_shared ? (const half *) smem : at<half>(base, h.decode);

    for (int i = threadIdx.x; i < (int) h.n_tables/16; i += blockDim.x) {
        copy_async<16>(table + 16*i, base + h.tables + 16*i);
    }
    for (int i = threadIdx.x; i < D/8; i += blockDim.x) {
        copy_async<8>(codes + i, base + h.codes + 8*i);
    }
    if (side == GGML_KVTC_K) {
        if constexpr (in_shared) {
            for (int i = threadIdx.x; i < D*(D/8); i += blockDim.x) {
                const int row = i/(D/8);
                copy_async<16>((half *) smem + row*LD + i%(D/8)*8, at<half>(base, h.decode) + pair_channel(row, rope_type, n_rot)*D + i%(D/8)*8);
            }
        }
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            mean[i] = at<float>(base, h.mean)[pair_channel(i, rope_type, n_rot)];
            if (i < D/2) {
                freq[i] = i < n_rot/2 ? at<uint64_t>(base, pack.freq)[i] : 0;
            }
        }
    }
    copy_commit();
    const int2 range = c.ranges[stream];

    half * const out = (side == GGML_KVTC_K ? keys : values) + ((int64_t) stream*a.n_head_kv + head)*c.n_all*D;

    // the warp's rows, from global memory to one of its two stages
    const auto fetch = [&](int i, int cell) {
        const uint8_t * rows = a.rows[side] + stream*a.nb_stream[side] + h.payload;
        uint8_t * to = stage + i*16*p.stride;
        const bool words = a.nb_row[side] % 4 == 0;
#pragma unroll
        for (int j = lane/8; j < 16; j += 4) {
            const uint8_t * src = rows + __shfl_sync(0xffffffff, cell, j)*a.nb_row[side];
            if (words) {
                for (int i = lane%8; i < ((int) h.n_bytes + 3)/4; i += 8) {
                    copy_async<4>(to + j*p.stride + 4*i, src + 4*i);
                }
            } else {
                for (int i = lane%8; i < (int) h.n_bytes; i += 8) {
                    to[j*p.stride + i] = src[i];
                }
            }
        }
    };
    const int  step = n_block*n_warp*16;
    const auto cell = [&](int col) { return get_cell(a, c, stream, min(col, c.n_all - 16) + lane%16, range); };

    int col0 = get_first_column(c, stream) + (block*n_warp + warp)*16;
    column_cell mine = cell(col0);
    column_cell next = cell(col0 + step);
    fetch(0, mine.cell);
    copy_commit();
    copy_wait<1>(); // tables and matrix
    __syncthreads();

    for (int i = 0; col0 < c.n_all; col0 += step, i ^= 1) {
        const column_cell after = cell(col0 + 2*step);
        fetch(i ^ 1, next.cell);
        copy_commit();
        copy_wait<1>();
        __syncwarp();
        const uint8_t * row = stage + (i*16 + lane%16)*p.stride;
        decode_slab<D, LD, 16, true>(a, side, head, row, codes, table, get_gain(h.gain_base, row[0]), mine.slot, tile);
        if (side == GGML_KVTC_K) {
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
                    const int      pair = 8*n + 4*j + q4;
                    const uint64_t f    = freq[pair];
                    const float    m    = 2*pair < n_rot ? mscale : 1.0f;
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float  x  = k[j][2*e];
                        const float  y  = k[j][2*e + 1];
                        const float2 cs = get_rotation(pos[e], f);
                        half * to = tile + (r8 + 8*e)*LD;
                        const half2 turned = __floats2half2_rn(m*(x*cs.x - y*cs.y), m*(x*cs.y + y*cs.x));
                        if (rope_type == GGML_KVTC_ROPE_NEOX && 2*pair < n_rot) { // as queries have it
                            to[pair]           = turned.x;
                            to[pair + n_rot/2] = turned.y;
                        } else {
                            *(half2 *) (to + 2*pair) = turned;
                        }
                    }
                }
            }
        }
        write_columns<D, LD, tiled>(tile, out, side, col0);
        mine = next;
        next = after;
    }
}

constexpr int COUNT_ALONE = 16; // blocks of COUNT_CELLS up to which each of them counts the cells before its own, in one launch for two

__device__ __forceinline__ bool is_either(const attn_args & a, int stream, int cell, const int2 & range) {
    const int2 info = cell < a.n_kv ? a.info[(int64_t) stream*a.n_kv + cell] : make_int2(-1, -1);
    return info.x >= 0 && get_use(a, info.x, info.y, range.x, range.y) == USE_EITHER;
}

// the block's count; it is true for this thread's cell
__device__ __forceinline__ void put_count(bool found, int n_block, int * counts, const int2 & range, int2 * ranges) {
    const int n = __syncthreads_count(found);
    if (threadIdx.x == 0) {
        counts[blockIdx.y*n_block + blockIdx.x] = n;
        if (blockIdx.x == 0) {
            ranges[blockIdx.y] = range;
        }
    }
}

__global__ void count_either(const attn_args a, int n_block, int * counts, int2 * ranges) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    int2 range;
    get_query_range(a, blockIdx.y, range.x, range.y, threadIdx.x, blockDim.x);
    put_count(is_either(a, blockIdx.y, blockIdx.x*COUNT_CELLS + threadIdx.x, range), n_block, counts, range, ranges);
}

// alone: nothing has been counted
template <bool alone>
__global__ void write_either(const attn_args a, int n_block, int n_max, int * counts, int2 * ranges, int * list, int * list_end) {
    __shared__ int warps[COUNT_CELLS/32];
    __shared__ int before;
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    const int stream = blockIdx.y;
    const int cell   = blockIdx.x*COUNT_CELLS + threadIdx.x;
    int2 range;
    int  n = 0;
    if (threadIdx.x == 0) {
        before = 0;
    }
    if (alone) {
        get_query_range(a, stream, range.x, range.y, threadIdx.x, blockDim.x);
#pragma unroll 8
        for (int i = 0; i < (int) blockIdx.x; ++i) {
            n += is_either(a, stream, i*COUNT_CELLS + threadIdx.x, range);
        }
    } else {
        range = ranges[stream];
        __syncthreads();
        for (int i = threadIdx.x; i < (int) blockIdx.x; i += blockDim.x) {
            n += counts[stream*n_block + i];
        }
    }
    n = warp_reduce_sum(n);
    if (threadIdx.x % 32 == 0 && n > 0) {
        atomicAdd(&before, n);
    }
    const bool     found  = is_either(a, stream, cell, range);
    const uint32_t ballot = __ballot_sync(0xffffffff, found);
    if (threadIdx.x % 32 == 0) {
        warps[threadIdx.x/32] = __popc(ballot);
    }
    if (alone) {
        put_count(found, n_block, counts, range, ranges);
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

constexpr int MASK_WIDTH   = 8; // columns of a thread
constexpr int MASK_THREADS = PREFILL_ALIGN/MASK_WIDTH;
constexpr int MASK_ROWS    = 8; // tokens of a block at once

// a block for each PREFILL_ALIGN columns and some of the tokens
__global__ void copy_mask(const attn_args a, const columns c, const int * counts, int n_block, int split, bool aligned, half * out) {
    const int stream = blockIdx.z;
    const int thread = threadIdx.y*MASK_THREADS + threadIdx.x;
    const int col0   = blockIdx.x*PREFILL_ALIGN + threadIdx.x*MASK_WIDTH;
    const int first  = get_first_column(c, stream);
    const int range  = blockIdx.x*PREFILL_ALIGN/split*split; // a split is a multiple of a block
    if ((int) blockIdx.x*PREFILL_ALIGN < first || (aligned &&
            !needs_mask(c, counts + stream*n_block, a.n_kv, max(range, first), min(c.n_all, range + split), thread, MASK_THREADS*MASK_ROWS))) {
        return;
    }
    const int2 queries = c.ranges[stream];
    const bool listed = c.at + col0 < c.n_list; // all of a block's columns are, or none
    int  cell  [MASK_WIDTH]; // -1: none
    int  pos   [MASK_WIDTH]; // its position
    int  either[MASK_WIDTH]; // the same, where some queries have it exactly, or -1
    bool plain = !listed;
#pragma unroll
    for (int i = 0; i < MASK_WIDTH; ++i) {
        const int x = listed ? get_listed(c, stream, col0 + i) : c.at + col0 + i - c.n_list;
        cell[i] = x < a.n_kv ? x : -1;
        const int2 info = cell[i] >= 0 ? a.info[(int64_t) stream*a.n_kv + x] : make_int2(-1, -1);
        pos   [i] = info.x;
        either[i] = info.x >= 0 && get_use(a, info.x, info.y, queries.x, queries.y) == USE_EITHER ? info.x : -1;
        plain = plain && cell[i] >= 0 && either[i] < 0;
    }
#pragma unroll 4
    for (int token = blockIdx.y*MASK_ROWS + threadIdx.y; token < a.n_tokens; token += gridDim.y*MASK_ROWS) {
        const half * from = a.mask ? a.mask + stream%a.n_mask*a.ne_m3 + token*a.ne_m1 : nullptr;
        __align__(16) half values[MASK_WIDTH];
        if (plain && aligned) {
            *(uint4 *) values = *(const uint4 *) (from + cell[0]);
        } else {
            const int query = a.query_pos[stream*a.n_tokens + token];
#pragma unroll
            for (int i = 0; i < MASK_WIDTH; ++i) {
                const bool ex = either[i] >= 0 && is_exact(a, query, either[i]);
                const bool in = cell[i] >= 0 && ex == listed;
                values[i] = !in ? __ushort_as_half(HIDDEN) : hide_by_position(a, from ? from[cell[i]] : __ushort_as_half(0), query, pos[i]);
            }
        }
        *(uint4 *) (out + ((int64_t) stream*a.n_tokens + token)*c.n_all + col0) = *(const uint4 *) values;
    }
}

template <int D, bool tiled>
void launch_rows(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * keys, half * values, cudaStream_t stream) {
    const expand_plan p = make_expand_plan(s, gpu);
    auto kernel = rebuild_rows<D, false, tiled>;
    if constexpr (D <= 256) { // else it never fits
        kernel = p.in_shared ? rebuild_rows<D, true, tiled> : kernel;
    }
    allow_shared_memory((const void *) kernel, p.shared);
    const int most    = ceil_div(c.n_all, 16*p.n_warp);
    const int blocks  = std::max(2, 2*gpu.n_sm/(a.n_head_kv*a.n_stream));
    int n_key   = std::max(1, std::min(most, blocks*2/3)); // a key costs twice what a value does
    int n_value = std::max(1, std::min(most, blocks - n_key));
    if (has_others(s)) { // a side or none is left
        for (int side = 0; side < 2; ++side) {
            if (s.kind[side] != SIDE_KVTC) {
                expand_side(a, s, c, side, tiled, side == GGML_KVTC_K ? keys : values, stream);
            }
        }
        n_key   = s.kind[GGML_KVTC_K] == SIDE_KVTC ? std::min(most, blocks) : 0;
        n_value = s.kind[GGML_KVTC_V] == SIDE_KVTC ? std::min(most, blocks) : 0;
        if (n_key + n_value == 0) {
            return;
        }
    }
    kernel<<<dim3(n_key + n_value, a.n_head_kv, a.n_stream), 32*p.n_warp, p.shared, stream>>>(a, c, p, n_key, keys, values);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace

void expand_cells(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * keys, half * values, cudaStream_t stream) {
    switch (s.d) {
        case  64: return launch_rows< 64, false>(a, s, gpu, c, keys, values, stream);
        case  80: return launch_rows< 80, false>(a, s, gpu, c, keys, values, stream);
        case  96: return launch_rows< 96, false>(a, s, gpu, c, keys, values, stream);
        case 128: return launch_rows<128, false>(a, s, gpu, c, keys, values, stream);
        case 256: return launch_rows<256, false>(a, s, gpu, c, keys, values, stream);
        case 512: return launch_rows<512, false>(a, s, gpu, c, keys, values, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", s.d);
    }
}

void expand_tiles(const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const columns & c, half * keys, half * values, cudaStream_t stream) {
    switch (s.d) {
        case  64: return launch_rows< 64, true>(a, s, gpu, c, keys, values, stream);
        case 128: return launch_rows<128, true>(a, s, gpu, c, keys, values, stream);
        case 256: return launch_rows<256, true>(a, s, gpu, c, keys, values, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", s.d);
    }
}

void list_either(const attn_args & a, int n_max, int * counts, int2 * ranges, int * list, int * list_end, cudaStream_t stream) {
    const int n_block = ceil_div(a.n_kv, COUNT_CELLS);
    const dim3 grid(n_block, a.n_stream);
    if (n_block <= COUNT_ALONE) {
        ggml_cuda_kernel_launch(write_either<true>, { grid, COUNT_CELLS, 0, stream }, a, n_block, n_max, counts, ranges, list, list_end);
    } else {
        ggml_cuda_kernel_launch(count_either,        { grid, COUNT_CELLS, 0, stream }, a, n_block, counts, ranges);
        ggml_cuda_kernel_launch(write_either<false>, { grid, COUNT_CELLS, 0, stream }, a, n_block, n_max, counts, ranges, list, list_end);
    }
}

void expand_mask(const attn_args & a, const columns & c, const int * counts, int split, bool aligned, half * out, cudaStream_t stream) {
    const int n_block = ceil_div(a.n_kv, COUNT_CELLS);
    // enough blocks to fill a device, since each waits for its loads
    const int n_part = std::min(ceil_div(a.n_tokens, MASK_ROWS), std::max(8, 1024/(c.n_all/PREFILL_ALIGN)));
    const dim3 grid(c.n_all/PREFILL_ALIGN, n_part, a.n_stream);
    copy_mask<<<grid, dim3(MASK_THREADS, MASK_ROWS), 0, stream>>>(a, c, counts, n_block, split, aligned, out);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace kvtc
