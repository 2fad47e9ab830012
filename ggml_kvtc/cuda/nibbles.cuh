// Codes to coefficients where tables of pairs have no room (those of 256 components of 4 bits take 128 KiB): codes become nibbles,
// whatever a group's width, and permutations of bytes make addresses of single levels of them.
#pragma once

#include "pairs.cuh"

namespace kvtc {

// bits of x where mask is 1, of y where it is 0
__device__ __forceinline__ uint32_t choose(uint32_t mask, uint32_t x, uint32_t y) {
    return (x & mask) | (y & ~mask);
}

// a permutation of the bytes of x, y; the highest bit of a nibble of `which` must be 0
__device__ __forceinline__ uint32_t permute(uint32_t x, uint32_t y, uint32_t which) {
    uint32_t z;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(x), "r"(y), "r"(which)); // __byte_perm masks `which` once more
    return z;
}

// Sums of neighbouring components, which are one register of a key as they are looked up: the products' inner dimension is (key, parity), and
// the weights' operand has zeros for the other parity. pick: for a column of even (odd) components, permutations that leave one of two keys'
// weight for them
__device__ __forceinline__ void pick_parity(uint32_t (&pick)[2], bool even) {
    pick[0] = even ? 0x4410u : 0x1044u;
    pick[1] = even ? 0x4432u : 0x3244u;
}

// z: a group of keys 2*q4, + 1, + 8, + 9; weights: of a column's query, two keys of the first eight, and of the others
template <int N>
__device__ __forceinline__ void add_pairs(float (&o)[2][N][4], const uint4 (&z)[4], const uint32_t (&weights)[2], const uint32_t (&pick)[N][2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint4 & z0 = z[2*i];
        const uint4 & z1 = z[2*i + 1];
        const uint32_t even[4] = { z0.x, z0.z, z1.x, z1.z };
        const uint32_t odd [4] = { z0.y, z0.w, z1.y, z1.w };
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const uint32_t b0 = permute(weights[i], 0, pick[j][0]);
            const uint32_t b1 = permute(weights[i], 0, pick[j][1]);
            mma(o[0][j], even, b0, b1);
            mma(o[1][j], odd,  b0, b1);
        }
    }
}

// Levels in shared memory, f16 [set of N groups][component][code / 8][group][code % 8]: a code's bits and its group's fill a byte of
// the address, and few lanes share banks. N: 8 for values, 4 for keys, the groups of a warp. Fewer levels than 16 are repeated, so
// that whatever lies above a code's bits in its nibble does not count.
constexpr int LEVEL_BYTES = 256; // of a group

// of component c of a group's f16 [8][2^width]; of no bits or more than 4, zeros
__device__ __forceinline__ void read_levels(uint32_t (&x)[8], const half * levels, int width, int c) {
    const uint32_t * pairs = (const uint32_t *) (levels + (c << width));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x[i] = width > 0 && width <= 4 ? pairs[i & (((1 << width) - 1) >> 1)] : 0;
    }
}

template <int N>
__device__ __forceinline__ void store_levels(uint4 * to, const uint32_t (&x)[8], int group, int c) {
    to += (group/N*8 + c)*2*N + group%N;
    to[0] = make_uint4(x[0], x[1], x[2], x[3]);
    to[N] = make_uint4(x[4], x[5], x[6], x[7]);
}

// of component threadIdx.x of a head
__device__ __forceinline__ void read_levels(uint32_t (&x)[8], const char * pack, const ggml_kvtc_cuda_head & head) {
    const int group = threadIdx.x/8;
    read_levels(x, at<half>(pack, head.levels) + at<uint32_t>(pack, head.levels_at)[group], at<uint8_t>(pack, head.widths)[group], threadIdx.x%8);
}

// eight codes of `width` bits to nibbles
__device__ __forceinline__ uint32_t spread(uint32_t x, uint32_t width) {
    x = choose(0x0000ffff, x, x << ((16 - 4*width) & 31));
    x = choose(0x00ff00ff, x, x << ((8 - 2*width) & 31));
    return choose(0x0f0f0f0f, x, x << ((4 - width) & 31));
}

// component c of a set whose levels begin at `table`, a multiple of 256; bytes: parts of addresses
template <int N, int c>
__device__ __forceinline__ uint32_t look_up_level(uint32_t bytes, uint32_t table) {
    uint16_t x;
    asm("ld.shared.u16 %0, [%1 + %2];" : "=h"(x) : "r"(permute(bytes, table, 0x7650 | c/2)), "n"(32*N*c));
    return x;
}

// eight components; code: nibbles; group: in its set, times 0x10101010
template <int N>
__device__ __forceinline__ void decode_nibbles(uint32_t code, uint32_t table, uint32_t group, uint32_t (&x)[8]) {
    constexpr uint32_t LOW = 0x0e0e0e0e, HIGH = 0x10101010u*N;
    constexpr int      UP  = N == 8 ? 4 : 3; // to where a code's highest bit is N times 16
    static_assert(N == 4 || N == 8, "another address");
    const uint32_t even = (code << 1 & LOW) | (code << UP & HIGH) | group;
    const uint32_t odd  = (code >> 3 & LOW) | (code >> (4 - UP) & HIGH) | group;
    x[0] = look_up_level<N, 0>(even, table); x[1] = look_up_level<N, 1>(odd, table);
    x[2] = look_up_level<N, 2>(even, table); x[3] = look_up_level<N, 3>(odd, table);
    x[4] = look_up_level<N, 4>(even, table); x[5] = look_up_level<N, 5>(odd, table);
    x[6] = look_up_level<N, 6>(even, table); x[7] = look_up_level<N, 7>(odd, table);
}

// codes[n]: the nibbles of row n; x[c][0]: component c of rows 0 and 1; x[c][1]: of rows 2 and 3
template <int N>
__device__ __forceinline__ void decode_four(const uint32_t (&codes)[4], uint32_t table, uint32_t group, uint32_t (&x)[8][2]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        uint32_t y[2][8];
        decode_nibbles<N>(codes[2*n],     table, group, y[0]);
        decode_nibbles<N>(codes[2*n + 1], table, group, y[1]);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            x[c][n] = permute(y[0][c], y[1][c], 0x5410);
        }
    }
}

// Where a group of more than 4 bits has its levels among those of all that are wide, and whether there is room: their end in
// bytes. A whole warp asks; each thread for its group. widths: of D/8 groups, at most 32
__device__ __forceinline__ int get_wide_end(const uint8_t * widths, int group) {
    const int lane  = threadIdx.x % 32;
    const int width = widths[lane];
    int end = width > 4 ? 16 << width : 0;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        const int before = __shfl_up_sync(0xffffffff, end, i);
        end += lane >= i ? before : 0;
    }
    return __shfl_sync(0xffffffff, end, group);
}

// by n threads
__device__ __forceinline__ void copy_levels(uint8_t * to, const half * levels, int width, int thread, int n) {
    for (int i = thread; i < 1 << width; i += n) {
        ((uint4 *) to)[i] = ((const uint4 *) levels)[i];
    }
}

// component c of row n becomes half c of y
__device__ __forceinline__ void set_row(uint32_t (&x)[8][2], int n, const uint4 & y) {
    const uint32_t from[4] = { y.x, y.y, y.z, y.w };
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        x[c][n/2] = permute(x[c][n/2], from[c/2], n%2 == 0 ? (c%2 == 0 ? 0x3254 : 0x3276) : (c%2 == 0 ? 0x5410 : 0x7610));
    }
}

// eight codes of more than 4 bits, whose levels may lie anywhere
__device__ __forceinline__ uint4 look_up_wide(const uint8_t * row, const pair_code & code, const half * levels) {
    const uint32_t * word = (const uint32_t *) (row + code.word);
    uint32_t lo = __funnelshift_r(word[0], word[1], code.shift);
    uint32_t hi = __funnelshift_r(word[1], word[2], code.shift);
    const uint32_t w = get_width<256>(code.shift);
    uint32_t x[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        x[c] = __half_as_ushort((levels + (c << w))[lo & ((1u << w) - 1)]);
        lo = __funnelshift_r(lo, hi, w);
        hi >>= w;
    }
    return make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
}

} // namespace kvtc
