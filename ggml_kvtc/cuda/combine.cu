// Merges the partial sums of the splits, turns coefficients into channels by the values' matrix, and divides by the sum of
// weights. Few rows: a block for each, or for some of its channels, whose threads share its components. Many: a product on tensor cores.
#include "combine.cuh"
#include "join.cuh"

namespace kvtc {

namespace {

template <int D> constexpr int N_THREADS = D <= 64 ? 256 : D <= 96 || D == 256 ? 2*D : 256; // a multiple of D
template <int D> constexpr int N_SHARE   = D == 256 ? 4 : 1;                   // blocks that share a row's channels

// the rows of one kv head, token after token
__device__ __forceinline__ query_row get_row(const attn_args & a, int head_kv, int i) {
    return { i/a.group, head_kv*a.group + i%a.group };
}

__device__ __forceinline__ int64_t get_index(const attn_args & a, const query_row & row) {
    return (int64_t) row.token*a.n_head + row.head;
}

// A token's own key, times a query; each warp for itself
template <int D>
struct own_logit {
    static constexpr int PAIRS = (D/2 + 31)/32; // of a lane
    float2 turn[PAIRS];

    // what is of the pack and of the graph's inputs
    __device__ __forceinline__ void init(const attn_args & a, int token) {
        const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) a.pack;
        const int n_pair = pack.rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot/2;
        const int pos    = a.query_pos[token];
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) {
            const int i = threadIdx.x%32 + 32*k;
            turn[k] = make_float2(1.0f, 0.0f);
            if (i < n_pair) {
                const float2 x = get_rotation(pos, at<uint64_t>(a.pack, pack.freq)[i]);
                turn[k] = make_float2(pack.rope_mscale*x.x, pack.rope_mscale*x.y);
            }
        }
    }

    // times log2(e)
    __device__ __forceinline__ float get(const attn_args & a, const own_tokens & own, int token, int head, int head_kv) const {
        const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) a.pack;
        const int     rope_type = (int) pack.rope_type;
        const int     n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;
        const float * q = (const float *) (a.q + token%a.n_tokens*a.nb_q1 + head*a.nb_q2 + token/a.n_tokens*a.nb_q3);
        const float * x = (const float *) (own.x[GGML_KVTC_K] + token*own.nb1[GGML_KVTC_K] + head_kv*own.nb2[GGML_KVTC_K]);
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) {
            const int i = threadIdx.x%32 + 32*k;
            if (i < D/2) {
                const int c0 = pair_channel(2*i,     rope_type, n_rot);
                const int c1 = pair_channel(2*i + 1, rope_type, n_rot);
                const float2 y = make_float2(x[c0], x[c1]);
                sum += q[c0]*(y.x*turn[k].x - y.y*turn[k].y) + q[c1]*(y.x*turn[k].y + y.y*turn[k].x);
            }
        }
        sum = warp_reduce_sum(sum)*a.scale;
        return LOG2E*(a.softcap != 0.0f ? a.softcap*tanhf(sum/a.softcap) : sum);
    }
};

// OWN: there are tokens that attention has left out. It runs between a layer's attention and its next product, executes its code once,
// and waits for it to be fetched: short code is what makes it fast (NOTES.md)
template <int D, bool OWN>
__launch_bounds__(N_THREADS<D>)
__global__ void combine_few(const attn_args a, const float * values, const float2 * meta, int n_split, const exact_rows exact, const own_tokens own, const output out) {
    constexpr int THREADS = N_THREADS<D>;
    constexpr int WIDTH   = D/N_SHARE<D>;            // channels of a block
    constexpr int SLICE   = THREADS/(WIDTH/8);       // of the components
    constexpr int PARTS   = THREADS/D;               // of the splits, summed apart
    constexpr int ROWS    = (D + SLICE - 1)/SLICE;   // of the matrix, for a thread
    constexpr int HELD    = ROWS <= 8 ? ROWS : 8;    // that are loaded before they are needed
    constexpr int AHEAD   = 32/PARTS + 1;            // splits of a thread, likewise: 33 are most where there are four heads
    constexpr int LAST    = WIDTH < D ? THREADS/WIDTH : 1; // threads of a channel that sum its slices
    constexpr int PAD     = WIDTH < D ? 8 : 0;       // their reads are of different banks
    static_assert(THREADS % 32 == 0 && THREADS % D == 0 && THREADS >= 2*D && SLICE % LAST == 0 && LAST <= 32 && 32 % PARTS == 0, "threads do not divide evenly");
    __shared__ float sums[PARTS][D];
    __shared__ __align__(16) float part[SLICE][WIDTH + PAD];
    ggml_cuda_pdl_lc();

    // of the pack, which no kernel writes
    const char * pack    = a.pack;
    const ggml_kvtc_cuda_head & head = get_head(pack, GGML_KVTC_V, blockIdx.y);
    const half * matrix  = at<half>(pack, head.decode); // [component][channel]
    const int    from    = blockIdx.z*WIDTH;
    const int    channel = threadIdx.x%(WIDTH/8)*8;
    const int    slice   = threadIdx.x/(WIDTH/8);
    uint4 held[HELD];
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
        held[k] = *(const uint4 *) (matrix + min(slice + k*SLICE, D - 1)*D + from + channel);
    }
    const float mean = at<float>(pack, head.mean)[from + threadIdx.x/LAST%WIDTH];
    const query_row row = get_row(a, blockIdx.y, blockIdx.x);
    own_logit<D> logit;
    if constexpr (OWN) {
        logit.init(a, row.token);
    }
    ggml_cuda_pdl_sync();

    const int lane   = threadIdx.x % 32;
    const int part_d = threadIdx.x / D; // the thread's part of the splits, and side of exact rows
    const int c_d    = threadIdx.x % D;
    meta   += get_index(a, row)*n_split;
    values += get_index(a, row)*n_split*D + c_d;
    // all that is read is on its way before any of it is needed
    const float2 none = make_float2(-INFINITY, 0.0f);
    const float2 first  = lane      < n_split ? meta[lane]      : none; // every warp for itself
    const float2 second = lane + 32 < n_split ? meta[lane + 32] : none;
    float y[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
        const int s = part_d + k*PARTS;
        y[k] = s < n_split ? values[s*D] : 0.0f;
    }
    float2 mine = none; // the own token's logit, and the channel of its value
    if constexpr (OWN) {
        mine.y = *(const float *) (own.x[GGML_KVTC_V] + row.token*own.nb1[GGML_KVTC_V] + blockIdx.y*own.nb2[GGML_KVTC_V] + (from + threadIdx.x/LAST%WIDTH)*sizeof(float));
        mine.x = logit.get(a, own, row.token, row.head, blockIdx.y);
    }
    // Attention has read the rows that these replace. The first row of a token's group takes both sides
    exact_component component = {};
    if (part_d < exact.n_side && row.head == (int) blockIdx.y*a.group && blockIdx.z == 0) {
        component = load_component(exact.side[part_d], row.token, blockIdx.y, c_d);
    }
    float top = fmaxf(first.x, second.x);
#pragma unroll 1
    for (int s = lane + 64; s < n_split; s += 32) {
        top = fmaxf(top, meta[s].x);
    }
    top = fmaxf(warp_reduce_max(top), mine.x);
    const float base = top == -INFINITY ? 0.0f : top; // no column is seen: all weights are 0
    const float weight[2] = { exp2f(first.x - base), exp2f(second.x - base) };
    float total = weight[0]*first.y + weight[1]*second.y;
#pragma unroll 1
    for (int s = lane + 64; s < n_split; s += 32) {
        total += exp2f(meta[s].x - base)*meta[s].y;
    }
    const float of_own = exp2f(mine.x - base);
    total = warp_reduce_sum(total) + of_own;
    float seen;
    const float norm = get_norm(a, row.head, top, total, seen).y;
    const float rest = (seen - of_own*norm)*mean + of_own*norm*mine.y; // what the matrix does not give
    {
        float value = 0.0f;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            value += __shfl_sync(0xffffffff, weight[k*PARTS/32], (part_d + k*PARTS) % 32)*y[k]; // those of 32 threads have one part
        }
#pragma unroll 2
        for (int s = part_d + AHEAD*PARTS; s < n_split; s += PARTS) {
            value += exp2f(meta[s].x - base)*values[s*D];
        }
        sums[part_d][c_d] = value*norm;
    }
    __syncthreads();
    store_component(component);

    float acc[8] = {};
    const auto add = [&](int c, const uint4 & m) {
        float x = sums[0][c];
#pragma unroll
        for (int i = 1; i < PARTS; ++i) {
            x += sums[i][c];
        }
        const half2 * h = (const half2 *) &m;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 y = __half22float2(h[j]);
            acc[2*j]     += x*y.x;
            acc[2*j + 1] += x*y.y;
        }
    };
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
        if (slice + k*SLICE < D) {
            add(slice + k*SLICE, held[k]);
        }
    }
#pragma unroll 2
    for (int c = slice + HELD*SLICE; c < D; c += SLICE) {
        add(c, *(const uint4 *) (matrix + c*D + from + channel));
    }
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
        *(float4 *) (part[slice] + channel + j) = make_float4(acc[j], acc[j + 1], acc[j + 2], acc[j + 3]);
    }
    __syncthreads();
    if (threadIdx.x < LAST*WIDTH) {
        const int c = threadIdx.x/LAST;
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < SLICE; s += LAST) {
            sum += part[s + threadIdx.x%LAST][c];
        }
#pragma unroll
        for (int i = LAST/2; i > 0; i /= 2) {
            sum += __shfl_xor_sync(0xffffffff, sum, i);
        }
        if (threadIdx.x%LAST == 0) {
            get_output(a, out, row)[from + c] = sum + rest;
        }
    }
}

constexpr int MANY_WARPS = 8;
template <int D> constexpr int MANY_ROWS = D <= 128 ? 64 : 32;
template <int D> constexpr int MANY_K    = D <= 128 ? (D + 31)/32*32 : 64; // components of the matrix in shared memory at once

// The sums as f16 times the matrix: what rounding them changes is below what f16 attention rounds.
template <int D>
__launch_bounds__(32*MANY_WARPS)
__global__ void combine_many(const attn_args a, const partial_sums p, const output out) {
    constexpr int ROWS  = MANY_ROWS<D>;
    constexpr int K     = MANY_K<D>;
    constexpr int LD    = (D + 31)/32*32 + 8;
    constexpr int TILES = ROWS/16;             // of rows: a warp takes one
    constexpr int PARTS = MANY_WARPS/TILES;    // of the channels
    constexpr int N     = D/8/PARTS;           // channels of a warp, by 8
    constexpr int LANES = (LD - 8)/4;          // threads that read a row's sums
    constexpr int HELD  = ROWS*LANES/(32*MANY_WARPS); // pieces of sums of a thread, which are on their way together
    static_assert(D/8 % PARTS == 0 && ROWS*LANES % (32*MANY_WARPS) == 0, "channels or sums do not divide evenly");
    extern __shared__ __align__(16) half many[];
    half  * sums   = many;                     // [ROWS][LD]
    half  * matrix = many + ROWS*LD;           // [K][D + 8]
    __shared__ float  seen[ROWS];
    __shared__ float2 norm[ROWS];              // largest logit, what a row is multiplied by
    __shared__ int64_t place[ROWS];

    ggml_cuda_pdl_lc();
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int n_row = a.n_tokens*a.n_stream*a.group;
    const char * pack = a.pack;
    const ggml_kvtc_cuda_head & head = get_head(pack, GGML_KVTC_V, blockIdx.y);
    const half * from = at<half>(pack, head.decode); // [component][channel]

    const auto load_matrix = [&](int k0) {
        for (int i = threadIdx.x; i < K*(D/8); i += 32*MANY_WARPS) {
            const int k = i/(D/8);
            half * to = matrix + k*(D + 8) + i%(D/8)*8;
            if (k0 + k < D) {
                copy_async<16>(to, from + (k0 + k)*D + i%(D/8)*8);
            } else {
                *(uint4 *) to = make_uint4(0, 0, 0, 0);
            }
        }
        copy_commit();
    };
    load_matrix(0);
    ggml_cuda_pdl_sync(); // all before is of the pack, which no kernel writes
    if (threadIdx.x < ROWS) {
        const int     i   = blockIdx.x*ROWS + threadIdx.x;
        const query_row row = get_row(a, blockIdx.y, min(i, n_row - 1));
        const int64_t index = get_index(a, row);
        const int64_t at    = get_place(a, p, index);
        float2 sum = p.old_meta ? p.old_meta[index] : make_float2(-INFINITY, 0.0f);
        for (int chunk = 0; chunk < p.n_chunk; ++chunk) {
            for (int s = 0; s < p.n_split; ++s) {
                const float2 m = get_meta(p, at, chunk, s);
                if (m.x != -INFINITY) {
                    const float top = fmaxf(sum.x, m.x);
                    sum = make_float2(top, (sum.x == -INFINITY ? 0.0f : exp2f(sum.x - top)*sum.y) + exp2f(m.x - top)*m.y);
                }
            }
        }
        norm [threadIdx.x] = get_norm(a, row.head, sum.x, sum.y, seen[threadIdx.x]);
        place[threadIdx.x] = at;
    }
    __syncthreads();
    {
        float4 x[HELD] = {};
        const auto add = [&](int k, const float2 & m, const float4 & y) {
            const float2 n = norm[(k*32*MANY_WARPS + threadIdx.x)/LANES];
            const float  f = m.x == -INFINITY ? 0.0f : exp2f(m.x - n.x)*n.y;
            if (f != 0.0f) { // else y may be anything
                x[k] = make_float4(x[k].x + f*y.x, x[k].y + f*y.y, x[k].z + f*y.z, x[k].w + f*y.w);
            }
        };
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            const int j = k*32*MANY_WARPS + threadIdx.x;
            const int c = min(j%LANES*4, D - 4);
            if (p.old_meta) {
                const int64_t row = get_index(a, get_row(a, blockIdx.y, min(blockIdx.x*ROWS + j/LANES, n_row - 1)));
                add(k, p.old_meta[row], *(const float4 *) (p.old_values + row*D + c));
            }
        }
        for (int chunk = 0; chunk < p.n_chunk; ++chunk) {
            for (int s = 0; s < p.n_split; ++s) {
                float2 m[HELD];
                float4 y[HELD];
#pragma unroll
                for (int k = 0; k < HELD; ++k) {
                    const int j = k*32*MANY_WARPS + threadIdx.x;
                    m[k] = get_meta    (p, place[j/LANES], chunk, s);
                    y[k] = get_value<D>(p, place[j/LANES], chunk, s, min(j%LANES*4, D - 4));
                }
#pragma unroll
                for (int k = 0; k < HELD; ++k) {
                    add(k, m[k], y[k]);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
            const int j = k*32*MANY_WARPS + threadIdx.x;
            *(uint2 *) (sums + j/LANES*LD + j%LANES*4) = make_uint2(pack_half2(x[k].x, x[k].y), pack_half2(x[k].z, x[k].w));
        }
    }
    const int tile = warp%TILES;
    const int n0   = warp/TILES*N;
    float acc[N][4] = {};
    for (int k0 = 0; k0 < D; k0 += K) {
        if (k0 > 0) {
            __syncthreads();
            load_matrix(k0);
        }
        copy_wait<0>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < K; k += 32) {
            uint32_t x[2][4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                ldmatrix_x4(x[j], sums + (16*tile + lane%16)*LD + k0 + k + 16*j + lane/16*8);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                uint32_t y[4]; // 32 components of 8 channels
                ldmatrix_x4_trans(y, matrix + (k + lane)*(D + 8) + 8*(n0 + n));
                mma(acc[n], x[0], y[0], y[1]);
                mma(acc[n], x[1], y[2], y[3]);
            }
        }
    }
    const float * mean = at<float>(pack, head.mean);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int r = 16*tile + lane/4 + 8*e;
        const int i = blockIdx.x*ROWS + r;
        if (i < n_row) {
            float * to = get_output(a, out, get_row(a, blockIdx.y, i));
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int c = 8*(n0 + n) + lane%4*2;
                const float2 m = *(const float2 *) (mean + c);
                *(float2 *) (to + c) = make_float2(acc[n][2*e] + m.x*seen[r], acc[n][2*e + 1] + m.y*seen[r]);
            }
        }
    }
}

template <int D>
void launch_many(const attn_args & a, const partial_sums & sums, const output & out, cudaStream_t stream) {
    constexpr size_t shared = (MANY_ROWS<D>*((D + 31)/32*32 + 8) + MANY_K<D>*(D + 8))*sizeof(half);
    const int per_kv = a.n_tokens*a.n_stream*a.group;
    allow_shared_memory((const void *) combine_many<D>, shared);
    const dim3 grid((per_kv + MANY_ROWS<D> - 1)/MANY_ROWS<D>, a.n_head_kv);
    ggml_cuda_kernel_launch(combine_many<D>, { grid, 32*MANY_WARPS, shared, stream }, a, sums, out);
}

template <int D>
void launch(const attn_args & a, const float * values, const float2 * meta, int n_split, const exact_rows & exact, const own_tokens & own, const output & out, cudaStream_t stream) {
    const int per_kv = a.n_tokens*a.n_stream*a.group;
    if (per_kv <= COMBINE_FEW) {
        const ggml_cuda_kernel_launch_params p = { dim3(per_kv, a.n_head_kv, N_SHARE<D>), N_THREADS<D>, 0, stream };
        if (own.x[0]) {
            launch_behind(own.made, combine_few<D, true>, p, a, values, meta, n_split, exact, own, out);
        } else {
            ggml_cuda_kernel_launch(combine_few<D, false>, p, a, values, meta, n_split, exact, own, out);
        }
        CUDA_CHECK(cudaGetLastError());
        return;
    }
    GGML_ASSERT(exact.n_side == 0 && !own.x[0]);
    partial_sums sums = {};
    sums.meta       = meta;
    sums.values     = values;
    sums.n_chunk    = 1;
    sums.n_split    = n_split;
    sums.split_step = 1;
    sums.to_log2    = 1.0f;
    launch_many<D>(a, sums, out, stream);
}

} // namespace

void combine(const attn_args & a, int d, const float * values, const float2 * meta, int n_split, const exact_rows & exact, const own_tokens & own,
             const output & out, cudaStream_t stream) {
    switch (d) {
        case  64: return launch< 64>(a, values, meta, n_split, exact, own, out, stream);
        case  80: return launch< 80>(a, values, meta, n_split, exact, own, out, stream);
        case  96: return launch< 96>(a, values, meta, n_split, exact, own, out, stream);
        case 128: return launch<128>(a, values, meta, n_split, exact, own, out, stream);
        case 256: return launch<256>(a, values, meta, n_split, exact, own, out, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

void combine(const attn_args & a, int d, const partial_sums & sums, const output & out, cudaStream_t stream) {
    switch (d) {
        case  64: return launch_many< 64>(a, sums, out, stream);
        case  80: return launch_many< 80>(a, sums, out, stream);
        case  96: return launch_many< 96>(a, sums, out, stream);
        case 128: return launch_many<128>(a, sums, out, stream);
        case 256: return launch_many<256>(a, sums, out, stream);
        case 512: return launch_many<512>(a, sums, out, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace kvtc
