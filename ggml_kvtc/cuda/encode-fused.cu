// Decode's write: transform, code and store a few vectors in one kernel, in place of a product, a sum and a write.
//
// A block for each head and token. A warp takes 16 rows of the matrix at once; their sums over the warp leave each component in two
// neighbouring threads, which code it too, so that vectors meet in shared memory only for the sums in f64. The time is that of reads and
// operations that wait for each other, so all reads are on their way before the product.
#include "encode.cuh"

namespace kvtc {

namespace {

constexpr int THREADS = 256;
constexpr int WARPS   = THREADS/32;
constexpr int LANES   = GGML_KVTC_GROUP;
constexpr int ROWS    = 16;         // of a warp at once; d is a multiple
constexpr int SPAN    = ROWS*WARPS; // components that the block takes at once
constexpr int NARROW  = 16;         // levels of a component whose bounds a thread has before it needs them
constexpr int NEAR    = 4096;       // of a head's bounds and levels, those that may lie in shared memory

// N numbers of a thread to half as many: the thread N further on, or before, keeps the others
template <int N>
__device__ __forceinline__ void halve(float (&x)[ROWS]) {
    const bool upper = threadIdx.x & N;
#pragma unroll
    for (int i = 0; i < N/2; ++i) {
        const float lo = x[i];
        const float hi = x[i + N/2];
        x[i] = (upper ? hi : lo) + __shfl_xor_sync(0xffffffff, upper ? lo : hi, N);
    }
}

// sums over the warp of 16 numbers: that of number lane/2
__device__ __forceinline__ float sum_rows(float (&x)[ROWS]) {
    static_assert(ROWS == 16, "a warp has two threads for each number");
    halve<16>(x);
    halve< 8>(x);
    halve< 4>(x);
    halve< 2>(x);
    return x[0] + __shfl_xor_sync(0xffffffff, x[0], 1);
}

// Two sums over a vector in the order that ggml_kvtc/README.md states: groups for each lane, then lanes. A warp takes them for itself.
template <int DIM>
__device__ __forceinline__ double2 ordered_sums(const double (*x)[DIM], int d) {
    const int lane = threadIdx.x % 32;
    const double * from = x[lane/LANES % 2];
    double sum = 0.0;
#pragma unroll 8
    for (int c = lane%LANES; c < d; c += LANES) {
        sum += from[c];
    }
    double2 total = make_double2(0.0, 0.0);
#pragma unroll
    for (int l = 0; l < LANES; ++l) {
        total.x += __shfl_sync(0xffffffff, sum, l);
        total.y += __shfl_sync(0xffffffff, sum, l + LANES);
    }
    return total;
}

// 1/sqrt(squares/d), rounded to f32 from what f64's operations give; 0 for a vector that is coded as zeros. A root in f32 and a step
// of Newton's are nearer than 2^-43: enough, unless they lie that close to the middle of two numbers.
__device__ __forceinline__ float get_inverse_norm(double squares, int d, double inv_d) {
    const double x = squares*inv_d;
    if (x > 1e-15 && x < 1e30) {
        const double y = rsqrtf((float) x);
        const double r = y*(1.5 - 0.5*x*y*y);
        const float lower = (float) (r*(1.0 - 0x1p-40));
        if (lower == (float) (r*(1.0 + 0x1p-40))) {
            return lower;
        }
    }
    const double norm = sqrt(squares/d);
    return norm >= 1e-9 && isfinite(norm) ? (float) (1.0/norm) : 0.0f;
}

// Code of a gain. sums: of the components' products with their levels, and of the levels' squares. f32 tells the step, unless it
// is close to the middle of two.
__device__ __forceinline__ uint8_t get_gain_code(double power, const double2 & sums, bool keep_norm, float base) {
    const double divisor = keep_norm ? sums.y : sums.x;
    if (divisor > 1e-30 && divisor < 1e30 && power > 1e-30 && power < 1e30 && base > 1e-30f) {
        const float ratio = log2f((float) power) - log2f((float) divisor);
        const float step  = GGML_KVTC_GAIN_STEPS*((keep_norm ? 0.5f*ratio : ratio) - log2f(base));
        const float whole = rintf(step);
        if (fabsf(step - whole) < 0.48f) {
            return (uint8_t) fminf(255.0f, fmaxf(1.0f, whole));
        }
    }
    const double gain = !(divisor > 0.0) ? 0.0 : keep_norm ? sqrt(power/divisor) : power/divisor;
    return gain > 0.0 ? (uint8_t) fmin(255.0, fmax(1.0, rint(GGML_KVTC_GAIN_STEPS*log2(gain/(double) base)))) : 0;
}

// what a thread needs to code one component
struct component {
    int   width;
    int   byte;     // of its group, from the payload's start
    float inv_scale;
    int   bounds;   // its group's place in the head's bounds
    int   levels;   // and in its levels
};

// A head's arrays begin in shared memory: groups of many levels come first.
__device__ __forceinline__ bool is_near(const component & x, int w) {
    return x.levels + (LANES << w) <= NEAR && x.bounds + (LANES << w) <= NEAR;
}

// N: spans of a vector
template <int N>
__launch_bounds__(THREADS)
__global__ void transform_and_write(const fused_args args) {
    constexpr int DIM = N*SPAN;
    const fused_side & a    = args.side [blockIdx.z];
    const int          side = args.index[blockIdx.z];
    __shared__ double terms[4][DIM]; // squares, whitened and not; products with levels, and levels' squares
    __shared__ __align__(16) float near_bounds[NEAR];
    __shared__ __align__(16) half  near_levels[NEAR];
    ggml_cuda_pdl_lc();
    const int h     = blockIdx.x;
    const int token = blockIdx.y;
    const int d     = args.d;
    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int u     = lane/2;       // of the warp's components
    const int part  = lane%2;       // of the component's two threads
    const int l     = u%LANES;

    // the matrix first: it is the most to wait for
    const float * encode = a.encode + (int64_t) h*d*d;
    float4 e[ROWS];
    const auto load = [&](int row0, int i) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            e[r] = *(const float4 *) (encode + (row0 + r)*d + i);
        }
    };
    if (ROWS*warp < d && 4*lane < d) {
        load(ROWS*warp, 4*lane);
    }
    // all that coding needs of the pack is on its way while the product is taken
    const char * pack = a.pack;
    const ggml_kvtc_cuda_head & head = get_head(pack, side, h);
    const uint32_t levels_at = head.levels;
    const uint32_t bounds_at = head.bounds;
    const uint32_t payload   = head.payload;
    const uint32_t n_bytes   = head.n_bytes;
    const bool     keep_norm = head.keep_norm != 0;
    const float    gain_base = head.gain_base;
    const uint32_t next      = h + 1 < args.n_head ? get_head(pack, side, h + 1).payload : ((const ggml_kvtc_cuda_pack *) pack)->side[side].row_bytes;
    component own [N];
    float     bias[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = min(ROWS*warp + i*SPAN + u, d - 1);
        const ggml_kvtc_cuda_code code = head.group_code[c/LANES];
        own[i].width     = code.width;
        own[i].byte      = code.byte;
        own[i].inv_scale = head.inverse_scale[c];
        own[i].bounds    = (int) head.first_bound[c/LANES];
        own[i].levels    = (int) head.first_level[c/LANES];
        bias[i] = a.bias[h*d + c];
    }
    const float * bounds = at<float>(pack, bounds_at);
    const half  * levels = at<half> (pack, levels_at);
    float midpoints[N][NARROW/2]; // every second one: the other thread has the others
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = ROWS*warp + i*SPAN + u;
        const int w = c < d ? own[i].width : 0;
        const int n = w >= 1 && w <= 4 ? 1 << w : 0;
#pragma unroll
        for (int k = 0; k < NARROW/2; ++k) {
            midpoints[i][k] = 2*k + part < n - 1 ? bounds[own[i].bounds + (2*k + part)*LANES + l] : INFINITY;
        }
        // A group's 16 threads fetch its levels and, where a search reads one after the other, its bounds.
        if (is_near(own[i], w)) {
            for (int k = lane%16; k < (w > 0 ? 1 << w : 0); k += 16) {
                copy_async<16>(near_levels + own[i].levels + 8*k, levels + own[i].levels + 8*k);
            }
            for (int k = lane%16; k < (w > 4 ? 2*((1 << w) - 1) : 0); k += 16) {
                copy_async<16>(near_bounds + own[i].bounds + 4*k, bounds + own[i].bounds + 4*k);
            }
        }
    }
    copy_commit();
    ggml_cuda_pdl_sync(); // all before is of the calibration, which no kernel writes
    const float * x = (const float *) (a.x + token*a.nb_x1 + h*a.nb_x2);
    const int64_t row = a.idxs[token];

    float z[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int row0 = ROWS*warp + i*SPAN;
        if (row0 < d) {
            float sum[ROWS] = {};
            for (int k = 4*lane; k < d; k += 4*32) {
                const float4 y = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
                if (i > 0 || k != 4*lane) {
                    load(row0, k);
                }
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    sum[r] += e[r].x*y.x + e[r].y*y.y + e[r].z*y.z + e[r].w*y.w;
                }
            }
            const int c = row0 + u;
            z[i] = sum_rows(sum) + bias[i];
            if (part == 0) {
                const float white = z[i]*own[i].inv_scale;
                *(float *) (a.z + token*a.nb_z1 + h*a.nb_z2 + c*sizeof(float)) = z[i];
                terms[0][c] = (double) white*white;
                terms[1][c] = (double) z[i]*z[i];
            }
        }
    }
    copy_wait<0>();
    if (row < 0) {
        return;
    }
    __syncthreads();
    uint8_t * out = a.rows + row*a.nb_row + payload;
    const double2 squares = ordered_sums<DIM>(terms, d);
    const float   inv     = get_inverse_norm(squares.x, d, args.inv_d); // 0: all codes are

#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = ROWS*warp + i*SPAN + u;
        if (c - u < d) {
            const int   w = own[i].width;
            const float y = z[i]*inv;
            int code = 0;
#pragma unroll
            for (int k = 0; k < NARROW/2; ++k) {
                code += y > midpoints[i][k]; // bounds never fall: as many are below y as the search steps over
            }
            code += __shfl_xor_sync(0xffffffff, code, 1);
            const bool    near = is_near(own[i], w);
            const float * from = (near ? near_bounds : bounds) + own[i].bounds + l;
            for (int step = w > 4 ? 1 << w >> 1 : 0; step > 0; step /= 2) {
                if (y > from[(code + step - 1)*LANES]) {
                    code += step;
                }
            }
            code = inv == 0.0f ? 0 : code;
            const float level = inv == 0.0f || w == 0 ? 0.0f : __half2float((near ? near_levels : levels)[own[i].levels + (l << w) + code]);
            const uint64_t word = (uint64_t) code << l*w;
            uint32_t lo = (uint32_t) word;
            uint32_t hi = (uint32_t) (word >> 32);
#pragma unroll
            for (int k = LANES; k > 1; k /= 2) {
                lo |= __shfl_xor_sync(0xffffffff, lo, k);
                hi |= __shfl_xor_sync(0xffffffff, hi, k);
            }
            if (part == 0) {
                terms[2][c] = (double) z[i]*level;
                terms[3][c] = (double) level*level;
                if (l < w) {
                    out[own[i].byte + l] = (uint8_t) ((l < 4 ? lo : hi) >> 8*(l % 4));
                }
            }
        }
    }
    for (uint32_t i = n_bytes + threadIdx.x; i < next - payload; i += THREADS) {
        out[i] = 0;
    }
    __syncthreads();
    if (warp == 0) {
        const double2 sums = ordered_sums<DIM>(terms + 2, d);
        if (lane == 0) {
            out[0] = inv == 0.0f ? 0 : get_gain_code(squares.y, sums, keep_norm, gain_base);
        }
    }
}

} // namespace

void encode_few(const fused_args & a, cudaStream_t stream) {
    const auto kernel = a.d <= SPAN ? transform_and_write<1> : a.d <= 2*SPAN ? transform_and_write<2> : transform_and_write<4>;
    static_assert(GGML_KVTC_MAX_DIM <= 4*SPAN, "no kernel for the largest vectors");
    ggml_cuda_kernel_launch(kernel, { dim3(a.n_head, a.n_tokens, a.n_side), THREADS, 0, stream }, a);
}

} // namespace kvtc
