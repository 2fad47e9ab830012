// Blocks that run together (a cluster, from sm_90 on) and send numbers to each other's shared memory. A message counts itself at a
// barrier there. The cluster's own barrier would do, but it waits until all that a thread has written lies in L2.
#pragma once

#include "common.cuh"

// Kernels of n blocks along z. Other architectures compile these too, and never run them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < GGML_CUDA_CC_HOPPER
#define KVTC_CLUSTER(n)
#else
#define KVTC_CLUSTER(n) __cluster_dims__(1, 1, n)
#endif

namespace kvtc {

inline bool has_clusters(int cc) {
    return GGML_CUDA_CC_IS_NVIDIA(cc) && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_HOPPER;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < GGML_CUDA_CC_HOPPER
template <int n>
__device__ __forceinline__ void mailbox_open(uint64_t (&)[n], uint32_t)                  { NO_DEVICE_CODE; }
__device__ __forceinline__ void mailbox_meet()                                           { NO_DEVICE_CODE; }
__device__ __forceinline__ void mailbox_send(double2 &, double2, int, uint64_t &)        { NO_DEVICE_CODE; }
__device__ __forceinline__ void mailbox_wait(uint64_t &)                                 { NO_DEVICE_CODE; }
#else
// Mailboxes of the block, at each of which as many bytes will come. All threads call this; nothing may be sent before they have met.
template <int n>
__device__ __forceinline__ void mailbox_open(uint64_t (&boxes)[n], uint32_t bytes) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < n; ++i) {
            const uint32_t box = (uint32_t) __cvta_generic_to_shared(boxes + i);
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(box) : "memory");
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(box), "r"(bytes) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// the mailboxes of all blocks are open
__device__ __forceinline__ void mailbox_meet() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// x to where block `rank` has `to`, with word to the mailbox there
__device__ __forceinline__ void mailbox_send(double2 & to, double2 x, int rank, uint64_t & box) {
    asm volatile(
        "{\n"
        ".reg .b32 to, box;\n"
        "mapa.shared::cluster.u32 to, %0, %2;\n"
        "mapa.shared::cluster.u32 box, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f64 [to], {%3, %4}, [box];\n"
        "}\n"
        :: "r"((uint32_t) __cvta_generic_to_shared(&to)), "r"((uint32_t) __cvta_generic_to_shared(&box)), "r"(rank), "d"(x.x), "d"(x.y) : "memory");
}

// all that was to come has come
__device__ __forceinline__ void mailbox_wait(uint64_t & box) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n"
        "@!p bra again;\n"
        "}\n"
        :: "r"((uint32_t) __cvta_generic_to_shared(&box)) : "memory");
}
#endif

} // namespace kvtc
