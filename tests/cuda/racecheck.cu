// What compute-sanitizer's racecheck makes of named barriers: `nvcc -arch=sm_90 -lineinfo racecheck.cu -o racecheck && compute-sanitizer
// --tool racecheck ./racecheck`. On an H100 (CUDA 13.0, 2026-11-26): 39 errors, 9 of them each for LAST 2 and 3 with GROUPS, none for 4, and no wrong word. In every kernel here each thread writes a word, all threads of the block meet, and each reads the words
// of all: nothing else touches these. Before that, groups of four warps met at barriers of their own, the first group three times, the
// second six times, the third nine times (GROUPS), or all the block as often as the third (not GROUPS).
// LAST: how the block meets. 0: __syncthreads(); 1: each thread arrives at an mbarrier, and all wait for it; 2: after __syncwarp() one lane
// of each warp does; 3: named barrier 15; 4: __syncthreads() twice
#include <cstdint>
#include <cstdio>

constexpr int THREADS = 384;

template <bool GROUPS, int LAST>
__global__ void meet(int * out) {
    __shared__ int words[THREADS];
    __shared__ uint64_t barrier;
    const uint32_t at = (uint32_t) __cvta_generic_to_shared(&barrier);
    const int group = threadIdx.x/128;
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at), "r"(LAST == 2 ? THREADS/32 : THREADS) : "memory");
    }
    __syncthreads();
    for (int i = 0; i < (GROUPS ? 3*(group + 1) : 9); ++i) {
        if (GROUPS) {
            asm volatile("barrier.cta.sync.aligned %0, 128;" :: "r"(group + 1) : "memory");
        } else {
            __syncthreads();
        }
    }
    __syncthreads();
    words[threadIdx.x] = (int) threadIdx.x;
    if (LAST == 0 || LAST == 4) {
        __syncthreads();
    }
    if (LAST == 4) {
        __syncthreads();
    }
    if (LAST == 3) {
        asm volatile("barrier.cta.sync.aligned 15, %0;" :: "n"(THREADS) : "memory");
    }
    if (LAST == 1 || LAST == 2) {
        __syncwarp();
        if (LAST == 1 || threadIdx.x%32 == 0) {
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(at) : "memory");
        }
        asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra again;\n}\n" :: "r"(at) : "memory");
    }
    int sum = 0;
    for (int i = 0; i < THREADS; ++i) {
        sum += words[i];
    }
    out[blockIdx.x*THREADS + threadIdx.x] = sum;
}

template <bool GROUPS, int LAST>
void run(int * out) {
    static int sums[132*THREADS];
    int n_wrong = 0;
    for (int i = 0; i < 20; ++i) {
        meet<GROUPS, LAST><<<132, THREADS>>>(out);
        cudaMemcpy(sums, out, sizeof(sums), cudaMemcpyDeviceToHost);
        for (int x : sums) {
            n_wrong += x != THREADS*(THREADS - 1)/2;
        }
    }
    printf("GROUPS %d LAST %d: %d wrong, %s\n", GROUPS, LAST, n_wrong, cudaGetErrorString(cudaDeviceSynchronize()));
    fflush(stdout);
}

int main() {
    int * out;
    cudaMalloc(&out, 132*THREADS*sizeof(int));
    run<false, 0>(out);
    run<true,  0>(out);
    run<true,  1>(out);
    run<true,  2>(out);
    run<true,  3>(out);
    run<true,  4>(out);
}
