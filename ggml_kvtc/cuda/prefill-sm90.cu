// Many query rows on Hopper: chunk by chunk, cells become tiles of f16 keys and values, attend-sm90.cu reads these, and its sums
// are merged. As in prefill.cu, a key that is exact for some of the queries only has two columns.
//
// Which tiles a block of query rows must see, and with which mask, is found once for all heads: a tile that all may see has no
// addends to read, and one that is masked for all is not read at all.
#include "attend-sm90.cuh"
#include "expand.cuh"
#include "prefill.cuh"

namespace kvtc {

namespace {

constexpr int THREADS = 256;

// A block for each tile and some of the blocks of query rows: a thread has eight columns of some of the tokens.
template <int KEYS>
__launch_bounds__(THREADS)
__global__ void classify_tiles(const attn_args a, const columns c, int n_row_block, bool aligned, uint8_t * classes, half * out) {
    constexpr int LANES  = KEYS/8;
    constexpr int STEP   = THREADS/LANES;                // from token to token of a thread
    constexpr int TOKENS = (TILE_ROWS + STEP - 1)/STEP;  // of a thread, at most
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    const int  tile   = blockIdx.x;
    const int  stream = blockIdx.z;
    const int  n_tile = gridDim.x;
    const int  col0   = tile*KEYS + threadIdx.x%LANES*8;
    const bool listed = c.at + tile*KEYS < c.n_list; // all columns of a tile are, or none
    const bool empty  = (tile + 1)*KEYS <= get_first_column(c, stream) || c.at + tile*KEYS - c.n_list >= a.n_kv;
    const int2 range  = c.ranges[stream];
    const half * mask = a.mask ? a.mask + stream%a.n_mask*a.ne_m3 : nullptr;
    int  cell  [8]; // -1: none
    int  pos   [8]; // its position
    int  either[8]; // the same, where some queries have it exactly, or -1
    bool plain = !listed && aligned;
    bool far   = true; // out of every query's span
#pragma unroll
    for (int i = 0; i < 8 && !empty; ++i) {
        const int x = listed ? get_listed(c, stream, col0 + i) : c.at + col0 + i - c.n_list;
        cell[i] = x < a.n_kv ? x : -1;
        const int2 info = cell[i] >= 0 ? a.info[(int64_t) stream*a.n_kv + x] : make_int2(-1, -1);
        pos   [i] = info.x;
        either[i] = info.x >= 0 && get_use(a, info.x, info.y, range.x, range.y) == USE_EITHER ? info.x : -1;
        plain = plain && cell[i] >= 0 && either[i] < 0;
        if (a.n_span > 0) {
            plain = plain && pos[i] >= 0 && pos[i] <= range.x && range.y - pos[i] < a.n_span; // seen by all
            far   = far && (pos[i] < 0 || pos[i] > range.y || range.x - pos[i] >= a.n_span);
        }
    }
    if (a.n_span > 0) { // most tiles are one of these, and there is no mask to look at
        const bool all  = __syncthreads_and(empty || plain);
        const bool none = __syncthreads_and(empty || far);
        if (all || none) {
            for (int i = blockIdx.y + threadIdx.x*gridDim.y; i < n_row_block; i += THREADS*gridDim.y) {
                classes[((int64_t) stream*n_row_block + i)*n_tile + tile] = empty || none ? TILE_HIDDEN : TILE_PLAIN;
            }
            return;
        }
    }
#pragma unroll 1
    for (int row_block = blockIdx.y; row_block < n_row_block; row_block += gridDim.y) {
        const int first = row_block*TILE_ROWS/a.group + threadIdx.x/LANES;
        const int last  = min(a.n_tokens, (row_block*TILE_ROWS + TILE_ROWS - 1)/a.group + 1);
        uint4 values[TOKENS];
        bool  seen  = false; // by any
        bool  added = false; // to any
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const int token = first + t*STEP;
            if (empty || token >= last) {
                break;
            }
            const half * from = mask ? mask + token*a.ne_m1 : nullptr;
            if (plain) {
                values[t] = from ? *(const uint4 *) (from + cell[0]) : make_uint4(0, 0, 0, 0);
            } else {
                const int query = a.query_pos[stream*a.n_tokens + token];
                __align__(16) half x[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const bool ex = either[i] >= 0 && is_exact(a, query, either[i]);
                    const bool in = cell[i] >= 0 && ex == listed;
                    x[i] = !in ? __ushort_as_half(HIDDEN) : hide_by_position(a, from ? from[cell[i]] : __ushort_as_half(0), query, pos[i]);
                }
                values[t] = *(const uint4 *) x;
            }
            const uint4 & v = values[t];
            added = added || (v.x | v.y | v.z | v.w) != 0;
            seen  = seen  || v.x != 0xfc00fc00 || v.y != 0xfc00fc00 || v.z != 0xfc00fc00 || v.w != 0xfc00fc00;
        }
        seen  = __syncthreads_or(seen);
        added = __syncthreads_or(added);
        if (threadIdx.x == 0) {
            classes[((int64_t) stream*n_row_block + row_block)*n_tile + tile] = !seen ? TILE_HIDDEN : added ? TILE_MASKED : TILE_PLAIN;
        }
        if (seen && added) {
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                const int token = first + t*STEP;
                if (token >= last) {
                    break;
                }
                *(uint4 *) (out + ((int64_t) stream*a.n_tokens + token)*c.n_all + col0) = values[t]; // blocks that share a token write the same
            }
        }
    }
}

} // namespace

void prefill_sm90(ggml_backend_cuda_context & ctx, const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const tiles_plan & p, const exact_rows & exact, const output & dst) {
    cudaStream_t stream = ctx.stream();
    const int     n_block = ceil_div(s.n_kv, COUNT_CELLS);
    const int     keys    = tile_keys(s.d);
    const int64_t n_row   = (int64_t) s.n_stream*s.n_tokens*a.n_head;
    const int64_t n_meta  = (int64_t) count_meta(s, p);
    const int64_t n_sums  = (int64_t) count_sums(s, p);

    const prefill_scratch x = get_scratch(s, p);
    ggml_cuda_pool_alloc<char> scratch(ctx.pool(), get_scratch_size(s, gpu, x.size, count_exact(a, s), count_cells(a)));
    half    * k        = (half    *) (scratch.get() + x.keys);
    half    * v        = (half    *) (scratch.get() + x.values);
    half    * mask     = (half    *) (scratch.get() + x.mask);
    uint8_t * classes  = (uint8_t *) (scratch.get() + x.classes);
    int     * counts   = (int     *) (scratch.get() + x.counts);
    int     * list     = (int     *) (scratch.get() + x.list);
    int2    * ranges   = (int2    *) (scratch.get() + x.ranges);
    float2  * out      = (float2  *) (scratch.get() + x.sums);
    float   * values   = (float   *) (scratch.get() + x.folded_values);
    float2  * meta     = (float2  *) (scratch.get() + x.folded_meta);
    int     * list_end = list + (int64_t) s.n_stream*p.n_list;

    list_either(a, p.n_list, counts, ranges, list, list_end, stream);
    const bool aligned = !a.mask || (a.ne_m1 % 8 == 0 && a.ne_m3 % 8 == 0 && (uintptr_t) a.mask % 16 == 0);

    partial_sums sums = {};
    sums.meta       = out;
    sums.values     = (const float *) (out + n_meta);
    sums.size       = n_sums;
    sums.n_split    = p.n_split;
    sums.split_step = 1;
    sums.to_log2    = 1.0f;

    for (int at = 0; at < p.n_column; at += p.chunk) {
        if (sums.n_chunk == p.n_merge) {
            merge_sums(a, sums, s.d, n_row, values, meta, stream);
            sums.old_meta   = meta;
            sums.old_values = values;
            sums.n_chunk    = 0;
        }
        const columns c = { at, std::min(p.chunk, p.n_column - at), p.n_list, list, list_end, ranges };
        rebuild_plan rebuild;
        if (make_rebuild_plan(s, gpu, c.n_all, rebuild)) {
            rebuild_tiles(a, s.d, c, rebuild, k, v, stream);
        } else {
            expand_tiles(a, s, gpu, c, k, v, stream);
        }
        // four blocks of rows each, or fewer where processors would have nothing to do
        const int  per = std::max(1, std::min(4, c.n_all/keys*p.n_row_block*s.n_stream/(2*gpu.n_sm)));
        const dim3 grid(c.n_all/keys, ceil_div(p.n_row_block, per), s.n_stream);
        const auto classify = s.d <= 128 ? classify_tiles<TILE_KEYS<128>> : classify_tiles<TILE_KEYS<256>>;
        ggml_cuda_kernel_launch(classify, { grid, THREADS, 0, stream }, a, c, p.n_row_block, aligned, classes, mask);
        float2 * to = out + sums.n_chunk*n_sums;
        attend_tiles(a, s.d, { k, v, mask, classes, c.n_all/keys, p.n_row_block, p.n_split, p.tiles_per_split,
            (float *) (to + n_meta), to, p.whole, dst, c.at + c.n_all == p.n_column ? exact : exact_rows() }, stream);
        ++sums.n_chunk;
    }
    if (!p.whole) {
        combine(a, s.d, sums, dst, stream);
    }
}

} // namespace kvtc
