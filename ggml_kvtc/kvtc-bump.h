// Lays out the arrays of a pack.
#pragma once

#include <cstddef>
#include <cstdint>

// Hands out aligned pieces of a block; with base == nullptr it only counts.
struct ggml_kvtc_bump {
    char * base;
    size_t align = 64;
    size_t used  = 0;

    uint32_t reserve(size_t n) {
        const size_t at = (used + align - 1)/align*align;
        used = at + n;
        return (uint32_t) at;
    }

    template <typename T> uint32_t put(size_t n, T ** out) {
        const uint32_t at = reserve(n*sizeof(T));
        *out = base ? (T *) (base + at) : nullptr;
        return at;
    }
};
