// The keys of a tile, or the queries in their place, rotated by position.
#include "tile.h"

#include "simd.h"

#include <algorithm>

namespace kvtc {

namespace {

// cos, sin of each pair at position pos by complex products of its digits, from first_level on
void base_rotation(const void * pack, const ggml_kvtc_pack_header & header, int32_t pos, int first_level, float * c, float * s) {
    const int P = (int) header.rope_n_rot/2;
    bool empty = true;
    for (int l = first_level; l < GGML_KVTC_ROPE_LEVELS; ++l) {
        const int digit = (pos >> (6*l)) & (GGML_KVTC_ROPE_STEP - 1);
        const float * lc = (const float *) ggml_kvtc_pack_at(pack, header.rope_base[l][0]) + digit*P;
        const float * ls = (const float *) ggml_kvtc_pack_at(pack, header.rope_base[l][1]) + digit*P;
        if (empty) {
            std::copy(lc, lc + P, c);
            std::copy(ls, ls + P, s);
            empty = false;
        } else if (digit != 0) {
            for (int p = 0; p < P; ++p) {
                const float x = c[p]*lc[p] - s[p]*ls[p];
                s[p] = s[p]*lc[p] + c[p]*ls[p];
                c[p] = x;
            }
        }
    }
}

// pairs of channels in the order of ggml's two kinds of rotation
struct pairing {
    int  n; // pairs
    bool neox;

    int a(int p) const { return neox ? p     : 2*p;     }
    int b(int p) const { return neox ? p + n : 2*p + 1; }
};

constexpr int SCORE_NV = 2; // vectors of keys whose sums stay in registers

template <int R>
void score_block(const pairing & pairs, int d, const float * fine_c, const float * fine_s, const float * keys,
                 const float * queries, int ld, float * scores) {
    vf sum[R][SCORE_NV];
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < SCORE_NV; ++n) {
            sum[r][n] = set1(0.0f);
        }
    }
    for (int p = 0; p < pairs.n; ++p) {
        const int ia = pairs.a(p);
        const int ib = pairs.b(p);
        for (int n = 0; n < SCORE_NV; ++n) {
            const vf x  = load(keys + ia*TILE + n*W);
            const vf y  = load(keys + ib*TILE + n*W);
            const vf c  = load(fine_c + p*GGML_KVTC_ROPE_STEP + n*W);
            const vf s  = load(fine_s + p*GGML_KVTC_ROPE_STEP + n*W);
            const vf xr = fnma(y, s, mul(x, c));
            const vf yr = fma (x, s, mul(y, c));
            for (int r = 0; r < R; ++r) {
                sum[r][n] = fma(set1(queries[r*ld + ia]), xr, sum[r][n]);
                sum[r][n] = fma(set1(queries[r*ld + ib]), yr, sum[r][n]);
            }
        }
    }
    for (int i = 2*pairs.n; i < d; ++i) { // channels that are not rotated
        for (int n = 0; n < SCORE_NV; ++n) {
            const vf x = load(keys + i*TILE + n*W);
            for (int r = 0; r < R; ++r) {
                sum[r][n] = fma(set1(queries[r*ld + i]), x, sum[r][n]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < SCORE_NV; ++n) {
            store(scores + r*TILE + n*W, sum[r][n]);
        }
    }
}

void rotate_rows(float * a, float * b, vf c, vf s) {
    const vf x = load(a);
    const vf y = load(b);
    store(a, fnma(y, s, mul(x, c)));
    store(b, fma (x, s, mul(y, c)));
}

} // namespace

bool score_keys(const void * pack, const tile_cells & cells, const float * keys, const float * queries, int rows, int ld, float * scores) {
    const auto & header = *(const ggml_kvtc_pack_header *) pack;
    const int    first  = cells.pos[0];
    if (header.rope_type == GGML_KVTC_ROPE_NONE || first < 0) {
        return false;
    }
    for (int j = 1; j < cells.n; ++j) {
        if (cells.pos[j] != first + j) {
            return false;
        }
    }
    const int     d     = (int) header.side[GGML_KVTC_K].d;
    const pairing pairs = { (int) header.rope_n_rot/2, header.rope_type == GGML_KVTC_ROPE_NEOX };
    const float * fine_c = (const float *) ggml_kvtc_pack_at(pack, header.rope_fine[0]);
    const float * fine_s = (const float *) ggml_kvtc_pack_at(pack, header.rope_fine[1]);
    alignas(64) float c[GGML_KVTC_MAX_DIM/2];
    alignas(64) float s[GGML_KVTC_MAX_DIM/2];
    base_rotation(pack, header, first, 0, c, s);

    constexpr int R = 4;
    alignas(64) float back[R*GGML_KVTC_MAX_DIM];
    for (int r = 0; r < rows; r += R) {
        const int n = std::min(R, rows - r);
        for (int i = 0; i < n; ++i) {
            const float * q   = queries + (size_t) (r + i)*ld;
            float       * out = back + i*d;
            for (int p = 0; p < pairs.n; ++p) {
                const float x = q[pairs.a(p)];
                const float y = q[pairs.b(p)];
                out[pairs.a(p)] = x*c[p] + y*s[p];
                out[pairs.b(p)] = y*c[p] - x*s[p];
            }
            std::copy(q + 2*pairs.n, q + d, out + 2*pairs.n);
        }
        for (int v = 0; v < TILE; v += SCORE_NV*W) {
            float * out = scores + (size_t) r*TILE + v;
            switch (n) {
                case 1:  score_block<1>(pairs, d, fine_c + v, fine_s + v, keys + v, back, d, out); break;
                case 2:  score_block<2>(pairs, d, fine_c + v, fine_s + v, keys + v, back, d, out); break;
                case 3:  score_block<3>(pairs, d, fine_c + v, fine_s + v, keys + v, back, d, out); break;
                default: score_block<4>(pairs, d, fine_c + v, fine_s + v, keys + v, back, d, out); break;
            }
        }
    }
    return true;
}

void rotate_keys(const void * pack, const tile_cells & cells, float * keys) {
    const auto & header = *(const ggml_kvtc_pack_header *) pack;
    if (header.rope_type == GGML_KVTC_ROPE_NONE) {
        return;
    }
    const int     P     = (int) header.rope_n_rot/2;
    const pairing pairs = { P, header.rope_type == GGML_KVTC_ROPE_NEOX };
    const auto row_a = [&](int p) { return keys + pairs.a(p)*TILE; };
    const auto row_b = [&](int p) { return keys + pairs.b(p)*TILE; };

    const auto [lo, hi] = std::minmax_element(cells.pos, cells.pos + cells.n);
    alignas(64) float c[GGML_KVTC_MAX_DIM/2];
    alignas(64) float s[GGML_KVTC_MAX_DIM/2];

    if (*lo >= 0 && *hi - *lo < GGML_KVTC_ROPE_STEP) {
        // neighbours in the sequence: rotation by the first position, then by 0 .. 63 along the row
        int32_t delta[TILE] = {};
        bool rising = true;
        for (int j = 0; j < cells.n; ++j) {
            delta[j] = cells.pos[j] - *lo;
            rising   = rising && delta[j] == j;
        }
        base_rotation(pack, header, *lo, 1, c, s);
        const int     digit = *lo % GGML_KVTC_ROPE_STEP;
        const float * c0 = (const float *) ggml_kvtc_pack_at(pack, header.rope_base[0][0]) + digit*P;
        const float * s0 = (const float *) ggml_kvtc_pack_at(pack, header.rope_base[0][1]) + digit*P;
        for (int p = 0; p < P; ++p) {
            const float cb = c[p]*c0[p] - s[p]*s0[p];
            const float sb = s[p]*c0[p] + c[p]*s0[p];
            const float * fc = (const float *) ggml_kvtc_pack_at(pack, header.rope_fine[0]) + p*GGML_KVTC_ROPE_STEP;
            const float * fs = (const float *) ggml_kvtc_pack_at(pack, header.rope_fine[1]) + p*GGML_KVTC_ROPE_STEP;
            for (int v = 0; v < TILE; v += W) {
                const vf xc = rising ? load(fc + v) : gather(fc, iload(delta + v));
                const vf xs = rising ? load(fs + v) : gather(fs, iload(delta + v));
                rotate_rows(row_a(p) + v, row_b(p) + v, fnma(set1(sb), xs, mul(set1(cb), xc)), fma(set1(cb), xs, mul(set1(sb), xc)));
            }
        }
        return;
    }

    for (int j = 0; j < cells.n; ++j) {
        base_rotation(pack, header, std::max(0, cells.pos[j]), 0, c, s);
        for (int p = 0; p < P; ++p) {
            float & a = row_a(p)[j];
            float & b = row_b(p)[j];
            const float x = (a*c[p] - b*s[p])*header.rope_mscale;
            b = (a*s[p] + b*c[p])*header.rope_mscale;
            a = x;
        }
    }
}

} // namespace kvtc
