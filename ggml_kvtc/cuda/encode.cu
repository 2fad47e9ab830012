// The write operation. A warp codes one head vector, thread l of eight component l of every fourth group; sums run in f64 in the order
// that ggml_kvtc/README.md states, so that the bytes are those of the CPU.
#include "kvtc-cuda.h"
#include "device.cuh"

namespace kvtc {

namespace {

constexpr int LANES   = GGML_KVTC_GROUP;
constexpr int THREADS = 256;

struct write_args {
    const char    * z;
    int64_t         nb_z1, nb_z2; // token, head
    const int64_t * idxs;
    const char    * pack;
    char          * dst;
    int64_t         nb_1, nb_2;
    int             n_tokens, n_head, d;
};

__device__ __forceinline__ double lane_sum(double x) {
    double sum = 0.0;
    for (int l = 0; l < LANES; ++l) {
        sum += __shfl_sync(0xffffffff, x, l, LANES);
    }
    return sum;
}

__device__ __forceinline__ uint32_t lane_or(uint32_t x) {
    for (int l = LANES/2; l > 0; l /= 2) {
        x |= __shfl_xor_sync(0xffffffff, x, l, LANES);
    }
    return x;
}

// A warp codes a vector: four threads share the groups of a lane, and one of them takes each sum, in order.
__global__ void write_codes(const write_args a, int side) {
    extern __shared__ float scratch[]; // [warp][3][d]: whitened, plain, levels
    const int lane   = threadIdx.x % 32;
    const int l      = lane % LANES;
    const int part   = lane / LANES;
    const int vector = (blockIdx.x*THREADS + threadIdx.x)/32;
    const int token  = vector/a.n_head;
    const int h      = vector%a.n_head;
    if (token >= a.n_tokens) {
        return; // the whole warp
    }
    const int64_t row = a.idxs[token];
    if (row < 0) {
        return;
    }
    const char * pack = find_pack(a.pack);
    const ggml_kvtc_cuda_head & head = get_head(pack, side, h);
    const auto * codes     = at<ggml_kvtc_cuda_code>(pack, head.codes);
    const auto * levels_at = at<uint32_t>(pack, head.levels_at);
    const auto * levels    = at<half>    (pack, head.levels);
    const auto * bounds_at = at<uint32_t>(pack, head.bounds_at);
    const auto * bounds    = at<float>   (pack, head.bounds);
    const auto * inv_scale = at<float>   (pack, head.inv_scale);
    const auto * z         = (const float *) (a.z + token*a.nb_z1 + h*a.nb_z2);
    const int G = a.d/LANES;
    float * white = scratch + threadIdx.x/32*3*a.d;
    float * plain = white + a.d;
    float * level = plain + a.d;

    for (int c = lane; c < a.d; c += 32) {
        const float x = z[c];
        plain[c] = x;
        white[c] = x*inv_scale[c];
        level[c] = 0.0f;
    }
    __syncwarp();
    // sum of x*y over this lane's groups
    const auto sum_groups = [&](const float * x, const float * y) {
        double sum = 0.0;
        for (int g = 0; g < G; ++g) {
            sum += (double) x[g*LANES + l]*y[g*LANES + l];
        }
        return lane_sum(sum);
    };
    const double squares  = sum_groups(part == 0 ? white : plain, part == 0 ? white : plain);
    const double whitened = __shfl_sync(0xffffffff, squares, 0);
    const double power    = __shfl_sync(0xffffffff, squares, LANES);
    const double norm = sqrt(whitened/a.d);
    const bool   zero = !(norm >= 1e-9 && isfinite(norm));
    const float  inv  = zero ? 0.0f : (float) (1.0/norm);

    uint8_t * out = (uint8_t *) a.dst + row*a.nb_1 + head.payload;
    for (int g = part; g < (G + 3)/4*4; g += 4) {
        const int w    = g < G ? codes[g].width : 0;
        int       code = 0;
        if (!zero && w > 0) {
            const float   y     = plain[g*LANES + l]*inv;
            const float * bound = bounds + bounds_at[g] + l;
            for (int step = 1 << w >> 1; step > 0; step /= 2) { // bounds never fall
                if (y > bound[(code + step - 1)*LANES]) {
                    code += step;
                }
            }
            level[g*LANES + l] = __half2float(levels[levels_at[g] + (l << w) + code]);
        }
        const uint64_t word = (uint64_t) code << l*w;
        const uint32_t lo   = lane_or((uint32_t) word);
        const uint32_t hi   = lane_or((uint32_t) (word >> 32));
        if (l < w) {
            out[codes[g].byte + l] = (uint8_t) ((l < 4 ? lo : hi) >> 8*(l % 4));
        }
    }
    __syncwarp();
    const double sums = sum_groups(part == 0 ? plain : level, level);
    const double self = __shfl_sync(0xffffffff, sums, LANES);
    if (lane == 0) {
        double gain = 0.0;
        if (!zero) {
            if (head.keep_norm) {
                gain = self > 0.0 ? sqrt(power/self) : 0.0;
            } else {
                gain = sums > 0.0 ? power/sums : 0.0;
            }
        }
        out[0] = gain > 0.0 ? (uint8_t) fmin(255.0, fmax(1.0, rint(GGML_KVTC_GAIN_STEPS*log2(gain/(double) head.gain_base)))) : 0;
    }
    // the gap to the next head, or the rest of the row: equal content gives equal rows
    const ggml_kvtc_cuda_side & s = ((const ggml_kvtc_cuda_pack *) pack)->side[side];
    const int end = (int) ((h + 1 < a.n_head ? get_head(pack, side, h + 1).payload : s.row_bytes) - head.payload);
    for (int i = (int) head.n_bytes + lane; i < end; i += 32) {
        out[i] = 0;
    }
}

struct exact_args {
    write_args side[2]; // keys and values, or one of them
};

__global__ void write_exact(const exact_args args) {
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    const write_args & a = args.side[blockIdx.z];
    const int i     = blockIdx.y*THREADS + threadIdx.x;
    const int c     = i%a.d;
    const int h     = i/a.d;
    const int token = blockIdx.x;
    if (h >= a.n_head) {
        return;
    }
    const int64_t row = a.idxs[token];
    if (row >= 0) {
        *(half *) (a.dst + row*a.nb_1 + h*a.nb_2 + c*sizeof(half)) = __float2half(*(const float *) (a.z + token*a.nb_z1 + h*a.nb_z2 + c*sizeof(float)));
    }
}

} // namespace

} // namespace kvtc

static kvtc::write_args get_args(const ggml_tensor * dst) {
    const ggml_tensor * z = dst->src[1];
    kvtc::write_args a;
    a.z        = (const char *) z->data;
    a.nb_z1    = z->nb[1];
    a.nb_z2    = z->nb[2];
    a.idxs     = (const int64_t *) dst->src[2]->data;
    a.pack     = (const char *) dst->src[3]->data;
    a.dst      = (char *) dst->data;
    a.nb_1     = dst->nb[1];
    a.nb_2     = dst->nb[2];
    a.n_tokens = (int) z->ne[1];
    a.n_head   = (int) z->ne[2];
    a.d        = (int) z->ne[0];
    return a;
}

static void write_exact_rows(const kvtc::write_args & a, const kvtc::write_args & b, int n_side, cudaStream_t stream) {
    using namespace kvtc;
    if (a.n_tokens > 0) {
        ggml_cuda_kernel_launch(kvtc::write_exact, { dim3(a.n_tokens, (a.n_head*a.d + THREADS - 1)/THREADS, n_side), THREADS, 0, stream }, exact_args{ { a, b } });
    }
}

void ggml_cuda_kvtc_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    using namespace kvtc;
    const write_args a = get_args(dst);
    if (!ggml_kvtc_is_type(dst->type)) {
        return write_exact_rows(a, a, 1, ctx.stream());
    }
    constexpr int WARPS = THREADS/32;
    const int64_t n = (int64_t) a.n_tokens*a.n_head;
    if (n > 0) {
        write_codes<<<(int) ((n + WARPS - 1)/WARPS), THREADS, WARPS*3*a.d*sizeof(float), ctx.stream()>>>(a, ggml_get_op_params_i32(dst, 0));
        CUDA_CHECK(cudaGetLastError());
    }
}

void ggml_cuda_kvtc_set_exact(ggml_backend_cuda_context & ctx, ggml_tensor * keys, ggml_tensor * values) {
    write_exact_rows(get_args(keys), get_args(values), 2, ctx.stream());
}
