// The fingerprint that binds a calibration to a model, and the hash that binds a saved state to a calibration: see README.md.
#include "kvtc-calibration.h"
#include "kvtc-rows.h"

#include "gguf.h"

#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

struct file_closer  { void operator()(FILE * f) const { fclose(f); } };
struct gguf_deleter { void operator()(gguf_context * ctx) const { gguf_free(ctx); } };
struct ggml_deleter { void operator()(ggml_context * ctx) const { ggml_free(ctx); } };

constexpr size_t WHOLE  = 65536; // tensors up to this size are hashed whole
constexpr size_t PIECE  = 4096;
constexpr size_t PIECES = 16;

const char * const NAMES[] = {
    "attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias", "attn_v.weight", "attn_v.bias",
    "attn_qkv.weight", "attn_qkv.bias", "attn_q_norm.weight", "attn_k_norm.weight",
};

using tensor_rank = std::pair<int, size_t>; // layer, index in NAMES: the order of the text

// layer -1: not part of the fingerprint
tensor_rank rank_of(const std::string & name) {
    int layer = -1;
    int end   = 0;
    if (sscanf(name.c_str(), "blk.%9d.%n", &layer, &end) == 1 && end > 0 && layer >= 0) {
        for (size_t i = 0; i < std::size(NAMES); ++i) {
            if (name == "blk." + std::to_string(layer) + "." + NAMES[i]) {
                return { layer, i };
            }
        }
    }
    return { -1, 0 };
}

int seek(FILE * f, uint64_t offset) {
#ifdef _WIN32
    return _fseeki64(f, (int64_t) offset, SEEK_SET);
#else
    return fseeko(f, (off_t) offset, SEEK_SET);
#endif
}

uint32_t tensor_crc(FILE * f, uint64_t offset, size_t size) {
    std::vector<uint8_t> buf(size <= WHOLE ? size : PIECE);
    uint32_t crc = 0;
    for (size_t i = 0; i < (size <= WHOLE ? 1 : PIECES); ++i) {
        const uint64_t at = size <= WHOLE ? 0 : i*(uint64_t) (size - PIECE)/(PIECES - 1);
        if (seek(f, offset + at) != 0 || fread(buf.data(), 1, buf.size(), f) != buf.size()) {
            throw std::runtime_error("the file is truncated");
        }
        crc = ggml_kvtc_crc32(crc, buf.data(), buf.size());
    }
    return crc;
}

// the lines of one file's tensors; a split model has several files
void collect(const std::string & fname, std::map<tensor_rank, std::string> & lines, std::string & tail, int & n_split) {
    ggml_context * meta = nullptr;
    std::unique_ptr<gguf_context, gguf_deleter> gguf(gguf_init_from_file(fname.c_str(), { /*.no_alloc =*/ true, /*.ctx =*/ &meta }));
    std::unique_ptr<ggml_context, ggml_deleter> ctx(meta);
    std::unique_ptr<FILE, file_closer> file(fopen(fname.c_str(), "rb"));
    if (!gguf || !file) {
        throw std::runtime_error("not a readable GGUF file");
    }

    const int64_t id_split = gguf_find_key(gguf.get(), "split.count");
    if (id_split >= 0 && gguf_get_kv_type(gguf.get(), id_split) == GGUF_TYPE_UINT16) {
        n_split = gguf_get_val_u16(gguf.get(), id_split);
    }
    const int64_t id_arch = gguf_find_key(gguf.get(), "general.architecture");
    if (id_arch >= 0 && gguf_get_kv_type(gguf.get(), id_arch) == GGUF_TYPE_STRING) {
        const std::string arch = gguf_get_val_str(gguf.get(), id_arch);
        char text[64];
        const int64_t id_base = gguf_find_key(gguf.get(), (arch + ".rope.freq_base").c_str());
        if (id_base >= 0 && gguf_get_kv_type(gguf.get(), id_base) == GGUF_TYPE_FLOAT32) {
            snprintf(text, sizeof(text), "rope.freq_base %.9g\n", gguf_get_val_f32(gguf.get(), id_base));
            tail += text;
        }
        const int64_t id_dims = gguf_find_key(gguf.get(), (arch + ".rope.dimension_count").c_str());
        if (id_dims >= 0 && gguf_get_kv_type(gguf.get(), id_dims) == GGUF_TYPE_UINT32) {
            snprintf(text, sizeof(text), "rope.dimension_count %d\n", (int) gguf_get_val_u32(gguf.get(), id_dims));
            tail += text;
        }
    }

    for (int64_t id = 0; id < gguf_get_n_tensors(gguf.get()); ++id) {
        const std::string name = gguf_get_tensor_name(gguf.get(), id);
        const tensor_rank rank = rank_of(name);
        if (rank.first < 0) {
            continue;
        }
        const ggml_tensor * t = ggml_get_tensor(ctx.get(), name.c_str());
        std::string dims = std::to_string(t->ne[0]);
        for (int i = 1; i < ggml_n_dims(t); ++i) {
            dims += "," + std::to_string(t->ne[i]);
        }
        char crc[16];
        snprintf(crc, sizeof(crc), "%08x", tensor_crc(file.get(), gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), id),
                                                      gguf_get_tensor_size(gguf.get(), id)));
        lines[rank] = name + " " + std::to_string((int) t->type) + " " + dims + " " + crc + "\n";
    }
}

std::string fingerprint(const std::string & fname) {
    std::map<tensor_rank, std::string> lines;
    std::string tail;
    int n_split = 0;
    collect(fname, lines, tail, n_split);
    for (int i = 2; i <= n_split; ++i) {
        char suffix[40];
        snprintf(suffix, sizeof(suffix), "-%05d-of-%05d.gguf", 1, n_split);
        const size_t at = fname.rfind(suffix);
        if (at == std::string::npos) {
            throw std::runtime_error("is part of a split model but not its first file");
        }
        std::string rest_tail;
        int ignore = 0;
        snprintf(suffix, sizeof(suffix), "-%05d-of-%05d.gguf", i, n_split);
        collect(fname.substr(0, at) + suffix, lines, rest_tail, ignore);
    }

    if (lines.empty()) {
        throw std::runtime_error("holds no attention tensors, so it is no model that kvtc can serve");
    }

    uint64_t hash = 0xcbf29ce484222325ull;
    const auto feed = [&](const std::string & text) {
        for (unsigned char c : text) {
            hash = (hash ^ c)*0x100000001b3ull;
        }
    };
    for (const auto & line : lines) {
        feed(line.second);
    }
    feed(tail);

    char text[17];
    snprintf(text, sizeof(text), "%016llx", (unsigned long long) hash);
    return text;
}

} // namespace

bool ggml_kvtc_fingerprint(const char * fname, char out[17], char * err, size_t err_size) {
    try {
        memcpy(out, fingerprint(fname).c_str(), 17);
        return true;
    } catch (const std::exception & e) {
        snprintf(err, err_size, "model %s: %s", fname, e.what());
        return false;
    }
}

uint64_t ggml_kvtc_calibration_hash(const ggml_kvtc_calibration * cal) {
    uint64_t hash = 0xcbf29ce484222325ull; // FNV-1a 64
    const auto add = [&](const auto & values) {
        const uint8_t * bytes = (const uint8_t *) values.data();
        for (size_t i = 0; i < values.size()*sizeof(values[0]); ++i) {
            hash = (hash ^ bytes[i])*0x100000001b3ull;
        }
    };
    add(cal->fingerprint);
    add(cal->bits);
    for (int s = 0; s < 2; ++s) {
        add(cal->layer_bits[s]);
        for (const auto & [il, side] : cal->layers[s]) { // encode is derived, and by a computation that may round otherwise elsewhere
            add(std::vector<int32_t> { il, side.H, side.d });
            if (side.turbo) {
                add(side.bits);
            }
            add(side.mean);
            add(side.scale);
            add(side.gain);
            add(side.decode);
            add(side.widths);
            add(side.levels);
        }
    }
    return hash;
}
