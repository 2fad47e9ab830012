// A prompt's write: transform, code and store the tokens of one head, 32 in a block. The transform is a product of tf32 on tensor
// cores, in three parts of which each drops what the others have, so that its error is that of f32.
//
// A warp codes four vectors at once, thread l of eight component l of every group: the sums in f64, whose order is fixed, run in the
// thread's registers, and all of a warp search the same group, whose width is one number.
#include "encode.cuh"

namespace kvtc {

namespace {

constexpr int WARPS   = 8;
constexpr int THREADS = 32*WARPS;
constexpr int LANES   = ENCODE_LANES;
constexpr int VECTORS = 32/LANES; // of a warp
template <int D> constexpr int MANY_ROWS = D <= 128 ? 32 : 16; // the matrix is read once for so many
template <int D> constexpr int X_LD      = D % 32 == 0 ? D + 16 : D; // rows on other banks than their neighbours, 16 bytes of two at once
template <int D> constexpr int Z_LD      = D + 8;                    // or eight numbers of four
template <int D> constexpr int SPAN      = MANY_ROWS<D>*(X_LD<D> > Z_LD<D> ? X_LD<D> : Z_LD<D>);
template <int D> constexpr int NEAR      = SPAN<D>/12*8; // of a head's bounds and levels, those that lie in shared memory

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    GGML_UNUSED_VARS(c, a, b0, b1);
    NO_DEVICE_CODE;
#endif
}

// x = big + small
__device__ __forceinline__ void split_tf32(float x, uint32_t & big, uint32_t & small) {
    big   = __float_as_uint(x) & 0xffffe000;
    small = __float_as_uint(x - __uint_as_float(big));
}

// how to code a group; its places in the head's bounds and levels
struct group_code {
    int width;
    int byte;
    int bounds, levels;
};

template <int D>
struct write_memory {
    __align__(16) float x[2][SPAN<D>]; // big, small; then z in place of the first, bounds and levels of the second
    float      inv_scale[D];
    group_code groups[D/LANES];

    __device__ float * bounds() { return x[1]; }
    __device__ half  * levels() { return (half *) (x[1] + NEAR<D>); }
};

// what all vectors of a head share
struct head_code {
    const float * bounds;
    const half  * levels;
    uint32_t payload, n_bytes, end; // bytes up to the next head's
    bool     keep_norm;
    float    gain_base;
};

// component l of each group, coded, to out (nullptr: not stored)
template <int D>
__device__ __forceinline__ void code_components(write_memory<D> & m, const head_code & head, const float (&z)[D/LANES], int l, float inv, double power, uint8_t * out) {
    constexpr int G = D/LANES;
    constexpr int U = 4; // groups whose searches run together
    double2 sums = make_double2(0.0, 0.0);
#pragma unroll
    for (int g0 = 0; g0 < G; g0 += U) {
        group_code group[U];
        float y [U];
        int   at[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            group[u] = m.groups[min(g0 + u, G - 1)];
            y [u] = z[g0 + u < G ? g0 + u : G - 1]*inv;
            at[u] = group[u].bounds + l;
        }
        const int widest = inv == 0.0f ? 0 : group[0].width; // widths never rise
        const auto search = [&](const float * bounds) { // these never fall
            for (int step = LANES << widest >> 1; step >= LANES; step /= 2) {
#pragma unroll
                for (int u = 0; u < U; ++u) {
                    if (step < LANES << group[u].width && y[u] > bounds[at[u] + step - LANES]) {
                        at[u] += step;
                    }
                }
            }
        };
        const auto end = [](const group_code & c) { return max(c.bounds, c.levels) + (LANES << c.width); };
        const bool near = end(group[U - 1]) <= NEAR<D>;
        if (near) {
            search(m.bounds());
        } else {
            search(head.bounds);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (g0 + u < G && group[u].width > 0) {
                const int w     = group[u].width;
                const int code  = (at[u] - l - group[u].bounds)/LANES;
                const int entry = group[u].levels + (l << w) + code;
                const float level = inv == 0.0f ? 0.0f : __half2float(near ? m.levels()[entry] : head.levels[entry]);
                sums.x += (double) z[g0 + u < G ? g0 + u : 0]*level;
                sums.y += (double) level*level;
                uint32_t word;
                if (w <= 4) {
                    word = lane_or((uint32_t) code << l*w) >> 8*(l % 4);
                } else {
                    const uint64_t wide = (uint64_t) code << l*w;
                    const uint32_t lo   = lane_or((uint32_t) wide);
                    const uint32_t hi   = lane_or((uint32_t) (wide >> 32));
                    word = (l < 4 ? lo : hi) >> 8*(l % 4);
                }
                if (out && l < w) {
                    out[group[u].byte + l] = (uint8_t) word;
                }
            }
        }
    }
    sums.x = lane_sum(sums.x);
    sums.y = lane_sum(sums.y);
    if (out) {
        if (l == 0) {
            out[0] = inv == 0.0f ? 0 : get_gain_code(power, sums, head.keep_norm, head.gain_base);
        }
        // the gap to the next head, or the rest of the row: equal content gives equal rows
        for (uint32_t i = head.n_bytes + l; i < head.end; i += LANES) {
            out[i] = 0;
        }
    }
}

template <int D>
__launch_bounds__(THREADS, D <= 128 ? 2 : 1)
__global__ void transform_and_write_many(const fused_args args) {
    constexpr int ROWS    = MANY_ROWS<D>;
    constexpr int LD      = X_LD<D>;
    constexpr int TILES   = (D/8 + WARPS - 1)/WARPS; // of 8 components, for a warp
    constexpr int TOGETHER = TILES <= 2 ? TILES : 1; // that share what they read of x
    constexpr int G       = D/LANES;
    __shared__ write_memory<D> m;
    static_assert(sizeof(m) <= 48*1024, "more shared memory than a kernel has without asking");
    ggml_cuda_pdl_lc();
    const fused_side & a    = args.side [blockIdx.z];
    const int          side = args.index[blockIdx.z];
    const int h      = blockIdx.y;
    const int token0 = blockIdx.x*ROWS;
    const int n      = min(ROWS, args.n_tokens - token0);
    const int lane   = threadIdx.x % 32;
    const int warp   = threadIdx.x / 32;
    const int q4     = lane % 4;
    const int r8     = lane / 4;

    // A thread has components 4*q4 ... 4*q4 + 3 of 16: the order of the addends is free, and so 16 bytes are loaded at once.
    const float * encode = a.encode + (int64_t) h*D*D;
    float4 e[TOGETHER][D/16];
    const auto load = [&](int t0) {
#pragma unroll
        for (int t = 0; t < TOGETHER; ++t) {
            const int tile = min(warp + (t0 + t)*WARPS, D/8 - 1);
#pragma unroll
            for (int s = 0; s < D/16; ++s) {
                e[t][s] = *(const float4 *) (encode + (8*tile + r8)*D + 16*s + 4*q4);
            }
        }
    };
    load(0);
    const char * pack = a.pack;
    const ggml_kvtc_cuda_head & info = get_head(pack, side, h);
    for (int i = threadIdx.x; i < D; i += THREADS) {
        m.inv_scale[i] = info.inverse_scale[i];
    }
    if (threadIdx.x < G) {
        group_code & group = m.groups[threadIdx.x];
        group.width  = info.group_code [threadIdx.x].width;
        group.byte   = info.group_code [threadIdx.x].byte;
        group.bounds = (int) info.first_bound[threadIdx.x];
        group.levels = (int) info.first_level[threadIdx.x];
    }
    ggml_cuda_pdl_sync(); // all before is of the calibration, which no kernel writes
    const bool wide = ((uintptr_t) a.x | a.nb_x1 | a.nb_x2) % 16 == 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS*D/4; i += THREADS) {
        const int r = i/(D/4);
        const int c = i%(D/4)*4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (r < n) {
            const float * from = (const float *) (a.x + (token0 + r)*a.nb_x1 + h*a.nb_x2) + c;
            x = wide ? *(const float4 *) from : make_float4(from[0], from[1], from[2], from[3]);
        }
        uint4 upper;
        uint4 lower;
        split_tf32(x.x, upper.x, lower.x);
        split_tf32(x.y, upper.y, lower.y);
        split_tf32(x.z, upper.z, lower.z);
        split_tf32(x.w, upper.w, lower.w);
        *(uint4 *) (m.x[0] + r*LD + c) = upper;
        *(uint4 *) (m.x[1] + r*LD + c) = lower;
    }
    const int     r   = warp*VECTORS + lane/LANES; // the thread's vector
    const int64_t row = r < n ? a.idxs[token0 + r] : -1;
    __syncthreads();

    float acc[TILES][ROWS/16][4] = {};
#pragma unroll
    for (int t0 = 0; t0 < TILES; t0 += TOGETHER) {
        if (t0 > 0) {
            load(t0);
        }
        if (warp + t0*WARPS < D/8) {
#pragma unroll
            for (int s = 0; s < D/16; ++s) {
                uint32_t b_big[TOGETHER][4], b_small[TOGETHER][4];
#pragma unroll
                for (int t = 0; t < TOGETHER; ++t) {
                    split_tf32(e[t][s].x, b_big[t][0], b_small[t][0]);
                    split_tf32(e[t][s].y, b_big[t][1], b_small[t][1]);
                    split_tf32(e[t][s].z, b_big[t][2], b_small[t][2]);
                    split_tf32(e[t][s].w, b_big[t][3], b_small[t][3]);
                }
#pragma unroll
                for (int i = 0; i < ROWS/16; ++i) {
                    const int at = (16*i + r8)*LD + 16*s + 4*q4;
                    const uint4 big_lo   = *(const uint4 *) (m.x[0] + at);
                    const uint4 big_hi   = *(const uint4 *) (m.x[0] + at + 8*LD);
                    const uint4 small_lo = *(const uint4 *) (m.x[1] + at);
                    const uint4 small_hi = *(const uint4 *) (m.x[1] + at + 8*LD);
                    const uint32_t a_big  [2][4] = { { big_lo.x,   big_hi.x,   big_lo.y,   big_hi.y   }, { big_lo.z,   big_hi.z,   big_lo.w,   big_hi.w   } };
                    const uint32_t a_small[2][4] = { { small_lo.x, small_hi.x, small_lo.y, small_hi.y }, { small_lo.z, small_hi.z, small_lo.w, small_hi.w } };
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
#pragma unroll
                        for (int t = 0; t < TOGETHER; ++t) {
                            mma_tf32(acc[t0 + t][i], a_small[k], b_big  [t][2*k], b_big  [t][2*k + 1]);
                        }
#pragma unroll
                        for (int t = 0; t < TOGETHER; ++t) {
                            mma_tf32(acc[t0 + t][i], a_big  [k], b_small[t][2*k], b_small[t][2*k + 1]);
                        }
#pragma unroll
                        for (int t = 0; t < TOGETHER; ++t) {
                            mma_tf32(acc[t0 + t][i], a_big  [k], b_big  [t][2*k], b_big  [t][2*k + 1]);
                        }
                    }
                }
            }
        }
    }
    __syncthreads();

    head_code head;
    head.bounds    = at<float>(pack, info.bounds);
    head.levels    = at<half> (pack, info.levels);
    head.payload   = info.payload;
    head.n_bytes   = info.n_bytes;
    head.end       = get_end(pack, side, h, args.n_head) - head.payload;
    head.keep_norm = info.keep_norm != 0;
    head.gain_base = info.gain_base;
    {
        const group_code & last = m.groups[G - 1];
        const int n_bound = min(NEAR<D>, last.bounds + (LANES << last.width) - LANES);
        const int n_level = min(NEAR<D>, last.width > 0 ? last.levels + (LANES << last.width) : last.levels);
        for (int i = 4*threadIdx.x; i < n_bound; i += 4*THREADS) {
            copy_async<16>(m.bounds() + i, head.bounds + i);
        }
        for (int i = 8*threadIdx.x; i < n_level; i += 8*THREADS) {
            copy_async<16>(m.levels() + i, head.levels + i);
        }
        copy_commit();
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        const int c = 8*(warp + t*WARPS) + 2*q4;
        if (c < D) {
            const float2 bias = *(const float2 *) (a.bias + h*D + c);
#pragma unroll
            for (int i = 0; i < 2*(ROWS/16); ++i) {
                const float2 z = make_float2(acc[t][i/2][i%2*2] + bias.x, acc[t][i/2][i%2*2 + 1] + bias.y);
                const int to = 8*i + r8;
                *(float2 *) (m.x[0] + to*Z_LD<D> + c) = z;
                if (to < n) {
                    *(float2 *) ((float *) (a.z + (token0 + to)*a.nb_z1 + h*a.nb_z2) + c) = z;
                }
            }
        }
    }
    __syncthreads();

    float  z[G];
    double white = 0.0;
    double power = 0.0;
    const int l = lane%LANES;
    if (r < ROWS) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
            z[g] = m.x[0][r*Z_LD<D> + g*LANES + l];
            const float u = z[g]*m.inv_scale[g*LANES + l];
            white += (double) u*u;
            power += (double) z[g]*z[g];
        }
        white = lane_sum(white);
        power = lane_sum(power);
    }
    copy_wait<0>();
    __syncthreads();
    if (__any_sync(0xffffffff, row >= 0)) {
        uint8_t * out = row >= 0 ? a.rows + row*a.nb_row + head.payload : nullptr;
        code_components<D>(m, head, z, l, get_inverse_norm(white, D, args.inv_d), power, out);
    }
}

template <int D>
void launch(const fused_args & a, cudaStream_t stream) {
    ggml_cuda_kernel_launch(transform_and_write_many<D>, { dim3((a.n_tokens + MANY_ROWS<D> - 1)/MANY_ROWS<D>, a.n_head, a.n_side), THREADS, 0, stream }, a);
}

} // namespace

bool encode_many_supports(int cc, int d) {
    return cc >= GGML_CUDA_CC_AMPERE && (d == 64 || d == 80 || d == 96 || d == 128 || d == 256);
}

void encode_many(const fused_args & a, cudaStream_t stream) {
    switch (a.d) {
        case  64: return launch< 64>(a, stream);
        case  80: return launch< 80>(a, stream);
        case  96: return launch< 96>(a, stream);
        case 128: return launch<128>(a, stream);
        case 256: return launch<256>(a, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", a.d);
    }
}

} // namespace kvtc
