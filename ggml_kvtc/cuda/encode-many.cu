// A prompt's write: transform, code and store the tokens of one head, 32 in a block. The transform is a product of tf32 on tensor
// cores, in three parts of which each drops what the others have, so that its error is that of f32.
#include "encode.cuh"

namespace kvtc {

namespace {

template <int D> constexpr int MANY_ROWS  = D <= 128 ? 32 : 16; // the matrix is read once for so many
template <int D> constexpr int MANY_WARPS = D <= 128 ? 16 :  8; // that code two vectors each

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

template <int D>
__launch_bounds__(32*MANY_WARPS<D>, D <= 128 ? 2 : 1)
__global__ void transform_and_write_many(const fused_args args) {
    constexpr int ROWS    = MANY_ROWS<D>;
    constexpr int WARPS   = MANY_WARPS<D>;
    constexpr int THREADS = 32*WARPS;
    constexpr int LD      = D % 32 == 0 ? D + 16 : D; // rows of x on other banks than their neighbours
    constexpr int TILES   = (D/8 + WARPS - 1)/WARPS;  // of 8 components, for a warp
    __shared__ __align__(16) float big  [ROWS*LD];    // of x, then z
    __shared__ __align__(16) float small[ROWS*LD];    // of x, then scratch of the warps
    static_assert(ROWS*LD >= WARPS*2*D, "scratch does not fit");
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
    float4 e[D/16];
    const auto load = [&](int tile) {
#pragma unroll
        for (int s = 0; s < D/16; ++s) {
            e[s] = *(const float4 *) (encode + (8*tile + r8)*D + 16*s + 4*q4);
        }
    };
    if (warp < D/8) {
        load(warp);
    }
    const char * pack = a.pack;
    ggml_cuda_pdl_sync(); // all before is of the calibration, which no kernel writes
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS*D/4; i += THREADS) {
        const int r = i/(D/4);
        const int c = i%(D/4)*4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (r < n) {
            const float * from = (const float *) (a.x + (token0 + r)*a.nb_x1 + h*a.nb_x2) + c;
            x = make_float4(from[0], from[1], from[2], from[3]);
        }
        uint4 upper;
        uint4 lower;
        split_tf32(x.x, upper.x, lower.x);
        split_tf32(x.y, upper.y, lower.y);
        split_tf32(x.z, upper.z, lower.z);
        split_tf32(x.w, upper.w, lower.w);
        *(uint4 *) (big   + r*LD + c) = upper;
        *(uint4 *) (small + r*LD + c) = lower;
    }
    __syncthreads();

    float acc[TILES][ROWS/16][4] = {};
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        const int tile = warp + t*WARPS;
        if (tile < D/8) {
            if (t > 0) {
                load(tile);
            }
#pragma unroll
            for (int s = 0; s < D/16; ++s) {
                uint32_t b_big[4], b_small[4];
                split_tf32(e[s].x, b_big[0], b_small[0]);
                split_tf32(e[s].y, b_big[1], b_small[1]);
                split_tf32(e[s].z, b_big[2], b_small[2]);
                split_tf32(e[s].w, b_big[3], b_small[3]);
#pragma unroll
                for (int m = 0; m < ROWS/16; ++m) {
                    const int at = (16*m + r8)*LD + 16*s + 4*q4;
                    const uint4 big_lo   = *(const uint4 *) (big   + at);
                    const uint4 big_hi   = *(const uint4 *) (big   + at + 8*LD);
                    const uint4 small_lo = *(const uint4 *) (small + at);
                    const uint4 small_hi = *(const uint4 *) (small + at + 8*LD);
                    const uint32_t a_big  [2][4] = { { big_lo.x,   big_hi.x,   big_lo.y,   big_hi.y   }, { big_lo.z,   big_hi.z,   big_lo.w,   big_hi.w   } };
                    const uint32_t a_small[2][4] = { { small_lo.x, small_hi.x, small_lo.y, small_hi.y }, { small_lo.z, small_hi.z, small_lo.w, small_hi.w } };
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        mma_tf32(acc[t][m], a_small[k], b_big  [2*k], b_big  [2*k + 1]);
                        mma_tf32(acc[t][m], a_big  [k], b_small[2*k], b_small[2*k + 1]);
                        mma_tf32(acc[t][m], a_big  [k], b_big  [2*k], b_big  [2*k + 1]);
                    }
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        const int c = 8*(warp + t*WARPS) + 2*q4;
        if (c < D) {
            const float2 bias = *(const float2 *) (a.bias + h*D + c);
#pragma unroll
            for (int m = 0; m < ROWS/16; ++m) {
                *(float2 *) (big + (16*m + r8)*LD     + c) = make_float2(acc[t][m][0] + bias.x, acc[t][m][1] + bias.y);
                *(float2 *) (big + (16*m + r8 + 8)*LD + c) = make_float2(acc[t][m][2] + bias.x, acc[t][m][3] + bias.y);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n*D; i += THREADS) {
        *(float *) (a.z + (token0 + i/D)*a.nb_z1 + h*a.nb_z2 + i%D*sizeof(float)) = big[i/D*LD + i%D];
    }
    const uint32_t payload = get_head(pack, side, h).payload;
    float * const scratch = small + warp*2*D;
    for (int r = warp; r < n; r += WARPS) {
        const int64_t row = a.idxs[token0 + r];
        if (row >= 0) {
            code_vector(pack, side, h, args.n_head, D, big + r*LD, scratch, scratch + D, a.rows + row*a.nb_row + payload);
            __syncwarp(); // scratch is used again
        }
    }
}

template <int D>
void launch(const fused_args & a, cudaStream_t stream) {
    ggml_cuda_kernel_launch(transform_and_write_many<D>, { dim3((a.n_tokens + MANY_ROWS<D> - 1)/MANY_ROWS<D>, a.n_head, a.n_side), 32*MANY_WARPS<D>, 0, stream }, a);
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
