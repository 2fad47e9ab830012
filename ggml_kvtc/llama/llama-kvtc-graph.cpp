// kvtc's nodes in llama.cpp's graphs.
#include "llama-kvtc.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-kv-cells.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace {

std::atomic<bool> capture { false };

// what the host tells the graph about the ubatch; one per cache and graph
class llm_graph_input_kvtc : public llm_graph_input_i {
public:
    explicit llm_graph_input_kvtc(const llama_kvtc * kvtc) : kvtc(kvtc) {}

    void set_input(const llama_ubatch * ubatch) override {
        if (info && info->buffer) {
            kvtc->set_info(info, *ubatch, needs_mask, written);
        }
        if (slots && slots->buffer) {
            kvtc->set_slots(slots);
        }
        if (pos && pos->buffer) {
            ggml_backend_tensor_set(pos, ubatch->pos, 0, ggml_nbytes(pos)); // of M-RoPE's four, the temporal ones come first
        }
        if (pos_rel && pos_rel->buffer) {
            // text tokens have one position, which stands for three; their fourth is 0 (see llm_graph_input_pos)
            const int64_t n = ubatch->n_tokens;
            std::vector<llama_pos> rel(4*n, 0);
            for (int64_t i = n; i < 4*n; ++i) {
                const llama_pos own = ubatch->token ? (i < 3*n ? ubatch->pos[i % n] : 0) : ubatch->pos[i];
                rel[i] = own - ubatch->pos[i % n];
            }
            ggml_backend_tensor_set(pos_rel, rel.data(), 0, ggml_nbytes(pos_rel));
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        return (!info    || (ggml_nelements(info) == kvtc->info_size() && slots->ne[0] == params.ubatch.n_tokens &&
                             needs_mask == kvtc->needs_mask(params.ubatch, params.cparams))) &&
               (!pos     || pos->ne[0]     ==   params.ubatch.n_tokens) &&
               (!pos_rel || pos_rel->ne[0] == 4*params.ubatch.n_tokens);
    }

    const llama_kvtc * kvtc;
    ggml_tensor * info    = nullptr; // I32, see ggml_kvtc_attn
    ggml_tensor * slots   = nullptr; // I64 [n_tokens]
    ggml_tensor * pos     = nullptr; // I32 [n_tokens]
    ggml_tensor * pos_rel = nullptr; // I32 [4*n_tokens], M-RoPE's four positions less the temporal one
    bool needs_mask       = true;    // the graph's operations have a mask
    llama_kvtc::info_written written; // to info
};

llm_graph_input_kvtc * get_input(const llm_graph_context & g, const llama_kvtc * kvtc) {
    for (auto & input : g.res->inputs) {
        auto * found = dynamic_cast<llm_graph_input_kvtc *>(input.get());
        if (found && found->kvtc == kvtc) {
            return found;
        }
    }
    return (llm_graph_input_kvtc *) g.res->add_input(std::make_unique<llm_graph_input_kvtc>(kvtc));
}

ggml_tensor * get_pos(const llm_graph_context & g, const llama_kvtc * kvtc) {
    llm_graph_input_kvtc * input = get_input(g, kvtc);
    if (!input->pos) {
        input->pos = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, g.n_tokens);
        ggml_set_input(input->pos);
    }
    return input->pos;
}

ggml_tensor * get_pos_rel(const llm_graph_context & g, const llama_kvtc * kvtc) {
    llm_graph_input_kvtc * input = get_input(g, kvtc);
    if (!input->pos_rel) {
        input->pos_rel = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, 4*g.n_tokens);
        ggml_set_input(input->pos_rel);
    }
    return input->pos_rel;
}

// the cache tensor a node writes to
const ggml_tensor * root_of(const ggml_tensor * t) {
    while (t->view_src) {
        t = t->view_src;
    }
    return t;
}

// transformed vectors of this ubatch that were written to a cache tensor
ggml_tensor * find_stored(ggml_cgraph * gf, const ggml_tensor * cache) {
    for (int i = ggml_graph_n_nodes(gf) - 1; i >= 0; --i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_KVTC_SET_ROWS && root_of(node) == cache) {
            return node->src[1];
        }
    }
    return nullptr;
}

// A device's attention may read what a vector was before it was transformed, and may run the nodes that make it beside those that make
// the query. So this, and what both are made of, outlives the attention, before `write`, as far as there is room.
void keep_key(ggml_tensor * write, const ggml_tensor * z) {
    ggml_tensor * x = z->src[0]->src[1];
    ggml_kvtc_set_rows_keep(write, x);
    while (x && x->op != GGML_OP_MUL_MAT) {
        x = x->src[0];
    }
    if (x) {
        ggml_kvtc_set_rows_keep(write, x->src[1]);
    }
}

// What the query is made of from its product on, where a view keeps operations from working in place.
void keep_query(ggml_tensor * write, const ggml_tensor * q) {
    const ggml_tensor * result = root_of(q);
    for (const ggml_tensor * t = q; t && t->op != GGML_OP_MUL_MAT; t = t->src[0]) {
        ggml_tensor * from = t->src[0];
        if (t->view_src && from && !from->view_src && from != result) {
            ggml_kvtc_set_rows_keep(write, from);
        }
    }
}

bool is_single_rope(const ggml_tensor * t) {
    return t->op == GGML_OP_ROPE && (t->op_params[2] == GGML_ROPE_TYPE_NORMAL || t->op_params[2] == GGML_ROPE_TYPE_NEOX);
}

bool is_multi_rope(const ggml_tensor * t) {
    return t->op == GGML_OP_ROPE && (t->op_params[2] == GGML_ROPE_TYPE_MROPE || t->op_params[2] == GGML_ROPE_TYPE_IMROPE);
}

// A rotation as ggml stores it in its nodes. M-RoPE pairs channels and takes frequencies as NeoX does, in both of its modes;
// only the positions differ from section to section. Reading a key rotates all pairs by its temporal position.
struct rotation {
    ggml_tensor * factors;
    int32_t params[GGML_MAX_OP_PARAMS/sizeof(int32_t)];
    int32_t mode; // params has the mode of what reading repeats

    explicit rotation(const ggml_tensor * rope) : factors(rope->src[2]), mode(rope->op_params[2]) {
        memcpy(params, rope->op_params, sizeof(params));
        if (mode == GGML_ROPE_TYPE_MROPE || mode == GGML_ROPE_TYPE_IMROPE) {
            params[2] = GGML_ROPE_TYPE_NEOX;
        }
    }

    // attn_factor with which a node of these parameters scales magnitudes by YaRN's own scale to the given power
    float attn_factor(int power) const {
        ggml_kvtc_rope rope;
        if (!ggml_kvtc_rope_from_params(params, nullptr, &rope)) {
            throw std::runtime_error("kvtc: cannot undo the RoPE of this architecture");
        }
        return get_f(8)*std::pow(rope.mscale, power - 1);
    }

    float get_f(int i) const {
        float f;
        memcpy(&f, params + i, sizeof(f));
        return f;
    }
};

// x before a rotation: for keys that pass through other operations after it (a norm, say)
ggml_tensor * unrotate(const llm_graph_context & g, const llama_kvtc * kvtc, ggml_tensor * x, const rotation & r) {
    // ROPE_BACK multiplies by the magnitude scale instead of dividing by it
    return ggml_rope_ext_back(g.ctx0, x, get_pos(g, kvtc), r.factors, r.params[1], r.params[2], r.params[4],
            r.get_f(5), r.get_f(6), r.get_f(7), r.attn_factor(-1), r.get_f(9), r.get_f(10));
}

// What the node rotates, less the rotation by the (temporal) position that reading repeats: with M-RoPE, an image's tokens
// stay rotated by where they lie in it, and the sections of the fourth position, which text does not count in, back by the first.
ggml_tensor * before_rope(const llm_graph_context & g, const llama_kvtc * kvtc, ggml_tensor * rope) {
    if (!is_multi_rope(rope)) {
        return rope->src[0];
    }
    rotation r(rope);
    return ggml_rope_multi(g.ctx0, rope->src[0], get_pos_rel(g, kvtc), r.factors, r.params[1], r.params + 11, r.mode, r.params[4],
            r.get_f(5), r.get_f(6), r.get_f(7), r.attn_factor(0), r.get_f(9), r.get_f(10));
}

// the rotation behind what is done to each head after it; nullptr if there is none or something else is in between
ggml_tensor * find_rope(ggml_tensor * t) {
    while (t->op == GGML_OP_SCALE || t->op == GGML_OP_RMS_NORM || t->op == GGML_OP_NORM || t->op == GGML_OP_MUL) {
        t = t->src[0];
    }
    return is_single_rope(t) || is_multi_rope(t) ? t : nullptr;
}

void add_capture(const llm_graph_context & g, ggml_tensor * x, const char * name, int il, float scale = 1.0f) {
    if (x) {
        x = ggml_cont(g.ctx0, scale == 1.0f ? x : ggml_scale(g.ctx0, x, scale));
        ggml_format_name(x, "%s-%d", name, il);
        ggml_set_output(x); // its memory must outlive the node
        ggml_build_forward_expand(g.gf, x);
    }
}

} // namespace

void llama_kvtc_set_capture(bool on) {
    capture = on;
}

ggml_tensor * llm_kvtc_keys(const llm_graph_context & g, llama_kvtc * kvtc, ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur, float kq_scale, int il) {
    if (capture && k_cur && v_cur) {
        const bool swa = g.hparams.is_swa(il);
        ggml_tensor * q_rope = q_cur; // some models scale queries after RoPE: that only changes what all weights share
        while (q_rope->op == GGML_OP_SCALE) {
            q_rope = q_rope->src[0];
        }
        const auto plain = [&](ggml_tensor * x) {
            ggml_tensor * rope = find_rope(x);
            if (!rope) {
                throw std::runtime_error("kvtc: cannot capture keys before RoPE from this architecture yet");
            }
            return rope == x ? before_rope(g, kvtc, x) : unrotate(g, kvtc, x, rotation(rope));
        };
        add_capture(g, g.hparams.has_rope(il) ? plain(q_rope) : q_cur, "kvtc_q", il);
        add_capture(g, g.hparams.has_rope(il) ? plain(k_cur)  : k_cur, "kvtc_k", il);
        add_capture(g, v_cur, "kvtc_v", il);
        add_capture(g, q_cur, swa ? "kvtc_q_rope_swa" : "kvtc_q_rope", il, kq_scale);
        add_capture(g, k_cur, swa ? "kvtc_k_rope_swa" : "kvtc_k_rope", il);
    }
    return kvtc && k_cur ? kvtc->keys(g, k_cur, il) : k_cur;
}

ggml_tensor * llama_kvtc::keys(const llm_graph_context & g, ggml_tensor * k_cur, int il) {
    layer & l = get_layer(il);
    if (!l.encode[GGML_KVTC_K] || turbo[GGML_KVTC_K]) { // turbo types code keys as they are after RoPE; their pack rotates nothing
        return k_cur;
    }
    if (is_single_rope(k_cur) || is_multi_rope(k_cur)) {
        set_rope(l, rotation(k_cur).params, k_cur->src[2]);
        return before_rope(g, this, k_cur); // the ROPE node stays out of the graph
    }
    if (!g.hparams.has_rope(il)) {
        return k_cur;
    }
    ggml_tensor * rope = find_rope(k_cur);
    if (!rope) { // the rotation that the layer is said to have; the node itself does not enter the graph
        const int mode = g.hparams.n_pos_per_embd() > 1 ? GGML_ROPE_TYPE_NEOX : g.hparams.rope_type;
        rope = ggml_rope_ext(g.ctx0, k_cur, get_pos(g, this), model.get_rope_factors(g.cparams, il), g.hparams.n_rot(il), mode,
                g.cparams.n_ctx_orig_yarn, model.get_rope_freq_base(g.cparams, il), model.get_rope_freq_scale(g.cparams, il),
                g.cparams.yarn_ext_factor, g.cparams.yarn_attn_factor, g.cparams.yarn_beta_fast, g.cparams.yarn_beta_slow);
    }
    const rotation r(rope);
    set_rope(l, r.params, r.factors);
    return unrotate(g, this, k_cur, r);
}

void llama_kvtc::set_rope(layer & l, const int32_t * op_params, const ggml_tensor * freq_factors) {
    const std::vector<int32_t> now(op_params, op_params + GGML_MAX_OP_PARAMS/sizeof(int32_t));
    if (hparams.no_alloc || now == l.rope) {
        return;
    }
    std::vector<float> factors;
    if (freq_factors) {
        factors.resize(ggml_nelements(freq_factors));
        ggml_backend_tensor_get(freq_factors, factors.data(), 0, ggml_nbytes(freq_factors));
    }
    ggml_kvtc_rope rope;
    if (!ggml_kvtc_rope_from_params(op_params, freq_factors ? factors.data() : nullptr, &rope) || rope.n_rot > l.encode[GGML_KVTC_K]->ne[0]) {
        throw std::runtime_error("kvtc: cannot undo the RoPE of layer " + std::to_string(l.il));
    }
    std::vector<uint8_t> pack(ggml_nbytes(l.pack));
    ggml_backend_tensor_get(l.pack, pack.data(), 0, pack.size());
    (l.on_device ? ggml_kvtc_cuda_pack_set_rope : ggml_kvtc_pack_set_rope)(pack.data(), &rope);
    ggml_backend_tensor_set(l.pack, pack.data(), 0, pack.size());
    if (l.on_device) {
        ggml_kvtc_cuda_pack_limits(pack.data(), l.limits);
    }
    l.rope = now;
}

ggml_tensor * llama_kvtc::store(ggml_context * ctx, ggml_kvtc_side side, ggml_tensor * x, ggml_tensor * idxs, int il) {
    const layer & l = get_layer(il);
    ggml_tensor * cache = l.cache[side];
    if (x->type != GGML_TYPE_F32) {
        x = ggml_cast(ctx, x, GGML_TYPE_F32);
    }
    // z = encode * x + bias, head by head
    ggml_tensor * z = ggml_mul_mat(ctx, l.encode[side], ggml_permute(ctx, x, 0, 2, 1, 3));
    z = ggml_add(ctx, z, l.bias[side]);

    cache = ggml_reshape_2d(ctx, cache, cache->ne[0], cache->ne[1]*cache->ne[2]); // idxs count over all streams
    if (side == GGML_KVTC_V && last_keys.idxs) {
        idxs = last_keys.idxs; // the same numbers: the graph has an input less, which would be copied to its device for each ubatch
    }
    ggml_tensor * write = ggml_kvtc_set_rows(ctx, cache, z, idxs, l.pack, side);
    if (side == GGML_KVTC_V) {
        ggml_kvtc_set_rows_keep(write, last_keys.x);
        last_keys = {};
    } else {
        last_keys = { x, idxs };
    }
    return write;
}

ggml_tensor * llama_kvtc::attend(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
        ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int il) {
    if (kq_b) {
        throw std::runtime_error("kvtc: cache types kvtc* and turbo* cannot serve models with an attention bias");
    }
    const layer & l = get_layer(il);

    // one stream's worth of queries per slice, as in build_attn_mha
    const int64_t n_stream = k->ne[3];
    q = ggml_view_4d(g.ctx0, q, q->ne[0], q->ne[1], q->ne[2]/n_stream, n_stream, q->nb[1], q->nb[2], q->nb[2]*(q->ne[2]/n_stream), 0);
    q = ggml_permute(g.ctx0, q, 0, 2, 1, 3);
    k = ggml_permute(g.ctx0, k, 0, 2, 1, 3);
    v = ggml_permute(g.ctx0, v, 0, 2, 1, 3);

    llm_graph_input_kvtc * input = get_input(g, this);
    if (!input->info) {
        input->info  = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, 2*k->ne[1]*n_stream + g.n_tokens);
        input->slots = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I64, g.n_tokens);
        input->needs_mask = needs_mask(g.ubatch, g.cparams);
        ggml_set_input(input->info);
        ggml_set_output(input->info); // else a graph's other nodes may have its memory when it has been read
        ggml_set_input(input->slots);
    }

    ggml_tensor * z[2];
    for (int s = 0; s < 2; ++s) {
        z[s] = l.encode[s] ? find_stored(g.gf, l.cache[s]) : nullptr;
    }
    ggml_kvtc_attn_params p = {
        /*.scale         =*/ kq_scale,
        /*.max_bias      =*/ g.hparams.f_max_alibi_bias,
        /*.logit_softcap =*/ g.hparams.attn_soft_cap ? g.hparams.f_attn_logit_softcapping : 0.0f,
        /*.n_sink        =*/ params.n_sink,
        /*.n_window      =*/ params.n_window,
        /*.n_slots       =*/ (int32_t) owners.size(),
        /*.n_span        =*/ input->needs_mask ? 0 : n_span,
        /*.limits        =*/ {},
    };
    std::copy_n(l.limits, GGML_KVTC_N_LIMITS, p.limits);
    ggml_tensor * cur = ggml_kvtc_attn(g.ctx0, q, k, v, input->needs_mask ? kq_mask : nullptr, sinks, l.pack, input->info, l.exact, z[0], z[1], p);
    ggml_format_name(cur, "kvtc_attn-%d", il);
    cur = ggml_reshape_2d(g.ctx0, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(g.gf, cur);

    // only now: the attention above still reads the rows that these replace
    for (int s = 0; s < 2; ++s) {
        if (z[s] && l.rows[s]) {
            ggml_tensor * write = ggml_kvtc_set_rows(g.ctx0, l.rows[s], z[s], input->slots, l.pack, (ggml_kvtc_side) s);
            if (l.on_device) { // else these would be copied from where they are
                keep_key(write, z[s]);
                if (s == GGML_KVTC_V) {
                    keep_query(write, q);
                }
            }
            ggml_build_forward_expand(g.gf, write);
        }
    }
    return cur;
}
