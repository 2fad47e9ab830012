// Rows of codes as the copy engine brings them to shared memory: boxes of a tensor map.
#pragma once

#include "device.cuh"
#include "hopper-tiles.cuh"

namespace kvtc {

// a kernel's parameter, __grid_constant__
struct row_maps {
    CUtensorMap side[2];
};

constexpr int BOX_ROWS = 16; // of cells that follow each other

// boxes of their rows, `stride` bytes of each
inline CUtensorMap make_map(const attn_args & a, int side, int stride) {
    static const auto encode = [] {
        void * found = nullptr;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#else
        CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
        GGML_ASSERT(found != nullptr && result == cudaDriverEntryPointSuccess);
        return (decltype(&cuTensorMapEncodeTiled)) found;
    }();
    const cuuint64_t row       = a.nb_row[side];
    const cuuint64_t sizes[3]   = { row, (cuuint64_t) a.n_kv, (cuuint64_t) a.n_stream };
    const cuuint64_t strides[2] = { row, a.n_stream > 1 ? (cuuint64_t) a.nb_stream[side] : row*a.n_kv };
    const cuuint32_t box[3]     = { (cuuint32_t) stride, BOX_ROWS, 1 };
    const cuuint32_t steps[3]   = { 1, 1, 1 };
    CUtensorMap map;
    const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<uint8_t *>(a.rows[side]), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    GGML_ASSERT(result == CUDA_SUCCESS && "a cache's rows do not suit the copy engine");
    return map;
}

inline row_maps make_row_maps(const attn_args & a, const int (&stride)[2]) {
    return { { make_map(a, 0, stride[0]), make_map(a, 1, stride[1]) } };
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// A box is on its way, by the thread that calls. from: of a row's bytes, a multiple of 16; stride: the map's
__device__ __forceinline__ void bring_rows(void * to, const CUtensorMap & map, int from, int stride, int cell, int stream, uint64_t & barrier) {
    barrier_expect(barrier, BOX_ROWS*stride);
    copy_box(to, map, from, cell, stream, barrier);
}
#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
