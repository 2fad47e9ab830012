// Why the decoding kernels of sm_90a end with an mbarrier: what compute-sanitizer's racecheck makes of named barriers.
//     nvcc -arch=sm_90 -lineinfo racecheck.cu -o racecheck && compute-sanitizer --tool racecheck ./racecheck
// Each thread writes a word, all threads of the block meet, and each reads the words of all. Before that, groups of four warps met at
// barriers of their own, the first three times, the second six times, the third nine times. No kernel here can race; racecheck
// reports the one that ends with __syncthreads().
#include <cstdint>
#include <cstdio>

constexpr int THREADS = 384;

template <bool MBARRIER>
__global__ void meet(int * out) {
    __shared__ int      words[THREADS];
    __shared__ uint64_t barrier;
    const uint32_t at = (uint32_t) __cvta_generic_to_shared(&barrier);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at), "n"(THREADS) : "memory");
    }
    __syncthreads();
    const int group = threadIdx.x/128;
    for (int i = 0; i < 3*(group + 1); ++i) {
        asm volatile("barrier.cta.sync.aligned %0, 128;" :: "r"(group + 1) : "memory");
    }
    __syncthreads();
    words[threadIdx.x] = (int) threadIdx.x;
    if (MBARRIER) {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(at) : "memory");
        asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra again;\n}\n" :: "r"(at) : "memory");
    } else {
        __syncthreads();
    }
    int sum = 0;
    for (int i = 0; i < THREADS; ++i) {
        sum += words[i];
    }
    out[blockIdx.x*THREADS + threadIdx.x] = sum;
}

template <bool MBARRIER>
void run(int * out) {
    static int sums[132*THREADS];
    int n_wrong = 0;
    for (int i = 0; i < 20; ++i) {
        meet<MBARRIER><<<132, THREADS>>>(out);
        cudaMemcpy(sums, out, sizeof(sums), cudaMemcpyDeviceToHost);
        for (int x : sums) {
            n_wrong += x != THREADS*(THREADS - 1)/2;
        }
    }
    printf("%s: %d wrong sums, %s\n", MBARRIER ? "mbarrier" : "__syncthreads()", n_wrong, cudaGetErrorString(cudaDeviceSynchronize()));
}

int main() {
    int * out;
    cudaMalloc(&out, 132*THREADS*sizeof(int));
    run<false>(out);
    run<true>(out);
}
