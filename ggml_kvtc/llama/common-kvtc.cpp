#include "common-kvtc.h"

#include "llama-kvtc.h"

#include "arg.h"
#include "common.h"
#include "log.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace {

void set_files(const std::string & value) {
    llama_kvtc_params params = llama_kvtc_default_params();
    params.files = value.c_str();
    llama_kvtc_set_params(params);
}

void set_count(int32_t llama_kvtc_params::* field, const std::string & value, const char * flag) {
    const bool digits = !value.empty() && std::all_of(value.begin(), value.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (!digits || value.size() > 9) {
        throw std::invalid_argument(std::string(flag) + " takes a number of tokens from 0 to 999999999, not '" + value + "'");
    }
    llama_kvtc_params params = llama_kvtc_default_params();
    params.*field = std::stoi(value);
    llama_kvtc_set_params(params);
}

void parse_both(const std::string & name, ggml_type & type_k, ggml_type & type_v) {
    if (llama_kvtc_parse_cache_type(name, type_k, type_v)) {
        return;
    }
    type_k = type_v = ggml_kvtc_type_from_name(name.c_str());
    if (type_k == GGML_TYPE_COUNT) {
        throw std::invalid_argument("--cache-type takes kvtc-k<a>v<b> or kvtc<a> with a, b from 1 to " + std::to_string(GGML_KVTC_MAX_BITS) +
                                    ", or turbo2, turbo3, turbo4, not '" + name + "'");
    }
}

// A program that stops early loses the lines its logger's thread has not printed yet: the reason why it stopped.
void flush_log_at_exit() {
#ifndef _WIN32 // there the thread is gone by then, and joining it hangs
    static const int registered = std::atexit([]() { common_log_flush(common_log_main()); });
    (void) registered;
#endif
}

} // namespace

std::vector<common_arg> common_kvtc_args() {
    flush_log_at_exit();
    return {
        common_arg(
            {"-ct", "--cache-type"}, "TYPE",
            "KV cache data types of K and V in one: kvtc-k<a>v<b> is --cache-type-k kvtc<a> --cache-type-v kvtc<b>;\n"
            "kvtc<a>, turbo2, turbo3, turbo4: the same for both",
            [](common_params & params, const std::string & value) {
                parse_both(value, params.cache_type_k, params.cache_type_v);
            }
        ).set_env("LLAMA_ARG_CACHE_TYPE"),
        common_arg(
            {"--kvtc-file"}, "FNAME[,FNAME...]",
            "calibration for kvtc cache types; of several, each model takes the one made for it\n"
            "(default: the model's own metadata, then MODEL.kvtc.gguf beside it)",
            [](common_params &, const std::string & value) {
                set_files(value);
            }
        ).set_env("LLAMA_ARG_KVTC_FILE"),
        common_arg(
            {"--kvtc-sink"}, "N",
            "first positions of a sequence that kvtc keeps exact (default: 4; turbo types alone: 0)",
            [](common_params &, const std::string & value) {
                set_count(&llama_kvtc_params::n_sink, value, "--kvtc-sink");
            }
        ).set_env("LLAMA_ARG_KVTC_SINK"),
        common_arg(
            {"--kvtc-window"}, "N",
            "newest positions of a sequence that kvtc keeps exact (default: 128; turbo types alone: 0)",
            [](common_params &, const std::string & value) {
                set_count(&llama_kvtc_params::n_window, value, "--kvtc-window");
            }
        ).set_env("LLAMA_ARG_KVTC_WINDOW"),
    };
}

bool common_kvtc_bench_arg(const std::string & arg, const char * value, std::vector<ggml_type> & type_k, std::vector<ggml_type> & type_v, bool & invalid) {
    const bool types  = arg == "-ct" || arg == "--cache-type";
    const bool file   = arg == "--kvtc-file";
    const bool sink   = arg == "--kvtc-sink";
    const bool window = arg == "--kvtc-window";
    if (!types && !file && !sink && !window) {
        return false;
    }
    try {
        if (!value) {
            throw std::invalid_argument(arg + " needs a value");
        }
        if (types) {
            ggml_type k;
            ggml_type v;
            parse_both(value, k, v);
            type_k.push_back(k);
            type_v.push_back(v);
        } else if (file) {
            set_files(value);
        } else {
            set_count(sink ? &llama_kvtc_params::n_sink : &llama_kvtc_params::n_window, value, arg.c_str());
        }
    } catch (const std::exception & e) {
        fprintf(stderr, "error: %s\n", e.what());
        invalid = true;
    }
    return true;
}

const char * common_kvtc_bench_help() {
    return
        "  -ct, --cache-type <kvtc-k<a>v<b>|turbo<a>>        (sets -ctk kvtc<a> -ctv kvtc<b>, or both to one type)\n"
        "  --kvtc-file <filename>                            (default: the model's own metadata, then MODEL.kvtc.gguf)\n"
        "  --kvtc-sink <n>                                   (default: 4; turbo types alone: 0)\n"
        "  --kvtc-window <n>                                 (default: 128; turbo types alone: 0)\n";
}
