// Many query rows: chunk by chunk, cells become f16 columns, flash attention reads them, and its sums are merged.
//
// A key that is exact for some of the queries only has two columns: one from its codes, in its chunk, and one from its exact
// row, in the chunks of a list that come last; masks of their own give each query one of the two.
#include "prefill.cuh"
#include "prefill-kernel.cuh"

namespace kvtc {

namespace {

struct waiting { // chunks whose sums lie one after the other
    int     n;
    columns c[PREFILL_MERGE];
};

constexpr int MERGE_THREADS = 256;

// fold the splits of these chunks into one partial sum for each row
template <int D>
__global__ void merge_chunks(const chunk_args a, const waiting w, int n_cols, int n_cols2, int n_grid, bool first, int64_t n_row, float * values, float2 * meta) {
    constexpr int LANES  = D/4; // threads of a row, four components each
    constexpr int ROWS   = MERGE_THREADS/LANES;
    const int     r      = threadIdx.x/LANES;
    const bool    inside = r < ROWS && (int64_t) blockIdx.x*ROWS + r < n_row;
    const int64_t row    = inside ? (int64_t) blockIdx.x*ROWS + r : 0;
    const int     head   = (int) (row%a.n_head);
    const int     token  = (int) (row/a.n_head%a.n_tokens.z);
    const int     stream = (int) (row/a.n_head/a.n_tokens.z);
    const int     g      = head%a.group;
    const int     n_col1 = n_cols/n_cols2;
    const int     col    = token%n_col1*n_cols2 + g%n_cols2;
    const int64_t block0 = ((((int64_t) stream*a.n_head_kv + head/a.group)*a.n_head_block + g/n_cols2)*a.n_token_block + token/n_col1)*a.n_split;
    const int64_t size   = (int64_t) n_grid*n_cols*(2 + D/2); // of a chunk's sums
    const int     c      = threadIdx.x%LANES*4;

    float2 before = first ? make_float2(-INFINITY, 0.0f) : meta[row];
    float4 value  = first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *(const float4 *) (values + row*D + c);
    __syncthreads(); // meta has been read
    if (!inside) {
        return;
    }
    const auto add = [&](float2 m, const float4 & x) {
        const float top = fmaxf(before.x, LOG2E*m.x);
        const float f   = before.x == -INFINITY ? 0.0f : exp2f(before.x - top);
        const float g   = exp2f(LOG2E*m.x - top);
        value  = make_float4(f*value.x + g*x.x, f*value.y + g*x.y, f*value.z + g*x.z, f*value.w + g*x.w);
        before = make_float2(top, f*before.y + g*m.y);
    };
    for (int s = 0; s < a.n_split; ++s) {
        float2 m[PREFILL_MERGE];
        float4 x[PREFILL_MERGE];
#pragma unroll
        for (int i = 0; i < PREFILL_MERGE; ++i) { // all loads before the first use
            m[i] = make_float2(-INFINITY, 0.0f);
            if (i < w.n && s*a.split < get_n_column(w.c[i], stream)) {
                const float2 * sums = a.out + i*size;
                m[i] = sums[(n_grid + block0 + s)*n_cols + col];
                x[i] = *(const float4 *) ((const float *) (sums + (int64_t) n_grid*2*n_cols) + ((block0 + s)*n_cols + col)*D + c);
            }
        }
#pragma unroll
        for (int i = 0; i < PREFILL_MERGE; ++i) {
            if (m[i].x != -INFINITY) {
                add(m[i], x[i]);
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
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

template <int D>
void merge(const chunk_args & a, const waiting & w, const prefill_plan & p, int n_grid, bool first, int64_t n_row, float * values, float2 * meta, cudaStream_t stream) {
    constexpr int ROWS = MERGE_THREADS/(D/4);
    merge_chunks<D><<<(int) ((n_row + ROWS - 1)/ROWS), MERGE_THREADS, 0, stream>>>(a, w, p.n_cols, p.n_cols2, n_grid, first, n_row, values, meta);
    CUDA_CHECK(cudaGetLastError());
}

void merge(const chunk_args & a, const waiting & w, int d, const prefill_plan & p, int n_grid, bool first, int64_t n_row, float * values, float2 * meta, cudaStream_t stream) {
    switch (d) {
        case  64: return merge< 64>(a, w, p, n_grid, first, n_row, values, meta, stream);
        case  80: return merge< 80>(a, w, p, n_grid, first, n_row, values, meta, stream);
        case  96: return merge< 96>(a, w, p, n_grid, first, n_row, values, meta, stream);
        case 128: return merge<128>(a, w, p, n_grid, first, n_row, values, meta, stream);
        case 256: return merge<256>(a, w, p, n_grid, first, n_row, values, meta, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace

bool prefill_supports(const attn_args & a, const attn_shape & s) {
    return a.softcap == 0.0f || s.d >= 128; // ggml compiles its kernel with a cap for these
}

void prefill(ggml_backend_cuda_context & ctx, const attn_args & a, const attn_shape & s, const gpu_shape & gpu, float * values, float2 * meta) {
    cudaStream_t stream = ctx.stream();
    const int cc = ggml_cuda_info().devices[ctx.device].cc;
    const prefill_plan p = make_prefill_plan(s, gpu, a.n_slots, a.max_bias != 0.0f, cc == GGML_CUDA_CC_TURING ? 32 : 64);

    const int     n_grid  = p.n_split*p.n_token_block*p.n_head_block*s.n_head_kv*s.n_stream;
    const int     n_block = ceil_div(s.n_kv, COUNT_CELLS);
    const int64_t n_row   = (int64_t) s.n_stream*s.n_tokens*a.n_head;
    const int64_t n_sums  = (int64_t) n_grid*p.n_cols*(2 + s.d/2);
    const int64_t n_keys  = (int64_t) s.n_stream*s.n_head_kv*p.chunk*s.d;

    ggml_cuda_pool_alloc<float>  q     (ctx.pool(), n_row*s.d);
    ggml_cuda_pool_alloc<half>   k     (ctx.pool(), n_keys);
    ggml_cuda_pool_alloc<half>   v     (ctx.pool(), n_keys);
    ggml_cuda_pool_alloc<half>   mask  (ctx.pool(), (int64_t) s.n_stream*s.n_tokens*p.chunk);
    ggml_cuda_pool_alloc<int>    counts(ctx.pool(), s.n_stream*n_block);
    ggml_cuda_pool_alloc<int>    list  (ctx.pool(), s.n_stream*(p.n_list + 1));
    ggml_cuda_pool_alloc<float2> out   (ctx.pool(), n_sums*p.n_merge);
    int * list_end = list.get() + (int64_t) s.n_stream*p.n_list;

    expand_queries(a, s.d, q.get(), stream);
    list_either(a, p.n_list, counts.get(), list.get(), list_end, stream);

    // 16-byte copies of the mask
    const bool plain_mask = a.mask && a.ne_m1 % 8 == 0 && a.ne_m3 % 8 == 0 && (uintptr_t) a.mask % 16 == 0;
    chunk_args c = {};
    c.q          = (const float2 *) q.get();
    c.k          = k.get();
    c.v          = v.get();
    c.ne_m1      = a.ne_m1;
    c.ne_m3      = a.ne_m3;
    c.n_mask     = a.n_mask;
    c.own_mask   = mask.get();
    c.counts     = counts.get();
    c.n_block    = n_block;
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
    c.out        = out.get();

    bool    first = true;
    waiting wait  = {};
    const auto flush = [&]() {
        if (wait.n > 0) {
            c.out = out.get();
            merge(c, wait, s.d, p, n_grid, first, n_row, values, meta, stream);
            wait.n = 0;
            first  = false;
        }
    };
    const auto run = [&](const columns & columns) {
        expand_cells(a, s, gpu, columns, k.get(), v.get(), stream);
        expand_mask (a, columns, counts.get(), p.split, !plain_mask, mask.get(), stream);
        c.c    = columns;
        c.mask = plain_mask && !columns.list ? a.mask + columns.first : nullptr;
        c.out  = out.get() + wait.n*n_sums;
        attend(c, s.d, p, n_grid, cc, stream);
        wait.c[wait.n++] = columns;
        if (wait.n == p.n_merge) {
            flush();
        }
    };
    for (int at = 0; at < s.n_kv; at += p.chunk) {
        run({ at, std::min(p.chunk, ceil_div(s.n_kv - at, PREFILL_ALIGN)*PREFILL_ALIGN), nullptr, nullptr, 0 });
    }
    if (a.n_slots > 0 || a.batch[0]) {
        for (int at = 0; at < p.n_list; at += p.chunk) {
            run({ at, std::min(p.chunk, p.n_list - at), list.get(), list_end, p.n_list });
        }
    }
    flush();
}

} // namespace kvtc
