// kvtc: KV-cache transform coding for ggml. The public C interface; README.md beside this file is the format's spec.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_KVTC_VERSION   1
#define GGML_KVTC_MAX_BITS  6   // kvtc1 ... kvtc6
#define GGML_KVTC_N_WIDTHS  8   // a group's width is one of {0, 1, 2, 3, 4, 5, 6, 8} bits
#define GGML_KVTC_MAX_DIM   512 // largest head_dim
#define GGML_KVTC_N_LIMITS  7   // numbers that a pack on a CUDA device tells the kernels' launches

enum ggml_kvtc_side {
    GGML_KVTC_K = 0,
    GGML_KVTC_V = 1,
};

// RoPE pairings a pack can undo; GGML_KVTC_ROPE_NONE stores keys as they are
enum ggml_kvtc_rope_type {
    GGML_KVTC_ROPE_NONE   = 0,
    GGML_KVTC_ROPE_NORMAL = 1, // pairs (2i, 2i + 1)
    GGML_KVTC_ROPE_NEOX   = 2, // pairs (i, i + n_rot/2)
};

struct ggml_kvtc_rope {
    enum ggml_kvtc_rope_type type;
    int32_t n_rot;                                // rotated dimensions, the first of each head
    float   mscale;                               // magnitude scale (YaRN), 1 otherwise
    double  inv_freq[GGML_KVTC_MAX_DIM/2];        // effective inverse frequencies: angle = position * inv_freq
};

//
// types
//

// true for GGML_TYPE_KVTC1 ... GGML_TYPE_KVTC6 and for GGML_TYPE_TURBO2 ... GGML_TYPE_TURBO4
GGML_API bool ggml_kvtc_is_type  (enum ggml_type type);
// true for the latter: data-free, keys as they are after RoPE, an f16 norm beside the codes of each vector
GGML_API bool ggml_kvtc_is_turbo (enum ggml_type type);
// bits of a code of these types (of kvtc types, bits per value with everything), 0 for any other type
GGML_API int  ggml_kvtc_type_bits(enum ggml_type type);
// "kvtc2" -> GGML_TYPE_KVTC2; GGML_TYPE_COUNT for any name but those of these types
GGML_API enum ggml_type ggml_kvtc_type_from_name(const char * name);
// Values (ne[0]) that a cache tensor of the type has a row of, for n_head vectors of head_dim: turbo types also have room for norms.
GGML_API int64_t ggml_kvtc_row_values(enum ggml_type type, int64_t n_head, int64_t head_dim);

//
// calibration files
//

struct ggml_kvtc_calibration;

// Read a calibration from a sidecar (general.type = "kvtc") or from a model's own metadata.
// Returns NULL and one line in err when the file holds none or anything in it is out of range.
GGML_API struct ggml_kvtc_calibration * ggml_kvtc_calibration_open(const char * fname, char * err, size_t err_size);
GGML_API void                           ggml_kvtc_calibration_free(struct ggml_kvtc_calibration * cal);

// true if the GGUF carries calibration keys at all (without reading the payload)
GGML_API bool         ggml_kvtc_calibration_present    (const char * fname);
GGML_API const char * ggml_kvtc_calibration_fingerprint(const struct ggml_kvtc_calibration * cal);
// names the calibration itself, whatever file it came from: saved states hold codes that mean nothing under another one
GGML_API uint64_t     ggml_kvtc_calibration_hash       (const struct ggml_kvtc_calibration * cal);
GGML_API bool         ggml_kvtc_calibration_has_bits   (const struct ggml_kvtc_calibration * cal, int bits);
// comma-separated list of the budgets the file can serve
GGML_API const char * ggml_kvtc_calibration_bits       (const struct ggml_kvtc_calibration * cal);
// bits that a layer keeps of a side when the user asks for `bits`; 0 if the file cannot serve these, or has no such layer
GGML_API int          ggml_kvtc_calibration_layer_bits (const struct ggml_kvtc_calibration * cal, int il, enum ggml_kvtc_side side, int bits);
// shape of one side of a layer; false if the file has no such layer
GGML_API bool         ggml_kvtc_calibration_shape      (const struct ggml_kvtc_calibration * cal, int il, enum ggml_kvtc_side side,
                                                        int * n_head, int * head_dim);

// The data-free types need no file: a calibration without layers, or a copy of one from a file, to which their layers are added.
GGML_API struct ggml_kvtc_calibration * ggml_kvtc_calibration_copy     (const struct ggml_kvtc_calibration * cal); // NULL: an empty one
GGML_API void                           ggml_kvtc_calibration_set_turbo(struct ggml_kvtc_calibration * cal, int il, enum ggml_kvtc_side side,
                                                                        enum ggml_type type, int n_head, int head_dim);

// Fingerprint of a model file: 16 hex digits and a terminating zero in out. False and one line in err if it cannot be read.
GGML_API bool ggml_kvtc_fingerprint(const char * fname, char out[17], char * err, size_t err_size);

// Encode matrices [head_dim, head_dim, n_head] (ggml order: row c of head h gives component c) and
// biases [head_dim, 1, n_head]: z = encode * x + bias.
GGML_API void ggml_kvtc_encode_matrix(const struct ggml_kvtc_calibration * cal, int il, enum ggml_kvtc_side side,
                                      float * encode, float * bias);

//
// packs: what the CPU kernels need of one layer, in one block of bytes
//

// Size in bytes. bits_k / bits_v: budget of a kvtc side, 0 for a side kept in another type.
GGML_API size_t ggml_kvtc_pack_size (const struct ggml_kvtc_calibration * cal, int il, int bits_k, int bits_v);
GGML_API void   ggml_kvtc_pack_write(const struct ggml_kvtc_calibration * cal, int il, int bits_k, int bits_v, void * pack);
// Fill in the rotation tables. The pack is born with GGML_KVTC_ROPE_NONE.
GGML_API void   ggml_kvtc_pack_set_rope(void * pack, const struct ggml_kvtc_rope * rope);
// The same for CUDA devices (kvtc-pack-cuda.h). limits: what the kernels' launches need of a pack, for ggml_kvtc_attn_params.
GGML_API size_t ggml_kvtc_cuda_pack_size    (const struct ggml_kvtc_calibration * cal, int il, int bits_k, int bits_v);
GGML_API void   ggml_kvtc_cuda_pack_write   (const struct ggml_kvtc_calibration * cal, int il, int bits_k, int bits_v, void * pack);
GGML_API void   ggml_kvtc_cuda_pack_set_rope(void * pack, const struct ggml_kvtc_rope * rope);
GGML_API void   ggml_kvtc_cuda_pack_limits  (const void * pack, int32_t limits[GGML_KVTC_N_LIMITS]);

// Parameters of a ROPE node (op_params as ggml_rope_ext stores them, freq_factors or NULL) as a table of inverse
// frequencies. False for modes that are no rotation by one position (M-RoPE, vision).
GGML_API bool   ggml_kvtc_rope_from_params(const int32_t * op_params, const float * freq_factors, struct ggml_kvtc_rope * rope);

//
// operations
//

// Scatter transformed vectors into a cache. Returns a view of cache.
//   cache : kvtc type  [row, n_cells]              -> coded rows, or
//           F16        [head_dim, n_slots, n_head] -> exact rows
//   z     : F32 [head_dim, n_tokens, n_head], idxs: I64 [n_tokens] row of each token, negative: not stored
GGML_API struct ggml_tensor * ggml_kvtc_set_rows(
        struct ggml_context * ctx,
        struct ggml_tensor  * cache,
        struct ggml_tensor  * z,
        struct ggml_tensor  * idxs,
        struct ggml_tensor  * pack,
        enum ggml_kvtc_side   side);

// A graph's allocator does not give away the memory of x (or NULL) before `rows`, a result of ggml_kvtc_set_rows, which does not read x.
// False where it keeps six already.
GGML_API bool ggml_kvtc_set_rows_keep(struct ggml_tensor * rows, struct ggml_tensor * x);

struct ggml_kvtc_attn_params {
    float   scale;
    float   max_bias;
    float   logit_softcap;
    int32_t n_sink;
    int32_t n_window;
    int32_t n_slots;
    int32_t n_span;    // without a mask: how far back a query sees, itself included; 0: every query sees every cell
    // of the pack on a CUDA device: the largest payload of a head, K and V, its largest tables, and these as pairs; rotation pairs that do not
    // turn slowly; else zeros
    int32_t limits[GGML_KVTC_N_LIMITS];
};

// Attention over a cache of which at least one side is of a kvtc type.
//   q     : F32 [head_dim_k, n_tokens, n_head, n_stream], after RoPE
//   k, v  : [head_dim, n_kv, n_head_kv, n_stream] views; nb[1] is the row stride. A kvtc side has no meaning by head
//   mask  : F16 [n_kv, n_tokens, 1, n_stream] or NULL;  sinks: F32 [n_head] or NULL
//   info  : I32 [2*n_kv*n_stream + n_tokens*n_stream]: (position, slot) per cell, then the position of every query.
//           slot >= 0: row of exact; -1: codes only; <= -2: token -(slot + 2) of this batch (zk, zv)
//   exact : F16, K part [head_dim_k, n_slots, n_head_kv] then V part (only kvtc sides), or NULL
//   zk, zv: F32 [head_dim, n_tokens*n_stream, n_head_kv] of a kvtc side, or NULL
// Key j counts exactly for query i when it has a slot and (pos_i - pos_j < n_window or pos_j < n_sink).
// Without a mask but with n_span, query i sees cell j when pos_j >= 0 and 0 <= pos_i - pos_j < n_span.
// Result: F32 [head_dim_v, n_head, n_tokens, n_stream].
GGML_API struct ggml_tensor * ggml_kvtc_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * sinks,
        struct ggml_tensor  * pack,
        struct ggml_tensor  * info,
        struct ggml_tensor  * exact,
        struct ggml_tensor  * zk,
        struct ggml_tensor  * zv,
        struct ggml_kvtc_attn_params params);

#ifdef __cplusplus
}
#endif
