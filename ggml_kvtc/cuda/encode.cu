// The write operation. Eight threads code one head vector, thread l component l of every group; sums run in f64 in the order
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

__global__ void write_codes(const write_args a, int side) {
    const int l      = threadIdx.x % LANES;
    const int vector = (blockIdx.x*THREADS + threadIdx.x)/LANES;
    const int token  = vector/a.n_head;
    const int h      = vector%a.n_head;
    const bool inside = token < a.n_tokens; // all threads stay for the shuffles
    const int64_t row = inside ? a.idxs[token] : -1;

    const char * pack = find_pack(a.pack);
    const ggml_kvtc_cuda_head & head = get_head(pack, side, h);
    const auto * widths    = at<uint8_t> (pack, head.widths);
    const auto * levels_at = at<uint32_t>(pack, head.levels_at);
    const auto * levels    = at<half>    (pack, head.levels);
    const auto * bounds_at = at<uint32_t>(pack, head.bounds_at);
    const auto * bounds    = at<float>   (pack, head.bounds);
    const auto * inv_scale = at<float>   (pack, head.inv_scale);
    const auto * z         = (const float *) (a.z + (inside ? token : 0)*a.nb_z1 + h*a.nb_z2);
    const int G = a.d/LANES;

    double whitened = 0.0;
    double power    = 0.0;
    for (int g = 0; g < G; ++g) {
        const int   c = g*LANES + l;
        const float u = z[c]*inv_scale[c];
        whitened += (double) u*u;
        power    += (double) z[c]*z[c];
    }
    const double norm = sqrt(lane_sum(whitened)/a.d);
    const bool   zero = !(norm >= 1e-9 && isfinite(norm));
    const float  inv  = zero ? 0.0f : (float) (1.0/norm);

    uint8_t * out = (uint8_t *) a.dst + row*a.nb_1 + head.payload;
    double dot  = 0.0;
    double self = 0.0;
    int    byte = 1;
    for (int g = 0; g < G && __any_sync(0xffffffff, widths[g] > 0); ++g) { // heads of a warp differ
        const int w    = widths[g];
        int       code = 0;
        if (!zero && w > 0) {
            const float   x     = z[g*LANES + l];
            const float   y     = x*inv;
            const float * bound = bounds + bounds_at[g] + l;
            for (int step = 1 << w >> 1; step > 0; step /= 2) { // bounds never fall
                if (y > bound[(code + step - 1)*LANES]) {
                    code += step;
                }
            }
            const float level = __half2float(levels[levels_at[g] + (l << w) + code]);
            dot  += (double) x*level;
            self += (double) level*level;
        }
        const uint64_t word = (uint64_t) code << l*w;
        const uint32_t lo   = lane_or((uint32_t) word);
        const uint32_t hi   = lane_or((uint32_t) (word >> 32));
        if (row >= 0 && l < w) {
            out[byte + l] = (uint8_t) ((l < 4 ? lo : hi) >> 8*(l % 4));
        }
        byte += w;
    }

    power = lane_sum(power);
    dot   = lane_sum(dot);
    self  = lane_sum(self);
    if (row < 0) {
        return;
    }
    double gain = 0.0;
    if (!zero) {
        if (head.keep_norm) {
            gain = self > 0.0 ? sqrt(power/self) : 0.0;
        } else {
            gain = dot > 0.0 ? power/dot : 0.0;
        }
    }
    if (l == 0) {
        const double steps = gain > 0.0 ? fmin(255.0, fmax(1.0, rint(GGML_KVTC_GAIN_STEPS*log2(gain/(double) head.gain_base)))) : 0.0;
        out[0] = (uint8_t) steps;
    }
    // the gap to the next head, or the rest of the row: equal content gives equal rows
    const ggml_kvtc_cuda_side & s = ((const ggml_kvtc_cuda_pack *) pack)->side[side];
    const int end = (int) ((h + 1 < a.n_head ? get_head(pack, side, h + 1).payload : s.row_bytes) - head.payload);
    for (int i = (int) head.n_bytes + l; i < end; i += LANES) {
        out[i] = 0;
    }
}

__global__ void write_exact(const write_args keys, const write_args values) {
    const write_args & a = blockIdx.y == 0 ? keys : values;
    const int i     = blockIdx.x*THREADS + threadIdx.x;
    const int c     = i%a.d;
    const int h     = i/a.d%a.n_head;
    const int token = i/a.d/a.n_head;
    if (token >= a.n_tokens) {
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

void ggml_cuda_kvtc_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    using namespace kvtc;
    const write_args a = get_args(dst);
    const bool    coded = ggml_kvtc_is_type(dst->type);
    const int64_t n     = (int64_t) a.n_tokens*a.n_head*(coded ? LANES : a.d);
    const int     grid  = (int) ((n + THREADS - 1)/THREADS);
    if (grid == 0) {
        return;
    }
    if (coded) {
        write_codes<<<grid, THREADS, 0, ctx.stream()>>>(a, ggml_get_op_params_i32(dst, 0));
    } else {
        write_exact<<<grid, THREADS, 0, ctx.stream()>>>(a, a);
    }
    CUDA_CHECK(cudaGetLastError());
}

void ggml_cuda_kvtc_set_exact(ggml_backend_cuda_context & ctx, ggml_tensor * keys, ggml_tensor * values) {
    using namespace kvtc;
    const write_args a = get_args(keys);
    const int64_t n    = (int64_t) a.n_tokens*a.n_head*a.d;
    if (n > 0) {
        write_exact<<<dim3((int) ((n + THREADS - 1)/THREADS), 2), THREADS, 0, ctx.stream()>>>(a, get_args(values));
        CUDA_CHECK(cudaGetLastError());
    }
}
