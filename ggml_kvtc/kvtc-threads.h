// f(i) for i < n on several threads, for work that is independent and whose results lie apart.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

// f must not throw: an exception that leaves a thread ends the program
template <typename F>
void kvtc_for_each(size_t n, F && f) {
    constexpr size_t MAX_THREADS = 8;
    const size_t n_threads = std::min({ n, MAX_THREADS, (size_t) std::max(1u, std::thread::hardware_concurrency()) });
    std::atomic<size_t> next(0);
    const auto work = [&] {
        for (size_t i; (i = next++) < n;) {
            f(i);
        }
    };
    std::vector<std::thread> threads;
    for (size_t i = 1; i < n_threads; ++i) {
        threads.emplace_back(work);
    }
    work();
    for (auto & thread : threads) {
        thread.join();
    }
}
