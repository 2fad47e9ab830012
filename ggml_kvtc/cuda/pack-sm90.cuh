// What Hopper's kernels need of the pack before their first slab, by the copy engine: one thread starts it, and all wait for its barrier.
#pragma once

#include "device.cuh"
#include "hopper-tiles.cuh"
#include "plan.h"

namespace kvtc {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr uint32_t BRING_BYTES = 8192; // of one copy: several are under way together

__device__ __forceinline__ void bring_bytes(uint8_t * to, const char * from, uint32_t n, uint64_t & barrier) {
    for (uint32_t i = 0; i < n; i += BRING_BYTES) {
        copy_bulk(to + i, from + i, min(BRING_BYTES, n - i), barrier);
    }
}

// The head's operand to `to`, and `n_turn` positions of the table of rotations. Where they lie follows from the shape: nothing is waited for.
// By one thread, which then counts once more at the barrier: bring_tables()
template <int D>
__device__ __forceinline__ void bring_operand(const attn_args & a, int head, uint8_t * to, uint8_t * turns, int n_turn, uint64_t & barrier) {
    barrier_init(barrier, 2);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    constexpr uint32_t OPERAND = GGML_KVTC_CUDA_OPERAND_BYTES(D);
    const uint32_t n = n_turn*GGML_KVTC_CUDA_TURN_WORDS(D)*sizeof(uint32_t);
    barrier_expect(barrier, OPERAND + n);
    bring_bytes(to,    a.pack + GGML_KVTC_CUDA_OPERAND_AT(a.n_head_kv, D, head), OPERAND, barrier);
    bring_bytes(turns, a.pack + GGML_KVTC_CUDA_TURNS_AT(a.n_head_kv, D), n, barrier);
}

// Tables of pairs, of one or both sides. By the same thread
__device__ __forceinline__ void bring_tables(const attn_args & a, uint8_t * to, const ggml_kvtc_cuda_head & head, uint8_t * to_other, const ggml_kvtc_cuda_head * other, uint64_t & barrier) {
    const uint32_t at[2] = { head.pairs,   other ? other->pairs   : 0 };
    const uint32_t n [2] = { head.n_pairs, other ? other->n_pairs : 0 };
    barrier_expect(barrier, n[0] + n[1]);
    bring_bytes(to,       a.pack + at[0], n[0], barrier);
    bring_bytes(to_other, a.pack + at[1], n[1], barrier);
}

#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
