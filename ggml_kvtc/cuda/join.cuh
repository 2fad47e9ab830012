// Kernels that wait for two streams.
#pragma once

#include "common.cuh"

#include <cstdlib>
#include <vector>

namespace kvtc {

// what follows on `to` waits for what is on `from`
inline void follow(cudaStream_t from, cudaStream_t to) {
    cudaEvent_t event;
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventRecord(event, from));
    CUDA_CHECK(cudaStreamWaitEvent(to, event));
    CUDA_CHECK(cudaEventDestroy(event));
}

// Both streams are being captured: the next kernel on `stream` waits for all of `side`, but may begin before the kernel before it on
// `stream` has ended. An event would make it wait for both. False, and nothing is done, where there is no such graph.
inline bool follow_early(cudaStream_t side, cudaStream_t stream) {
#if CUDART_VERSION >= 12030
    struct dependencies {
        cudaStreamCaptureStatus     status;
        const cudaGraphNode_t     * nodes = nullptr;
        const cudaGraphEdgeData   * edges = nullptr;
        size_t                      n     = 0;

        explicit dependencies(cudaStream_t stream) {
#if CUDART_VERSION >= 13000
            CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &nodes, &edges, &n));
#else
            CUDA_CHECK(cudaStreamGetCaptureInfo_v3(stream, &status, nullptr, nullptr, &nodes, &edges, &n));
#endif
        }
    };
    const dependencies own(stream), other(side);
    cudaGraphNodeType type;
    if (own.status != cudaStreamCaptureStatusActive || other.status != cudaStreamCaptureStatusActive || own.n != 1 ||
            cudaGraphNodeGetType(own.nodes[0], &type) != cudaSuccess || type != cudaGraphNodeTypeKernel) {
        return false;
    }
    std::vector<cudaGraphNode_t>   nodes(own.nodes, own.nodes + 1);
    std::vector<cudaGraphEdgeData> edges(1 + other.n);
    nodes.insert(nodes.end(), other.nodes, other.nodes + other.n);
    edges[0].from_port = cudaGraphKernelNodePortProgrammatic;
    edges[0].type      = cudaGraphDependencyTypeProgrammatic;
#if CUDART_VERSION >= 13000
    CUDA_CHECK(cudaStreamUpdateCaptureDependencies(stream, nodes.data(), edges.data(), nodes.size(), cudaStreamSetCaptureDependencies));
#else
    CUDA_CHECK(cudaStreamUpdateCaptureDependencies_v2(stream, nodes.data(), edges.data(), nodes.size(), cudaStreamSetCaptureDependencies));
#endif
    return true;
#else
    GGML_UNUSED_VARS(side, stream);
    return false;
#endif
}

// A kernel behind what is on its stream and on `side`
template <typename Kernel, typename... Args>
void launch_behind(cudaStream_t side, Kernel kernel, const ggml_cuda_kernel_launch_params & p, Args &&... args) {
#ifdef GGML_CUDA_USE_PDL
    const char * pdl = getenv("GGML_CUDA_PDL");
    if ((!pdl || atoi(pdl) != 0) && ggml_cuda_kernel_can_use_pdl((const void *) kernel) && follow_early(side, p.stream)) {
        kernel<<<p.block_nums, p.block_dims, p.shmem, p.stream>>>(std::forward<Args>(args)...);
        CUDA_CHECK(cudaGetLastError());
        return;
    }
#endif
    follow(side, p.stream);
    ggml_cuda_kernel_launch(kernel, p, std::forward<Args>(args)...);
}

} // namespace kvtc
