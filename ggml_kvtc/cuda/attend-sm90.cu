// Two groups of four warps have 64 query rows each; another warp has the copy engine bring tiles of keys and values. A group's
// products of the next keys and of these values are under way while it takes the exponentials of the scores before:
//
//   scores of tile 0 | scores of 1, values of 0 | scores of 2, values of 1 | ...
//                      weights of 1               weights of 2
//
// Tiles lie in shared memory as they do in the scratch: 8 rows x 16 bytes of an operand are 128 bytes in a row, without swizzle.
// Where a block sees all columns, one more product turns its sums into channels; the warps that have nothing to copy fetch its matrix.
#include "attend-sm90.cuh"
#include "hopper-tiles.cuh"

namespace kvtc {

namespace {

constexpr int GROUPS  = TILE_ROWS/64;
constexpr int THREADS = 32*GROUP_WARPS*(GROUPS + 1); // registers are dealt out to four warps at once, so the copies have as many

constexpr int HELPERS = 32*(GROUP_WARPS - 1); // threads beside the one warp that copies tiles

struct tile_barriers {
    uint64_t full [2][TILE_STAGES]; // keys, values
    uint64_t empty[2][TILE_STAGES];
    uint64_t matrix;
};

// a product whose sums are at most 128 columns; `next` halves from eight columns' first operand to that of the next components
template <int N, bool start, bool transposed = false, typename A, int R>
__device__ __forceinline__ void multiply(float (&d)[N/128 > 0 ? N/128 : 1][R], const A & a, const half * b, int next) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#pragma unroll
    for (int i = 0; i < (N/128 > 0 ? N/128 : 1); ++i) {
        if constexpr (transposed) {
            wgmma<start, true>(d[i], a, get_operand(b + i*128*8, next*sizeof(half), 128));
        } else {
            wgmma<start>(d[i], a, get_operand(b + i*128*8, next*sizeof(half), 128));
        }
    }
#endif
}

// what both kinds of warps know of their block
struct tile_block {
    int split, row_block, head, stream;
    int end;                  // of the range's tiles
    const uint8_t * classes;

    __device__ __forceinline__ int next(int tile) const {
        do {
            ++tile;
        } while (tile < end && classes[tile] == TILE_HIDDEN);
        return tile;
    }
};

template <int D> constexpr bool TILE_ENDS = D <= TILE_MOST_WHOLE; // the values' matrix fits beside the tiles

template <int D>
struct tile_memory {
    half          queries[GROUPS][D/8][64][8];
    half          tiles[2][TILE_STAGES][TILE_KEYS<D>*D]; // keys, values
    half          matrix[TILE_ENDS<D> ? D*D : 8];        // [components/8][channels/8][8][8]: the last eight are channels
    float         mean[D];
    tile_barriers barriers;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int D>
__device__ __forceinline__ void bring_tiles(const attn_args & a, const tile_args & p, const tile_block & b, int tile, tile_memory<D> & m) {
    constexpr int TILE = TILE_KEYS<D>*D;
    const half * from[2] = { p.k, p.v };
    for (int n = 0; tile < b.end; tile = b.next(tile), ++n) {
        const int     stage = n%TILE_STAGES;
        const int64_t at    = (((int64_t) b.stream*a.n_head_kv + b.head)*p.n_tile + tile)*TILE;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            barrier_wait  (m.barriers.empty[s][stage], n/TILE_STAGES%2 ^ 1);
            barrier_expect(m.barriers.full [s][stage], TILE*sizeof(half));
            copy_bulk(m.tiles[s][stage], from[s] + at, TILE*sizeof(half), m.barriers.full[s][stage]);
        }
    }
}

// what the block's end needs, and its share of the exact rows
template <int D>
__device__ __forceinline__ void help(const attn_args & a, const tile_args & p, const tile_block & b, int thread, tile_memory<D> & m) {
    if constexpr (TILE_ENDS<D>) {
        if (p.whole) {
            const ggml_kvtc_cuda_head & head = get_head(a.pack, GGML_KVTC_V, b.head);
            const half  * matrix = at<half> (a.pack, head.decode); // [component][channel]
            const float * mean   = at<float>(a.pack, head.mean);
#pragma unroll 1
            for (int i = thread; i < D*D/8; i += HELPERS) { // 16 bytes
                const int component = i/(D/8);
                copy_async<16>(m.matrix + ((component/8*(D/8) + i%(D/8))*8 + component%8)*8, matrix + 8*i);
            }
            for (int i = thread; i < D/4; i += HELPERS) {
                copy_async<16>(m.mean + 4*i, mean + 4*i);
            }
            copy_commit();
            copy_wait<0>();
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            barrier_arrive(m.barriers.matrix); // every thread for what it brought
        }
    }
    const int n_tokens = a.n_tokens*a.n_stream;
#pragma unroll 1
    for (int side = 0; side < p.exact.n_side; ++side) {
#pragma unroll 1
        for (int i = blockIdx.x*HELPERS + thread; i < n_tokens*a.n_head_kv*(D/8); i += gridDim.x*HELPERS) {
            const int vector = i/(D/8);
            write_components(p.exact.side[side], vector%n_tokens, vector/n_tokens, i%(D/8)*8);
        }
    }
}

template <int D, bool softcap>
__device__ __forceinline__ void attend_rows(const attn_args & a, const tile_args & p, const tile_block & b, int tile, tile_memory<D> & m) {
    constexpr int KEYS = TILE_KEYS<D>;
    constexpr int NS   = KEYS/2;               // scores of a thread
    constexpr int PO   = D < 128 ? 1 : D/128;  // its sums, in parts
    constexpr int NO   = D/2/PO;
    const int lane  = threadIdx.x % 32;
    const int warp  = threadIdx.x / 32;
    const int group = warp/GROUP_WARPS;
    const int q4    = lane % 4;

    // the thread's two rows
    const int n_row = a.n_tokens*a.group; // of a kv head
    const int r0    = b.row_block*TILE_ROWS + group*64 + warp%GROUP_WARPS*16 + lane/4;
    int   token[2];
    int   head [2];
    float slope[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int r = min(r0 + 8*e, n_row - 1);
        token[e] = b.stream*a.n_tokens + r/a.group;
        head [e] = b.head*a.group + r%a.group;
        slope[e] = LOG2E*alibi_slope(a, head[e]);
    }

    float o[PO][NO];
    float s[1][NS];
    float top [2] = { -INFINITY, -INFINITY };
    float sum [2] = { 0.0f, 0.0f };
    float fade[2];
#pragma unroll
    for (int x = 0; x < PO; ++x) {
#pragma unroll
        for (int y = 0; y < NO; ++y) {
            o[x][y] = 0.0f;
        }
    }
    const auto done = [&](int side, int n) { // a warp has read tile n in turn
        if (lane == 0) {
            barrier_arrive(m.barriers.empty[side][n%TILE_STAGES]);
        }
    };
    const auto score = [&](int n) { // starts a product
        const half * keys = m.tiles[0][n%TILE_STAGES];
        barrier_wait(m.barriers.full[0][n%TILE_STAGES], n/TILE_STAGES%2);
        wgmma_fence(s[0]);
        wgmma_fence();
        multiply<KEYS, true>(s, get_operand(m.queries[group][0], 64*16, 128), keys, KEYS*8);
#pragma unroll
        for (int k = 1; k < D/16; ++k) {
            multiply<KEYS, false>(s, get_operand(m.queries[group][2*k], 64*16, 128), keys + k*2*KEYS*8, KEYS*8);
        }
        wgmma_commit();
    };
    // scores to weights
    const auto weigh = [&](int tile) {
        if constexpr (softcap) {
#pragma unroll
            for (int j = 0; j < NS; ++j) {
                s[0][j] = a.softcap*LOG2E*tanhf(s[0][j]);
            }
        }
        if (b.classes[tile] == TILE_MASKED) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const half * mask = p.mask + ((int64_t) token[e]*p.n_tile + tile)*KEYS + 2*q4;
#pragma unroll
                for (int j = 0; j < NS/4; ++j) {
                    const float2 x = __half22float2(*(const half2 *) (mask + 8*j));
                    s[0][4*j + 2*e]     += slope[e]*x.x;
                    s[0][4*j + 2*e + 1] += slope[e]*x.y;
                }
            }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float most = top[e];
#pragma unroll
            for (int j = 0; j < NS/4; ++j) {
                most = fmaxf(most, fmaxf(s[0][4*j + 2*e], s[0][4*j + 2*e + 1]));
            }
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
            const float base = most == -INFINITY ? 0.0f : most;
            fade[e] = exp2f(top[e] - base);
            top [e] = most;
            float all = 0.0f;
#pragma unroll
            for (int j = 0; j < NS/4; ++j) {
#pragma unroll
                for (int x = 0; x < 2; ++x) {
                    float & w = s[0][4*j + 2*e + x];
                    w = exp2f(w - base);
                    all += w;
                }
            }
            sum[e] = sum[e]*fade[e] + all;
        }
    };
    uint32_t w[KEYS/16][4];
    const auto pack = [&]() {
#pragma unroll
        for (int k = 0; k < KEYS/16; ++k) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                w[k][j] = pack_half2(s[0][8*k + 2*j], s[0][8*k + 2*j + 1]);
            }
        }
    };
    const auto add = [&](int n) { // starts a product
        const half * values = m.tiles[1][n%TILE_STAGES];
        barrier_wait(m.barriers.full[1][n%TILE_STAGES], n/TILE_STAGES%2);
#pragma unroll
        for (int x = 0; x < PO; ++x) {
            wgmma_fence(o[x]);
        }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < KEYS/16; ++k) {
            multiply<D, false>(o, w[k], values + k*2*D*8, D*8);
        }
        wgmma_commit();
    };
    const auto added = [&](int n) {
        wgmma_wait<0>();
#pragma unroll
        for (int x = 0; x < PO; ++x) {
            wgmma_fence(o[x]);
        }
        done(1, n);
    };

    if (tile < b.end) {
        score(0);
        wgmma_wait<0>();
        wgmma_fence(s[0]);
        done(0, 0);
        weigh(tile);
        pack();
        int n = 0;
#pragma unroll 1
        for (tile = b.next(tile); tile < b.end; tile = b.next(tile), ++n) {
            score(n + 1);
            add(n);
            wgmma_wait<1>();
            wgmma_fence(s[0]);
            done(0, n + 1);
            weigh(tile);
            added(n);
#pragma unroll
            for (int x = 0; x < PO; ++x) {
#pragma unroll
                for (int j = 0; j < NO; ++j) {
                    o[x][j] *= fade[j/2%2];
                }
            }
            pack();
        }
        add(n);
        added(n);
    }

#pragma unroll
    for (int e = 0; e < 2; ++e) {
        sum[e] += __shfl_xor_sync(0xffffffff, sum[e], 1);
        sum[e] += __shfl_xor_sync(0xffffffff, sum[e], 2);
    }
    if constexpr (TILE_ENDS<D>) {
        if (p.whole) {
            float inv [2];
            float seen[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                inv[e] = get_norm(a, head[e], top[e], sum[e], seen[e]).y;
            }
            uint32_t x[D/16][4];
#pragma unroll
            for (int k = 0; k < D/16; ++k) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    x[k][j] = pack_half2(o[0][8*k + 2*j]*inv[j%2], o[0][8*k + 2*j + 1]*inv[j%2]);
                }
            }
            barrier_wait(m.barriers.matrix, 0);
            float y[1][D/2];
            wgmma_fence(y[0]);
            wgmma_fence();
            multiply<D, true, true>(y, x[0], m.matrix, D*8);
#pragma unroll
            for (int k = 1; k < D/16; ++k) {
                multiply<D, false, true>(y, x[k], m.matrix + k*2*D*8, D*8);
            }
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_fence(y[0]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                if (r0 + 8*e < n_row) {
                    float * to = get_output(a, p.out, { token[e], head[e] });
#pragma unroll
                    for (int j = 0; j < D/8; ++j) {
                        const int    c = 8*j + 2*q4;
                        const float2 z = *(const float2 *) (m.mean + c);
                        *(float2 *) (to + c) = make_float2(y[0][4*j + 2*e] + z.x*seen[e], y[0][4*j + 2*e + 1] + z.y*seen[e]);
                    }
                }
            }
            return;
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        if (r0 + 8*e < n_row) {
            const int64_t at = ((int64_t) token[e]*a.n_head + head[e])*p.n_split + b.split;
            if (q4 == 0) {
                p.meta[at] = make_float2(top[e], sum[e]);
            }
#pragma unroll
            for (int x = 0; x < PO; ++x) {
#pragma unroll
                for (int j = 0; j < NO/4; ++j) {
                    *(float2 *) (p.values + at*D + 128*x + 8*j + 2*q4) = make_float2(o[x][4*j + 2*e], o[x][4*j + 2*e + 1]);
                }
            }
        }
    }
}
#endif // __CUDA_ARCH_FEAT_SM90_ALL

template <int D, bool softcap>
__launch_bounds__(THREADS, 1)
__global__ void attend(const attn_args a, const tile_args p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) uint8_t smem[];
    tile_memory<D> & m = *(tile_memory<D> *) smem;
    ggml_cuda_pdl_lc();
    tile_block b;
    int i = blockIdx.x;
    b.split     = i % p.n_split;     i /= p.n_split;
    b.row_block = i % p.n_row_block; i /= p.n_row_block;
    b.head      = i % a.n_head_kv;
    b.stream    = i / a.n_head_kv;
    b.end       = min(p.n_tile, (b.split + 1)*p.tiles_per_split);
    b.classes   = p.classes + ((int64_t) b.stream*p.n_row_block + b.row_block)*p.n_tile;

    if (threadIdx.x == 0) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int stage = 0; stage < TILE_STAGES; ++stage) {
                barrier_init(m.barriers.full [s][stage], 1);
                barrier_init(m.barriers.empty[s][stage], GROUPS*GROUP_WARPS);
            }
        }
        barrier_init(m.barriers.matrix, HELPERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    ggml_cuda_pdl_sync();
    const float scale = a.softcap != 0.0f ? a.scale/a.softcap : a.scale*LOG2E;
    for (int j = threadIdx.x; j < TILE_ROWS*(D/8); j += THREADS) {
        const int row = b.row_block*TILE_ROWS + j/(64*(D/8))*64 + j%64;
        const int c   = j/64%(D/8); // of eight components
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < a.n_tokens*a.group) {
            const float2 * q = (const float2 *) (a.q + row/a.group*a.nb_q1 + (b.head*a.group + row%a.group)*a.nb_q2 + b.stream*a.nb_q3) + 4*c;
            x = make_uint4(pack_half2(q[0].x*scale, q[0].y*scale), pack_half2(q[1].x*scale, q[1].y*scale),
                pack_half2(q[2].x*scale, q[2].y*scale), pack_half2(q[3].x*scale, q[3].y*scale));
        }
        ((uint4 *) m.queries)[j] = x;
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // wgmma reads what threads wrote
    __syncthreads();

    const int tile = b.next(b.split*p.tiles_per_split - 1);
    if (threadIdx.x/(32*GROUP_WARPS) == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        const int thread = threadIdx.x % (32*GROUP_WARPS) - 32;
        if (thread >= 0) {
            help<D>(a, p, b, thread, m);
        } else if (thread == -32) {
            bring_tiles<D>(a, p, b, tile, m);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        attend_rows<D, softcap>(a, p, b, tile, m);
    }
#else
    GGML_UNUSED_VARS(a, p);
    NO_DEVICE_CODE;
#endif
}

template <int D>
void launch(const attn_args & a, const tile_args & p, cudaStream_t stream) {
    const auto kernel = a.softcap != 0.0f ? attend<D, true> : attend<D, false>;
    allow_shared_memory((const void *) kernel, sizeof(tile_memory<D>));
    const dim3 grid(p.n_split*p.n_row_block*a.n_head_kv*a.n_stream);
    ggml_cuda_kernel_launch(kernel, { grid, THREADS, sizeof(tile_memory<D>), stream }, a, p);
}

} // namespace

void attend_tiles(const attn_args & a, int d, const tile_args & p, cudaStream_t stream) {
    switch (d) {
        case  64: return launch< 64>(a, p, stream);
        case 128: return launch<128>(a, p, stream);
        case 256: return launch<256>(a, p, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace kvtc
