// Blocks that run together (a cluster, from sm_90 on): they meet, and store to each other's shared memory.
#pragma once

#include "common.cuh"

// Kernels of n blocks along z. Other architectures compile these without a body that works; none is launched there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < GGML_CUDA_CC_HOPPER
#define KVTC_CLUSTER(n)
#else
#define KVTC_CLUSTER(n) __cluster_dims__(1, 1, n)
#endif

namespace kvtc {

inline bool has_clusters(int cc) {
    return GGML_CUDA_CC_IS_NVIDIA(cc) && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_HOPPER;
}

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
    NO_DEVICE_CODE;
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    NO_DEVICE_CODE;
#endif
}

// to where this block has p, in the shared memory of block `rank`
__device__ __forceinline__ void cluster_store(double * p, int rank, double x) {
#if __CUDA_ARCH__ >= GGML_CUDA_CC_HOPPER
    asm volatile(
        "{\n"
        ".reg .b32 to;\n"
        "mapa.shared::cluster.u32 to, %0, %1;\n"
        "st.shared::cluster.f64 [to], %2;\n"
        "}\n" :: "r"((uint32_t) __cvta_generic_to_shared(p)), "r"(rank), "d"(x) : "memory");
#else
    GGML_UNUSED_VARS(p, rank, x);
    NO_DEVICE_CODE;
#endif
}

} // namespace kvtc
