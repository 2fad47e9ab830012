// Columns from the rows of sides of another kind than kvtc's, and queries in the space in which turbo keeps its keys: both let
// prompts leave keys as they are stored, so no matrix is needed for each of them.
#include "expand.cuh"
#include "sides.cuh"

namespace kvtc {

namespace {

template <int D> constexpr int WARPS = D <= 128 ? 4 : 2;
constexpr int   MAX_TABLE = 1024;     // bytes of a turbo side's table
constexpr float MAX_GAIN  = 23'820.0f; // times any level this is below f16's largest number: infinity, even in a cell that nobody sees, is NaN in a sum

// A warp has 16 columns. tiled: in the order that attend-sm90.cuh states, else column after column.
template <int D, bool tiled>
__launch_bounds__(32*WARPS<D>)
__global__ void copy_side(const attn_args a, const columns c, const side_rows s, int side, int stride, half * out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != GGML_CUDA_CC_HOPPER
    if constexpr (tiled) { // its reader is for Hopper
        GGML_UNUSED_VARS(a, c, s, side, stride, out);
        NO_DEVICE_CODE;
        return;
    }
#endif
    constexpr int LD = D + 8;
    extern __shared__ __align__(16) uint8_t smem[];
    const int lane   = threadIdx.x % 32;
    const int warp   = threadIdx.x / 32;
    const int head   = blockIdx.y;
    const int stream = blockIdx.z;
    const int col    = (blockIdx.x*WARPS<D> + warp)*16;
    uint8_t * stage  = smem + MAX_TABLE + warp*16*stride;
    half    * tile   = (half *) (smem + MAX_TABLE + WARPS<D>*16*stride) + warp*16*LD;

    if (s.kind == SIDE_TURBO) {
        const ggml_kvtc_cuda_head & h = get_head(a.pack, side, head);
        for (int i = threadIdx.x; i < (int) h.n_tables/16; i += blockDim.x) {
            copy_async<16>(smem + 16*i, a.pack + h.tables + 16*i);
        }
    }
    const column_cell mine  = get_cell(a, c, stream, min(col, c.n_all - 16) + lane%16, c.ranges[stream]);
    const uint8_t   * rows  = a.rows[side] + stream*a.nb_stream[side];
    const uint8_t   * start = rows + (int64_t) mine.cell*a.nb_row[side] + head*s.n_bytes;
#pragma unroll
    for (int j = lane/8; j < 16; j += 4) {
        const uint8_t * from = rows + (int64_t) __shfl_sync(0xffffffff, mine.cell, j)*a.nb_row[side] + head*s.n_bytes;
        copy_pieces(stage + j*stride, get_pieces(from, s.n_bytes), lane%8, 8);
    }
    const float gain = s.kind == SIDE_TURBO ? fmaxf(-MAX_GAIN, fminf(MAX_GAIN, load_gain(s, start - head*s.n_bytes, head))) : 1.0f;
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    if (col < get_first_column(c, stream) || col >= c.n_all) {
        return; // the whole warp
    }
    decode_side<D, LD, 16, true>(a, s, side, head, stage + lane%16*stride, (int) ((uintptr_t) start % SIDE_PIECE), smem, gain, mine.slot, tile);
    write_columns<D, LD, tiled>(tile, out + ((int64_t) stream*a.n_head_kv + head)*c.n_all*D, side, col);
}

template <int D, bool tiled>
void launch(const attn_args & a, const attn_shape & s, const columns & c, int side, half * out, cudaStream_t stream) {
    const int    stride = staged_row(s.bytes[side]);
    const size_t shared = MAX_TABLE + WARPS<D>*16*(stride + (D + 8)*sizeof(half));
    const dim3   grid(ceil_div(c.n_all, 16*WARPS<D>), a.n_head_kv, a.n_stream);
    allow_shared_memory((const void *) copy_side<D, tiled>, shared);
    copy_side<D, tiled><<<grid, 32*WARPS<D>, shared, stream>>>(a, c, make_side_rows(s, side), side, stride, out);
    CUDA_CHECK(cudaGetLastError());
}

constexpr int TURN_THREADS = 256;
constexpr int TURN_MANY    = 8;   // rows of a block, of which the matrix is read once, where there are enough of them
constexpr int TURN_FEW     = 512; // rows up to which each has a block

// out: f32 [stream][token][head][d]. A thread has two neighbouring components, and every n_slice-th channel.
template <int ROWS>
__launch_bounds__(TURN_THREADS)
__global__ void turn_rows(const attn_args a, int d, int n_row, float * out) {
    extern __shared__ __align__(16) float turn_smem[];
    float * queries = turn_smem;          // [ROWS][d]
    float * sums    = turn_smem + ROWS*d; // [slice][ROWS][d]
    const int n_pair  = d/2;
    const int n_slice = TURN_THREADS/n_pair;
    const int pair    = threadIdx.x%n_pair;
    const int slice   = threadIdx.x/n_pair;
    const int row0    = blockIdx.x*ROWS;
    ggml_cuda_pdl_lc();
    ggml_cuda_pdl_sync();
    for (int i = threadIdx.x; i < ROWS*d; i += TURN_THREADS) {
        const int row    = min(row0 + i/d, n_row - 1);
        const int token  = row/a.n_head;
        queries[i] = *(const float *) (a.q + token%a.n_tokens*a.nb_q1 + row%a.n_head*a.nb_q2 + token/a.n_tokens*a.nb_q3 + i%d*sizeof(float));
    }
    __syncthreads();
    if (slice < n_slice) {
        // all heads share the matrix: f16 [channel][component]
        const half2 * matrix = (const half2 *) at<half>(a.pack, get_head(a.pack, GGML_KVTC_K, 0).decode) + pair;
        float2 sum[ROWS] = {};
#pragma unroll 8
        for (int i = slice; i < d; i += n_slice) {
            const float2 m = __half22float2(matrix[i*n_pair]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const float x = queries[r*d + i];
                sum[r].x += x*m.x;
                sum[r].y += x*m.y;
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            *(float2 *) (sums + (slice*ROWS + r)*d + 2*pair) = sum[r];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS*d; i += TURN_THREADS) {
        float sum = 0.0f;
        for (int s = 0; s < n_slice; ++s) {
            sum += sums[s*ROWS*d + i];
        }
        if (row0 + i/d < n_row) {
            out[(int64_t) row0*d + i] = sum;
        }
    }
}

template <int ROWS>
void launch_turn(const attn_args & a, int d, int n_row, float * out, cudaStream_t stream) {
    const size_t shared = (1 + TURN_THREADS/(d/2))*ROWS*d*sizeof(float); // at most 32 KiB
    ggml_cuda_kernel_launch(turn_rows<ROWS>, { dim3(ceil_div(n_row, ROWS)), TURN_THREADS, shared, stream }, a, d, n_row, out);
}

} // namespace

void expand_side(const attn_args & a, const attn_shape & s, const columns & c, int side, bool tiled, half * out, cudaStream_t stream) {
    switch (s.d) {
        case  64: return tiled ? launch< 64, true>(a, s, c, side, out, stream) : launch< 64, false>(a, s, c, side, out, stream);
        case  80: return launch< 80, false>(a, s, c, side, out, stream);
        case  96: return launch< 96, false>(a, s, c, side, out, stream);
        case 128: return tiled ? launch<128, true>(a, s, c, side, out, stream) : launch<128, false>(a, s, c, side, out, stream);
        case 256: return tiled ? launch<256, true>(a, s, c, side, out, stream) : launch<256, false>(a, s, c, side, out, stream);
        case 512: return launch<512, false>(a, s, c, side, out, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", s.d);
    }
}

void turn_queries(attn_args & a, int d, float * out, cudaStream_t stream) {
    const int n_row = a.n_stream*a.n_tokens*a.n_head;
    if (n_row <= TURN_FEW) {
        launch_turn<1>(a, d, n_row, out, stream);
    } else {
        launch_turn<TURN_MANY>(a, d, n_row, out, stream);
    }
    a.q     = (const char *) out;
    a.nb_q2 = d*sizeof(float);
    a.nb_q1 = a.n_head*a.nb_q2;
    a.nb_q3 = a.n_tokens*a.nb_q1;
}

} // namespace kvtc
