// Decode's write: transform, code and store a few vectors in one kernel, in place of a product, a sum and a write.
//
// A block for each head and token, or a cluster of them. A warp takes 16 (8) rows of the matrix at once; their sums over the warp leave each
// component in two (four) neighbouring threads, which code it too, so that vectors meet in shared memory only for the sums in f64. The
// time is that of reads and operations that wait for each other, so all reads are on their way before the product: matrices too large
// for that in one block are shared by a cluster.
#include "cluster.cuh"
#include "encode.cuh"
#include "join.cuh"

namespace kvtc {

namespace {

constexpr int THREADS = 256;
constexpr int WARPS   = THREADS/32;
constexpr int LANES   = GGML_KVTC_GROUP;
constexpr int ALL     = 16;         // rows of a warp at once, where a block has all of a vector; d is a multiple
constexpr int SHARED  = 8;          // where a cluster shares it
constexpr int COLUMNS = 4*32;       // of a row, that a warp takes at once
constexpr int NARROW  = 16;         // levels of a component whose bounds a thread has before it needs them
constexpr int NEAR    = 4096;       // of a head's bounds and levels, those that may lie in shared memory

// Sums over the warp of a thread's first N numbers: the thread STEP further on, or before, keeps the other half of them. Of ROWS
// numbers, that of number lane/(32/ROWS) is left.
template <int N, int STEP = 16, int ROWS>
__device__ __forceinline__ float sum_rows(float (&x)[ROWS]) {
    if constexpr (N == 1) {
        x[0] += __shfl_xor_sync(0xffffffff, x[0], STEP);
    } else {
        const bool upper = threadIdx.x & STEP;
#pragma unroll
        for (int i = 0; i < N/2; ++i) {
            const float lo = x[i];
            const float hi = x[i + N/2];
            x[i] = (upper ? hi : lo) + __shfl_xor_sync(0xffffffff, upper ? lo : hi, STEP);
        }
    }
    if constexpr (STEP > 1) {
        return sum_rows<(N + 1)/2, STEP/2>(x);
    }
    return x[0];
}

// Two sums over a vector in the order that ggml_kvtc/README.md states: groups for each lane, then lanes. A warp takes them for itself.
__device__ __forceinline__ double2 ordered_sums(const double2 * x, int d) {
    const int lane = threadIdx.x % 32;
    const double * from = (const double *) x + lane/LANES % 2;
    double sum = 0.0;
#pragma unroll 8
    for (int c = lane%LANES; c < d; c += LANES) {
        sum += from[2*c];
    }
    double2 total = make_double2(0.0, 0.0);
#pragma unroll
    for (int l = 0; l < LANES; ++l) {
        total.x += __shfl_sync(0xffffffff, sum, l);
        total.y += __shfl_sync(0xffffffff, sum, l + LANES);
    }
    return total;
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

// components that N times a block's warps have, in R blocks
template <int N, int R> constexpr int LARGEST = N*R*WARPS*(R > 1 ? SHARED : ALL);

// R blocks share a vector. turbo: both sides are of turbo types, else of kvtc's
template <int N, int R, bool turbo>
__device__ __forceinline__ void transform_and_write(const fused_args & args) {
    constexpr int ROWS  = R > 1 ? SHARED : ALL; // of a warp at once
    constexpr int PARTS = 32/ROWS;              // threads of a component
    constexpr int SPAN  = ROWS*WARPS;           // components that a block takes at once
    constexpr int DIM   = LARGEST<N, R>;
    constexpr int HELD  = ALL/ROWS;             // pieces of a row that are on their way before the product
    const fused_side & a    = args.side [blockIdx.z/R];
    const int          side = args.index[blockIdx.z/R];
    const int          rank = blockIdx.z%R;
    __shared__ double2 squares [DIM]; // whitened, and not
    __shared__ double2 products[DIM]; // with levels, and of levels
    __shared__ uint64_t boxes[2];     // for these, from the other blocks
    __shared__ __align__(16) float near_bounds[NEAR];
    __shared__ __align__(16) half  near_levels[NEAR];
    ggml_cuda_pdl_lc();
    const int h     = blockIdx.x;
    const int token = blockIdx.y;
    const int d     = args.d;
    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int u     = lane/PARTS;   // of the warp's components
    const int part  = lane%PARTS;   // of the component's threads
    const int l     = u%LANES;
    const int first = rank*N*SPAN + ROWS*warp;
    if constexpr (R > 1) {
        mailbox_open(boxes, d*sizeof(double2));
    }

    // the matrix first: it is the most to wait for
    const float * encode = a.encode + (int64_t) h*d*d;
    float4 e[HELD][ROWS];
    const auto load = [&](float4 (&piece)[ROWS], int row0, int k) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            piece[r] = *(const float4 *) (encode + (row0 + r)*d + k);
        }
    };
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
        if (first < d && 4*lane + k*COLUMNS < d) {
            load(e[k], first, 4*lane + k*COLUMNS);
        }
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
    const uint32_t next      = get_end(pack, side, h, args.n_head);
    component own [N];
    float     bias[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = min(first + i*SPAN + u, d - 1);
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
    float midpoints[N][NARROW/PARTS]; // the component's other threads have the others
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = first + i*SPAN + u;
        const int w = c < d ? own[i].width : 0;
        const int n = w >= 1 && w <= 4 ? 1 << w : 0;
#pragma unroll
        for (int k = 0; k < NARROW/PARTS; ++k) {
            midpoints[i][k] = PARTS*k + part < n - 1 ? bounds[own[i].bounds + (PARTS*k + part)*LANES + l] : INFINITY;
        }
        // A group's threads fetch its levels and, where a search reads one after the other, its bounds.
        if (!turbo && is_near(own[i], w)) {
            constexpr int T = LANES*PARTS;
#pragma unroll 1
            for (int k = lane%T; k < (w > 0 ? 1 << w : 0); k += T) {
                copy_async<16>(near_levels + own[i].levels + 8*k, levels + own[i].levels + 8*k);
            }
#pragma unroll 1
            for (int k = lane%T; k < (w > 4 ? 2*((1 << w) - 1) : 0); k += T) {
                copy_async<16>(near_bounds + own[i].bounds + 4*k, bounds + own[i].bounds + 4*k);
            }
        }
    }
    copy_commit();
    if (!args.beside) {
        ggml_cuda_pdl_sync(); // all before is of the calibration, which no kernel writes
    }
    const float * x = (const float *) (a.x + token*a.nb_x1 + h*a.nb_x2);
    const int64_t row = a.idxs[token];

    if constexpr (R > 1) {
        mailbox_meet();
    }
    float z[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int row0 = first + i*SPAN;
        if (row0 < d) {
            float sum[ROWS] = {};
#pragma unroll (R > 1 ? DIM/COLUMNS : 1)
            for (int k = 0; k < DIM/COLUMNS; ++k) {
                const int at = 4*lane + k*COLUMNS;
                if (at < d) {
                    const float4 y = make_float4(x[at], x[at + 1], x[at + 2], x[at + 3]);
                    float4 (&piece)[ROWS] = e[k%HELD];
                    if (i > 0 || k >= HELD) {
                        load(piece, row0, at);
                    }
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
                        sum[r] += piece[r].x*y.x + piece[r].y*y.y + piece[r].z*y.z + piece[r].w*y.w;
                    }
                }
            }
            const int c = row0 + u;
            z[i] = sum_rows<ROWS>(sum) + bias[i];
            const float   white = z[i]*own[i].inv_scale;
            const double2 terms = make_double2((double) white*white, (double) z[i]*z[i]);
            if constexpr (R > 1) {
                for (int r = part; r < R && row >= 0; r += PARTS) { // a block that has returned has no memory
                    mailbox_send(squares[c], terms, r, boxes[0]);
                }
            }
            if (part == 0) {
                *(float *) (a.z + token*a.nb_z1 + h*a.nb_z2 + c*sizeof(float)) = z[i];
                if constexpr (R == 1) {
                    squares[c] = terms;
                }
            }
        }
    }
    copy_wait<0>();
    if (row < 0) {
        return;
    }
    if constexpr (R > 1) {
        __syncwarp(); // a warp's groups have been fetched by the warp
        mailbox_wait(boxes[0]);
    } else {
        __syncthreads();
    }
    uint8_t * out = a.rows + row*a.nb_row + payload;
    const double2 power = ordered_sums(squares, d);
    const float   inv   = get_inverse_norm(power.x, d, args.inv_d); // 0: all codes are

#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = first + i*SPAN + u;
        if (c - u < d) {
            const int   w = own[i].width;
            const float y = z[i]*inv;
            int code = 0;
#pragma unroll
            for (int k = 0; k < NARROW/PARTS; ++k) {
                code += y > midpoints[i][k]; // bounds never fall: as many are below y as the search steps over
            }
#pragma unroll
            for (int k = PARTS/2; k > 0; k /= 2) {
                code += __shfl_xor_sync(0xffffffff, code, k);
            }
            const bool    near = !turbo && is_near(own[i], w); // turbo: all groups have one table
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
            for (int k = LANES*PARTS/2; k >= PARTS; k /= 2) {
                lo |= __shfl_xor_sync(0xffffffff, lo, k);
                hi |= __shfl_xor_sync(0xffffffff, hi, k);
            }
            if (part == 0) {
                const double2 terms = make_double2((double) z[i]*level, (double) level*level);
                if constexpr (R > 1) {
                    mailbox_send(products[c], terms, 0, boxes[1]);
                } else {
                    products[c] = terms;
                }
                if (l < w) {
                    out[own[i].byte + l] = (uint8_t) ((l < 4 ? lo : hi) >> 8*(l % 4));
                }
            }
        }
    }
    if (rank > 0) {
        return;
    }
#pragma unroll 1
    for (uint32_t i = n_bytes + threadIdx.x; !turbo && i < next - payload; i += THREADS) {
        out[i] = 0;
    }
    if constexpr (R > 1) {
        mailbox_wait(boxes[1]);
    } else {
        __syncthreads();
    }
    if (warp == 0) {
        const double2 sums = ordered_sums(products, d);
        if (lane == 0) {
            if constexpr (turbo) {
                put_turbo_gain(pack, side, n_bytes, h, args.n_head, inv == 0.0f ? 0 : get_gain_bits(power.y, sums), out - payload);
            } else {
                out[0] = inv == 0.0f ? 0 : get_gain_code(power.y, sums, keep_norm, gain_base);
            }
        }
    }
}

template <int N, bool turbo = false>
__launch_bounds__(THREADS)
__global__ void transform_and_write_all(const fused_args args) {
    transform_and_write<N, 1, turbo>(args);
}

template <int R, bool turbo = false>
KVTC_CLUSTER(R) __launch_bounds__(THREADS)
__global__ void transform_and_write_shared(const fused_args args) {
    transform_and_write<1, R, turbo>(args);
}

template <typename F>
void launch(F kernel, int n_block, fused_args a, cudaStream_t stream, cudaStream_t main) {
    const ggml_cuda_kernel_launch_params p = { dim3(a.n_head, a.n_tokens, a.n_side*n_block), THREADS, 0, stream };
    a.beside = main != nullptr;
    if (main) {
        launch_beside(main, kernel, p, a);
    } else {
        ggml_cuda_kernel_launch(kernel, p, a);
    }
}

} // namespace

bool encode_few_supports_turbo(int cc, int d) {
    return d <= LARGEST<1, 1> || (has_clusters(cc) && d <= LARGEST<1, 4>);
}

void encode_few(const fused_args & a, int cc, cudaStream_t stream, cudaStream_t main) {
    static_assert(GGML_KVTC_MAX_DIM <= LARGEST<4, 1> && GGML_KVTC_MAX_DIM <= LARGEST<1, 8>, "no kernel for the largest vectors");
    if (a.turbo) {
        const bool one = a.d <= LARGEST<1, 1>;
        launch(one ? transform_and_write_all<1, true> : transform_and_write_shared<4, true>, one ? 1 : 4, a, stream, main);
    } else if (a.d <= LARGEST<1, 1>) {
        launch(transform_and_write_all<1>, 1, a, stream, main);
    } else if (has_clusters(cc)) {
        const bool small = a.d <= LARGEST<1, 4>;
        launch(small ? transform_and_write_shared<4> : transform_and_write_shared<8>, small ? 4 : 8, a, stream, main);
    } else {
        launch(a.d <= LARGEST<2, 1> ? transform_and_write_all<2> : transform_and_write_all<4>, 1, a, stream, main);
    }
}

} // namespace kvtc
