// What kvtc cannot serve: said in one line, before anything is allocated.
#include "llama-kvtc.h"

#include "llama-kv-cells.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

[[noreturn]] void fail(const std::string & what) {
    throw std::runtime_error("kvtc: " + what);
}

// the attention of these reads the cache by itself, past llm_graph_context::build_attn
bool reads_cache_itself(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_QWEN4EXP:
            return true;
        default:
            return false;
    }
}

} // namespace

void llama_kvtc::check_model(const config & cfg, const std::vector<llama_kvtc_layer> & layers) const {
    const std::string arch = llm_arch_name(cfg.model.arch);
    if (cfg.hparams.is_mla() || reads_cache_itself(cfg.model.arch) || cfg.name_tag[0] != '\0') {
        fail("cache types kvtc* and turbo* cannot serve " + arch + " models (MLA or an attention of their own): use f16 or q8_0");
    }
    if (cfg.shared || cfg.hparams.n_layer_kv_from_start >= 0) {
        fail("cache types kvtc* and turbo* cannot serve models or contexts whose layers share a KV cache yet (" + arch + "): use f16 or q8_0");
    }
    if (cfg.model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        fail("cache types kvtc* and turbo* do not support --split-mode tensor yet: use --split-mode layer");
    }
    if (params.n_sink < 0 || params.n_window < 0) {
        fail("--kvtc-sink and --kvtc-window must not be negative");
    }
    for (const auto & l : layers) {
        if (!l.v) {
            fail("cache types kvtc* and turbo* cannot serve " + arch + " models (no V cache): use f16 or q8_0");
        }
    }
}

void llama_kvtc::check_layer(const config & cfg, const llama_kvtc_layer & l) const {
    const ggml_tensor * cache[2] = { l.k, l.v };
    const uint32_t want_d[2] = { cfg.hparams.n_embd_head_k(l.il), cfg.hparams.n_embd_head_v(l.il) };
    for (int s = 0; s < 2; ++s) {
        const int bits = ggml_kvtc_type_bits(cache[s]->type);
        if (bits == 0) {
            continue;
        }
        const std::string where = std::string(s == GGML_KVTC_K ? "K" : "V") + " of layer " + std::to_string(l.il);
        if (turbo[s]) {
            if (want_d[s] % 8 != 0 || want_d[s] > GGML_KVTC_MAX_DIM) {
                fail(where + " has head_dim " + std::to_string(want_d[s]) + ", cache types turbo* serve multiples of 8 up to " +
                     std::to_string(GGML_KVTC_MAX_DIM) + ": use f16 or q8_0");
            }
            continue;
        }
        if (!ggml_kvtc_calibration_has_bits(calibration.get(), bits)) {
            fail("calibration " + source + " serves kvtc{" + ggml_kvtc_calibration_bits(calibration.get()) + "}, not " +
                 ggml_type_name(cache[s]->type) + ": choose one of these or calibrate again");
        }
        int H = 0;
        int d = 0;
        if (!ggml_kvtc_calibration_shape(calibration.get(), l.il, (ggml_kvtc_side) s, &H, &d)) {
            fail("calibration " + source + " lacks " + where + ": calibrate again");
        }
        if (H != (int) cfg.hparams.n_head_kv(l.il) || d != (int) want_d[s]) {
            fail("calibration " + source + " has " + std::to_string(H) + " heads of dimension " + std::to_string(d) + " for " + where +
                 ", the model " + std::to_string(cfg.hparams.n_head_kv(l.il)) + " of " + std::to_string(want_d[s]));
        }
    }
}

// Does the layer's device have kernels for its types and shapes? Asked with nodes such as its graphs will hold.
void llama_kvtc::check_device(const config & cfg, ggml_backend_dev_t dev, const layer & l) const {
    const int64_t n_head    = cfg.hparams.n_head(l.il);
    const int64_t n_head_kv = cfg.hparams.n_head_kv(l.il);
    const int64_t n_kv      = cells[0].size();
    const int64_t d[2]      = { cfg.hparams.n_embd_head_k(l.il), cfg.hparams.n_embd_head_v(l.il) };
    ggml_kvtc_attn_params p = {};
    p.max_bias      = cfg.hparams.f_max_alibi_bias;
    p.logit_softcap = cfg.hparams.attn_soft_cap ? cfg.hparams.f_attn_logit_softcapping : 0.0f;
    std::copy_n(l.limits, GGML_KVTC_N_LIMITS, p.limits);

    // The pack is laid out for CUDA. Devices of other kinds may not know that: those behind RPC say yes to everything.
    bool supported = strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "CUDA") == 0;
    for (int64_t n_tokens : { 1, 16, 512 }) { // a sequence, a few, a prompt
        ggml_context_ptr ctx { ggml_init({ 32*ggml_tensor_overhead(), nullptr, true }) };
        ggml_tensor * pack = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, 64);
        ggml_tensor * idxs = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, n_tokens);
        ggml_tensor * info = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 2*n_kv + n_tokens);
        ggml_tensor * view[2];
        ggml_tensor * z[2] = {};
        for (int s = 0; s < 2; ++s) {
            ggml_tensor * cache = ggml_new_tensor_2d(ctx.get(), l.cache[s]->type, ggml_kvtc_row_values(l.cache[s]->type, n_head_kv, d[s]), n_kv);
            view[s] = ggml_view_4d(ctx.get(), cache, d[s], n_kv, n_head_kv, 1, cache->nb[1], ggml_row_size(cache->type, d[s]), cache->nb[1]*n_kv, 0);
            if (ggml_kvtc_is_type(cache->type)) {
                z[s] = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d[s], n_tokens, n_head_kv);
                supported = supported && ggml_backend_dev_supports_op(dev, ggml_kvtc_set_rows(ctx.get(), cache, z[s], idxs, pack, (ggml_kvtc_side) s));
            }
        }
        ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d[0], n_tokens, n_head);
        ggml_tensor * mask = p.max_bias > 0.0f ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, n_kv, n_tokens) : nullptr;
        supported = supported && ggml_backend_dev_supports_op(dev,
            ggml_kvtc_attn(ctx.get(), q, view[0], view[1], mask, nullptr, pack, info, nullptr, z[0], z[1], p));
    }
    if (supported) {
        return;
    }
    fail("no kernels for K " + std::string(ggml_type_name(l.cache[0]->type)) + ", V " + ggml_type_name(l.cache[1]->type) + " of head_dim " +
         std::to_string(d[0]) + (d[0] == d[1] ? "" : "/" + std::to_string(d[1])) + " on device " + ggml_backend_dev_name(dev) +
         ": use --no-kv-offload (or -ngl 0), or another cache type");
}
