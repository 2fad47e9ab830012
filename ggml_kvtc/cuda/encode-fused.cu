// Decode's write: transform, code and store a few vectors in one kernel, in place of a product, a sum and a write.
#include "encode.cuh"

namespace kvtc {

namespace {

constexpr int THREADS = 256;
constexpr int WARPS   = THREADS/32;
constexpr int LANES   = GGML_KVTC_GROUP;
constexpr int NARROW  = 16; // levels of a component that are loaded before they are needed, all at once

// Two sums over a vector in the order that ggml_kvtc/README.md states: groups for each lane, then lanes.
__device__ __forceinline__ double2 ordered_sums(const double (&x)[2][GGML_KVTC_MAX_DIM], int d, double (&lanes)[2][LANES]) {
    if (threadIdx.x < 2*LANES) {
        const double * from = x[threadIdx.x/LANES];
        double sum = 0.0;
#pragma unroll 8
        for (int c = threadIdx.x%LANES; c < d; c += LANES) {
            sum += from[c];
        }
        lanes[threadIdx.x/LANES][threadIdx.x%LANES] = sum;
    }
    __syncthreads();
    double2 total = make_double2(0.0, 0.0);
#pragma unroll
    for (int l = 0; l < LANES; ++l) {
        total.x += lanes[0][l];
        total.y += lanes[1][l];
    }
    __syncthreads();
    return total;
}

__launch_bounds__(THREADS)
__global__ void transform_and_write(const fused_args args) {
    const fused_side & a    = args.side [blockIdx.z];
    const int          side = args.index[blockIdx.z];
    __shared__ __align__(16) float x[GGML_KVTC_MAX_DIM];
    __shared__ float  z[GGML_KVTC_MAX_DIM];
    __shared__ double terms[2][GGML_KVTC_MAX_DIM];
    __shared__ double lanes[2][LANES];
    __shared__ __align__(16) half levels[GGML_KVTC_MAX_DIM][NARROW];
    constexpr int N = GGML_KVTC_MAX_DIM/THREADS; // components of a thread
    ggml_cuda_pdl_lc();
    const int h     = blockIdx.x;
    const int token = blockIdx.y;
    const int d     = args.d;
    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int l     = threadIdx.x % LANES;

    // the matrix first: it is the most to wait for
    const float * encode = a.encode + (int64_t) h*d*d;
    constexpr int U = 16; // rows of a warp whose loads are on their way together; d is a multiple of 16
    float4 e[U];
    const auto load = [&](int c0, int i) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            e[u] = *(const float4 *) (encode + min(c0 + u*WARPS, d - 1)*d + i);
        }
    };
    if (4*lane < d) {
        load(warp, 4*lane);
    }
    // all that coding needs of the pack is on its way while the product is taken
    const char * pack = find_pack(a.pack);
    const ggml_kvtc_cuda_head & head = get_head(pack, side, h);
    ggml_kvtc_cuda_code code_of[N];
    float         inv_scale[N];
    float         bias     [N];
    const float * bound    [N];
    const half  * level_of [N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = min(threadIdx.x + i*THREADS, d - 1);
        code_of  [i] = at<ggml_kvtc_cuda_code>(pack, head.codes)[c/LANES];
        inv_scale[i] = at<float>(pack, head.inv_scale)[c];
        bias     [i] = a.bias[h*d + c];
        bound    [i] = at<float>(pack, head.bounds) + at<uint32_t>(pack, head.bounds_at)[c/LANES] + l;
        level_of [i] = at<half>(pack, head.levels) + at<uint32_t>(pack, head.levels_at)[c/LANES] + (l << code_of[i].width);
    }
    float midpoints[N][NARROW - 1];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int w = threadIdx.x + i*THREADS < d ? code_of[i].width : 0;
        const int n = w >= 1 && w <= 4 ? 1 << w : 0;
#pragma unroll
        for (int k = 0; k < NARROW - 1; ++k) {
            midpoints[i][k] = k < n - 1 ? bound[i][k*LANES] : INFINITY;
        }
#pragma unroll
        for (int k = 0; k < NARROW; k += 2) { // levels come in pairs
            if (k < n) {
                *(half2 *) &levels[threadIdx.x + i*THREADS][k] = *(const half2 *) (level_of[i] + k);
            }
        }
    }
    ggml_cuda_pdl_sync(); // all before is of the calibration, which no kernel writes
    for (int c = threadIdx.x; c < d; c += THREADS) {
        x[c] = *(const float *) (a.x + token*a.nb_x1 + h*a.nb_x2 + c*sizeof(float));
    }
    const int64_t row = a.idxs[token];
    __syncthreads();

    for (int c0 = warp; c0 < d; c0 += U*WARPS) {
        float sum[U] = {};
        for (int i = 4*lane; i < d; i += 4*32) {
            const float4 y = *(const float4 *) (x + i);
            if (c0 != warp || i != 4*lane) {
                load(c0, i);
            }
#pragma unroll
            for (int u = 0; u < U; ++u) {
                sum[u] += e[u].x*y.x + e[u].y*y.y + e[u].z*y.z + e[u].w*y.w;
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            sum[u] = warp_reduce_sum(sum[u]);
            if (lane == u && c0 + u*WARPS < d) {
                z[c0 + u*WARPS] = sum[u];
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = threadIdx.x + i*THREADS;
        if (c < d) {
            const float y = z[c] + bias[i];
            const float u = y*inv_scale[i];
            *(float *) (a.z + token*a.nb_z1 + h*a.nb_z2 + c*sizeof(float)) = y;
            z[c] = y;
            terms[0][c] = (double) u*u;
            terms[1][c] = (double) y*y;
        }
    }
    __syncthreads();
    if (row < 0) {
        return;
    }
    uint8_t * out = a.rows + row*a.nb_row + head.payload;
    const double2 squares = ordered_sums(terms, d, lanes); // of the whitened and of the plain vector
    const double  norm = sqrt(squares.x/d);
    const bool    zero = !(norm >= 1e-9 && isfinite(norm));
    const float   inv  = zero ? 0.0f : (float) (1.0/norm);

#pragma unroll
    for (int i = 0; i < N; ++i) { // a warp's last groups may be beyond d
        const int  c      = threadIdx.x + i*THREADS;
        const bool inside = c < d;
        const int  w      = inside ? code_of[i].width : 0;
        int   code  = 0;
        float level = 0.0f;
        if (!zero && w > 0) {
            const float y = z[c]*inv;
            if (w <= 4) {
#pragma unroll
                for (int k = 0; k < NARROW - 1; ++k) {
                    code += y > midpoints[i][k]; // bounds never fall: as many are below y as the search steps over
                }
            }
            for (int step = w <= 4 ? 0 : 1 << w >> 1; step > 0; step /= 2) { // bounds never fall
                if (y > bound[i][(code + step - 1)*LANES]) {
                    code += step;
                }
            }
            level = __half2float(w <= 4 ? levels[c][code] : level_of[i][code]);
        }
        const uint64_t word = (uint64_t) code << l*w;
        uint32_t lo = (uint32_t) word;
        uint32_t hi = (uint32_t) (word >> 32);
        for (int k = LANES/2; k > 0; k /= 2) {
            lo |= __shfl_xor_sync(0xffffffff, lo, k, LANES);
            hi |= __shfl_xor_sync(0xffffffff, hi, k, LANES);
        }
        if (inside) {
            terms[0][c] = (double) z[c]*level;
            terms[1][c] = (double) level*level;
            if (l < w) {
                out[code_of[i].byte + l] = (uint8_t) ((l < 4 ? lo : hi) >> 8*(l % 4));
            }
        }
    }
    __syncthreads();
    const double2 sums = ordered_sums(terms, d, lanes); // with the levels, and of the levels' squares
    if (threadIdx.x == 0) {
        double gain = 0.0;
        if (!zero) {
            if (head.keep_norm) {
                gain = sums.y > 0.0 ? sqrt(squares.y/sums.y) : 0.0;
            } else {
                gain = sums.x > 0.0 ? squares.y/sums.x : 0.0;
            }
        }
        out[0] = gain > 0.0 ? (uint8_t) fmin(255.0, fmax(1.0, rint(GGML_KVTC_GAIN_STEPS*log2(gain/(double) head.gain_base)))) : 0;
    }
    const ggml_kvtc_cuda_side & s = ((const ggml_kvtc_cuda_pack *) pack)->side[side];
    const int end = (int) ((h + 1 < args.n_head ? get_head(pack, side, h + 1).payload : s.row_bytes) - head.payload);
    for (int i = (int) head.n_bytes + threadIdx.x; i < end; i += THREADS) {
        out[i] = 0;
    }
}

} // namespace

void encode_few(const fused_args & a, cudaStream_t stream) {
    ggml_cuda_kernel_launch(transform_and_write, { dim3(a.n_head, a.n_tokens, a.n_side), THREADS, 0, stream }, a);
}

} // namespace kvtc
