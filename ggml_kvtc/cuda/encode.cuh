// What the kernels that write rows share: a warp codes one head vector, thread l of eight component l of every fourth group; sums
// run in f64 in the order that ggml_kvtc/README.md states, so that the bytes are those of the CPU.
#pragma once

#include "gain.cuh"

namespace kvtc {

constexpr int ENCODE_LANES = GGML_KVTC_GROUP;

__device__ __forceinline__ double lane_sum(double x) {
    double sum = 0.0;
#pragma unroll
    for (int l = 0; l < ENCODE_LANES; ++l) {
        sum += __shfl_sync(0xffffffff, x, l, ENCODE_LANES);
    }
    return sum;
}

__device__ __forceinline__ uint32_t lane_or(uint32_t x) {
#pragma unroll
    for (int l = ENCODE_LANES/2; l > 0; l /= 2) {
        x |= __shfl_xor_sync(0xffffffff, x, l, ENCODE_LANES);
    }
    return x;
}

// where in a row the bytes of head h end
__device__ __forceinline__ uint32_t get_end(const char * pack, int side, int h, int n_head) {
    return h + 1 < n_head ? get_head(pack, side, h + 1).payload : ((const ggml_kvtc_cuda_pack *) pack)->side[side].row_bytes;
}

// The gain of a turbo vector to its place behind the codes of all heads, and behind the last one zeros to the row's end. row: its
// first byte; by one thread
__device__ __forceinline__ void put_turbo_gain(const char * pack, int side, uint32_t n_bytes, int h, int n_head, uint32_t bits, uint8_t * row) {
    uint32_t at = n_head*n_bytes + 2*h;
    row[at++] = (uint8_t) bits;
    row[at++] = (uint8_t) (bits >> 8);
    for (const uint32_t end = h + 1 < n_head ? at : ((const ggml_kvtc_cuda_pack *) pack)->side[side].row_bytes; at < end; ++at) {
        row[at] = 0;
    }
}

// One vector of head h to its codes at out. plain: its components, in shared memory, as are white and level, d floats of scratch.
// Four threads share the groups of a lane, and one of them takes each sum, in order. turbo: of a turbo type, else of kvtc's
template <bool turbo>
__device__ __forceinline__ void code_vector(const char * pack, int side, int h, int n_head, int d, const float * plain, float * white, float * level, uint8_t * out) {
    constexpr int LANES = ENCODE_LANES;
    constexpr int U     = 4; // groups of a thread whose searches run together
    const int lane = threadIdx.x % 32;
    const int l    = lane % LANES;
    const int part = lane / LANES;
    const int G    = d/LANES;
    const ggml_kvtc_cuda_head & head = get_head(pack, side, h);
    const auto * codes     = at<ggml_kvtc_cuda_code>(pack, head.codes);
    const auto * levels_at = at<uint32_t>(pack, head.levels_at);
    const auto * levels    = at<half>    (pack, head.levels);
    const auto * bounds_at = at<uint32_t>(pack, head.bounds_at);
    const auto * bounds    = at<float>   (pack, head.bounds);
    const auto * inv_scale = at<float>   (pack, head.inv_scale);

    for (int c = lane; c < d; c += 32) {
        white[c] = plain[c]*inv_scale[c];
        level[c] = 0.0f;
    }
    __syncwarp();
    // sum of x*y over this lane's groups
    const auto sum_groups = [&](const float * x, const float * y) {
        double sum = 0.0;
#pragma unroll 8
        for (int g = 0; g < G; ++g) {
            sum += (double) x[g*LANES + l]*y[g*LANES + l];
        }
        return lane_sum(sum);
    };
    const double squares  = sum_groups(part == 0 ? white : plain, part == 0 ? white : plain);
    const double whitened = __shfl_sync(0xffffffff, squares, 0);
    const double power    = __shfl_sync(0xffffffff, squares, LANES);
    const double norm = sqrt(whitened/d);
    const bool   zero = !(norm >= 1e-9 && isfinite(norm));
    const float  inv  = zero ? 0.0f : (float) (1.0/norm);

    for (int g0 = part; g0 < (G + 3)/4*4; g0 += 4*U) {
        int           w    [U];
        int           code [U];
        float         y    [U];
        const float * bound[U];
        int           widest = 0;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int g = g0 + 4*u;
            w    [u] = g < G ? codes[g].width : 0;
            y    [u] = g < G ? plain[g*LANES + l]*inv : 0.0f;
            bound[u] = bounds + (g < G ? bounds_at[g] : 0) + l;
            code [u] = 0;
            widest   = zero ? 0 : max(widest, w[u]);
        }
        for (int step = 1 << widest >> 1; step > 0; step /= 2) { // bounds never fall
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (step < 1 << w[u] && y[u] > bound[u][(code[u] + step - 1)*LANES]) {
                    code[u] += step;
                }
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int g = g0 + 4*u;
            if (!zero && w[u] > 0) {
                level[g*LANES + l] = __half2float(levels[levels_at[g] + (l << w[u]) + code[u]]);
            }
            const uint64_t word = (uint64_t) code[u] << l*w[u];
            const uint32_t lo   = lane_or((uint32_t) word);
            const uint32_t hi   = lane_or((uint32_t) (word >> 32));
            if (l < w[u]) {
                out[codes[g].byte + l] = (uint8_t) ((l < 4 ? lo : hi) >> 8*(l % 4));
            }
        }
    }
    __syncwarp();
    const double sums = sum_groups(part == 0 ? plain : level, level);
    const double self = __shfl_sync(0xffffffff, sums, LANES);
    if constexpr (turbo) {
        if (lane == 0) {
            put_turbo_gain(pack, side, head.n_bytes, h, n_head, zero ? 0 : get_gain_bits(power, make_double2(sums, self)), out - head.payload);
        }
        return;
    }
    if (lane == 0) {
        out[0] = zero ? 0 : get_gain_code(power, make_double2(sums, self), head.keep_norm != 0, head.gain_base);
    }
    // the gap to the next head, or the rest of the row: equal content gives equal rows
    const uint32_t end = get_end(pack, side, h, n_head) - head.payload;
    for (uint32_t i = head.n_bytes + lane; i < end; i += 32) {
        out[i] = 0;
    }
}

//
// product, sum and write as one kernel
//

struct fused_side {
    const char  * x;             // f32 [d, token, head]
    int64_t       nb_x1, nb_x2;
    const float * encode;        // [head][d][d]
    const float * bias;          // [head][d]
    char        * z;             // f32 [d, token, head]
    int64_t       nb_z1, nb_z2;
    const int64_t * idxs;
    const char  * pack;
    uint8_t     * rows;
    int64_t       nb_row;
};

struct fused_args {
    fused_side side[2]; // keys and values, or one of them
    int        index[2];
    int        n_side, d, n_head, n_tokens;
    double     inv_d;    // 1/d
    bool       turbo;    // all sides are of turbo types, else of kvtc's
    bool       beside = false; // of a kernel before it: what it reads is there
};

// A block, or a few, for each head and token. main: of a kernel that it runs beside, which has been launched; or nullptr
void encode_few(const fused_args & a, int cc, cudaStream_t stream, cudaStream_t main = nullptr);
bool encode_few_supports_turbo(int cc, int d);
// for more tokens than a block for each serves well
bool encode_many_supports(int cc, int d);
void encode_many(const fused_args & a, cudaStream_t stream);

} // namespace kvtc
