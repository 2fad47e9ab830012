// GPU time of a token, whatever the host does between two: median of the times from the end of a CUDA graph's launch to the end of the
// synchronization behind it. And that of the host: from there to the end of the next launch. A library to preload:
//
//   g++ -O2 -shared -fPIC -I/usr/local/cuda/include bench/graph_time.cpp -o graph_time.so -ldl
//   LD_PRELOAD=./graph_time.so llama-bench -m model.gguf -ngl 99 -fa 1 -ctk kvtc2 -ctv kvtc4 -p 0 -n 64 -d 16384
//
// It prints one line to stderr at the end, for one test alone: those of several depths would be one median. Medians of a model's tokens vary by 0.1% on a card and by 0.4% from card to card, where
// llama-bench's tokens per second vary by 2 to 4%, which is the host's.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

namespace {

constexpr double SHORTEST = 700.0; // µs: what is waited for less is no token

double now() {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> & x) {
    std::nth_element(x.begin(), x.begin() + x.size()/2, x.end());
    return x[x.size()/2];
}

struct times {
    double launched = 0.0; // when the last graph's launch ended; 0: none since a token's end
    double ended    = 0.0; // when the last token did
    std::vector<double> tokens;
    std::vector<double> hosts; // between two tokens

    ~times() {
        if (!hosts.empty()) {
            fprintf(stderr, "graph_time: %zu tokens, median %.1f us, and of the host between two %.1f us\n", tokens.size(), median(tokens), median(hosts));
        }
    }
} seen;

template <typename F>
F next(const char * name) {
    return (F) dlsym(RTLD_NEXT, name);
}

} // namespace

extern "C" cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    static const auto launch = next<cudaError_t (*)(cudaGraphExec_t, cudaStream_t)>("cudaGraphLaunch");
    const cudaError_t error = launch(graph, stream);
    seen.launched = now();
    return error;
}

extern "C" cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    static const auto synchronize = next<cudaError_t (*)(cudaStream_t)>("cudaStreamSynchronize");
    const double before = now();
    const cudaError_t error = synchronize(stream);
    const double after = now();
    if (seen.launched > 0.0 && after - before > SHORTEST) {
        seen.tokens.push_back(after - seen.launched);
        if (seen.ended > 0.0) {
            seen.hosts.push_back(seen.launched - seen.ended);
        }
        seen.ended    = after;
        seen.launched = 0.0;
    }
    return error;
}
