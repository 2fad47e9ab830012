// Writes packs: the plans of one layer, laid out for the CPU kernels (kvtc-pack.h).
#include "kvtc-calibration.h"
#include "kvtc-bump.h"
#include "kvtc-pack.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

size_t table_size(int w) {
    return (size_t) std::max(16, 1 << w);
}

void put_codebook(ggml_kvtc_bump & out, const ggml_kvtc_side_calibration & side, int h, int g, int w, uint32_t & table_at, uint32_t & bounds_at) {
    const int    n = 1 << w;
    const size_t t = table_size(w);
    float * table;
    float * bounds;
    table_at  = out.put(8*t, &table);
    bounds_at = out.put((size_t) (n - 1)*8, &bounds);
    if (!out.base) {
        return;
    }
    const float * levels = &side.levels[side.book_start(h, g, w)];
    for (int c = 0; c < 8; ++c) {
        for (size_t i = 0; i < t; ++i) {
            table[c*t + i] = levels[c*n + (int) i % n]; // repeated, so that a lookup may ignore the bits above the code
        }
        for (int i = 0; i + 1 < n; ++i) {
            bounds[i*8 + c] = (levels[c*n + i] + levels[c*n + i + 1])*0.5f;
        }
    }
}

void put_head(ggml_kvtc_bump & out, const ggml_kvtc_side_calibration & side, ggml_kvtc_side which, int h, int budget,
              ggml_kvtc_place place, ggml_kvtc_pack_head * head) {
    const int d  = side.d;
    const int dp = GGML_KVTC_PADDED(d);
    const int G  = d/8;
    const int8_t * w = side.group_widths(h, budget);

    uint8_t * widths; uint32_t * bytes; uint32_t * table; uint32_t * bounds;
    float * inv_scale; float * gains; float * mean; float * decode;
    ggml_kvtc_pack_head tmp;
    tmp.payload   = place.gain;
    tmp.f16_gain  = side.turbo;
    tmp.rank      = 0;
    tmp.gain_base = side.gain[2*h];
    tmp.keep_norm = side.gain[2*h + 1] != 0.0f;
    tmp.widths    = out.put(G, &widths);
    tmp.bytes     = out.put(G, &bytes);
    tmp.table     = out.put(G, &table);
    tmp.bounds    = out.put(G, &bounds);
    tmp.inv_scale = out.put(d, &inv_scale);
    tmp.gains     = out.put(256, &gains);
    tmp.mean      = out.put(dp, &mean);
    tmp.decode    = out.put((size_t) d*dp, &decode);

    uint32_t at = place.codes;
    for (int g = 0; g < G; ++g) {
        uint32_t table_at = 0;
        uint32_t bounds_at = 0;
        if (w[g] > 0) {
            tmp.rank = 8*(g + 1);
            put_codebook(out, side, h, g, w[g], table_at, bounds_at);
        }
        if (out.base) {
            widths[g] = (uint8_t) w[g];
            bytes [g] = at;
            table [g] = table_at;
            bounds[g] = bounds_at;
        }
        at += w[g];
    }
    if (!out.base) {
        return;
    }
    *head = tmp;

    const float * scale = &side.scale[(size_t) h*d];
    const float   floor = 1e-3f**std::max_element(scale, scale + d);
    for (int c = 0; c < d; ++c) {
        inv_scale[c] = 1.0f/std::max(scale[c], floor);
    }
    gains[0] = 0.0f;
    for (int i = 1; i < 256; ++i) {
        gains[i] = (float) ((double) tmp.gain_base*std::exp2((double) i/GGML_KVTC_GAIN_STEPS));
    }
    for (int i = 0; i < d; ++i) {
        mean[i] = side.mean[(size_t) h*d + i];
        for (int c = 0; c < d; ++c) {
            const float x = side.decode[((size_t) h*d + i)*d + c];
            decode[which == GGML_KVTC_K ? (size_t) i*dp + c : (size_t) c*dp + i] = x;
        }
    }
}

void put_side(ggml_kvtc_bump & out, const ggml_kvtc_calibration & cal, int il, ggml_kvtc_side which, int bits, ggml_kvtc_pack_header * header) {
    if (bits == 0) {
        return;
    }
    const ggml_kvtc_side_calibration & side = *cal.find(il, which);
    const int budget = side.budget_index(bits);
    const std::vector<ggml_kvtc_place> places = side.places(budget);

    ggml_kvtc_pack_head * heads;
    const uint32_t heads_at = out.put(side.H, &heads);
    for (int h = 0; h < side.H; ++h) {
        put_head(out, side, which, h, budget, places[h], heads ? &heads[h] : nullptr);
    }
    if (header) {
        header->side[which] = { (uint32_t) bits, (uint32_t) side.H, (uint32_t) side.d, side.row_bytes(bits), heads_at };
    }
}

size_t put_pack(const ggml_kvtc_calibration & cal, int il, int bits_k, int bits_v, char * base) {
    ggml_kvtc_bump out { base };
    ggml_kvtc_pack_header * header;
    out.put(1, &header);
    put_side(out, cal, il, GGML_KVTC_K, bits_k, header);
    put_side(out, cal, il, GGML_KVTC_V, bits_v, header);

    if (bits_k > 0) {
        const size_t n = (size_t) cal.find(il, GGML_KVTC_K)->d/2*GGML_KVTC_ROPE_STEP; // room for n_rot = head_dim
        for (int i = 0; i < 2; ++i) {
            const uint32_t fine = out.reserve(n*sizeof(float));
            if (header) {
                header->rope_fine[i] = fine;
            }
            for (int l = 0; l < GGML_KVTC_ROPE_LEVELS; ++l) {
                const uint32_t level = out.reserve(n*sizeof(float));
                if (header) {
                    header->rope_base[l][i] = level;
                }
            }
        }
    }
    const size_t size = (out.used + 63)/64*64;
    if (header) {
        header->magic     = GGML_KVTC_PACK_MAGIC;
        header->version   = GGML_KVTC_VERSION;
        header->size      = size;
        header->rope_type = GGML_KVTC_ROPE_NONE;
    }
    return size;
}

} // namespace

uint32_t ggml_kvtc_side_calibration::head_bytes(int h, int budget) const {
    uint32_t n = turbo ? sizeof(ggml_fp16_t) : 1;
    for (int g = 0; g < d/8; ++g) {
        n += group_widths(h, budget)[g];
    }
    return n;
}

uint32_t ggml_kvtc_side_calibration::row_bytes(int b) const {
    const ggml_type type = (ggml_type) ((turbo ? GGML_TYPE_TURBO2 - 2 : GGML_TYPE_KVTC1 - 1) + b);
    return (uint32_t) ggml_row_size(type, ggml_kvtc_row_values(type, H, d));
}

std::vector<ggml_kvtc_place> ggml_kvtc_side_calibration::places(int budget) const {
    std::vector<ggml_kvtc_place> result;
    uint32_t at = 0;
    for (int h = 0; h < H; ++h) {
        if (turbo) { // every head has as many codes
            const uint32_t codes = (uint32_t) (d*bits[budget]/8);
            result.push_back({ H*codes + h*(uint32_t) sizeof(ggml_fp16_t), h*codes });
        } else {
            result.push_back({ at, at + 1 });
            at = (at + head_bytes(h, budget) + 3)/4*4;
        }
    }
    return result;
}

size_t ggml_kvtc_pack_size(const ggml_kvtc_calibration * cal, int il, int bits_k, int bits_v) {
    return put_pack(*cal, il, bits_k, bits_v, nullptr);
}

void ggml_kvtc_pack_write(const ggml_kvtc_calibration * cal, int il, int bits_k, int bits_v, void * pack) {
    memset(pack, 0, ggml_kvtc_pack_size(cal, il, bits_k, bits_v)); // the paddings count as zero
    put_pack(*cal, il, bits_k, bits_v, (char *) pack);
}

void ggml_kvtc_pack_set_rope(void * pack, const ggml_kvtc_rope * rope) {
    auto * header = (ggml_kvtc_pack_header *) pack;
    GGML_ASSERT(header->magic == GGML_KVTC_PACK_MAGIC);
    GGML_ASSERT(rope->n_rot % 2 == 0 && rope->n_rot <= (int) header->side[GGML_KVTC_K].d);

    header->rope_type   = rope->type;
    header->rope_n_rot  = (uint32_t) rope->n_rot;
    header->rope_mscale = rope->mscale;
    if (rope->type == GGML_KVTC_ROPE_NONE) {
        return;
    }
    const int P = rope->n_rot/2;
    for (int l = 0; l < GGML_KVTC_ROPE_LEVELS; ++l) {
        const double step = std::pow((double) GGML_KVTC_ROPE_STEP, l);
        for (int digit = 0; digit < GGML_KVTC_ROPE_STEP; ++digit) {
            for (int p = 0; p < P; ++p) {
                const double angle = digit*step*rope->inv_freq[p];
                const double value[2] = { std::cos(angle), std::sin(angle) };
                for (int i = 0; i < 2; ++i) {
                    ((float *) ((char *) pack + header->rope_base[l][i]))[digit*P + p] = (float) value[i];
                    if (l == 0) {
                        ((float *) ((char *) pack + header->rope_fine[i]))[p*GGML_KVTC_ROPE_STEP + digit] = (float) (value[i]*rope->mscale);
                    }
                }
            }
        }
    }
}

bool ggml_kvtc_rope_from_params(const int32_t * op_params, const float * freq_factors, ggml_kvtc_rope * rope) {
    const int n_rot      = op_params[1];
    const int mode       = op_params[2];
    const int n_ctx_orig = op_params[4];
    const int offset     = op_params[15];
    float f[6]; // freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow
    memcpy(f, op_params + 5, sizeof(f));

    if ((mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) || offset != 0 ||
            n_rot < 2 || n_rot % 2 != 0 || n_rot > GGML_KVTC_MAX_DIM) {
        return false;
    }
    rope->type   = mode == GGML_ROPE_TYPE_NEOX ? GGML_KVTC_ROPE_NEOX : GGML_KVTC_ROPE_NORMAL;
    rope->n_rot  = n_rot;
    rope->mscale = f[3];

    // the same steps as ggml's own rotation: YaRN mixes two angles, both linear in the position
    float corr[2];
    ggml_rope_yarn_corr_dims(n_rot, n_ctx_orig, f[0], f[4], f[5], corr);
    for (int p = 0; p < n_rot/2; ++p) {
        const double extrapolated = std::pow((double) f[0], -2.0*p/n_rot)/(freq_factors ? freq_factors[p] : 1.0f);
        double mix = 0.0;
        if (f[2] != 0.0f) {
            const double ramp = ((double) p - corr[0])/std::max(0.001, (double) corr[1] - corr[0]);
            mix = (1.0 - std::min(1.0, std::max(0.0, ramp)))*f[2];
        }
        rope->inv_freq[p] = extrapolated*(f[1]*(1.0 - mix) + mix);
    }
    if (f[2] != 0.0f) {
        rope->mscale *= 1.0f + 0.1f*logf(1.0f/f[1]);
    }
    return true;
}
