#include "tile.h"

#include "simd.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvtc {

namespace {

template <int w, int i>
void load_component(const float * table, vi low, vi high, vf gain, float * z) {
    constexpr int  T     = w <= 4 ? 16 : 1 << w;
    constexpr bool first = (i + 1)*w <= 32;
    const vi code = shift_right<first ? i*w : i*w - 8*(w - 4)>(first ? low : high);
    store(z + i*TILE, mul(gain, lookup<w>(table + i*T, code)));
}

// low: from the group's first bit on; high: its last 32 bits, for widths above 4
template <int w, int... i>
void load_group(const float * table, vi low, vi high, vf gain, float * z, std::integer_sequence<int, i...>) {
    (load_component<w, i>(table, low, high, gain, z), ...);
}

template <int w>
void load_group(const float * table, vi low, vi high, vf gain, float * z) {
    load_group<w>(table, low, high, gain, z, std::make_integer_sequence<int, GGML_KVTC_GROUP>());
}

// the gains of turbo rows in the low halves
vf from_f16(vi bits) {
    int32_t half[W];
    float   value[W];
    memcpy(half, &bits, sizeof(half));
    for (int l = 0; l < W; ++l) {
        value[l] = GGML_CPU_FP16_TO_FP32(ggml_kvtc_gain_bits((uint32_t) half[l]));
    }
    return load(value);
}

// rows of less than a piece, one after the other
void load_group_bytes(const uint8_t * codes, int w, const float * table, float gain, float * z) {
    const int T = std::max(16, 1 << w);
    uint64_t word = 0;
    for (int i = 0; i < w; ++i) {
        word |= (uint64_t) codes[i] << (8*i);
    }
    for (int i = 0; i < GGML_KVTC_GROUP; ++i) {
        z[i*TILE] = gain*table[i*T + (int) ((word >> (i*w)) & ((1u << w) - 1))];
    }
}

// The bytes of W rows from `start` on, in words of 32 bits. They are read in pieces, which a processor moves to words sooner than it
// gathers these; rows are not read past their end.
struct row_words {
    static constexpr int PIECE = 16;
    static constexpr int WORDS = GGML_KVTC_MAX_DIM/4 + 8; // 8 bits a component and a gain

    vi  word[WORDS];
    int start;

    row_words(const uint8_t * rows, const int32_t * offsets, int start, int end, int row_bytes) : start(start) {
        vi * to = word;
        for (int at = start; at < end; at += PIECE, to += PIECE/4) {
            const int from = std::min(at, row_bytes - PIECE);
            vi piece[PIECE/4 + 1] = {};
            load_pieces(rows + from, offsets, piece);
            const int skip  = (at - from)/4;
            const int shift = 8*((at - from)%4);
            for (int i = 0; i < PIECE/4; ++i) {
                if (from == at) {
                    to[i] = piece[i];
                } else if (i + skip < PIECE/4) {
                    to[i] = shift > 0 ? bit_or(shift_right(piece[i + skip], shift), shift_left(piece[i + skip + 1], 32 - shift)) : piece[i + skip];
                }
            }
        }
    }

    // n <= 4 bytes from byte `at` of the row on; what lies above them is not defined
    vi get(int at, int n) const {
        const int i     = (at - start)/4;
        const int shift = 8*((at - start)%4);
        if (shift == 0) {
            return word[i];
        }
        const vi low = shift_right(word[i], shift);
        return shift + 8*n > 32 ? bit_or(low, shift_left(word[i + 1], 32 - shift)) : low;
    }
};

void load_codes(const void * pack, const ggml_kvtc_pack_side & side, const ggml_kvtc_pack_head & head, int n,
                const uint8_t * first_row, size_t stride, float * z) {
    const auto * widths = (const uint8_t *)  ggml_kvtc_pack_at(pack, head.widths);
    const auto * bytes  = (const uint32_t *) ggml_kvtc_pack_at(pack, head.bytes);
    const auto * tables = (const uint32_t *) ggml_kvtc_pack_at(pack, head.table);
    const auto * gains  = (const float *)    ggml_kvtc_pack_at(pack, head.gains);
    const int    G      = (int) side.d/GGML_KVTC_GROUP;

    if (side.row_bytes < row_words::PIECE) {
        std::fill(z, z + head.rank*TILE, 0.0f);
        for (int j = 0; j < n; ++j) {
            const uint8_t * row  = first_row + j*stride;
            const uint8_t * at   = row + head.payload;
            const float     gain = head.f16_gain ? GGML_CPU_FP16_TO_FP32(ggml_kvtc_gain_bits((uint32_t) at[0] | (uint32_t) at[1] << 8)) : gains[at[0]];
            for (int g = 0; g < G && widths[g] > 0; ++g) {
                load_group_bytes(row + bytes[g], widths[g], (const float *) ggml_kvtc_pack_at(pack, tables[g]), gain, z + g*GGML_KVTC_GROUP*TILE + j);
            }
        }
        return;
    }

    // the next tile's codes come while this one is worked on
    uint32_t end = bytes[0];
    for (int g = 0; g < G && widths[g] > 0; ++g) {
        end = bytes[g] + widths[g];
    }
    for (int j = TILE; j < 2*TILE; ++j) {
        prefetch(first_row + j*stride + bytes[0]);
        prefetch(first_row + j*stride + end - 1);
    }
    const int start = (int) (head.f16_gain ? bytes[0] : head.payload); // turbo gains lie behind the codes of all heads
    alignas(64) int32_t offsets[TILE];
    for (int j = 0; j < TILE; ++j) {
        offsets[j] = (int32_t) (std::min(j, n - 1)*stride);
    }
    for (int v = 0; v < TILE; v += W) {
        const row_words words(first_row, offsets + v, start, (int) end, (int) side.row_bytes);
        vf gain;
        if (head.f16_gain) {
            const uint32_t at = std::min(head.payload, side.row_bytes - 4);
            gain = from_f16(shift_right(gather_bytes(first_row + at, iload(offsets + v)), 8*(int) (head.payload - at)));
        } else {
            gain = lookup<8>(gains, words.get((int) head.payload, 1));
        }
        for (int g = 0; g < G && widths[g] > 0; ++g) {
            const int w = widths[g];
            const vi low  = words.get((int) bytes[g], std::min(w, 4));
            const vi high = w > 4 ? words.get((int) bytes[g] + w - 4, 4) : low;
            const float * table = (const float *) ggml_kvtc_pack_at(pack, tables[g]);
            float       * out   = z + g*GGML_KVTC_GROUP*TILE + v;
            switch (w) {
                case 1: load_group<1>(table, low, high, gain, out); break;
                case 2: load_group<2>(table, low, high, gain, out); break;
                case 3: load_group<3>(table, low, high, gain, out); break;
                case 4: load_group<4>(table, low, high, gain, out); break;
                case 5: load_group<5>(table, low, high, gain, out); break;
                case 6: load_group<6>(table, low, high, gain, out); break;
                case 8: load_group<8>(table, low, high, gain, out); break;
                default: break;
            }
        }
    }
}

// what a batch's own z would be after a visit to the exact store: decode and batched paths see the same numbers
float through_f16(float x) {
    return GGML_CPU_FP16_TO_FP32(GGML_CPU_FP32_TO_FP16(x));
}

void transpose_8x8(const float * src, int ld_src, float * dst, int ld_dst) {
#if defined(__AVX2__)
    __m256 a[8];
    __m256 b[8];
    for (int i = 0; i < 8; ++i) {
        a[i] = _mm256_loadu_ps(src + (size_t) i*ld_src);
    }
    for (int i = 0; i < 8; i += 2) {
        b[i]     = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i]     = _mm256_shuffle_ps(b[i],     b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i],     b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(dst + (size_t) i*ld_dst,       _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(dst + (size_t) (i + 4)*ld_dst, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; ++i) {
        for (int j = 0; j < 8; ++j) {
            dst[(size_t) j*ld_dst + i] = src[(size_t) i*ld_src + j];
        }
    }
#endif
}

// an exact row as f32
void exact_row(const exact_source & exact, int32_t slot, int d, float * out) {
    if (slot >= 0) {
        ggml_cpu_fp16_to_fp32(exact.store + slot*exact.stride, out, d);
        return;
    }
    const float * src = (const float *) (exact.batch - (slot + 2)*(int64_t) exact.batch_nb);
    for (int c = 0; c < d; ++c) {
        out[c] = through_f16(src[c]);
    }
}

} // namespace

int load_components(const void * pack, ggml_kvtc_side which, int h, const tile_cells & cells,
                    const uint8_t * rows, size_t row_stride, const exact_source & exact, float * z) {
    const ggml_kvtc_pack_side & side = ((const ggml_kvtc_pack_header *) pack)->side[which];
    const ggml_kvtc_pack_head & head = *ggml_kvtc_pack_get_head(pack, which, h);
    const int d = (int) side.d;

    if (cells.coded) {
        load_codes(pack, side, head, cells.n, rows + cells.cell[0]*row_stride, row_stride, z);
    }
    if (!cells.exact) {
        return (int) head.rank;
    }
    const int known = cells.coded ? (int) head.rank : 0;
    std::fill(z + known*TILE, z + d*TILE, 0.0f);
    alignas(64) float rows8[8*GGML_KVTC_MAX_DIM];
    for (int j = 0; j < cells.n; j += 8) {
        const int n = std::min(8, cells.n - j);
        int found = 0;
        for (int i = 0; i < n; ++i) {
            if (cells.slot[j + i] != -1) {
                exact_row(exact, cells.slot[j + i], d, rows8 + (size_t) i*d);
                found++;
            }
        }
        if (found == 8) {
            for (int c = 0; c < d; c += 8) {
                transpose_8x8(rows8 + c, d, z + (size_t) c*TILE + j, TILE);
            }
            continue;
        }
        for (int i = 0; found > 0 && i < n; ++i) {
            for (int c = 0; cells.slot[j + i] != -1 && c < d; ++c) {
                z[c*TILE + j + i] = rows8[i*d + c];
            }
        }
    }
    return d;
}

void transpose_tile(const float * src, int rows, float * dst, int ld) {
    for (int r = 0; r < rows; r += 8) { // rows is a multiple of 8: head dimensions are
        for (int j = 0; j < TILE; j += 8) {
            transpose_8x8(src + r*TILE + j, TILE, dst + (size_t) j*ld + r, ld);
        }
    }
}

} // namespace kvtc
