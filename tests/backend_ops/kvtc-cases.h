// Cases of the kvtc operations for upstream's test-backend-ops, which includes this file behind its own definitions: every case
// runs on a backend and on the CPU, from the same inputs.
#pragma once

#include "kvtc-synthetic.h"

#include <climits>
#include <limits>

// Sets what a case has made for the tensor of this name; the rest of the context is sentinels.
struct kvtc_test_case : public test_case {
    std::map<std::string, std::vector<uint8_t>> data;

    template <typename T>
    void put(const char * name, const std::vector<T> & values) {
        data[name].assign((const uint8_t *) values.data(), (const uint8_t *) (values.data() + values.size()));
    }

    void initialize_tensors(ggml_context * ctx) override {
        data.clear();
        make_data();
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            const auto it = data.find(t->name);
            if (it != data.end()) {
                GGML_ASSERT(it->second.size() == ggml_nbytes(t));
                ggml_backend_tensor_set(t, it->second.data(), 0, it->second.size());
            } else if (strcmp(t->name, "out") == 0 && !t->view_src) {
                ggml_backend_tensor_memset(t, 0xff, 0, ggml_nbytes(t)); // NaN, so that a value which is not written shows
            } else if (!t->view_src) {
                init_tensor_uniform(t);
            }
        }
    }

    virtual void make_data() = 0;

    static ggml_tensor * named(ggml_tensor * t, const char * name) {
        return ggml_set_name(t, name);
    }
};

//
// GGML_OP_KVTC_SET_ROWS
//

struct kvtc_write {
    int  kind   = 2; // of kvtc_test; 0: exact rows, f16
    int  side   = GGML_KVTC_K;
    int  d      = 128;
    int  heads  = 2;
    int  tokens = 17;
    int  memory = 0;     // of z: 0 as the operation reads it, 1 heads inside tokens, 2 that with other heads between
    bool fused  = false; // z = encode*x + bias is part of the graph
};

// Codes are compared byte by byte. The cache's type has no conversion to float, so the graph ends in a view of it as I8, which
// is the node that is compared, in the whole graph: a backend may fuse the product, the sum and the write.
struct test_kvtc_set_rows : public kvtc_test_case {
    static constexpr int SPARE = 9; // rows beyond the tokens
    const kvtc_write c;
    std::unique_ptr<kvtc_test::universal_pack> pack;
    std::vector<ggml_tensor *> compared;

    explicit test_kvtc_set_rows(const kvtc_write & c) : c(c) {}

    std::string op_desc(ggml_tensor *) override { return c.fused ? "KVTC_SET_ROWS_FUSED" : "KVTC_SET_ROWS"; }

    std::string vars() override {
        std::ostringstream s;
        s << "type=" << (c.kind ? ggml_type_name(kvtc_test::get_type(c.kind)) : "f16") << ",side=" << "kv"[c.side] << ",d=" << c.d
          << ",heads=" << c.heads << ",tokens=" << c.tokens << ",memory=" << c.memory;
        return s.str();
    }

    int n_rows() const { return c.tokens + SPARE; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int kind = c.kind ? c.kind : 2;
        pack = std::make_unique<kvtc_test::universal_pack>(c.heads, c.d, kind, kind, nullptr);
        compared.clear();

        ggml_tensor * z;
        if (c.memory == 0) {
            z = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.d, c.tokens, c.heads), "z");
        } else {
            z = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.d, c.heads + (c.memory == 2 ? 3 : 0), c.tokens), "z");
            z = ggml_view_3d(ctx, z, c.d, c.heads, c.tokens, z->nb[1], z->nb[2], 0);
            z = ggml_permute(ctx, z, 0, 2, 1, 3);
        }
        if (c.fused) {
            ggml_tensor * encode = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.d, c.d, c.heads), "encode");
            ggml_tensor * bias   = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.d, 1,   c.heads), "bias");
            z = ggml_add(ctx, ggml_mul_mat(ctx, encode, z), bias);
        }
        ggml_tensor * idxs = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, c.tokens), "idxs");
        ggml_tensor * p    = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I8, (int64_t) pack->bytes.size()), "pack");
        if (c.kind == 0) {
            ggml_tensor * cache = named(ggml_new_tensor_3d(ctx, GGML_TYPE_F16, c.d, n_rows(), c.heads), "cache");
            return ggml_kvtc_set_rows(ctx, cache, z, idxs, p, (ggml_kvtc_side) c.side);
        }
        const ggml_type type = kvtc_test::get_type(c.kind);
        ggml_tensor * cache = named(ggml_new_tensor_2d(ctx, type, ggml_kvtc_row_values(type, c.heads, c.d), n_rows()), "cache");
        ggml_tensor * out   = ggml_kvtc_set_rows(ctx, cache, z, idxs, p, (ggml_kvtc_side) c.side);

        ggml_tensor * bytes = ggml_view_2d(ctx, out, out->ne[0], out->ne[1], out->nb[1], 0);
        bytes->type  = GGML_TYPE_I8;
        bytes->ne[0] = (int64_t) kvtc_test::get_row_bytes(c.kind, c.heads, c.d);
        bytes->nb[0] = 1;
        compared.push_back(bytes);
        return bytes;
    }

    void make_data() override {
        kvtc_test::rng_t rng(7);
        const auto & side = kvtc_test::get_side(c.heads, c.d, c.side);

        // z has the calibration's variances, by its own or by those of the encode matrix's rows
        const int n_heads = c.heads + (c.memory == 2 ? 3 : 0);
        std::vector<float> z((size_t) n_heads*c.d*c.tokens);
        for (size_t i = 0; i < z.size(); ++i) {
            const size_t token = c.memory == 0 ? i/c.d % c.tokens : i/c.d/n_heads;
            const size_t h     = c.memory == 0 ? i/c.d/c.tokens   : i/c.d % n_heads;
            z[i] = kvtc_test::normal(rng)*(c.fused ? 1.0f : side.scale[h % c.heads*c.d + i % c.d]*std::exp2(0.2f*token));
            if (c.tokens >= 8 && !c.fused) { // what has no direction, or none that counts
                z[i] = token == 1 ? 0.0f : token == 3 ? 1e-12f*z[i] : z[i];
                if (c.kind && token == 5 && i % c.d == 3) {
                    z[i] = std::numeric_limits<float>::infinity();
                }
                if (c.kind && token == 6 && i % c.d == 9) {
                    z[i] = std::numeric_limits<float>::quiet_NaN();
                }
            }
        }
        put("z", z);
        if (c.fused) {
            std::vector<float> encode((size_t) c.heads*c.d*c.d);
            std::vector<float> bias  ((size_t) c.heads*c.d);
            for (size_t i = 0; i < encode.size(); ++i) {
                encode[i] = kvtc_test::normal(rng)*side.scale[i/c.d]/std::sqrt((float) c.d);
            }
            for (size_t i = 0; i < bias.size(); ++i) {
                bias[i] = 0.1f*kvtc_test::normal(rng)*side.scale[i];
            }
            put("encode", encode);
            put("bias", bias);
        }
        std::vector<int64_t> idxs(n_rows());
        for (int i = 0; i < n_rows(); ++i) {
            idxs[i] = i;
        }
        std::shuffle(idxs.begin(), idxs.end(), rng);
        idxs.resize(c.tokens);
        if (c.tokens > 4) {
            idxs[2] = -1; // not stored
        }
        put("idxs", idxs);
        put("pack", pack->bytes);
        if (c.kind) {
            put("cache", pack->random_rows(rng, (ggml_kvtc_side) c.side, n_rows()));
        }
    }

    bool run_whole_graph() override { return c.kind != 0; }

    std::vector<ggml_tensor *> fusion_test_nodes() override {
        if (compared.empty()) {
            return {};
        }
        std::vector<ggml_tensor *> nodes = compared;
        nodes.insert(nodes.end(), sentinels.begin(), sentinels.end()); // else nothing looks at them
        return nodes;
    }

    // the share of elements that differ
    double err(const float * a, const float * b, size_t n) override {
        size_t wrong = 0;
        for (size_t i = 0; i < n; ++i) {
            wrong += a[i] != b[i];
        }
        return (double) wrong/n;
    }

    // Every byte, but where the product comes first: its sums differ in their last bits, and a value may cross a boundary.
    double max_nmse_err() override { return c.fused ? 0.01 : 0.0; }
};

//
// GGML_OP_KVTC_ATTN
//

enum kvtc_mask  { KVTC_CAUSAL, KVTC_HOLES, KVTC_DEAD, KVTC_ALL, KVTC_SPAN };  // DEAD: odd queries see nothing; ALL: no mask; SPAN: nor that, but positions
enum kvtc_exact { KVTC_NONE, KVTC_STORE, KVTC_SOME, KVTC_BATCH };             // which tokens are exact: BATCH its own only
enum kvtc_cells { KVTC_IN_ORDER, KVTC_SHUFFLED, KVTC_SPARSE, KVTC_TWO_SEQS }; // SPARSE: positions 97 apart

// S streams of n_kv cells; the last T used cells of each are this batch's tokens, which are the queries
struct kvtc_read {
    int        k = 2, v = 4; // kinds of kvtc_test
    int        d       = 128;
    int        heads   = 2;  // kv heads
    int        group   = 4;  // query heads of one kv head
    int        tokens  = 1;
    int        n_kv    = 256;
    int        empty   = 9;  // cells
    int        streams = 1;
    int        rope    = GGML_KVTC_ROPE_NEOX;
    int        n_rot   = 0;  // 0: head_dim
    float      mscale  = 1.0f;
    double     base    = 1e4; // of the rotation's frequencies
    int        start   = 0;  // position of the first token
    int        sinks   = 4;
    int        window  = 32;
    kvtc_mask  mask    = KVTC_CAUSAL;
    int        span    = 0;  // of KVTC_SPAN
    kvtc_exact exact   = KVTC_SOME;
    kvtc_cells cells   = KVTC_IN_ORDER;
    int        memory  = 1;  // of q and z: 0 as the operation reads them, 1 heads inside tokens, 2 that with other heads between
    float      softcap = 0.0f;
    float      alibi   = 0.0f;
    bool       sink_logits = false;
};

struct test_kvtc_attn : public kvtc_test_case {
    static constexpr int SPARE = 7; // rows of the cache beyond the view
    const kvtc_read c;
    std::unique_ptr<kvtc_test::universal_pack> pack;

    explicit test_kvtc_attn(const kvtc_read & c) : c(c) {}

    double max_nmse_err() override { return 5e-4; }

    std::string vars() override {
        static const char * masks [] = { "causal", "holes", "dead", "none", "span" };
        static const char * exacts[] = { "none", "store", "some", "batch" };
        static const char * orders[] = { "order", "shuffled", "sparse", "seqs" };
        std::ostringstream s;
        s << "k=" << c.k << ",v=" << c.v << ",d=" << c.d << ",heads=" << c.heads << ",group=" << c.group << ",tokens=" << c.tokens
          << ",n_kv=" << c.n_kv << ",empty=" << c.empty << ",streams=" << c.streams << ",rope=" << c.rope << ",n_rot=" << c.n_rot << ",mscale=" << c.mscale << ",base=" << c.base
          << ",start=" << c.start << ",sinks=" << c.sinks << ",window=" << c.window << ",mask=" << masks[c.mask] << ",span=" << c.span
          << ",exact=" << exacts[c.exact] << ",cells=" << orders[c.cells] << ",memory=" << c.memory
          << ",softcap=" << c.softcap << ",alibi=" << c.alibi << ",sink_logits=" << c.sink_logits;
        return s.str();
    }

    int n_head () const { return c.heads*c.group; }
    int n_slots() const { return c.streams*c.n_kv + 5; }
    bool is_coded(int side) const { return kvtc_test::is_coded(side == GGML_KVTC_K ? c.k : c.v); }

    // [d, rows, heads, S] as the operation reads it
    ggml_tensor * new_vectors(ggml_context * ctx, const char * name, int rows, int heads, int streams) {
        if (c.memory == 0) {
            return named(ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.d, rows, heads, streams), name);
        }
        ggml_tensor * t = named(ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.d, heads + (c.memory == 2 ? 3 : 0), rows, streams), name);
        t = ggml_view_4d(ctx, t, c.d, heads, rows, streams, t->nb[1], t->nb[2], t->nb[3], 0);
        return ggml_permute(ctx, t, 0, 2, 1, 3);
    }

    ggml_tensor * new_cache(ggml_context * ctx, const char * name, int kind) {
        const ggml_type type = kvtc_test::get_type(kind);
        ggml_tensor * t = named(ggml_new_tensor_3d(ctx, type, ggml_kvtc_row_values(type, c.heads, c.d), c.n_kv + SPARE, c.streams), name);
        return ggml_view_4d(ctx, t, c.d, c.n_kv, c.heads, c.streams, t->nb[1], ggml_row_size(type, c.d), t->nb[2], 0);
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_kvtc_rope rope = {};
        rope.type   = (ggml_kvtc_rope_type) c.rope;
        rope.n_rot  = c.n_rot ? c.n_rot : c.d;
        rope.mscale = c.mscale;
        for (int i = 0; i < rope.n_rot/2; ++i) {
            rope.inv_freq[i] = std::pow(c.base, -2.0*i/rope.n_rot);
        }
        pack = std::make_unique<kvtc_test::universal_pack>(c.heads, c.d, c.k, c.v, c.rope ? &rope : nullptr);

        ggml_tensor * q     = new_vectors(ctx, "q", c.tokens, n_head(), c.streams);
        ggml_tensor * k     = new_cache(ctx, "k", c.k);
        ggml_tensor * v     = new_cache(ctx, "v", c.v);
        ggml_tensor * mask  = nullptr;
        ggml_tensor * sinks = nullptr;
        ggml_tensor * exact = nullptr;
        ggml_tensor * z[2]  = { nullptr, nullptr };
        if (c.mask != KVTC_ALL && c.mask != KVTC_SPAN) {
            mask = named(ggml_new_tensor_4d(ctx, GGML_TYPE_F16, c.n_kv, c.tokens, 1, c.streams), "mask");
        }
        if (c.sink_logits) {
            sinks = named(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head()), "sinks");
        }
        if (c.exact != KVTC_NONE) {
            exact = named(ggml_new_tensor_1d(ctx, GGML_TYPE_F16, (int64_t) (is_coded(0) + is_coded(1))*c.d*n_slots()*c.heads), "exact");
            z[0] = is_coded(0) ? new_vectors(ctx, "zk", c.tokens*c.streams, c.heads, 1) : nullptr;
            z[1] = is_coded(1) ? new_vectors(ctx, "zv", c.tokens*c.streams, c.heads, 1) : nullptr;
        }
        ggml_tensor * p    = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I8, (int64_t) pack->bytes.size()), "pack");
        ggml_tensor * info = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (2*c.n_kv + c.tokens)*c.streams), "info");

        ggml_kvtc_attn_params params = {};
        params.scale         = 1.0f/std::sqrt((float) c.d);
        params.max_bias      = c.alibi;
        params.logit_softcap = c.softcap;
        params.n_sink        = c.sinks;
        params.n_window      = c.window;
        params.n_slots       = n_slots();
        params.n_span        = c.span;
        std::copy_n(pack->limits, GGML_KVTC_N_LIMITS, params.limits);
        return named(ggml_kvtc_attn(ctx, q, k, v, mask, sinks, p, info, exact, z[0], z[1], params), "out");
    }

    void make_data() override {
        kvtc_test::rng_t rng(c.tokens + 1000*c.n_kv);
        const auto chance = [&](int n, int of) { return (int) (rng() % of) < n; };
        const int used = c.n_kv - c.empty;
        GGML_ASSERT(used >= c.tokens);

        std::vector<int> pos((size_t) c.streams*c.n_kv, -1), seq(pos.size(), 0), slot(pos.size(), -1), query_pos;
        std::vector<ggml_fp16_t> mask((size_t) c.streams*c.tokens*c.n_kv);
        std::vector<int> free_slots(n_slots());
        for (int i = 0; i < n_slots(); ++i) {
            free_slots[i] = i;
        }
        std::shuffle(free_slots.begin(), free_slots.end(), rng);

        for (int s = 0; s < c.streams; ++s) {
            std::vector<int> cell(c.n_kv); // of the stream's i-th token
            for (int i = 0; i < c.n_kv; ++i) {
                cell[i] = s*c.n_kv + i;
            }
            if (c.cells != KVTC_IN_ORDER) {
                std::shuffle(cell.begin(), cell.end(), rng);
            }
            for (int i = 0; i < used; ++i) {
                const int at = cell[i];
                pos[at] = c.start + (c.cells == KVTC_SPARSE ? 97*i : i);
                if (c.cells == KVTC_TWO_SEQS) {
                    seq[at] = i % 2;
                    pos[at] = c.start + i/2 + 500*(i % 2);
                }
                if (c.exact == KVTC_STORE || (c.exact == KVTC_SOME && chance(3, 5))) {
                    slot[at] = free_slots[at];
                }
            }
            for (int t = 0; t < c.tokens; ++t) {
                const int at = cell[used - c.tokens + t];
                query_pos.push_back(pos[at]);
                if (c.exact != KVTC_NONE) {
                    slot[at] = -2 - (s*c.tokens + t);
                }
                for (int j = 0; j < c.n_kv; ++j) {
                    const int other = s*c.n_kv + j;
                    bool sees = pos[other] >= 0 && pos[other] <= pos[at] && seq[other] == seq[at];
                    sees = sees && !((c.mask == KVTC_HOLES || c.mask == KVTC_DEAD) && chance(1, 3));
                    sees = sees && !(c.mask == KVTC_DEAD && t % 2 == 1);
                    const float distance = c.alibi > 0.0f ? std::max(-60000, pos[other] - pos[at]) : 0.0f;
                    mask[((size_t) s*c.tokens + t)*c.n_kv + j] = ggml_fp32_to_fp16(sees ? distance : -INFINITY);
                }
            }
        }
        std::vector<int> info;
        for (size_t i = 0; i < pos.size(); ++i) {
            info.push_back(pos[i]);
            info.push_back(slot[i]);
        }
        info.insert(info.end(), query_pos.begin(), query_pos.end());

        // rows that no cell owns are NaN
        std::vector<bool> owned(n_slots(), false);
        for (int at : slot) {
            if (at >= 0) {
                owned[at] = true;
            }
        }
        const int n_heads = c.memory == 2 ? 3 : 0; // the heads between
        std::vector<float> q((size_t) c.d*c.tokens*c.streams*(n_head() + n_heads)), sinks(n_head());
        std::vector<float> z[2];
        std::vector<ggml_fp16_t> exact;
        for (float & x : q) {
            x = kvtc_test::normal(rng); // flat enough that every token counts
        }
        for (float & x : sinks) {
            x = 6.0f + 2.0f*kvtc_test::normal(rng); // about the logarithm of the other weights' sum
        }
        for (int i = 0; i < 2; ++i) {
            const auto & side = kvtc_test::get_side(c.heads, c.d, i);
            z[i].resize((size_t) c.d*c.tokens*c.streams*(c.heads + n_heads));
            for (size_t j = 0; j < z[i].size(); ++j) {
                z[i][j] = kvtc_test::normal(rng)*side.scale[j % c.d];
            }
            for (int64_t j = 0; is_coded(i) && j < (int64_t) c.heads*n_slots()*c.d; ++j) {
                const float x = owned[j/c.d % n_slots()] ? kvtc_test::normal(rng)*side.scale[j % c.d] : NAN;
                exact.push_back(ggml_fp32_to_fp16(x));
            }
        }
        put("q",     q);
        for (int i = 0; i < 2; ++i) {
            const size_t n = (size_t) (c.n_kv + SPARE)*c.streams;
            const int    kind = i == GGML_KVTC_K ? c.k : c.v;
            auto rows = is_coded(i) ? pack->random_rows(rng, (ggml_kvtc_side) i, n) : kvtc_test::plain_rows(rng, kind, c.heads, c.d, n);
            for (size_t j = 0; is_coded(i) && j < pos.size(); ++j) {
                if (pos[j] < 0 && c.mask != KVTC_ALL) {
                    pack->set_largest_gains((ggml_kvtc_side) i, j/c.n_kv*(c.n_kv + SPARE) + j%c.n_kv, rows);
                }
            }
            put(i == GGML_KVTC_K ? "k" : "v", rows);
        }
        put("mask",  mask);
        put("sinks", sinks);
        put("pack",  pack->bytes);
        put("info",  info);
        put("exact", exact);
        put("zk",    z[0]);
        put("zv",    z[1]);
    }
};
