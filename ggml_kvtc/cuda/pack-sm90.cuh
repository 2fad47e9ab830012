// What Hopper's kernels need of the pack before their first slab, by the copy engine: one thread starts it, and all wait for its barrier.
#pragma once

#include "device.cuh"
#include "hopper-tiles.cuh"
#include "plan.h"

namespace kvtc {

// of a block that decodes, in shared memory
struct block_barriers {
    uint64_t pack; // its part of the pack is there
    uint64_t sums; // those of all warps are
};

static_assert(sizeof(block_barriers) == SM90_BARRIERS, "the plan has another size");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr uint32_t BRING_BYTES = 8192; // of one copy: several are under way together

__device__ __forceinline__ void bring_bytes(uint8_t * to, const char * from, uint32_t n, uint64_t & barrier) {
#pragma unroll 1 // a block executes this once: short code, which it must fetch, counts (NOTES.md)
    for (uint32_t i = 0; i < n; i += BRING_BYTES) {
        copy_bulk(to + i, from + i, min(BRING_BYTES, n - i), barrier);
    }
}

// before n calls of what follows, by the thread that makes them
__device__ __forceinline__ void init_bring(uint64_t & barrier, int n) {
    barrier_init(barrier, n);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A head's operand. Where this and the rotations lie follows from the shape: nothing is waited for
template <int D>
__device__ __forceinline__ void bring_operand(const attn_args & a, int head, uint8_t * to, uint64_t & barrier) {
    constexpr uint32_t n = GGML_KVTC_CUDA_OPERAND_BYTES(D);
    barrier_expect(barrier, n);
    bring_bytes(to, a.pack + GGML_KVTC_CUDA_OPERAND_AT(a.n_head_kv, D, head), n, barrier);
}

// its first n columns
template <int D, int n>
__device__ __forceinline__ void bring_columns(const attn_args & a, int head, uint8_t * to, uint64_t & barrier) {
    barrier_expect(barrier, (D/8 + 1)*n*16);
    const char * from = a.pack + GGML_KVTC_CUDA_OPERAND_AT(a.n_head_kv, D, head);
#pragma unroll 1
    for (int i = 0; i <= D/8; ++i) {
        copy_bulk(to + i*n*16, from + i*D*16, n*16, barrier);
    }
}

// the rotations of n_turn positions
template <int D>
__device__ __forceinline__ void bring_turns(const attn_args & a, uint8_t * to, int n_turn, uint64_t & barrier) {
    const uint32_t n = n_turn*GGML_KVTC_CUDA_TURN_WORDS(D)*sizeof(uint32_t);
    barrier_expect(barrier, n);
    bring_bytes(to, a.pack + GGML_KVTC_CUDA_TURNS_AT(a.n_head_kv, D), n, barrier);
}

// those of the first eight of each 16 positions
template <int D>
__device__ __forceinline__ void bring_half_turns(const attn_args & a, uint8_t * to, int n_turn, uint64_t & barrier) {
    constexpr uint32_t n = 8*GGML_KVTC_CUDA_TURN_WORDS(D)*sizeof(uint32_t);
    barrier_expect(barrier, n_turn/16*n);
#pragma unroll 1
    for (int i = 0; i < n_turn/16; ++i) {
        copy_bulk(to + i*n, a.pack + GGML_KVTC_CUDA_TURNS_AT(a.n_head_kv, D) + 2*i*n, n, barrier);
    }
}

// a head's tables of pairs
__device__ __forceinline__ void bring_tables(const attn_args & a, const ggml_kvtc_cuda_head & head, uint8_t * to, uint64_t & barrier) {
    const uint32_t n = head.n_pairs;
    barrier_expect(barrier, n);
    bring_bytes(to, a.pack + head.pairs, n, barrier);
}

#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
