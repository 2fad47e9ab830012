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

#if CUDART_VERSION >= 12030
// what the next kernel on a stream that is being captured waits for
struct dependencies {
    std::vector<cudaGraphNode_t>   nodes;
    std::vector<cudaGraphEdgeData> edges; // all of them full
    bool ok = false;

    explicit dependencies(cudaStream_t stream) {
        cudaStreamCaptureStatus   status;
        const cudaGraphNode_t   * at      = nullptr;
        const cudaGraphEdgeData * of_edge = nullptr;
        size_t n = 0;
#if CUDART_VERSION >= 13000
        CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &at, &of_edge, &n));
#else
        CUDA_CHECK(cudaStreamGetCaptureInfo_v3(stream, &status, nullptr, nullptr, &at, &of_edge, &n));
#endif
        ok = status == cudaStreamCaptureStatusActive;
        if (ok) {
            nodes.assign(at, at + n);
            edges.resize(n);
        }
    }

    // not for their ends, but for all blocks to have begun. False where there is another node than a kernel, or none
    bool start_early() {
        cudaGraphNodeType type;
        if (!ok || nodes.size() != 1 || cudaGraphNodeGetType(nodes[0], &type) != cudaSuccess || type != cudaGraphNodeTypeKernel) {
            return false;
        }
        edges[0].from_port = cudaGraphKernelNodePortProgrammatic;
        edges[0].type      = cudaGraphDependencyTypeProgrammatic;
        return true;
    }

    void add(const dependencies & other) {
        nodes.insert(nodes.end(), other.nodes.begin(), other.nodes.end());
        edges.insert(edges.end(), other.edges.begin(), other.edges.end());
    }

    void set(cudaStream_t stream) {
#if CUDART_VERSION >= 13000
        CUDA_CHECK(cudaStreamUpdateCaptureDependencies(stream, nodes.data(), edges.data(), nodes.size(), cudaStreamSetCaptureDependencies));
#else
        CUDA_CHECK(cudaStreamUpdateCaptureDependencies_v2(stream, nodes.data(), edges.data(), nodes.size(), cudaStreamSetCaptureDependencies));
#endif
    }
};
#endif

// Both streams are being captured: the next kernel on `stream` waits for all that is on one of them, and for the last kernel on the other,
// `early`, to have begun. An event would make it wait for the ends of both. False, and nothing is done, where there is no such graph.
inline bool follow_early(cudaStream_t early, cudaStream_t other, cudaStream_t stream) {
#if CUDART_VERSION >= 12030
    dependencies begun(early), ended(other);
    if (!ended.ok || !begun.start_early()) {
        return false;
    }
    begun.add(ended);
    begun.set(stream);
    return true;
#else
    GGML_UNUSED_VARS(early, other, stream);
    return false;
#endif
}

inline bool has_early(const void * kernel) {
#ifdef GGML_CUDA_USE_PDL
    const char * pdl = getenv("GGML_CUDA_PDL");
    return (!pdl || atoi(pdl) != 0) && ggml_cuda_kernel_can_use_pdl(kernel);
#else
    GGML_UNUSED(kernel);
    return false;
#endif
}

// A kernel behind what is on its stream and on `side`; it may begin before the kernel before it on its stream has ended
template <typename Kernel, typename... Args>
void launch_behind(cudaStream_t side, Kernel kernel, const ggml_cuda_kernel_launch_params & p, Args &&... args) {
    if (has_early((const void *) kernel) && follow_early(p.stream, side, p.stream)) {
        kernel<<<p.block_nums, p.block_dims, p.shmem, p.stream>>>(std::forward<Args>(args)...);
        CUDA_CHECK(cudaGetLastError());
        return;
    }
    follow(side, p.stream);
    ggml_cuda_kernel_launch(kernel, p, std::forward<Args>(args)...);
}

// A kernel behind what is on its stream alone, which takes no processor from the last kernel on `main` where that can be told: it begins
// when all blocks of that have
template <typename Kernel, typename... Args>
void launch_beside(cudaStream_t main, Kernel kernel, const ggml_cuda_kernel_launch_params & p, Args &&... args) {
    if (has_early((const void *) kernel)) {
        follow_early(main, p.stream, p.stream);
    }
    kernel<<<p.block_nums, p.block_dims, p.shmem, p.stream>>>(std::forward<Args>(args)...);
    CUDA_CHECK(cudaGetLastError());
}

} // namespace kvtc
