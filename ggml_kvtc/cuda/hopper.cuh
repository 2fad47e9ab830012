// Instructions of sm_90a: products of four warps, and the barrier at which they meet.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace kvtc {

constexpr int GROUP_WARPS = 4; // whose instructions these are

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// K-major operand without swizzle: cores of 8 rows x 16 bytes; `next_k`, `next_row` bytes apart
__device__ __forceinline__ uint64_t get_operand(const void * at, int next_k, int next_row) {
    const uint32_t address = (uint32_t) __cvta_generic_to_shared(at);
    return (uint64_t) ((address & 0x3ffff) >> 4) | (uint64_t) (next_k >> 4) << 16 | (uint64_t) (next_row >> 4) << 32;
}

__device__ __forceinline__ void wgmma_fence()  { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// which the compiler must have made before
__device__ __forceinline__ void wgmma_fence(uint32_t (&k)[2][4]) {
    asm volatile("wgmma.fence.sync.aligned;" : "+r"(k[0][0]), "+r"(k[0][1]), "+r"(k[0][2]), "+r"(k[0][3]),
        "+r"(k[1][0]), "+r"(k[1][1]), "+r"(k[1][2]), "+r"(k[1][3]) :: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait()   { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// 64 rows x 256 (128, 64) columns += 64 x 16, of registers, times 16 x 256 (128, 64); start: = instead. The four warps of a group multiply
// together: all must be at this very instruction, so none may choose its code by what its own rows hold
__device__ __forceinline__ void wgmma(uint32_t (&d)[64], const uint32_t (&a)[4], uint64_t b, bool start) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.s32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f16.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n"
        "}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
          "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
          "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]),
          "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]),
          "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]),
          "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
          "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(start ? 0 : 1));
}

__device__ __forceinline__ void wgmma(uint32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool start) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.s32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f16.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"
        "}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
          "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
          "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(start ? 0 : 1));
}

__device__ __forceinline__ void wgmma(uint32_t (&d)[16], const uint32_t (&a)[4], uint64_t b, bool start) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.s32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f16.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n"
        "}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(start ? 0 : 1));
}

template <bool start, int N>
__device__ __forceinline__ void wgmma(uint32_t (&d)[N], const uint32_t (&a)[4], uint64_t b) {
    wgmma(d, a, b, start);
}

// the two components that are 1 in every row. The compiler must not make them between products: it would wait for these
__device__ __forceinline__ void set_ones(uint32_t (&x)[4], bool count = true) {
    const uint32_t one = threadIdx.x % 4 == 0 && count ? 0x3c003c00 : 0;
    asm volatile("mov.b32 %0, %4; mov.b32 %1, %4; mov.b32 %2, 0; mov.b32 %3, 0;" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(one));
}

// n_warp warps meet at a barrier of the block; true where it is true for any thread
template <int n_warp>
__device__ __forceinline__ bool meet(int barrier, bool x) {
    int any;
    asm volatile(
        "{\n"
        ".reg .pred p, q;\n"
        "setp.ne.s32 p, %1, 0;\n"
        "barrier.cta.red.or.pred.aligned q, %2, %3, p;\n"
        "selp.s32 %0, 1, 0, q;\n"
        "}\n"
        : "=r"(any) : "r"((int) x), "r"(barrier), "n"(32*n_warp) : "memory");
    return any != 0;
}

// n_warp warps meet at a barrier of the block, without a question
template <int n_warp>
__device__ __forceinline__ void meet(int barrier) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" :: "r"(barrier), "n"(32*n_warp) : "memory");
}

// the four warps of a group meet
__device__ __forceinline__ bool meet(int group, bool x) {
    return meet<GROUP_WARPS>(group + 1, x);
}
#endif // __CUDA_ARCH_FEAT_SM90_ALL

} // namespace kvtc
