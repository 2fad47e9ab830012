// Many query rows: chunk by chunk, cells become f16 columns, flash attention reads them, and its sums are merged.
//
// A key that is exact for some of the queries only has two columns: one from its codes, and one from its exact row, in a list
// before all cells; masks of their own give each query one of the two.
#include "prefill.cuh"
#include "prefill-kernel.cuh"

namespace kvtc {

namespace {

constexpr int MERGE_THREADS = 256;

template <int D>
__global__ void merge_chunks(const attn_args a, const partial_sums p, int64_t n_row, float * values, float2 * meta) {
    constexpr int LANES  = D/4; // threads of a row, four components each
    constexpr int ROWS   = MERGE_THREADS/LANES;
    const int     r      = threadIdx.x/LANES;
    const bool    inside = r < ROWS && (int64_t) blockIdx.x*ROWS + r < n_row;
    const int64_t row    = inside ? (int64_t) blockIdx.x*ROWS + r : 0;
    const int64_t place  = get_place(a, p, row);
    const int     c      = threadIdx.x%LANES*4;

    float2 before = p.old_meta ? p.old_meta[row] : make_float2(-INFINITY, 0.0f);
    float4 value  = p.old_meta ? *(const float4 *) (p.old_values + row*D + c) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    __syncthreads(); // meta has been read
    if (!inside) {
        return;
    }
    for (int s = 0; s < p.n_split; ++s) {
        float2 m[PREFILL_MERGE];
        float4 x[PREFILL_MERGE];
#pragma unroll
        for (int i = 0; i < PREFILL_MERGE; ++i) { // all loads before the first use
            m[i] = make_float2(-INFINITY, 0.0f);
            if (i < p.n_chunk) {
                m[i] = get_meta(p, place, i, s);
                x[i] = get_value<D>(p, place, i, s, c);
            }
        }
#pragma unroll
        for (int i = 0; i < PREFILL_MERGE; ++i) {
            if (m[i].x != -INFINITY) {
                const float top = fmaxf(before.x, m[i].x);
                const float f   = before.x == -INFINITY ? 0.0f : exp2f(before.x - top);
                const float g   = exp2f(m[i].x - top);
                value  = make_float4(f*value.x + g*x[i].x, f*value.y + g*x[i].y, f*value.z + g*x[i].z, f*value.w + g*x[i].w);
                before = make_float2(top, f*before.y + g*m[i].y);
            }
        }
    }
    *(float4 *) (values + row*D + c) = value;
    if (c == 0) {
        meta[row] = before;
    }
}

void attend(const chunk_args & a, int d, const prefill_plan & p, int n_grid, int cc, cudaStream_t stream) {
    switch (d) {
        case  64: return attend_chunk_case< 64>(a, p.n_cols, p.n_cols2, n_grid, cc, stream);
        case  80: return attend_chunk_case< 80>(a, p.n_cols, p.n_cols2, n_grid, cc, stream);
        case  96: return attend_chunk_case< 96>(a, p.n_cols, p.n_cols2, n_grid, cc, stream);
        case 128: return attend_chunk_case<128>(a, p.n_cols, p.n_cols2, n_grid, cc, stream);
        case 256: return attend_chunk_case<256>(a, p.n_cols, p.n_cols2, n_grid, cc, stream);
        case 512: return attend_chunk_case<512>(a, p.n_cols, p.n_cols2, n_grid, cc, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

template <int D>
void merge(const attn_args & a, const partial_sums & p, int64_t n_row, float * values, float2 * meta, cudaStream_t stream) {
    constexpr int ROWS = MERGE_THREADS/(D/4);
    merge_chunks<D><<<(int) ((n_row + ROWS - 1)/ROWS), MERGE_THREADS, 0, stream>>>(a, p, n_row, values, meta);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace

void merge_sums(const attn_args & a, const partial_sums & p, int d, int64_t n_row, float * values, float2 * meta, cudaStream_t stream) {
    switch (d) {
        case  64: return merge< 64>(a, p, n_row, values, meta, stream);
        case  80: return merge< 80>(a, p, n_row, values, meta, stream);
        case  96: return merge< 96>(a, p, n_row, values, meta, stream);
        case 128: return merge<128>(a, p, n_row, values, meta, stream);
        case 256: return merge<256>(a, p, n_row, values, meta, stream);
        case 512: return merge<512>(a, p, n_row, values, meta, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

bool prefill_supports(float softcap, int d) {
    return softcap == 0.0f || d >= 128; // ggml compiles its kernel with a cap for these
}

void prefill(ggml_backend_cuda_context & ctx, const attn_args & a, const attn_shape & s, const gpu_shape & gpu, const output & dst) {
    cudaStream_t stream = ctx.stream();
    const int cc = ggml_cuda_info().devices[ctx.device].cc;
    const prefill_plan p = make_prefill_plan(s, gpu, count_exact(a, s), a.max_bias != 0.0f, cc == GGML_CUDA_CC_TURING ? 32 : 64);

    const int     n_grid  = p.n_split*p.n_token_block*p.n_head_block*s.n_head_kv*s.n_stream;
    const int     n_block = ceil_div(s.n_kv, COUNT_CELLS);
    const int64_t n_row   = (int64_t) s.n_stream*s.n_tokens*a.n_head;
    const int64_t n_sums  = (int64_t) count_sums(s, p);

    const prefill_scratch x = get_scratch(s, p);
    ggml_cuda_pool_alloc<char> scratch(ctx.pool(), get_scratch_size(s, gpu, x.size, count_exact(a, s), count_cells(a)));
    half   * k        = (half   *) (scratch.get() + x.keys);
    half   * v        = (half   *) (scratch.get() + x.values);
    half   * mask     = (half   *) (scratch.get() + x.mask);
    int    * counts   = (int    *) (scratch.get() + x.counts);
    int    * list     = (int    *) (scratch.get() + x.list);
    int2   * ranges   = (int2   *) (scratch.get() + x.ranges);
    float2 * out      = (float2 *) (scratch.get() + x.sums);
    float  * values   = (float  *) (scratch.get() + x.folded_values);
    float2 * meta     = (float2 *) (scratch.get() + x.folded_meta);
    int    * list_end = list + (int64_t) s.n_stream*p.n_list;

    list_either(a, p.n_list, counts, ranges, list, list_end, stream);

    // 16-byte copies of the mask
    const bool plain_mask = a.mask && a.ne_m1 % 8 == 0 && a.ne_m3 % 8 == 0 && (uintptr_t) a.mask % 16 == 0;
    chunk_args c = {};
    c.q          = a.q;
    c.nb_q1      = a.nb_q1;
    c.nb_q2      = a.nb_q2;
    c.nb_q3      = a.nb_q3;
    c.k          = k;
    c.v          = v;
    c.mask       = plain_mask ? a.mask : nullptr;
    c.ne_m1      = a.ne_m1;
    c.ne_m3      = a.ne_m3;
    c.n_mask     = a.n_mask;
    c.own_mask   = mask;
    c.counts     = counts;
    c.n_block    = n_block;
    c.info       = a.info;
    c.query_pos  = a.query_pos;
    c.n_sink     = a.n_sink;
    c.n_window   = a.n_window;
    c.n_kv       = s.n_kv;
    c.n_head     = a.n_head;
    c.n_head_kv  = s.n_head_kv;
    c.group      = s.group;
    c.n_token_block = p.n_token_block;
    c.n_head_block  = p.n_head_block;
    c.n_split    = p.n_split;
    c.split      = p.split;
    c.n_tokens   = init_fastdiv_values((uint32_t) s.n_tokens);
    c.softcap    = a.softcap;
    c.scale      = a.softcap != 0.0f ? a.scale/a.softcap : a.scale;
    c.max_bias   = a.max_bias;
    c.slope_low  = a.slope_low;
    c.slope_high = a.slope_high;
    c.log2_heads = (uint32_t) a.log2_heads;

    partial_sums sums = {};
    sums.meta       = out + (int64_t) n_grid*p.n_cols;
    sums.values     = (const float *) (out + (int64_t) n_grid*2*p.n_cols);
    sums.size       = n_sums;
    sums.n_split    = p.n_split;
    sums.split_step = p.n_cols;
    sums.to_log2    = LOG2E;
    sums.n_cols     = p.n_cols;
    sums.n_cols2    = p.n_cols2;
    sums.n_token_block = p.n_token_block;
    sums.n_head_block  = p.n_head_block;

    for (int at = 0; at < p.n_column; at += p.chunk) {
        if (sums.n_chunk == p.n_merge) {
            merge_sums(a, sums, s.d, n_row, values, meta, stream);
            sums.old_meta   = meta;
            sums.old_values = values;
            sums.n_chunk    = 0;
        }
        c.c   = { at, std::min(p.chunk, p.n_column - at), p.n_list, list, list_end, ranges };
        c.out = out + sums.n_chunk*n_sums;
        expand_cells(a, s, gpu, c.c, k, v, stream);
        expand_mask (a, c.c, counts, p.split, plain_mask, mask, stream);
        attend(c, s.d, p, n_grid, cc, stream);
        ++sums.n_chunk;
    }
    combine(a, s.d, sums, dst, stream);
}

} // namespace kvtc
