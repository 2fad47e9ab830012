// The write operation: transformed vectors to coded rows or to exact rows. README.md states the arithmetic; its numpy
// twin must give the same bytes, so sums run in f64 over 8 lanes and no product is rounded twice.
#include "kvtc-cpu.h"
#include "kvtc-pack.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr int LANES = GGML_KVTC_GROUP;

struct lane_sum {
    double lane[LANES] = {};

    double total() const {
        double sum = 0.0;
        for (double x : lane) {
            sum += x;
        }
        return sum;
    }
};

// codes and the levels they stand for, of 8 components at unit norm
void code_group(const float * unit, const float * bounds, const float * table, int w, uint8_t * codes, float * levels) {
    int32_t index[LANES] = {};
    const int n = (1 << w) - 1;
    for (int i = 0; i < n; ++i) {
        for (int l = 0; l < LANES; ++l) {
            index[l] += unit[l] > bounds[i*LANES + l] ? 1 : 0;
        }
    }
    const int t = std::max(16, 1 << w);
    for (int l = 0; l < LANES; ++l) {
        codes [l] = (uint8_t) index[l];
        levels[l] = table[l*t + index[l]];
    }
}

void pack_group(const uint8_t * codes, int w, uint8_t * out) {
    uint64_t word = 0;
    for (int l = 0; l < LANES; ++l) {
        word |= (uint64_t) codes[l] << (l*w);
    }
    for (int i = 0; i < w; ++i) {
        out[i] = (uint8_t) (word >> (8*i));
    }
}

void encode_head(const void * pack, const ggml_kvtc_pack_head & head, int d, const float * z, uint8_t * row) {
    const auto * inv_scale = (const float *)    ggml_kvtc_pack_at(pack, head.inv_scale);
    const auto * widths    = (const uint8_t *)  ggml_kvtc_pack_at(pack, head.widths);
    const auto * bytes     = (const uint32_t *) ggml_kvtc_pack_at(pack, head.bytes);
    const auto * table     = (const uint32_t *) ggml_kvtc_pack_at(pack, head.table);
    const auto * bounds    = (const uint32_t *) ggml_kvtc_pack_at(pack, head.bounds);
    const int G = d/LANES;

    lane_sum whitened;
    lane_sum power;
    for (int g = 0; g < G; ++g) {
        for (int l = 0; l < LANES; ++l) {
            const int   c = g*LANES + l;
            const float u = z[c]*inv_scale[c];
            whitened.lane[l] += (double) u*u;
            power.lane[l]    += (double) z[c]*z[c];
        }
    }
    const double norm = sqrt(whitened.total()/d);
    const bool   zero = !(norm >= 1e-9 && std::isfinite(norm));
    const float  inv  = zero ? 0.0f : (float) (1.0/norm);

    lane_sum dot;
    lane_sum self;
    for (int g = 0; g < G && widths[g] > 0; ++g) {
        uint8_t codes[LANES] = {};
        if (!zero) {
            float unit[LANES];
            float levels[LANES];
            for (int l = 0; l < LANES; ++l) {
                unit[l] = z[g*LANES + l]*inv;
            }
            code_group(unit, (const float *) ggml_kvtc_pack_at(pack, bounds[g]), (const float *) ggml_kvtc_pack_at(pack, table[g]),
                       widths[g], codes, levels);
            for (int l = 0; l < LANES; ++l) {
                dot.lane[l]  += (double) z[g*LANES + l]*levels[l];
                self.lane[l] += (double) levels[l]*levels[l];
            }
        }
        pack_group(codes, widths[g], row + bytes[g]);
    }

    double gain = 0.0;
    if (!zero) {
        if (head.keep_norm) {
            gain = self.total() > 0.0 ? sqrt(power.total()/self.total()) : 0.0;
        } else {
            gain = dot.total() > 0.0 ? power.total()/dot.total() : 0.0;
        }
    }
    if (head.f16_gain) {
        const ggml_fp16_t half = GGML_CPU_FP32_TO_FP16((float) std::min(gain, 65504.0));
        memcpy(row + head.payload, &half, sizeof(half));
        return;
    }
    uint8_t code = 0;
    if (gain > 0.0) {
        const double steps = nearbyint(GGML_KVTC_GAIN_STEPS*log2(gain/(double) head.gain_base));
        code = (uint8_t) std::min(255.0, std::max(1.0, steps));
    }
    row[head.payload] = code;
}

float get_gain(const void * pack, const ggml_kvtc_pack_head & head, const uint8_t * row) {
    if (head.f16_gain) {
        ggml_fp16_t half;
        memcpy(&half, row + head.payload, sizeof(half));
        return ggml_fp16_to_fp32(ggml_kvtc_gain_bits(half)); // not by the table that graphs have filled: this runs outside them, too
    }
    return ((const float *) ggml_kvtc_pack_at(pack, head.gains))[row[head.payload]];
}

void decode_head(const void * pack, const ggml_kvtc_pack_head & head, int d, const uint8_t * row, float * z) {
    const auto * widths = (const uint8_t *)  ggml_kvtc_pack_at(pack, head.widths);
    const auto * bytes  = (const uint32_t *) ggml_kvtc_pack_at(pack, head.bytes);
    const auto * table  = (const uint32_t *) ggml_kvtc_pack_at(pack, head.table);
    const float  gain   = get_gain(pack, head, row);

    memset(z, 0, (size_t) d*sizeof(float));
    for (int g = 0; g < d/LANES && widths[g] > 0; ++g) {
        const int     w = widths[g];
        const int     t = std::max(16, 1 << w);
        const float * levels = (const float *) ggml_kvtc_pack_at(pack, table[g]);
        uint64_t word = 0;
        for (int i = 0; i < w; ++i) {
            word |= (uint64_t) row[bytes[g] + i] << (8*i);
        }
        for (int l = 0; l < LANES; ++l) {
            z[g*LANES + l] = gain*levels[l*t + ((word >> (l*w)) & ((1u << w) - 1))];
        }
    }
}

// z: component 0 of head 0, heads head_stride bytes apart
void encode_row(const void * pack, ggml_kvtc_side which, const void * z, size_t head_stride, uint8_t * row) {
    const ggml_kvtc_pack_side & side = ((const ggml_kvtc_pack_header *) pack)->side[which];
    memset(row, 0, side.row_bytes); // the gaps between the heads: equal content must give equal rows
    for (uint32_t h = 0; h < side.n_head; ++h) {
        encode_head(pack, *ggml_kvtc_pack_get_head(pack, which, (int) h), (int) side.d, (const float *) ((const char *) z + h*head_stride), row);
    }
}

} // namespace

void ggml_kvtc_cpu_encode(const void * pack, ggml_kvtc_side which, int64_t n, const float * z, uint8_t * rows) {
    const ggml_kvtc_pack_side & side = ((const ggml_kvtc_pack_header *) pack)->side[which];
    for (int64_t i = 0; i < n; ++i) {
        encode_row(pack, which, z + i*side.n_head*side.d, side.d*sizeof(float), rows + i*side.row_bytes);
    }
}

void ggml_kvtc_cpu_decode(const void * pack, ggml_kvtc_side which, int64_t n, const uint8_t * rows, float * z) {
    const ggml_kvtc_pack_side & side = ((const ggml_kvtc_pack_header *) pack)->side[which];
    for (int64_t i = 0; i < n; ++i) {
        for (uint32_t h = 0; h < side.n_head; ++h) {
            decode_head(pack, *ggml_kvtc_pack_get_head(pack, which, (int) h), (int) side.d, rows + i*side.row_bytes, z + (i*side.n_head + h)*side.d);
        }
    }
}

void ggml_compute_forward_kvtc_set_rows(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * z    = dst->src[1];
    const ggml_tensor * idxs = dst->src[2];
    const void        * pack = ggml_kvtc_pack_find(dst->src[3]->data);
    const auto         which = (ggml_kvtc_side) ggml_get_op_params_i32(dst, 0);

    const int64_t n_tokens = z->ne[1];
    const bool    coded    = ggml_kvtc_is_type(dst->type);

    for (int64_t t = params->ith; t < n_tokens; t += params->nth) {
        const int64_t row = ((const int64_t *) idxs->data)[t];
        if (row < 0) {
            continue;
        }
        const char * src = (const char *) z->data + t*z->nb[1];
        if (coded) {
            GGML_ASSERT(row < ggml_nrows(dst));
            encode_row(pack, which, src, z->nb[2], (uint8_t *) dst->data + row*dst->nb[1]);
        } else {
            GGML_ASSERT(row < dst->ne[1]);
            for (int64_t h = 0; h < z->ne[2]; ++h) {
                ggml_cpu_fp32_to_fp16((const float *) (src + h*z->nb[2]), (ggml_fp16_t *) ((char *) dst->data + row*dst->nb[1] + h*dst->nb[2]), z->ne[0]);
            }
        }
    }
}

bool ggml_kvtc_cpu_supports_op(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_KVTC_SET_ROWS:
        case GGML_OP_KVTC_ATTN:
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        default:
            break;
    }
    if (ggml_kvtc_is_type(op->type)) {
        return false;
    }
    for (const ggml_tensor * src : op->src) {
        if (src && ggml_kvtc_is_type(src->type)) {
            return false;
        }
    }
    return true;
}
