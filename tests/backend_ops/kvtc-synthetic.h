// Random calibrations and the packs made from them, for tests that have no calibration file.
#pragma once

#include "kvtc-calibration.h"
#include "kvtc-pack.h"

#include "ggml.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

namespace kvtc_test {

using rng_t = std::mt19937;

inline float normal(rng_t & rng) {
    return std::normal_distribution<float>(0.0f, 1.0f)(rng);
}

// a number that f16 holds, as everything does that a calibration file keeps in f16
inline float as_f16(float x) {
    return ggml_fp16_to_fp32(ggml_fp32_to_fp16(x));
}

// Widths that fill a row's budget: bits go where they save most, so heads differ and widths never rise along the groups.
inline void allocate_widths(ggml_kvtc_side_calibration & side, int bits, int budget, int n_budgets) {
    const int G = side.d/8;
    std::vector<int> width((size_t) side.H*G, 0);

    const auto row_size = [&]() {
        int size = 0;
        for (int h = 0; h < side.H; ++h) {
            size = (size + 3)/4*4 + 1;
            for (int g = 0; g < G; ++g) {
                size += width[h*G + g];
            }
        }
        return size;
    };
    std::vector<bool> done(width.size(), false); // the next step of its width does not fit
    for (;;) {
        int   best  = -1;
        float saved = 0.0f;
        for (int h = 0; h < side.H; ++h) {
            for (int g = 0; g < G; ++g) {
                const int i = h*G + g;
                // a later group waits for the one before it
                if (done[i] || width[i] == 8 || (g > 0 && width[i] >= width[i - 1])) {
                    continue;
                }
                const float scale = side.scale[(size_t) h*side.d + g*8];
                const float saves = (1.0f + 0.5f*h)*scale*scale*std::pow(0.25f, (float) width[i]);
                if (saves > saved) {
                    saved = saves;
                    best  = i;
                }
            }
        }
        if (best < 0) {
            break;
        }
        const int before = width[best];
        width[best] = before == 6 ? 8 : before + 1;
        if (row_size() > side.H*side.d*bits/8) {
            width[best] = before;
            done [best] = true;
        }
    }
    for (int h = 0; h < side.H; ++h) {
        for (int g = 0; g < G; ++g) {
            side.widths[((size_t) h*n_budgets + budget)*G + g] = (int8_t) width[h*G + g];
        }
    }
}

inline ggml_kvtc_side_calibration make_side(rng_t & rng, int H, int d, bool keep_norm, const std::vector<int> & bits) {
    const int G = d/8;
    ggml_kvtc_side_calibration side;
    side.H = H;
    side.d = d;
    side.bits = bits;
    side.mean  .resize((size_t) H*d);
    side.scale .resize((size_t) H*d);
    side.decode.resize((size_t) H*d*d);
    side.widths.resize((size_t) H*bits.size()*G);
    side.book  .assign((size_t) H*G*9, -1);
    for (int h = 0; h < H; ++h) {
        // standard deviations that fall by another rate in every head; their squares average 1
        float total = 0.0f;
        for (int c = 0; c < d; ++c) {
            float & scale = side.scale[(size_t) h*d + c];
            scale  = std::exp(-(2.0f + h)*(c/8*8)/d);
            total += scale*scale;
        }
        for (int c = 0; c < d; ++c) {
            side.scale[(size_t) h*d + c] *= std::sqrt(d/total);
            side.mean [(size_t) h*d + c]  = 0.03f*normal(rng);
        }
        // gain codes around 64 stand for 1
        side.gain.push_back(0.25f*(1.0f + 0.1f*h));
        side.gain.push_back(keep_norm ? 1.0f : 0.0f);
        for (int i = 0; i < d*d; ++i) {
            side.decode[(size_t) h*d*d + i] = as_f16(normal(rng)/std::sqrt((float) d));
        }
        for (int g = 0; g < G; ++g) {
            for (int w : KVTC_WIDTHS) {
                if (w == 0) {
                    continue;
                }
                side.book[((size_t) h*G + g)*9 + w] = (int64_t) side.levels.size();
                for (int c = 0; c < 8; ++c) {
                    std::vector<float> levels(1 << w);
                    // around 0, as codes of random rows are: sums over many tokens stay small, and a single wrong one shows
                    for (size_t i = 0; i < levels.size(); i += 2) {
                        levels[i]     = as_f16(1.2f*side.scale[(size_t) h*d + g*8 + c]*normal(rng));
                        levels[i + 1] = -levels[i];
                    }
                    std::sort(levels.begin(), levels.end());
                    side.levels.insert(side.levels.end(), levels.begin(), levels.end());
                }
            }
        }
    }
    for (size_t i = 0; i < bits.size(); ++i) {
        allocate_widths(side, bits[i], (int) i, (int) bits.size());
    }
    return side;
}

// One layer, all budgets; made once for each shape.
inline const ggml_kvtc_calibration & get_calibration(int H, int d) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, std::unique_ptr<ggml_kvtc_calibration>> made;
    std::lock_guard<std::mutex> guard(mutex);
    auto & cal = made[{ H, d }];
    if (!cal) {
        rng_t rng(1000*H + d);
        cal = std::make_unique<ggml_kvtc_calibration>();
        cal->bits = { 1, 2, 3, 4, 5, 6 };
        cal->layers[GGML_KVTC_K][0] = make_side(rng, H, d, false, cal->bits);
        cal->layers[GGML_KVTC_V][0] = make_side(rng, H, d, true,  cal->bits);
    }
    return *cal;
}

inline const ggml_kvtc_side_calibration & get_side(int H, int d, int side) {
    return get_calibration(H, d).layers[side].at(0);
}

// What a side of a case is: 1 to 6 for kvtc's types, or one of these.
enum kind { TURBO2 = 12, TURBO3, TURBO4, PLAIN_F16 = 20, PLAIN_Q8_0 };

inline ggml_type get_type(int kind) {
    return kind == PLAIN_F16 ? GGML_TYPE_F16 : kind == PLAIN_Q8_0 ? GGML_TYPE_Q8_0 :
        (ggml_type) (kind >= TURBO2 ? GGML_TYPE_TURBO2 + kind - TURBO2 : GGML_TYPE_KVTC1 + kind - 1);
}

inline bool is_coded(int kind) {
    return kind < PLAIN_F16;
}

// of one layer's row
inline size_t get_row_bytes(int kind, int H, int d) {
    return ggml_row_size(get_type(kind), ggml_kvtc_row_values(get_type(kind), H, d));
}

// A pack for the CPU and, behind it at the next multiple of 64, one for CUDA devices: the same graph runs on two backends with
// the same bytes, and each finds its own.
struct universal_pack {
    std::vector<uint8_t> bytes;
    int32_t limits[GGML_KVTC_N_LIMITS];

    // rope: of keys of kvtc's types
    universal_pack(int H, int d, int kind_k, int kind_v, const ggml_kvtc_rope * rope) {
        ggml_kvtc_calibration cal = get_calibration(H, d);
        for (int side = 0; side < 2; ++side) {
            const ggml_type type = get_type(side == GGML_KVTC_K ? kind_k : kind_v);
            if (ggml_kvtc_is_turbo(type)) {
                ggml_kvtc_calibration_set_turbo(&cal, 0, (ggml_kvtc_side) side, type, H, d);
            }
        }
        const int bits_k = ggml_kvtc_type_bits(get_type(kind_k));
        const int bits_v = ggml_kvtc_type_bits(get_type(kind_v));
        const size_t at = ggml_kvtc_cuda_pack_size(&cal, 0, bits_k, bits_v); // a multiple of 64
        bytes.resize(at + ggml_kvtc_pack_size(&cal, 0, bits_k, bits_v));
        ggml_kvtc_cuda_pack_write(&cal, 0, bits_k, bits_v, bytes.data());
        ggml_kvtc_pack_write     (&cal, 0, bits_k, bits_v, bytes.data() + at);
        if (rope && kind_k < TURBO2) {
            ggml_kvtc_cuda_pack_set_rope(bytes.data(),      rope);
            ggml_kvtc_pack_set_rope     (bytes.data() + at, rope);
        }
        ggml_kvtc_cuda_pack_limits(bytes.data(), limits);
    }

    // The largest gains in row i of a turbo side: what nobody sees must not become infinity.
    void set_largest_gains(ggml_kvtc_side side, size_t i, std::vector<uint8_t> & rows) const {
        const void * pack   = ggml_kvtc_pack_find(bytes.data());
        const auto & layout = ((const ggml_kvtc_pack_header *) pack)->side[side];
        for (uint32_t h = 0; h < layout.n_head; ++h) {
            const ggml_kvtc_pack_head & head = *ggml_kvtc_pack_get_head(pack, side, (int) h);
            const ggml_fp16_t largest = 0x7bff;
            if (head.f16_gain) {
                memcpy(&rows[i*layout.row_bytes + head.payload], &largest, sizeof(largest));
            }
        }
    }

    // Rows of random codes. Gains stay near 1 or are 0, so that no single token takes all of the attention; the bytes that no
    // head owns are random as well. Turbo gains may be what only a damaged state holds.
    std::vector<uint8_t> random_rows(rng_t & rng, ggml_kvtc_side side, size_t n) const {
        const void * pack   = ggml_kvtc_pack_find(bytes.data());
        const auto & layout = ((const ggml_kvtc_pack_header *) pack)->side[side];
        std::vector<uint8_t> rows(n*layout.row_bytes);
        for (uint8_t & byte : rows) {
            byte = (uint8_t) rng();
        }
        for (size_t i = 0; i < n; ++i) {
            for (uint32_t h = 0; h < layout.n_head; ++h) {
                const ggml_kvtc_pack_head & head = *ggml_kvtc_pack_get_head(pack, side, (int) h);
                uint8_t * to = &rows[i*layout.row_bytes + head.payload];
                if (head.f16_gain) {
                    const uint32_t odd  = rng() % 32;
                    const float    gain = odd == 0 ? INFINITY : odd == 1 ? NAN : odd == 2 ? 0.0f : 0.75f + rng() % 64/128.0f;
                    const ggml_fp16_t half = ggml_fp32_to_fp16(gain);
                    memcpy(to, &half, sizeof(half));
                } else {
                    *to = (uint8_t) (rng() % 16 == 0 ? 0 : 48 + rng() % 32);
                }
            }
        }
        return rows;
    }
};

// Rows of an ordinary type.
inline std::vector<uint8_t> plain_rows(rng_t & rng, int kind, int H, int d, size_t n) {
    std::vector<uint8_t> rows(n*get_row_bytes(kind, H, d));
    if (kind == PLAIN_F16) {
        for (size_t i = 0; i < rows.size(); i += sizeof(ggml_fp16_t)) {
            const ggml_fp16_t half = ggml_fp32_to_fp16(normal(rng));
            memcpy(&rows[i], &half, sizeof(half));
        }
        return rows;
    }
    const size_t block = ggml_type_size(GGML_TYPE_Q8_0);
    for (size_t i = 0; i < rows.size(); ++i) {
        rows[i] = (uint8_t) rng();
        if (i % block < sizeof(ggml_fp16_t)) { // the scale
            const ggml_fp16_t half = ggml_fp32_to_fp16(0.01f*(1 + i/block % 3));
            rows[i] = (uint8_t) (half >> 8*(i % block));
        }
    }
    return rows;
}

} // namespace kvtc_test
