// Reads a calibration and trusts nothing in it: every size, width and number is checked before use.
#include "kvtc-calibration.h"
#include "kvtc-invert.h"
#include "kvtc-threads.h"

#include "gguf.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace {

struct gguf_deleter { void operator()(gguf_context * ctx) const { gguf_free(ctx); } };
struct ggml_deleter { void operator()(ggml_context * ctx) const { ggml_free(ctx); } };
struct file_closer  { void operator()(FILE * f) const { fclose(f); } };

[[noreturn]] void fail(const std::string & what) {
    throw std::runtime_error(what);
}

int64_t find_key(const gguf_context * gguf, const char * key, gguf_type type) {
    const int64_t id = gguf_find_key(gguf, key);
    if (id < 0) {
        fail(std::string("key ") + key + " is missing");
    }
    if (gguf_get_kv_type(gguf, id) != type) {
        fail(std::string("key ") + key + " has the wrong type");
    }
    return id;
}

// does the file have n > 0 bytes?
bool reaches(FILE * f, uint64_t n) {
#ifdef _WIN32
    return _fseeki64(f, (int64_t) n - 1, SEEK_SET) == 0 && fgetc(f) != EOF;
#else
    return fseeko(f, (off_t) n - 1, SEEK_SET) == 0 && fgetc(f) != EOF;
#endif
}

// the six blobs of one side, wherever they came from
struct raw_side {
    int64_t H = 0;
    int64_t d = 0;
    int64_t n_codebook = 0;

    const float       * mean     = nullptr;
    const float       * scale    = nullptr;
    const float       * gain     = nullptr;
    const ggml_fp16_t * decode   = nullptr;
    const int8_t      * widths   = nullptr;
    const ggml_fp16_t * codebook = nullptr;
};

void check_shape(const raw_side & raw, const std::string & where) {
    if (raw.H < 1 || raw.H > 4096 || raw.d < 8 || raw.d > GGML_KVTC_MAX_DIM || raw.d % 8 != 0) {
        fail(where + ": " + std::to_string(raw.H) + " heads of dimension " + std::to_string(raw.d) + " are out of range");
    }
    if (raw.n_codebook < 0 || raw.n_codebook > (int64_t) 1 << 28) {
        fail(where + ": codebook size out of range");
    }
}

void copy_f32(std::vector<float> & dst, const float * src, size_t n, const std::string & what) {
    dst.resize(n);
    memcpy(dst.data(), src, n*sizeof(float)); // the source may be unaligned
    for (float x : dst) {
        if (!std::isfinite(x)) {
            fail(what + " holds NaN or infinity");
        }
    }
}

void copy_f16(std::vector<float> & dst, const ggml_fp16_t * src, size_t n, const std::string & what) {
    std::vector<ggml_fp16_t> half(n);
    if (n > 0) { // else src may be null, which memcpy must not see
        memcpy(half.data(), src, n*sizeof(ggml_fp16_t));
    }
    dst.resize(n);
    ggml_fp16_to_fp32_row(half.data(), dst.data(), (int64_t) n);
    for (float x : dst) {
        if (!std::isfinite(x)) {
            fail(what + " holds NaN or infinity");
        }
    }
}

void check_widths(const ggml_kvtc_side_calibration & side, const std::string & where) {
    const int G = side.d/8;
    for (int budget = 0; budget < (int) side.bits.size(); ++budget) {
        size_t used = 0;
        for (int h = 0; h < side.H; ++h) {
            const int8_t * w = side.group_widths(h, budget);
            for (int g = 0; g < G; ++g) {
                if (std::find(std::begin(KVTC_WIDTHS), std::end(KVTC_WIDTHS), (int) w[g]) == std::end(KVTC_WIDTHS)) {
                    fail(where + ".widths: " + std::to_string(w[g]) + " bits is no width");
                }
                if (g > 0 && w[g] > w[g - 1]) {
                    fail(where + ".widths rise along the groups of head " + std::to_string(h));
                }
            }
            used = (used + 3)/4*4 + side.head_bytes(h, budget);
        }
        const size_t row = (size_t) side.H*side.d*side.bits[budget]/8;
        if (used > row) {
            fail(where + ".widths need " + std::to_string(used) + " bytes of a row of " + std::to_string(row));
        }
    }
}

void read_codebooks(ggml_kvtc_side_calibration & side, const std::string & where) {
    const int G = side.d/8;
    size_t next = 0;
    side.book.assign((size_t) side.H*G*9, -1);
    for (int h = 0; h < side.H; ++h) {
        for (int g = 0; g < G; ++g) {
            for (int w : KVTC_WIDTHS) {
                bool used = false;
                for (int budget = 0; budget < (int) side.bits.size(); ++budget) {
                    used = used || side.group_widths(h, budget)[g] == w;
                }
                if (w == 0 || !used) {
                    continue;
                }
                const size_t n = (size_t) 8 << w;
                if (next + n > side.levels.size()) {
                    fail(where + ".codebook is too short");
                }
                side.book[((size_t) h*G + g)*9 + w] = (int64_t) next;
                for (size_t i = 0; i < n; ++i) {
                    if ((i & ((1u << w) - 1)) != 0 && side.levels[next + i] < side.levels[next + i - 1]) {
                        fail(where + ".codebook: levels do not rise");
                    }
                }
                next += n;
            }
        }
    }
    if (next != side.levels.size()) {
        fail(where + ".codebook is too long");
    }
}

ggml_kvtc_side_calibration take_side(const raw_side & raw, const std::vector<int> & bits, const std::string & where) {
    ggml_kvtc_side_calibration side;
    side.H = (int) raw.H;
    side.d = (int) raw.d;
    side.bits = bits;
    const size_t n  = (size_t) side.H*side.d;
    const size_t nw = n/8*bits.size();
    copy_f32(side.mean,   raw.mean,     n,                      where + ".mean");
    copy_f32(side.scale,  raw.scale,    n,                      where + ".scale");
    copy_f32(side.gain,   raw.gain,     (size_t) 2*side.H,      where + ".gain");
    copy_f16(side.decode, raw.decode,   n*side.d,               where + ".decode");
    copy_f16(side.levels, raw.codebook, (size_t) raw.n_codebook, where + ".codebook");
    side.widths.assign(raw.widths, raw.widths + nw);

    for (float s : side.scale) {
        if (!(s > 0.0f)) {
            fail(where + ".scale holds a value that is not positive");
        }
    }
    for (int h = 0; h < side.H; ++h) {
        const float base = side.gain[2*h];
        const float rule = side.gain[2*h + 1];
        if (!(base > 1e-30f && base < 1e30f) || (rule != 0.0f && rule != 1.0f)) {
            fail(where + ".gain of head " + std::to_string(h) + " is out of range");
        }
    }
    check_widths(side, where);
    read_codebooks(side, where);
    return side;
}

// how files and messages name a side of a layer
std::string side_name(int64_t il, int s) {
    return "kvtc.blk." + std::to_string(il) + (s == 0 ? ".k" : ".v");
}

// The encode matrices of all heads, which are the inverses of the decode matrices: most of the time of opening a calibration.
void invert_bases(ggml_kvtc_calibration & cal) {
    struct head { ggml_kvtc_side_calibration & side; int h; std::string where; bool good; };
    std::vector<head> heads;
    for (int s = 0; s < 2; ++s) {
        for (auto & [il, side] : cal.layers[s]) {
            side.encode.resize(side.decode.size());
            for (int h = 0; h < side.H; ++h) {
                heads.push_back({ side, h, side_name(il, s), false });
            }
        }
    }
    kvtc_for_each(heads.size(), [&](size_t i) {
        head & x = heads[i];
        const size_t offset = (size_t) x.h*x.side.d*x.side.d;
        x.good = kvtc_invert(&x.side.decode[offset], &x.side.encode[offset], x.side.d);
    });
    for (const head & x : heads) {
        if (!x.good) {
            fail(x.where + ".decode of head " + std::to_string(x.h) + " has no usable inverse");
        }
    }
}

// a tensor of the sidecar with its expected type and shape (numpy order); -1 accepts any size and stores it
const void * get_tensor(ggml_context * ctx, const std::string & name, ggml_type type, std::initializer_list<int64_t *> shape) {
    const ggml_tensor * t = ggml_get_tensor(ctx, name.c_str());
    if (!t) {
        fail(name + " is missing");
    }
    if (t->type != type) {
        fail(name + " is " + ggml_type_name(t->type) + ", expected " + ggml_type_name(type));
    }
    int dim = (int) shape.size();
    for (int64_t * expected : shape) {
        const int64_t n = t->ne[--dim];
        if (*expected < 0) {
            *expected = n;
        } else if (*expected != n) {
            fail(name + " has the wrong shape");
        }
    }
    for (int i = (int) shape.size(); i < GGML_MAX_DIMS; ++i) {
        if (t->ne[i] != 1) {
            fail(name + " has the wrong shape");
        }
    }
    return t->data;
}

raw_side sidecar_side(ggml_context * ctx, const std::string & where, int64_t B) {
    raw_side raw;
    raw.H = raw.d = raw.n_codebook = -1;
    int64_t two = 2;
    raw.mean = (const float *) get_tensor(ctx, where + ".mean", GGML_TYPE_F32, { &raw.H, &raw.d });
    raw.n_codebook = 0;
    check_shape(raw, where);
    raw.n_codebook = -1;
    int64_t groups = raw.d/8;
    raw.scale    = (const float *)       get_tensor(ctx, where + ".scale",    GGML_TYPE_F32, { &raw.H, &raw.d });
    raw.gain     = (const float *)       get_tensor(ctx, where + ".gain",     GGML_TYPE_F32, { &raw.H, &two });
    raw.decode   = (const ggml_fp16_t *) get_tensor(ctx, where + ".decode",   GGML_TYPE_F16, { &raw.H, &raw.d, &raw.d });
    raw.widths   = (const int8_t *)      get_tensor(ctx, where + ".widths",   GGML_TYPE_I8,  { &raw.H, &B, &groups });
    raw.codebook = (const ggml_fp16_t *) get_tensor(ctx, where + ".codebook", GGML_TYPE_F16, { &raw.n_codebook });
    return raw;
}

// the embedded form: six sizes, then the blobs of K and V one after the other, each padded to 8 bytes
struct blob_reader {
    const uint8_t * p;
    size_t left;
    std::string where;

    const void * take(size_t n) {
        const size_t padded = (n + 7)/8*8;
        if (padded > left) {
            fail(where + " is too short");
        }
        const void * result = p;
        p    += padded;
        left -= padded;
        return result;
    }
};

void embedded_layer(const gguf_context * gguf, int64_t id, int il, ggml_kvtc_calibration & cal) {
    blob_reader in { (const uint8_t *) gguf_get_arr_data(gguf, id), gguf_get_arr_n(gguf, id)*8, "kvtc.blk." + std::to_string(il) };
    uint64_t sizes[6];
    memcpy(sizes, in.take(sizeof(sizes)), sizeof(sizes));
    for (int s = 0; s < 2; ++s) {
        const std::string where = side_name(il, s);
        raw_side raw;
        raw.d = (int64_t) std::min<uint64_t>(sizes[3*s], 1 << 30);
        raw.H = (int64_t) std::min<uint64_t>(sizes[3*s + 1], 1 << 30);
        raw.n_codebook = (int64_t) std::min<uint64_t>(sizes[3*s + 2], (uint64_t) 1 << 40);
        check_shape(raw, where);
        const size_t n = (size_t) (raw.H*raw.d);
        raw.mean     = (const float *)       in.take(n*4);
        raw.scale    = (const float *)       in.take(n*4);
        raw.gain     = (const float *)       in.take((size_t) raw.H*2*4);
        raw.decode   = (const ggml_fp16_t *) in.take(n*(size_t) raw.d*2);
        raw.widths   = (const int8_t *)      in.take(n/8*cal.bits.size());
        raw.codebook = (const ggml_fp16_t *) in.take((size_t) raw.n_codebook*2);
        cal.layers[s][il] = take_side(raw, cal.bits, where);
    }
    if (in.left != 0) {
        fail(in.where + " is too long");
    }
}

// N of "kvtc.blk.N" + tail; -1 for any other name
int64_t layer_of(const std::string & name, const char * tail) {
    int64_t il  = -1;
    int     end = 0;
    if (sscanf(name.c_str(), "kvtc.blk.%9" SCNd64 "%n", &il, &end) != 1 || il < 0) {
        return -1;
    }
    const std::string prefix = "kvtc.blk." + std::to_string(il); // no sign, no leading zeros
    return name.compare(0, end, prefix) == 0 && name.compare(end, strlen(tail), tail) == 0 &&
           (*tail != 0 || name.size() == (size_t) end) ? il : -1;
}

void check_layer(int64_t il, uint32_t n_layer) {
    if (il >= n_layer) {
        fail("it holds layer " + std::to_string(il) + " of a model of " + std::to_string(n_layer));
    }
}

// layers without a cache are absent
void read_embedded(const gguf_context * gguf, uint32_t n_layer, ggml_kvtc_calibration & cal) {
    for (int64_t id = 0; id < gguf_get_n_kv(gguf); ++id) {
        const int64_t il = layer_of(gguf_get_key(gguf, id), "");
        if (il < 0) {
            continue;
        }
        check_layer(il, n_layer);
        if (gguf_get_kv_type(gguf, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, id) != GGUF_TYPE_UINT64) {
            fail(std::string(gguf_get_key(gguf, id)) + " has the wrong type");
        }
        embedded_layer(gguf, id, (int) il, cal);
    }
}

void read_sidecar(const char * fname, const gguf_context * gguf, uint32_t n_layer, ggml_kvtc_calibration & cal) {
    // ggml aborts on sizes that it cannot allocate: none may go beyond the file; the last tensor ends the data
    std::unique_ptr<FILE, file_closer> file(ggml_fopen(fname, "rb"));
    const int64_t n_tensors = gguf_get_n_tensors(gguf);
    if (n_tensors == 0) {
        fail("it holds no layer");
    }
    const uint64_t offset = gguf_get_tensor_offset(gguf, n_tensors - 1);
    const uint64_t size   = gguf_get_tensor_size  (gguf, n_tensors - 1);
    if (!file || std::max(offset, size) > (uint64_t) 1 << 60 || !reaches(file.get(), gguf_get_data_offset(gguf) + offset + size)) {
        fail("it is truncated");
    }
    ggml_context * data = nullptr;
    std::unique_ptr<gguf_context, gguf_deleter> again(gguf_init_from_file(fname, { /*.no_alloc =*/ false, /*.ctx =*/ &data }));
    std::unique_ptr<ggml_context, ggml_deleter> ctx(data);
    if (!again || !ctx) {
        fail("its data cannot be read (truncated?)");
    }
    const char * const tails[2] = { ".k.", ".v." };
    for (int64_t id = 0; id < n_tensors; ++id) {
        for (const char * tail : tails) {
            const int64_t il = layer_of(gguf_get_tensor_name(gguf, id), tail);
            if (il < 0 || cal.layers[0].count((int) il) > 0) {
                continue;
            }
            check_layer(il, n_layer);
            for (int s = 0; s < 2; ++s) {
                const std::string where = side_name(il, s);
                cal.layers[s][(int) il] = take_side(sidecar_side(ctx.get(), where, (int64_t) cal.bits.size()), cal.bits, where);
            }
        }
    }
}

// what each layer keeps of a side when a budget is asked for: that budget, unless the file says otherwise
void read_layer_bits(const gguf_context * gguf, const std::string & key, uint32_t n_layer, ggml_kvtc_side side, ggml_kvtc_calibration & cal) {
    const size_t  n  = cal.bits.size()*n_layer;
    const int64_t id = gguf_find_key(gguf, key.c_str());
    if (id >= 0 && (gguf_get_kv_type(gguf, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, id) != GGUF_TYPE_INT32 || gguf_get_arr_n(gguf, id) != n)) {
        fail(key + " has the wrong type or size");
    }
    for (size_t i = 0; i < n; ++i) {
        const bool has  = cal.find((int) (i % n_layer), side) != nullptr;
        const int  bits = id >= 0 ? ((const int32_t *) gguf_get_arr_data(gguf, id))[i] : has ? cal.bits[i/n_layer] : 0;
        if (has ? cal.budget_index(bits) < 0 : bits != 0) {
            fail(key + ": " + std::to_string(bits) + " bits for layer " + std::to_string(i % n_layer) + (has ? " are none of kvtc.bits" : ", which has no cache"));
        }
        cal.layer_bits[side].push_back(bits);
    }
}

std::unique_ptr<ggml_kvtc_calibration> read_calibration(const char * fname) {
    std::unique_ptr<gguf_context, gguf_deleter> gguf(gguf_init_from_file(fname, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }));
    if (!gguf) {
        fail("not a readable GGUF file (truncated?)");
    }
    const int64_t id_version = find_key(gguf.get(), "kvtc.version", GGUF_TYPE_UINT32);
    const uint32_t version = gguf_get_val_u32(gguf.get(), id_version);
    if (version != GGML_KVTC_VERSION) {
        fail("format version " + std::to_string(version) + ", this build reads version " + std::to_string(GGML_KVTC_VERSION) +
             (version > GGML_KVTC_VERSION ? ": update kvtc" : ": calibrate again"));
    }

    auto cal = std::make_unique<ggml_kvtc_calibration>();
    cal->fingerprint = gguf_get_val_str(gguf.get(), find_key(gguf.get(), "kvtc.model.fingerprint", GGUF_TYPE_STRING));
    if (cal->fingerprint.size() != 16 || cal->fingerprint.find_first_not_of("0123456789abcdef") != std::string::npos) {
        fail("kvtc.model.fingerprint is not 16 hex digits");
    }

    const uint32_t n_layer = gguf_get_val_u32(gguf.get(), find_key(gguf.get(), "kvtc.block_count", GGUF_TYPE_UINT32));
    if (n_layer < 1 || n_layer > 65536) {
        fail("kvtc.block_count is out of range");
    }

    const int64_t id_bits = find_key(gguf.get(), "kvtc.bits", GGUF_TYPE_ARRAY);
    if (gguf_get_arr_type(gguf.get(), id_bits) != GGUF_TYPE_INT32 || gguf_get_arr_n(gguf.get(), id_bits) < 1 || gguf_get_arr_n(gguf.get(), id_bits) > GGML_KVTC_MAX_BITS) {
        fail("kvtc.bits has the wrong type or size");
    }
    for (size_t i = 0; i < gguf_get_arr_n(gguf.get(), id_bits); ++i) {
        const int32_t b = ((const int32_t *) gguf_get_arr_data(gguf.get(), id_bits))[i];
        if (b < 1 || b > GGML_KVTC_MAX_BITS || (i > 0 && b <= cal->bits.back())) {
            fail("kvtc.bits is out of range");
        }
        cal->bits.push_back(b);
        cal->bits_text += (i > 0 ? "," : "") + std::to_string(b);
    }

    const int64_t id_type = gguf_find_key(gguf.get(), "general.type");
    const bool sidecar = id_type >= 0 && gguf_get_kv_type(gguf.get(), id_type) == GGUF_TYPE_STRING &&
                         strcmp(gguf_get_val_str(gguf.get(), id_type), "kvtc") == 0;
    if (sidecar) {
        read_sidecar(fname, gguf.get(), n_layer, *cal);
    } else {
        read_embedded(gguf.get(), n_layer, *cal);
    }
    if (cal->layers[0].empty()) {
        fail("it holds no layer");
    }
    invert_bases(*cal);
    read_layer_bits(gguf.get(), "kvtc.layer_bits.k", n_layer, GGML_KVTC_K, *cal);
    read_layer_bits(gguf.get(), "kvtc.layer_bits.v", n_layer, GGML_KVTC_V, *cal);
    return cal;
}

} // namespace

static int find_index(const std::vector<int> & bits, int b) {
    const auto it = std::find(bits.begin(), bits.end(), b);
    return it == bits.end() ? -1 : (int) (it - bits.begin());
}

int ggml_kvtc_side_calibration::budget_index(int b) const {
    return find_index(bits, b);
}

int ggml_kvtc_calibration::budget_index(int b) const {
    return find_index(bits, b);
}

const ggml_kvtc_side_calibration * ggml_kvtc_calibration::find(int il, ggml_kvtc_side side) const {
    const auto it = layers[side].find(il);
    return it == layers[side].end() ? nullptr : &it->second;
}

ggml_kvtc_calibration * ggml_kvtc_calibration_open(const char * fname, char * err, size_t err_size) {
    try {
        return read_calibration(fname).release();
    } catch (const std::exception & e) {
        snprintf(err, err_size, "calibration %s: %s", fname, e.what());
        return nullptr;
    }
}

void ggml_kvtc_calibration_free(ggml_kvtc_calibration * cal) {
    delete cal;
}

bool ggml_kvtc_calibration_present(const char * fname) {
    std::unique_ptr<gguf_context, gguf_deleter> gguf(gguf_init_from_file(fname, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }));
    return gguf && gguf_find_key(gguf.get(), "kvtc.version") >= 0;
}

const char * ggml_kvtc_calibration_fingerprint(const ggml_kvtc_calibration * cal) {
    return cal->fingerprint.c_str();
}

bool ggml_kvtc_calibration_has_bits(const ggml_kvtc_calibration * cal, int bits) {
    return cal->budget_index(bits) >= 0;
}

const char * ggml_kvtc_calibration_bits(const ggml_kvtc_calibration * cal) {
    return cal->bits_text.c_str();
}

int ggml_kvtc_calibration_layer_bits(const ggml_kvtc_calibration * cal, int il, ggml_kvtc_side side, int bits) {
    const int budget = cal->budget_index(bits);
    return budget < 0 || !cal->find(il, side) ? 0 : cal->layer_bits[side][cal->layer_bits[side].size()/cal->bits.size()*budget + il];
}

bool ggml_kvtc_calibration_shape(const ggml_kvtc_calibration * cal, int il, ggml_kvtc_side side, int * n_head, int * head_dim) {
    const auto * s = cal->find(il, side);
    if (s) {
        *n_head   = s->H;
        *head_dim = s->d;
    }
    return s != nullptr;
}

void ggml_kvtc_encode_matrix(const ggml_kvtc_calibration * cal, int il, ggml_kvtc_side side, float * encode, float * bias) {
    const auto * s = cal->find(il, side);
    memcpy(encode, s->encode.data(), s->encode.size()*sizeof(float));
    for (int h = 0; h < s->H; ++h) {
        for (int c = 0; c < s->d; ++c) {
            const float * row = &s->encode[((size_t) h*s->d + c)*s->d];
            double sum = 0.0;
            for (int i = 0; i < s->d; ++i) {
                sum += (double) row[i]*s->mean[(size_t) h*s->d + i];
            }
            bias[(size_t) h*s->d + c] = (float) -sum;
        }
    }
}
