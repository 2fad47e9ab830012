// A prompt's write: transform, code and store 16 tokens of one head in a block. The transform is a product of tf32 on tensor
// cores, in three parts of which each drops what the others have, so that its error is that of f32.
#include "encode.cuh"

namespace kvtc {

namespace {

constexpr int ROWS    = 16;
constexpr int THREADS = 256;
constexpr int WARPS   = THREADS/32;

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
__launch_bounds__(THREADS)
__global__ void transform_and_write_many(const fused_args args) {
    constexpr int LD    = D % 32 == 0 ? D + 16 : D; // rows of x on other banks than their neighbours
    constexpr int TILES = (D/8 + WARPS - 1)/WARPS;  // of 8 components, for a warp
    __shared__ __align__(16) float x[ROWS*LD];      // then z
    __shared__ float scratch[WARPS][2*D];
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
    for (int i = threadIdx.x; i < ROWS*D; i += THREADS) {
        const int r = i/D;
        x[r*LD + i%D] = r < n ? *(const float *) (a.x + (token0 + r)*a.nb_x1 + h*a.nb_x2 + i%D*sizeof(float)) : 0.0f;
    }
    __syncthreads();

    float acc[TILES][4] = {};
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
        const int tile = warp + t*WARPS;
        if (tile < D/8) {
            if (t > 0) {
                load(tile);
            }
#pragma unroll
            for (int s = 0; s < D/16; ++s) {
                const float4 lo = *(const float4 *) (x + r8*LD       + 16*s + 4*q4);
                const float4 hi = *(const float4 *) (x + (r8 + 8)*LD + 16*s + 4*q4);
                const float values[2][4] = { { lo.x, hi.x, lo.y, hi.y }, { lo.z, hi.z, lo.w, hi.w } };
                const float factors[2][2] = { { e[s].x, e[s].y }, { e[s].z, e[s].w } };
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    uint32_t a_big[4], a_small[4], b_big[2], b_small[2];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        split_tf32(values[k][i], a_big[i], a_small[i]);
                    }
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        split_tf32(factors[k][i], b_big[i], b_small[i]);
                    }
                    mma_tf32(acc[t], a_small, b_big  [0], b_big  [1]);
                    mma_tf32(acc[t], a_big,   b_small[0], b_small[1]);
                    mma_tf32(acc[t], a_big,   b_big  [0], b_big  [1]);
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
            *(float2 *) (x + r8*LD       + c) = make_float2(acc[t][0] + bias.x, acc[t][1] + bias.y);
            *(float2 *) (x + (r8 + 8)*LD + c) = make_float2(acc[t][2] + bias.x, acc[t][3] + bias.y);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n*D; i += THREADS) {
        *(float *) (a.z + (token0 + i/D)*a.nb_z1 + h*a.nb_z2 + i%D*sizeof(float)) = x[i/D*LD + i%D];
    }
    const uint32_t payload = get_head(pack, side, h).payload;
    for (int r = warp; r < n; r += WARPS) {
        const int64_t row = a.idxs[token0 + r];
        if (row >= 0) {
            code_vector(pack, side, h, args.n_head, D, x + r*LD, scratch[warp], scratch[warp] + D, a.rows + row*a.nb_row + payload);
            __syncwarp(); // scratch is used again
        }
    }
}

template <int D>
void launch(const fused_args & a, cudaStream_t stream) {
    ggml_cuda_kernel_launch(transform_and_write_many<D>, { dim3((a.n_tokens + ROWS - 1)/ROWS, a.n_head, a.n_side), THREADS, 0, stream }, a);
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
