// kvtc's options for the command lines of llama.cpp.
#pragma once

#include "ggml.h"

#include <string>
#include <vector>

struct common_arg;

// --cache-type, --kvtc-file, --kvtc-sink, --kvtc-window
std::vector<common_arg> common_kvtc_args();

// The same for llama-bench, which parses by hand: true if arg is one of them (and takes value).
bool common_kvtc_bench_arg(const std::string & arg, const char * value, std::vector<ggml_type> & type_k, std::vector<ggml_type> & type_v, bool & invalid);

// the lines of llama-bench's help
const char * common_kvtc_bench_help();
