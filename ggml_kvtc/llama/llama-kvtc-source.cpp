// Where a context's calibration comes from, and the parameters of the command line.
#include "llama-kvtc.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <climits>
#include <cstdio>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace {

struct bound_model {
    std::string path;
    // loaded once, used by every cache of every context of the model
    std::string key; // the files it was looked for in
    std::string source;
    std::weak_ptr<ggml_kvtc_calibration> calibration;

    // a cache in the making asks for the type of every layer before it takes the calibration
    std::shared_ptr<ggml_kvtc_calibration> held;
    int refused = INT_MAX; // what it asked for first, where there is no calibration: the rest need not look again
};

std::mutex mutex;
std::unordered_map<const llama_model *, bound_model> models;

std::string files;
llama_kvtc_params defaults = { nullptr, LLAMA_KVTC_BY_TYPE, LLAMA_KVTC_BY_TYPE };

std::shared_ptr<ggml_kvtc_calibration> open_calibration(const std::string & fname) {
    char err[512];
    ggml_kvtc_calibration * cal = ggml_kvtc_calibration_open(fname.c_str(), err, sizeof(err));
    if (!cal) {
        throw std::runtime_error(std::string("kvtc: ") + err);
    }
    return { cal, ggml_kvtc_calibration_free };
}

bool exists(const std::string & fname) {
    FILE * f = fopen(fname.c_str(), "rb");
    if (f) {
        fclose(f);
    }
    return f != nullptr;
}

std::string sidecar_of(const std::string & path) {
    const std::string ext = ".gguf";
    const bool has = path.size() > ext.size() && path.compare(path.size() - ext.size(), ext.size(), ext) == 0;
    return (has ? path.substr(0, path.size() - ext.size()) : path) + ".kvtc.gguf";
}

std::string fingerprint_of(const std::string & path) {
    char text[17];
    char err[512];
    if (!ggml_kvtc_fingerprint(path.c_str(), text, err, sizeof(err))) {
        throw std::runtime_error(std::string("kvtc: ") + err);
    }
    return text;
}

std::vector<std::string> split(const std::string & list) {
    std::vector<std::string> parts;
    size_t from = 0;
    while (from <= list.size()) {
        const size_t to = std::min(list.find(',', from), list.size());
        if (to > from) {
            parts.push_back(list.substr(from, to - from));
        }
        from = to + 1;
    }
    return parts;
}

std::shared_ptr<ggml_kvtc_calibration> find(const std::string & path, std::string & source) {
    if (path.empty()) {
        throw std::runtime_error("kvtc: the model was not loaded from a file, so no calibration can be checked against it");
    }
    const std::string command = "run `python -m kvtc_gguf.calibrate " + path + "`";

    // candidates: those named by the user, or the first that exists of metadata and sidecar
    std::vector<std::string> candidates = split(files);
    const bool named = !candidates.empty();
    if (!named) {
        if (ggml_kvtc_calibration_present(path.c_str())) {
            candidates.push_back(path);
        } else if (exists(sidecar_of(path))) {
            candidates.push_back(sidecar_of(path));
        } else {
            throw std::runtime_error("kvtc: no calibration for " + path + ": " + command + ", or name one with --kvtc-file");
        }
    }

    const std::string fingerprint = fingerprint_of(path);
    std::string other;
    for (const std::string & fname : candidates) {
        if (!exists(fname)) {
            throw std::runtime_error("kvtc: cannot open calibration " + fname);
        }
        auto cal = open_calibration(fname);
        if (ggml_kvtc_calibration_fingerprint(cal.get()) == fingerprint) {
            source = fname + (named ? " (--kvtc-file)" : fname == path ? " (embedded)" : " (sidecar)");
            return cal;
        }
        other = fname;
    }
    throw std::runtime_error("kvtc: calibration " + other + " belongs to another model (this one is " + fingerprint + "): " + command);
}

// with the mutex held
std::shared_ptr<ggml_kvtc_calibration> get_calibration(bound_model & bound) {
    auto cal = bound.calibration.lock();
    if (!cal || bound.key != files) {
        cal = find(bound.path, bound.source);
        bound.key         = files;
        bound.calibration = cal;
    }
    return cal;
}

} // namespace

llama_kvtc_params llama_kvtc_default_params() {
    std::lock_guard<std::mutex> lock(mutex);
    llama_kvtc_params result = defaults;
    result.files = files.c_str();
    return result;
}

void llama_kvtc_set_params(llama_kvtc_params params) {
    std::lock_guard<std::mutex> lock(mutex);
    const std::string copy = params.files ? params.files : "";
    files    = copy;
    defaults = params;
    defaults.files = nullptr;
}

void llama_kvtc_bind_model(const llama_model * model, const std::string & path) {
    std::lock_guard<std::mutex> lock(mutex);
    models[model].path = path;
}

void llama_kvtc_unbind_model(const llama_model * model) {
    std::lock_guard<std::mutex> lock(mutex);
    models.erase(model);
}

std::shared_ptr<ggml_kvtc_calibration> llama_kvtc_find_calibration(const llama_model & model, std::string & source) {
    std::lock_guard<std::mutex> lock(mutex);
    bound_model & bound = models[&model];
    const auto held = std::move(bound.held); // from here on the cache's
    auto cal = get_calibration(bound);
    source = bound.source;
    return cal;
}

ggml_type llama_kvtc_layer_type(const llama_model & model, ggml_type type, int il, ggml_kvtc_side side) {
    const int asked = 2*il + side;
    if (!ggml_kvtc_is_type(type) || ggml_kvtc_is_turbo(type)) {
        return type;
    }
    std::lock_guard<std::mutex> lock(mutex);
    bound_model & bound = models[&model];
    if (asked > bound.refused) {
        return type;
    }
    try {
        bound.held    = get_calibration(bound);
        bound.refused = INT_MAX;
    } catch (const std::exception &) { // said when the cache takes it, unless the model itself rules kvtc out
        bound.refused = asked;
        return type;
    }
    const int bits = ggml_kvtc_calibration_layer_bits(bound.held.get(), il, side, ggml_kvtc_type_bits(type));
    return bits > 0 ? (ggml_type) (GGML_TYPE_KVTC1 + bits - 1) : type;
}

uint32_t llama_kvtc_row_values(ggml_type type, uint32_t n_head, uint32_t n_embd) {
    return n_embd + (uint32_t) ggml_kvtc_row_values(type, n_head, 0);
}

uint32_t llama_kvtc_row_values(const ggml_tensor * cache, uint32_t n_embd) {
    return ggml_kvtc_is_turbo(cache->type) ? (uint32_t) cache->ne[0] : n_embd;
}

bool llama_kvtc_check_flash_attn(llama_context_params & params) {
    if (!ggml_kvtc_is_type(params.type_k) && !ggml_kvtc_is_type(params.type_v)) {
        return true;
    }
    if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
        LLAMA_LOG_ERROR("%s: kvtc and turbo cache types need flash attention: drop '-fa off' or use '-fa on'\n", __func__);
        return false;
    }
    if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO) {
        LLAMA_LOG_INFO("%s: enabling flash_attn since kvtc and turbo cache types need it\n", __func__);
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    }
    return true;
}

bool llama_kvtc_parse_cache_type(const std::string & name, ggml_type & type_k, ggml_type & type_v) {
    int k = 0;
    int v = 0;
    int end = 0;
    if (sscanf(name.c_str(), "kvtc-k%1dv%1d%n", &k, &v, &end) != 2 || end != (int) name.size() ||
            k < 1 || k > GGML_KVTC_MAX_BITS || v < 1 || v > GGML_KVTC_MAX_BITS) {
        return false;
    }
    type_k = (ggml_type) (GGML_TYPE_KVTC1 + k - 1);
    type_v = (ggml_type) (GGML_TYPE_KVTC1 + v - 1);
    return true;
}
