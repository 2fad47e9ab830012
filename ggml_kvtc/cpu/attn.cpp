// The attention operation. A unit of work is (stream, kv head, block of queries, range of cells); it walks over tiles
// of 64 cells, rebuilds the keys of a tile once for all its query rows, and keeps values in coefficient space until the
// end. Few queries (decode): the cells are split over the threads and the partial softmaxes merged.
#include "kvtc-cpu.h"
#include "attn-shape.h"
#include "gemm.h"
#include "lanes.h"
#include "tile.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvtc {

namespace {

constexpr float NONE = -INFINITY;

// one row of a kv head as f32
void plain_row(const ggml_tensor * t, int64_t cell, int64_t h, int64_t s, float * out) {
    const char * row = (const char *) t->data + cell*t->nb[1] + h*t->nb[2] + s*t->nb[3];
    if (t->type == GGML_TYPE_F32) {
        memcpy(out, row, t->ne[0]*sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(row, out, t->ne[0]);
    }
}

class unit {
public:
    unit(const ggml_tensor * dst, const shape & s, float * scratch) : dst(dst), s(s), scratch(scratch) {
        memcpy(&p, dst->op_params, sizeof(p));
        pack  = ggml_kvtc_pack_find(dst->src[5]->data);
        coded[GGML_KVTC_K] = ggml_kvtc_is_type(dst->src[1]->type);
        coded[GGML_KVTC_V] = ggml_kvtc_is_type(dst->src[2]->type);

        const uint32_t n_head_log2 = 1u << (uint32_t) floor(log2((double) s.n_head));
        log2_heads = n_head_log2;
        slope_low  = powf(2.0f, -(p.max_bias       )/n_head_log2);
        slope_high = powf(2.0f, -(p.max_bias/2.0f)/n_head_log2);
    }

    // attention of the queries of one block over cells [from, to); the state stays in acc, top and sum
    void run(int64_t stream, int64_t head, int block, int64_t from, int64_t to) {
        begin(stream, head, block);
        for (int64_t first = from; first < to; first += TILE) {
            tile(first, (int) std::min<int64_t>(TILE, to - first));
        }
        if (few) { // what finish() and save() expect
            fold_lanes(n_row*s.dvp, lanes, acc);
        }
    }

    void save(float * partial) const {
        std::copy(acc, acc + (size_t) n_row*s.dvp, partial);
        std::copy(top, top + n_row, partial + (size_t) s.rows*s.dvp);
        std::copy(sum, sum + n_row, partial + (size_t) s.rows*(s.dvp + 1));
    }

    // fold the state of other cells, same queries, into this one
    void merge(const float * partial) {
        const float * acc2 = partial;
        const float * top2 = partial + (size_t) s.rows*s.dvp;
        const float * sum2 = partial + (size_t) s.rows*(s.dvp + 1);
        for (int r = 0; r < n_row; ++r) {
            const float m = std::max(top[r], top2[r]);
            if (m == NONE) {
                continue;
            }
            const float a = expf(top[r] - m);
            const float b = expf(top2[r] - m);
            for (int c = 0; c < s.dvp; ++c) {
                acc[(size_t) r*s.dvp + c] = a*acc[(size_t) r*s.dvp + c] + b*acc2[(size_t) r*s.dvp + c];
            }
            sum[r] = a*sum[r] + b*sum2[r];
            top[r] = m;
        }
    }

    void begin(int64_t stream, int64_t head, int block) {
        i_stream = stream;
        i_head   = head;
        t0       = (int64_t) block*s.block;
        n_tok    = (int) std::min<int64_t>(s.block, s.n_tokens - t0);
        n_row    = (int) (n_tok*s.group);

        const int dmax = std::max(s.dkp, s.dvp);
        float * next = scratch;
        const auto take = [&next](size_t n) { float * at = next; next += n; return at; };
        z       = take((size_t) TILE*dmax);
        zt      = take((size_t) TILE*dmax);
        keys    = take((size_t) TILE*s.dkp);
        values  = take((size_t) TILE*s.dvp);
        queries = take((size_t) s.rows*dmax);
        scores  = take((size_t) s.rows*TILE);
        acc     = take((size_t) s.rows*s.dvp);
        few     = coded[GGML_KVTC_V] && n_row <= FEW_ROWS;
        lanes   = few ? take((size_t) n_row*s.dvp*W) : nullptr;
        top     = take(s.rows); // behind all that is read in whole vectors, which do not lie in two lines there
        sum     = take(s.rows);

        const ggml_tensor * q = dst->src[0];
        const float scale = p.logit_softcap != 0.0f ? p.scale/p.logit_softcap : p.scale;
        for (int r = 0; r < n_row; ++r) {
            const float * src = (const float *) ((const char *) q->data + (t0 + r/s.group)*q->nb[1] + (head*s.group + r%s.group)*q->nb[2] + stream*q->nb[3]);
            for (int64_t i = 0; i < s.dk; ++i) {
                queries[(size_t) r*s.dkp + i] = scale*src[i];
            }
        }
        std::fill(acc, acc + (size_t) n_row*s.dvp, 0.0f);
        std::fill(top, top + n_row, NONE);
        if (few) {
            std::fill(lanes, lanes + (size_t) n_row*s.dvp*W, 0.0f);
        }
        std::fill(sum, sum + n_row, 0.0f);

        cell_info = (const int32_t *) dst->src[6]->data + 2*s.n_kv*stream;
        query_pos = (const int32_t *) dst->src[6]->data + 2*s.n_kv*s.n_stream + stream*s.n_tokens + t0;
        min_pos   = *std::min_element(query_pos, query_pos + n_tok);
        max_pos   = *std::max_element(query_pos, query_pos + n_tok);

        for (int side = 0; side < 2; ++side) {
            source[side] = {};
            if (!coded[side]) {
                continue;
            }
            const ggml_tensor * exact = dst->src[7];
            const int64_t d = side == GGML_KVTC_K ? s.dk : s.dv;
            if (exact) {
                const int64_t skip = side == GGML_KVTC_V && coded[GGML_KVTC_K] ? p.n_slots*s.n_head_kv*s.dk : 0;
                source[side].store  = (const ggml_fp16_t *) exact->data + skip + head*p.n_slots*d;
                source[side].stride = d;
            }
            const ggml_tensor * batch = dst->src[side == GGML_KVTC_K ? 8 : 9];
            if (batch) {
                source[side].batch    = (const char *) batch->data + head*batch->nb[2];
                source[side].batch_nb = batch->nb[1];
            }
        }
    }

    void finish() {
        const ggml_tensor * sinks = dst->src[4];
        const bool v_coded = coded[GGML_KVTC_V];
        const ggml_kvtc_pack_head * plan = v_coded ? ggml_kvtc_pack_get_head(pack, GGML_KVTC_V, (int) i_head) : nullptr;
        const float * mean = v_coded ? (const float *) ggml_kvtc_pack_at(pack, plan->mean) : nullptr;

        float * out = acc;
        if (v_coded) { // coefficients to channels, once per row
            out = queries; // no longer needed
            gemm(n_row, s.dvp, (int) s.dv, acc, s.dvp, (const float *) ggml_kvtc_pack_at(pack, plan->decode), s.dvp, out, s.dvp, false);
        }
        for (int r = 0; r < n_row; ++r) {
            const int64_t head  = i_head*s.group + r%s.group;
            const int64_t token = t0 + r/s.group;
            float seen  = sum[r]; // weight of the tokens, without the sink logit
            float total = sum[r];
            float f     = 1.0f;
            if (sinks) {
                const float sink = ((const float *) sinks->data)[head];
                if (sink > top[r]) {
                    f     = top[r] == NONE ? 0.0f : expf(top[r] - sink);
                    seen  = seen*f;
                    total = seen + 1.0f;
                } else {
                    total = seen + expf(sink - top[r]);
                }
            }
            const float inv = total > 0.0f ? 1.0f/total : 0.0f;
            float * row = (float *) ((char *) dst->data + head*dst->nb[1] + token*dst->nb[2] + i_stream*dst->nb[3]);
            for (int64_t i = 0; i < s.dv; ++i) {
                row[i] = (f*out[(size_t) r*s.dvp + i] + (mean ? mean[i]*seen : 0.0f))*inv;
            }
        }
    }

private:
    enum use { CODES, EXACT, EITHER }; // of a key, over the queries of the block

    bool is_exact(int32_t query, int32_t pos) const { return query - pos < p.n_window || pos < p.n_sink; }

    use get_use(int32_t pos, int32_t slot) const {
        if (slot == -1) {
            return CODES;
        }
        if (pos < p.n_sink || max_pos - pos < p.n_window) {
            return EXACT;
        }
        return min_pos - pos < p.n_window ? EITHER : CODES;
    }

    // is any query of the block allowed to see any of the cells?
    bool visible(int64_t first, int n) const {
        const ggml_tensor * mask = dst->src[3];
        if (!mask && p.n_span == 0) {
            return true;
        }
        if (!mask) {
            for (int j = 0; j < n; ++j) {
                const int32_t pos = cell_info[2*(first + j)];
                if (pos >= 0 && pos <= max_pos && min_pos - pos < p.n_span) {
                    return true; // or none does, where the block's positions have gaps
                }
            }
            return false;
        }
        for (int t = 0; t < n_tok; ++t) {
            const ggml_fp16_t * row = mask_row(t) + first;
            for (int j = 0; j < n; ++j) {
                if (row[j] != 0xfc00) { // -inf
                    return true;
                }
            }
        }
        return false;
    }

    const ggml_fp16_t * mask_row(int t) const {
        const ggml_tensor * mask = dst->src[3];
        return (const ggml_fp16_t *) ((const char *) mask->data + (t0 + t)*mask->nb[1] + (i_stream % mask->ne[3])*mask->nb[3]);
    }

    void tile(int64_t first, int n) {
        if (!visible(first, n)) {
            return;
        }
        tile_cells main;
        tile_cells rest; // keys that are exact for some queries only: once more, under the complementary mask
        main.n = n;
        rest.n = 0;
        main.coded = main.exact = false;
        bool either[TILE];
        int32_t last = -1;
        for (int j = 0; j < n; ++j) {
            const int32_t slot = cell_info[2*(first + j) + 1];
            const int32_t pos  = cell_info[2*(first + j)] >= 0 ? cell_info[2*(first + j)] : last + 1; // an empty cell is masked
            const use     u    = get_use(pos, slot);
            last = pos;
            main.cell[j] = (int32_t) (first + j);
            main.pos [j] = pos;
            main.slot[j] = u == EXACT ? slot : -1;
            either[j]    = u == EITHER;
            (u == EXACT ? main.exact : main.coded) = true;
            if (u == EITHER) {
                rest.cell[rest.n] = (int32_t) (first + j);
                rest.pos [rest.n] = pos;
                rest.slot[rest.n] = slot;
                rest.n++;
            }
        }
        attend(main, rest.n > 0 ? either : nullptr, false);
        if (rest.n > 0) {
            bool all[TILE];
            std::fill(all, all + TILE, true);
            rest.coded = false;
            rest.exact = true;
            attend(rest, all, true);
        }
    }

    void load_keys(const tile_cells & cells) {
        const ggml_tensor * k = dst->src[1];
        if (coded[GGML_KVTC_K]) {
            const ggml_kvtc_pack_head & head = *ggml_kvtc_pack_get_head(pack, GGML_KVTC_K, (int) i_head);
            const int rank = load_components(pack, GGML_KVTC_K, (int) i_head, cells, (const uint8_t *) k->data + i_stream*k->nb[3],
                                             k->nb[1], source[GGML_KVTC_K], z);
            const float * mean = (const float *) ggml_kvtc_pack_at(pack, head.mean);
            gemm((int) s.dk, TILE, rank, (const float *) ggml_kvtc_pack_at(pack, head.decode), s.dkp, z, TILE, keys, TILE, mean);
        } else {
            if (cells.n < TILE) {
                std::fill(keys, keys + s.dk*TILE, 0.0f);
            }
            for (int j = 0; j < cells.n; ++j) {
                plain_row(k, cells.cell[j], i_head, i_stream, z);
                for (int64_t i = 0; i < s.dk; ++i) {
                    keys[i*TILE + j] = z[i];
                }
            }
        }
    }

    void load_values(const tile_cells & cells) {
        const ggml_tensor * v = dst->src[2];
        if (coded[GGML_KVTC_V]) {
            const int rank = load_components(pack, GGML_KVTC_V, (int) i_head, cells, (const uint8_t *) v->data + i_stream*v->nb[3],
                                             v->nb[1], source[GGML_KVTC_V], zt);
            if (few) {
                n_component = rank;
                return;
            }
            std::fill(zt + (size_t) rank*TILE, zt + (size_t) s.dvp*TILE, 0.0f);
            transpose_tile(zt, s.dvp, values, s.dvp);
        } else {
            for (int j = 0; j < cells.n; ++j) {
                plain_row(v, cells.cell[j], i_head, i_stream, values + (size_t) j*s.dvp);
                std::fill(values + (size_t) j*s.dvp + s.dv, values + (size_t) (j + 1)*s.dvp, 0.0f);
            }
        }
    }

    // split: keys whose codes (or, when exact, whose exact rows) count for some queries only
    void attend(const tile_cells & cells, const bool * split, bool exact) {
        load_keys(cells);
        load_values(cells);
        const bool rotated = !coded[GGML_KVTC_K];
        if (rotated || n_row > FEW_ROWS || !score_keys(pack, cells, keys, queries, n_row, s.dkp, scores)) {
            if (!rotated) {
                rotate_keys(pack, cells, keys);
            }
            gemm(n_row, TILE, (int) s.dk, queries, s.dkp, keys, TILE, scores, TILE, false);
        }

        for (int t = 0; t < n_tok; ++t) {
            alignas(64) float bias[TILE];
            const ggml_fp16_t * mask = dst->src[3] ? mask_row(t) : nullptr;
            std::fill(bias, bias + TILE, 0.0f);
            std::fill(bias + cells.n, bias + TILE, NONE);
            for (int j = 0; mask && j < cells.n; ++j) {
                bias[j] = GGML_CPU_FP16_TO_FP32(mask[cells.cell[j]]);
            }
            for (int j = 0; p.n_span > 0 && j < cells.n; ++j) {
                const int32_t pos = cell_info[2*cells.cell[j]]; // of an empty cell, cells.pos has another
                if (pos < 0 || pos > query_pos[t] || query_pos[t] - pos >= p.n_span) {
                    bias[j] = NONE;
                }
            }
            if (split) {
                for (int j = 0; j < cells.n; ++j) {
                    if (split[j] && is_exact(query_pos[t], cells.pos[j]) != exact) {
                        bias[j] = NONE;
                    }
                }
            }
            for (int g = 0; g < s.group; ++g) {
                softmax_row((int) (t*s.group + g), i_head*s.group + g, bias);
            }
        }
        if (few) {
            sum_lanes(n_row, n_component, scores, zt, s.dvp, lanes);
        } else {
            gemm(n_row, s.dvp, cells.n, scores, TILE, values, s.dvp, acc, s.dvp, true);
        }
    }

    // scores of one row to weights relative to its running maximum
    void softmax_row(int r, int64_t head, const float * bias) {
        float * x = scores + (size_t) r*TILE;
        float slope = 1.0f;
        if (p.max_bias > 0.0f) {
            slope = head < log2_heads ? powf(slope_low, (float) (head + 1)) : powf(slope_high, (float) (2*(head - log2_heads) + 1));
        }
        if (p.logit_softcap != 0.0f) {
            for (int j = 0; j < TILE; ++j) {
                x[j] = p.logit_softcap*tanhf(x[j]);
            }
        }
        vf m = set1(NONE);
        for (int j = 0; j < TILE; j += W) {
            const vf y = fma(set1(slope), load(bias + j), load(x + j));
            store(x + j, y);
            m = max(m, y);
        }
        const float peak = std::max(top[r], hmax(m));
        if (peak == NONE) {
            std::fill(x, x + TILE, 0.0f);
            return;
        }
        if (peak > top[r]) {
            const float f = top[r] == NONE ? 0.0f : expf(top[r] - peak);
            float * row = acc + (size_t) r*s.dvp;
            for (int c = 0; c < s.dvp; c += W) {
                store(row + c, mul(set1(f), load(row + c)));
            }
            for (int c = 0; few && c < s.dvp; ++c) {
                float * lane = lanes + ((size_t) r*s.dvp + c)*W;
                store(lane, mul(set1(f), load(lane)));
            }
            sum[r] *= f;
            top[r]  = peak;
        }
        vf total = set1(0.0f);
        for (int j = 0; j < TILE; j += W) {
            const vf e = vexp(add(load(x + j), set1(-peak)));
            store(x + j, e);
            total = add(total, e);
        }
        sum[r] += hsum(total);
    }

    const ggml_tensor * dst;
    const shape       & s;
    float             * scratch;
    ggml_kvtc_attn_params p;
    const void        * pack;
    bool                coded[2];
    int64_t             log2_heads;
    float               slope_low;
    float               slope_high;

    int64_t i_stream, i_head, t0;
    int     n_tok, n_row;
    int32_t min_pos, max_pos;
    bool    few;           // rows: lanes is used
    int     n_component;   // of zt, if few
    const int32_t * cell_info;
    const int32_t * query_pos;
    exact_source    source[2];

    float * z;       // [d][TILE] components of keys
    float * zt;      // [d][TILE] components of values
    float * keys;    // [dk][TILE]
    float * values;  // [TILE][dvp] components or channels
    float * queries; // [rows][dkp] scaled; at the end [rows][dvp] channels
    float * scores;  // [rows][TILE]
    float * acc;     // [rows][dvp]
    float * top;     // [rows] running maximum
    float * sum;     // [rows] running sum of weights
    float * lanes;   // [rows][dvp][W] sums to be added to acc, if few
};

// every thread takes the next free unit; the graph waits for all threads after the node
template <typename F>
void for_each_unit(const ggml_compute_params * params, int64_t n, F f) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = params->ith; i < n; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        f(i);
    }
}

} // namespace

} // namespace kvtc

size_t ggml_kvtc_attn_work_size(const ggml_tensor * dst, int n_tasks) {
    const kvtc::shape s = kvtc::get_shape(dst, n_tasks);
    const size_t partials = s.n_split > 1 ? s.n_unit()*s.partial_floats() : 0;
    return (n_tasks*s.scratch_floats() + partials)*sizeof(float) + 64;
}

void ggml_compute_forward_kvtc_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const kvtc::shape s = kvtc::get_shape(dst, params->nth);
    float * const wdata    = (float *) (((uintptr_t) params->wdata + 63) & ~(uintptr_t) 63);
    float * const partials = wdata + params->nth*s.scratch_floats();
    GGML_ASSERT(params->wsize >= ggml_kvtc_attn_work_size(dst, params->nth));

    kvtc::unit u(dst, s, wdata + params->ith*s.scratch_floats());

    const int64_t n_tiles = (s.n_kv + kvtc::TILE - 1)/kvtc::TILE;
    const auto split_at = [&](int64_t i) { return std::min(s.n_kv, n_tiles*i/s.n_split*kvtc::TILE); };

    // late blocks of a causal batch see the most cells: they go first
    kvtc::for_each_unit(params, s.n_unit(), [&](int64_t i) {
        const int64_t split  = i % s.n_split;
        const int64_t head   = i / s.n_split % s.n_head_kv;
        const int64_t stream = i / s.n_split / s.n_head_kv % s.n_stream;
        const int64_t block  = s.n_block - 1 - i / s.n_split / s.n_head_kv / s.n_stream;
        u.run(stream, head, (int) block, split_at(split), split_at(split + 1));
        if (s.n_split > 1) {
            u.save(partials + i*s.partial_floats());
        } else {
            u.finish();
        }
    });
    if (s.n_split == 1) {
        return;
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = params->ith; i < s.n_unit()/s.n_split; i += params->nth) { // as much work each
        u.begin(i / s.n_head_kv % s.n_stream, i % s.n_head_kv, (int) (s.n_block - 1 - i / s.n_head_kv / s.n_stream));
        for (int64_t split = 0; split < s.n_split; ++split) {
            u.merge(partials + (i*s.n_split + split)*s.partial_floats());
        }
        u.finish();
    }
}
