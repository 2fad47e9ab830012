// Codes to coefficients. Each block makes the tables of its kv head in shared memory, in the order its mma operands want.
//
//   K: thread q of a quad decodes components 4q … 4q+3 of every 16, that is half a group. Groups of up to 3 bits have tables of
//      two neighbouring components at once (4^w words of two f16 for each pair), wider ones 8 tables of 2^w f16.
//   V: thread r of 8 decodes component r of every group. Entry `code` of component r is word code*8*rep + r*rep + (0 … rep-1) of
//      the group's table: with rep = 4 every thread of a warp reads a bank of its own, whatever the codes are.
#pragma once

#include "device.cuh"

namespace kvtc {

struct group_code {
    uint32_t bits;  // first bit, from the start of a staged row; width << 16
    uint32_t table; // byte offset of its table
};

__device__ __forceinline__ uint32_t key_table_bytes(int w) {
    return w == 0 ? 0 : w <= 3 ? 4*4u << 2*w : 8*2u << w;
}

// descriptors of half groups [d/8][2] and tables; every thread of the block takes part, the caller synchronizes
__device__ __forceinline__ void make_key_tables(const char * pack, const ggml_kvtc_cuda_head & head, int d, int skew, group_code * codes, uint8_t * tables) {
    const auto * widths    = at<uint8_t> (pack, head.widths);
    const auto * bits      = at<uint32_t>(pack, head.bits);
    const auto * levels_at = at<uint32_t>(pack, head.levels_at);
    const auto * levels    = at<half>    (pack, head.levels);
    uint32_t offset = 0;
    for (int g = 0; g < d/8; ++g) {
        const int w = widths[g];
        const half * level = levels + levels_at[g];
        if (threadIdx.x < 2) {
            codes[2*g + threadIdx.x] = { (bits[g] + 8*skew + 4*w*threadIdx.x) | (uint32_t) w << 16, offset + threadIdx.x*key_table_bytes(w)/2 };
        }
        if (w > 3) {
            for (int i = threadIdx.x; i < 8 << w; i += blockDim.x) {
                ((half *) (tables + offset))[i] = level[i];
            }
        } else if (w > 0) {
            const int n = 1 << w;
            for (int i = threadIdx.x; i < 4*n*n; i += blockDim.x) {
                const int pair = i/(n*n);
                ((half2 *) (tables + offset))[i] = __halves2half2(level[2*pair*n + i%n], level[(2*pair + 1)*n + i/n%n]);
            }
        }
        offset += key_table_bytes(w);
    }
}

// descriptors of groups [d/8] and tables
__device__ __forceinline__ void make_value_tables(const char * pack, const ggml_kvtc_cuda_head & head, int d, int skew, int rep, group_code * codes, uint8_t * tables) {
    const auto * widths    = at<uint8_t> (pack, head.widths);
    const auto * bits      = at<uint32_t>(pack, head.bits);
    const auto * levels_at = at<uint32_t>(pack, head.levels_at);
    const auto * levels    = at<half>    (pack, head.levels);
    uint32_t offset = 0;
    for (int g = 0; g < d/8; ++g) {
        const int w = widths[g];
        const half * level = levels + levels_at[g];
        if (threadIdx.x == 0) {
            codes[g] = { (bits[g] + 8*skew) | (uint32_t) w << 16, offset };
        }
        if (w > 0) {
            for (int i = threadIdx.x; i < 8*rep << w; i += blockDim.x) {
                ((uint32_t *) (tables + offset))[i] = __half_as_ushort(level[(i/rep%8 << w) + i/(8*rep)]);
            }
            offset += 32*rep << w;
        }
    }
}

__device__ __forceinline__ float get_gain(const ggml_kvtc_cuda_head & head, uint8_t code) {
    return code == 0 ? 0.0f : head.gain_base*exp2f((float) code/GGML_KVTC_GAIN_STEPS);
}

// four components of a key's row: lo holds the first two
__device__ __forceinline__ void decode_key(const uint8_t * row, const group_code & code, const uint8_t * tables, uint32_t & lo, uint32_t & hi) {
    const int w     = code.bits >> 16;
    const int byte  = (code.bits & 0xffff) >> 3;
    const int shift = code.bits & 7;
    if (w == 0) {
        lo = hi = 0;
    } else if (w <= 3) {
        uint32_t x = row[byte];
        if (w == 3) {
            x |= (uint32_t) row[byte + 1] << 8;
        }
        x >>= shift;
        const uint32_t   mask  = (1u << 2*w) - 1;
        const uint32_t * table = (const uint32_t *) (tables + code.table);
        lo = table[x & mask];
        hi = table[mask + 1 + (x >> 2*w & mask)];
    } else {
        uint32_t x = row[byte] | (uint32_t) row[byte + 1] << 8;
        if (w > 4) {
            x |= (uint32_t) row[byte + 2] << 16;
        }
        if (w > 6) {
            x |= (uint32_t) row[byte + 3] << 24;
        }
        x >>= shift;
        const uint32_t   mask  = (1u << w) - 1;
        const uint16_t * table = (const uint16_t *) (tables + code.table);
        lo = table[x & mask]                       | (uint32_t) table[(1 << w) + (x >> w & mask)] << 16;
        hi = table[(2 << w) + (x >> 2*w & mask)] | (uint32_t) table[(3 << w) + (x >> 3*w & mask)] << 16;
    }
}

} // namespace kvtc
