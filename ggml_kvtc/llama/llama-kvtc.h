// kvtc in llama.cpp: what the hooks in llama-kv-cache.cpp, llama-graph.cpp and llama-context.cpp call.
#pragma once

#include "llama.h"
#include "kvtc.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LLAMA_KVTC_BY_TYPE -1 // 4 sinks and a window of 128 where a side has a kvtc type; none of either where only turbo types are

struct llama_kvtc_params {
    const char * files;    // calibration files, separated by commas; NULL or "": the model's metadata, then the sidecar
    int32_t      n_sink;   // first positions of a sequence that stay exact, or LLAMA_KVTC_BY_TYPE
    int32_t      n_window; // newest positions of a sequence that stay exact, or LLAMA_KVTC_BY_TYPE
};

LLAMA_API struct llama_kvtc_params llama_kvtc_default_params(void);

// Parameters of all contexts created from now on; the file names are copied. Kept apart from llama_context_params: bindings mirror that struct.
LLAMA_API void llama_kvtc_set_params(struct llama_kvtc_params params);

// While on, graphs of contexts with a plain cache hold nodes kvtc_{q,k,v,q_rope,k_rope}-<layer> for calibration.
LLAMA_API void llama_kvtc_set_capture(bool on);

// True if the context keeps a window of exact rows, which a rollback beyond LLAMA_KVTC_ROLLBACK tokens cannot bring back.
LLAMA_API bool llama_kvtc_has_window(struct llama_context * ctx);

// True if tokens in the window before position pos are there, but their exact rows are not.
LLAMA_API bool llama_kvtc_is_lost(struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

// Where to compute again from so that the window before position pos is exact: twice the window back.
LLAMA_API llama_pos llama_kvtc_recompute_from(struct llama_context * ctx, llama_pos pos);

#ifdef __cplusplus
}

#include "ggml-cpp.h"
#include "llama-kvtc-changes.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

class  llama_io_read_i;
class  llama_io_write_i;
class  llama_kv_cells;
struct llama_cparams;
struct llama_hparams;
struct llama_model;
struct llama_ubatch;
struct llm_graph_context;

// which model came from which file; called by the model loader
void llama_kvtc_bind_model  (const llama_model * model, const std::string & path);
void llama_kvtc_unbind_model(const llama_model * model);

// the model's calibration: --kvtc-file, its metadata, or the sidecar. Throws one line if there is none that fits.
std::shared_ptr<ggml_kvtc_calibration> llama_kvtc_find_calibration(const llama_model & model, std::string & source);

// The type of a layer's cache where `type` was asked for: another kvtc type if the calibration says so. A type that nothing
// can serve comes back as it is; llama_kvtc::create says why.
ggml_type llama_kvtc_layer_type(const llama_model & model, ggml_type type, int il, ggml_kvtc_side side);

// Values in a row of a cache tensor: of the turbo types more than n_embd, what n_head vectors have without their norms.
uint32_t llama_kvtc_row_values(ggml_type type, uint32_t n_head, uint32_t n_embd);
// The same where the tensor is there: n_embd, or what it was made with.
uint32_t llama_kvtc_row_values(const ggml_tensor * cache, uint32_t n_embd);

// Flash attention is how kvtc attends: on with a log line when left to llama.cpp, an error when switched off.
bool llama_kvtc_check_flash_attn(llama_context_params & params);

// "kvtc-k<a>v<b>" to two types; false if it is no such name
LLAMA_API bool llama_kvtc_parse_cache_type(const std::string & name, ggml_type & type_k, ggml_type & type_v);

// Throws unless `left`, what a file still has, is enough: llama_file would read less and say nothing.
void llama_kvtc_check_left(size_t left, size_t wanted);

// A file that is there whole or not at all: write(path) writes one beside it, which then takes its place. What write gives comes back,
// 0 or false for a failure.
std::string llama_kvtc_part_file   (const char * path);
void        llama_kvtc_replace_file(const std::string & part, const char * path); // throws
void        llama_kvtc_remove_file (const std::string & part);

template <typename F>
auto llama_kvtc_write_file(const char * path, F && write) -> decltype(write(path)) {
    const std::string part = llama_kvtc_part_file(path);
    try {
        const auto result = write(part.c_str());
        if (result) {
            llama_kvtc_replace_file(part, path);
        } else {
            llama_kvtc_remove_file(part);
        }
        return result;
    } catch (...) {
        llama_kvtc_remove_file(part);
        throw;
    }
}

struct llama_kvtc_layer {
    uint32_t      il;
    ggml_tensor * k;
    ggml_tensor * v;
};

// Tokens that a sequence can be rolled back by (speculative decoding) before its window loses exact rows.
constexpr int32_t LLAMA_KVTC_ROLLBACK = 64;

// The part of a KV cache that is kvtc's: plans, the exact rows of sinks and window, and who holds which exact row.
class llama_kvtc {
public:
    struct config {
        const llama_model   & model;
        const llama_hparams & hparams;
        bool                  offload;
        bool                  shared;   // the cache borrows cells of another one
        uint32_t              n_seq_max;
        uint32_t              n_stream;
        uint32_t              n_swa;
        int                   swa_type; // llama_swa_type
        const char          * name_tag;
    };

    // nullptr unless a layer has a kvtc type; throws one line when the model or its calibration cannot serve it
    static std::shared_ptr<llama_kvtc> create(const config & cfg, const std::vector<llama_kvtc_layer> & layers, const std::vector<llama_kv_cells> & cells);

    bool is_kvtc(ggml_kvtc_side side) const { return coded[side]; }

    // false where keys are coded as they are after RoPE: rotating them again would be coding them again
    bool can_shift() const;

    void memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const;

    // the ubatch has been placed: streams strm, cells idxs (one list per stream), n_kv cells to attend
    void apply(const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs, const llama_ubatch & ubatch, uint32_t n_kv);

    // all cells of stream src, with their exact rows, become those of dst: what knows which row is whose, then the rows
    void copy_cells(uint32_t src, uint32_t dst);
    void copy_rows (uint32_t src, uint32_t dst);

    // The state of the cache, or of one sequence, in its container (llama-kvtc-io.cpp): write or read is called with what packs or
    // unpacks, and is to do what it always does. Writing: false, and nothing done, where that is what is going on already, or where the
    // state stays on its device. Reading says what is wrong in one line, calls clear and throws.
    bool state_write(llama_io_write_i & io, llama_seq_id seq_id, uint32_t flags, const std::function<void(llama_io_write_i &)> & write);
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, uint32_t flags, const std::function<void(llama_io_read_i  &)> & read,
                     const std::function<void()> & clear);

    // The kvtc section of a saved state, for cells of a stream in the order they are saved in. Reading gives false if something is
    // wrong; the cells then hold codes only.
    void cells_write(llama_io_write_i & io, uint32_t stream, const std::vector<std::pair<uint32_t, uint32_t>> & ranges, llama_seq_id seq_id);
    bool cells_read (llama_io_read_i  & io, uint32_t stream, const std::vector<uint32_t> & idxs);

    // has the sequence lost exact rows of the window that ends before position pos?
    bool is_lost(llama_seq_id seq_id, llama_pos pos);
    int32_t n_window() const { return params.n_window; }

    // nodes that transform x [head_dim, n_head, n_tokens] and write it to the rows idxs of the cache
    ggml_tensor * store(ggml_context * ctx, ggml_kvtc_side side, ggml_tensor * x, ggml_tensor * idxs, int il);

    // K before RoPE, or k_cur itself when the cache keeps keys as they are
    ggml_tensor * keys(const llm_graph_context & g, ggml_tensor * k_cur, int il);

    ggml_tensor * attend(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * kq_b,
                         ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int il);

    // What an info tensor in the host's memory holds: what has not changed since is not written again
    struct info_written {
        struct part {
            uint64_t positions; // moments
            uint64_t slots;
            bool     hides;     // cells of other sequences
        };
        uint32_t first_stream = 0;
        uint32_t n_kv         = 0;
        std::vector<part> parts; // of streams
    };

    int64_t info_size() const; // of the ubatch in place
    // needs_mask: the operation has a mask; else cells that are not of the ubatch's sequence count as empty. written: what was left there by
    // the tensor's last time, since when nothing else has written to it
    void set_info (ggml_tensor * info, const llama_ubatch & ubatch, bool needs_mask, info_written & written) const;
    void set_slots(ggml_tensor * slots) const;

    // False where positions alone say which cells a query sees: llama.cpp then neither allocates nor fills its mask,
    // n_tokens*n_kv numbers that the host would make and copy for every ubatch.
    bool needs_mask(const llama_ubatch & ubatch, const llama_cparams & cparams) const;

private:
    struct layer {
        uint32_t      il;
        ggml_tensor * cache [2] = {};
        ggml_tensor * encode[2] = {}; // F32 [d, d, n_head]
        ggml_tensor * bias  [2] = {}; // F32 [d, 1, n_head]
        ggml_tensor * rows  [2] = {}; // F16 [d, n_slots, n_head] views of exact
        ggml_tensor * exact     = nullptr;
        ggml_tensor * pack      = nullptr;
        bool    on_device = false; // the pack has a CUDA device's layout
        int32_t limits[GGML_KVTC_N_LIMITS] = {}; // of that pack
        std::vector<int32_t> rope; // op_params the pack's rotation was made from
    };

    struct buffer {
        ggml_backend_buffer_type_t buft;
        bool                       exact; // exact rows, or bases
        ggml_context_ptr           ctx;
        ggml_backend_buffer_ptr    buf;
    };

    struct owner {
        int32_t stream = -1;
        int32_t cell   = -1;
    };

    llama_kvtc(const config & cfg, const std::vector<llama_kvtc_layer> & layers, const std::vector<llama_kv_cells> & cells);

    void check_model  (const config & cfg, const std::vector<llama_kvtc_layer> & layers) const;
    void check_layer  (const config & cfg, const llama_kvtc_layer & l) const;
    void find_calibration(const config & cfg, const std::vector<llama_kvtc_layer> & layers);
    void check_device (const config & cfg, ggml_backend_dev_t dev, const layer & l) const;
    void create_layers(const config & cfg, const std::vector<llama_kvtc_layer> & layers);
    void print_info   () const;
    size_t get_buffer_size(const buffer & b) const;
    void set_rope     (layer & l, const int32_t * op_params, const ggml_tensor * freq_factors);
    uint32_t stream_of(llama_seq_id seq_id) const { return slot_of.size() > 1 ? seq_id : 0; }
    int32_t distance  (uint32_t stream, uint32_t cell, llama_seq_id seq_id = -1) const;
    bool must_keep    (uint32_t stream, uint32_t cell, llama_seq_id seq_id = -1) const;
    void set_slot     (uint32_t stream, uint32_t cell, int32_t slot);
    void set_owner    (int32_t slot, uint32_t stream, uint32_t cell);
    void commit       ();
    std::vector<std::pair<int32_t, int32_t>> find_slots(uint32_t stream, size_t n) const;
    // The exact rows alone of a sequence whose codes stay in the cache: what a rollback beyond LLAMA_KVTC_ROLLBACK loses.
    // Reading takes the sequence back to when they were written; later tokens keep codes only.
    void state_write_partial(llama_io_write_i & io, llama_seq_id seq_id);
    void state_read_partial (llama_io_read_i  & io, llama_seq_id seq_id);

    friend class llama_kvtc_packer;
    bool find_place   (const ggml_tensor * t, size_t offset, struct llama_kvtc_rows_place & place) const;

    void write_head   (llama_io_write_i & io, const std::vector<int32_t> & keys, const std::vector<int32_t> & positions) const;
    void write_rows   (llama_io_write_i & io, const std::vector<int32_t> & slots) const;
    std::vector<int32_t> slots_for(uint32_t stream, size_t n) const;
    void read_rows    (llama_io_read_i  & io, const std::vector<int32_t> & slots) const;
    std::vector<int32_t> read_head(llama_io_read_i & io, const std::vector<int32_t> & positions) const;
    template <typename F> void for_each_row(const std::vector<int32_t> & slots, F && f) const;
    layer & get_layer (int il);
    const layer & get_layer(int il) const;

    const llama_model                 & model;
    const llama_hparams               & hparams;
    const std::vector<llama_kv_cells> & cells;
    const uint32_t n_seq_max;
    int32_t n_span = 0; // how far back a query sees, itself included; 0: only a mask can tell
    int32_t n_keep = 0; // newest positions of a sequence whose exact rows are kept: the window and what a rollback may bring back
    bool coded[2] = {};
    bool turbo[2] = {}; // coded, and without calibration

    llama_kvtc_params params;
    std::string source;
    std::shared_ptr<ggml_kvtc_calibration> calibration;
    uint64_t calibration_hash = 0; // taken once: it reads every byte of the calibration, and a server saves states all the time

    std::vector<layer> layers;

    // What asking for a state's size has packed, for the call that writes it; until the next tokens come.
    struct packed_item {
        uint64_t             hash; // of what was packed
        std::vector<uint8_t> bytes;
    };
    std::vector<packed_item> packed;
    std::string refusal; // why a state is not read
    bool sliding = false; // the cache drops tokens behind a window of its own, so that a part of its state is not the exact rows alone

    // The keys that the graph in the making wrote last. The values' write names them as a source that it does not read, so that their
    // memory is not given to the values' components: else no kernel could write both sides at once. It takes their indices, too.
    struct {
        ggml_tensor * x    = nullptr;
        ggml_tensor * idxs = nullptr;
    } last_keys;
    std::vector<buffer> buffers; // of every device; apart from the cache's own buffers, which are zeroed on clear

    uint32_t n_slots = 0; // per stream
    std::vector<owner> owners;                    // [n_stream*n_slots]
    std::vector<std::vector<int32_t>> slot_of;    // [n_stream][cell] as in the info tensor of ggml_kvtc_attn
    std::vector<llama_kvtc_changes> slot_changes; // [n_stream]

    // the ubatch in place; empty once its tokens are at rest
    uint32_t first_stream = 0;
    uint32_t n_stream_cur = 1;
    uint32_t n_kv_cur     = 0;
    int64_t  n_tokens_cur = 0;
    std::vector<owner>   cells_cur; // cell of each token
    std::vector<int64_t> slots_cur; // its slot, or -1
};

// hooks of llm_graph_context::build_attn
ggml_tensor * llm_kvtc_keys(const llm_graph_context & g, llama_kvtc * kvtc, ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur, float kq_scale, int il);

#endif
