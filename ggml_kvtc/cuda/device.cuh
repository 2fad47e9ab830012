// What the attention kernels share: arguments, mma wrappers, angles, and which keys count exactly.
#pragma once

#include "common.cuh"

#include "kvtc-pack-cuda.h"
#include "kvtc-pack.h"
#include "kvtc.h"

#include <cuda_fp16.h>

namespace kvtc {

constexpr float LOG2E = 1.4426950408889634f;

// One KVTC_ATTN node. Strides are in bytes unless they say elements.
struct attn_args {
    const char    * q;
    int64_t         nb_q1, nb_q2, nb_q3;    // token, head, stream
    const uint8_t * rows[2];                // K, V
    int64_t         nb_row[2], nb_stream[2];
    const half    * mask;
    int64_t         ne_m1, ne_m3;           // elements from token to token, from stream to stream
    int             n_mask;                 // streams of the mask
    const float   * sinks;
    const char    * pack;
    const int2    * info;                   // (position, slot) of each cell
    const int     * query_pos;
    const half    * exact[2];               // [head][slot][d]
    const char    * batch[2];               // f32 z of this batch
    int64_t         nb_batch1[2], nb_batch2[2]; // token, head
    int             n_kv, n_tokens, n_head, n_head_kv, group, n_stream;
    int             n_sink, n_window, n_slots;
    int             n_span;                 // without a mask, 0: all cells are seen
    float           scale, softcap, max_bias, slope_low, slope_high;
    int             log2_heads;
    int             least_slot;             // cells with less are left out
};

__device__ __forceinline__ const ggml_kvtc_cuda_head & get_head(const char * pack, int side, int h) {
    return *(const ggml_kvtc_cuda_head *) (pack + GGML_KVTC_CUDA_HEAD_AT(side, h));
}

template <typename T>
__device__ __forceinline__ const T * at(const char * pack, uint32_t offset) {
    return (const T *) (pack + offset);
}

__device__ __forceinline__ uint32_t pack_half2(float lo, float hi) {
    const half2 h = __floats2half2_rn(lo, hi);
    return *(const uint32_t *) &h;
}

__device__ __forceinline__ uint32_t mul_half2(uint32_t x, half2 y) {
    const half2 h = __hmul2(*(const half2 *) &x, y);
    return *(const uint32_t *) &h;
}

//
// which keys count exactly, for the queries at positions [min_pos, max_pos]
//

enum key_use { USE_CODES, USE_EXACT, USE_EITHER };

__device__ __forceinline__ key_use get_use(const attn_args & a, int pos, int slot, int min_pos, int max_pos) {
    if (slot == -1) {
        return USE_CODES;
    }
    if (pos < a.n_sink || max_pos - pos < a.n_window) {
        return USE_EXACT;
    }
    return min_pos - pos < a.n_window ? USE_EITHER : USE_CODES;
}

__device__ __forceinline__ bool is_exact(const attn_args & a, int query, int pos) {
    return query - pos < a.n_window || pos < a.n_sink;
}

//
// which cells a query sees: by a mask, by positions (n_span), or all
//

constexpr uint16_t HIDDEN = 0xfc00; // -inf

__device__ __forceinline__ bool is_seen(const half & mask) {
    return __half_as_ushort(mask) != HIDDEN;
}

// of_mask: the stream's mask, or nullptr; token: of the query, or -1
__device__ __forceinline__ half read_mask(const attn_args & a, const half * of_mask, int token, int cell) {
    return cell >= a.n_kv || token < 0 ? __ushort_as_half(HIDDEN) : of_mask ? of_mask[token*a.ne_m1 + cell] : __ushort_as_half(0);
}

// the addend of a cell for a query at that position, where `mask` is what a mask says, if there is one
__device__ __forceinline__ half hide_by_position(const attn_args & a, const half & mask, int query, int pos) {
    const bool sees = a.n_span == 0 || (pos >= 0 && (uint32_t) (query - pos) < (uint32_t) a.n_span);
    return sees ? mask : __ushort_as_half(HIDDEN);
}

// logits of queries that were scaled for it, to powers of two, if the model caps them
__device__ __forceinline__ void cap_logits(const attn_args & a, float (&w)[4]) {
    if (a.softcap != 0.0f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            w[i] = a.softcap*LOG2E*tanhf(w[i]);
        }
    }
}

// The same for (position, slot) of a cell, which becomes an empty one if it is left out
__device__ __forceinline__ half hide_cell(const attn_args & a, const half & mask, int query, int2 & cell) {
    if (cell.y < a.least_slot) {
        cell = make_int2(-1, -1);
        return __ushort_as_half(HIDDEN);
    }
    return hide_by_position(a, mask, query, cell.x);
}

// Is a cell seen, at this position, with codes only? seen: as hide_cell gives it
__device__ __forceinline__ bool is_plain(const attn_args & a, const int2 & cell, const half & seen, int pos, int query_pos) {
    return cell.x == pos && __half_as_ushort(seen) == 0 && get_use(a, cell.x, cell.y, query_pos, query_pos) == USE_CODES;
}

// eight neighbouring components of a key that counts exactly
__device__ __forceinline__ uint4 load_exact(const attn_args & a, int side, int d, int head, int slot, int c) {
    if (slot >= 0) {
        return *(const uint4 *) (a.exact[side] + ((int64_t) head*a.n_slots + slot)*d + c);
    }
    const float * z = (const float *) (a.batch[side] - (slot + 2)*a.nb_batch1[side] + head*a.nb_batch2[side]) + c;
    return make_uint4(pack_half2(z[0], z[1]), pack_half2(z[2], z[3]), pack_half2(z[4], z[5]), pack_half2(z[6], z[7]));
}

// A batch's only token: two components of its key, or value, of thread threadIdx.x < D; where the batch has it
template <int D>
__device__ __forceinline__ float2 read_own(const attn_args & a, int head, int stream) {
    const int side = threadIdx.x/(D/2);
    if (side > 1 || !a.batch[side]) {
        return make_float2(0.0f, 0.0f);
    }
    const float * z = (const float *) (a.batch[side] + stream*a.nb_batch1[side] + head*a.nb_batch2[side]) + threadIdx.x%(D/2)*2;
    return make_float2(z[0], z[1]);
}

// f16 [2][D], as the store will have them
template <int D>
__device__ __forceinline__ void store_own(half * own, const float2 & z) {
    if (threadIdx.x < D) {
        ((uint32_t *) own)[threadIdx.x] = pack_half2(z.x, z.y);
    }
}

// the row of a token that counts exactly: of the store, or the batch's only one
template <int D>
__device__ __forceinline__ const uint4 * get_exact_row(const attn_args & a, int side, int head, int slot, const half * own) {
    return (const uint4 *) (slot >= 0 ? a.exact[side] + ((int64_t) head*a.n_slots + slot)*D : own + side*D);
}

__device__ __forceinline__ float alibi_slope(const attn_args & a, int head) {
    if (a.max_bias == 0.0f) {
        return 1.0f;
    }
    return head < a.log2_heads ? powf(a.slope_low, (float) (head + 1)) : powf(a.slope_high, (float) (2*(head - a.log2_heads) + 1));
}

//
// rotation
//

// channel at place c of the order in which rotation pairs are neighbours
__device__ __forceinline__ int pair_channel(int c, int rope_type, int n_rot) {
    if (rope_type != GGML_KVTC_ROPE_NEOX || c >= n_rot) {
        return c;
    }
    return c/2 + c%2*(n_rot/2);
}

// (cos, sin) of position * frequency; exact at any position, since the product is taken modulo one turn in integers
__device__ __forceinline__ float2 get_rotation(int pos, uint64_t freq) {
    const int   turn  = (int) ((uint32_t) pos*(uint32_t) (freq >> 32) + __umulhi((uint32_t) pos, (uint32_t) freq));
    const float angle = (float) turn*(6.283185307179586f/4294967296.0f);
    return make_float2(__cosf(angle), __sinf(angle));
}

//
// tensor cores
//

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 750
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#else
    GGML_UNUSED_VARS(c, a, b0, b1);
    NO_DEVICE_CODE;
#endif
}

// the same with an addend of its own: pairs of columns (x, y) that are equal for all rows
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float2 & c) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %10, %11};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c.x), "f"(c.y));
#else
    d[0] = d[2] = c.x;
    d[1] = d[3] = c.y;
    mma(d, a, b0, b1);
#endif
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void * row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t) __cvta_generic_to_shared(row)));
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void * row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t) __cvta_generic_to_shared(row)));
}

// an 8x8 matrix of f16, transposed across the warp
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// over the eight lanes that hold a column of mma's sums
__device__ __forceinline__ float column_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 4);
    x += __shfl_xor_sync(0xffffffff, x, 8);
    x += __shfl_xor_sync(0xffffffff, x, 16);
    return x;
}

__device__ __forceinline__ float column_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 4));
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 8));
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 16));
    return x;
}

__device__ __forceinline__ int warp_min(int x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_min_sync(0xffffffff, x);
#else
    for (int i = 16; i > 0; i /= 2) {
        x = min(x, __shfl_xor_sync(0xffffffff, x, i));
    }
    return x;
#endif
}

__device__ __forceinline__ int warp_max(int x) {
    return ~warp_min(~x); // ~ turns the order round
}

// More than 48 KiB of shared memory must be asked for. The limit is the kernel's, not the launch's: layers whose tables differ ask
// for different sizes, and lowering it again would make the nodes of a CUDA graph that were captured with more invalid.
inline void allow_shared_memory(const void * kernel, size_t bytes) {
    if (bytes > 48*1024) {
        cudaFuncAttributes attributes;
        CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
        if ((size_t) attributes.maxDynamicSharedSizeBytes < bytes) {
            CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) bytes));
        }
    }
}

//
// asynchronous copies to shared memory; before Ampere they are plain ones
//

template <int n>
__device__ __forceinline__ void copy_async(void * dst, const void * src) {
#if __CUDA_ARCH__ >= 800
    const uint32_t to = (uint32_t) __cvta_generic_to_shared(dst);
    if constexpr (n == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(src) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(to), "l"(src), "n"(n) : "memory");
    }
#else
    if constexpr (n == 16) {
        *(uint4 *) dst = *(const uint4 *) src;
    } else if constexpr (n == 8) {
        *(uint2 *) dst = *(const uint2 *) src;
    } else {
        *(uint32_t *) dst = *(const uint32_t *) src;
    }
#endif
}

__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int n>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory");
#endif
}

} // namespace kvtc
