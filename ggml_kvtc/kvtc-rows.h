// Entropy coding of rows that are all laid out alike: cache rows of codes, exact rows of f16 (README.md, "Stored states").
// A model says how a row is made of fields and how often each value of a field occurs; a block of rows is coded under it
// on its own. The numpy twin is python/kvtc_gguf/reference_rows.py.
#pragma once

#include "kvtc.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_KVTC_PROB_BITS 12      // frequencies of a table sum to 4096
#define GGML_KVTC_LANES     32      // interleaved rANS states of a block
#define GGML_KVTC_TABLES    64      // most tables that the fields of one width share
#define GGML_KVTC_MAX_ROW   65536   // bytes; also bounds what a hostile model makes a reader allocate, 16 MiB
#define GGML_KVTC_MAX_CODED 32768   // coded fields of a row

enum ggml_kvtc_field {
    GGML_KVTC_FIELD_CODE = 0, // 1 ... 6 or 8 bits, entropy coded
    GGML_KVTC_FIELD_HALF = 1, // an f16: the upper byte entropy coded, the lower, which is noise, kept as it is
    GGML_KVTC_FIELD_ZERO = 2, // a byte of padding
};

// count fields of bits bits each, one behind the other in whole bytes, little endian
struct ggml_kvtc_run {
    uint8_t  bits; // 16 of a HALF, 8 of a ZERO
    uint8_t  kind;
    uint16_t count;
};

struct ggml_kvtc_rows; // the model

// False unless the runs are in range.
GGML_API bool ggml_kvtc_runs_valid(const struct ggml_kvtc_run * runs, int n_runs);

// The runs of a cache row of a kvtc or turbo type: all of them, or as many as fit into n_max. Returns their number, 0 if the
// calibration has no such side.
GGML_API int ggml_kvtc_cache_runs(const struct ggml_kvtc_calibration * cal, int il, enum ggml_kvtc_side side, int bits, size_t row_bytes,
                                  struct ggml_kvtc_run * runs, int n_max);

// The model that suits n_rows rows, for valid runs.
GGML_API struct ggml_kvtc_rows * ggml_kvtc_rows_fit  (const struct ggml_kvtc_run * runs, int n_runs, const uint8_t * rows, int64_t n_rows);
// Its bytes: all of them, or as many as fit into size. Returns their number.
GGML_API size_t                  ggml_kvtc_rows_write(const struct ggml_kvtc_rows * model, uint8_t * data, size_t size);
// NULL unless the bytes are those of a model
GGML_API struct ggml_kvtc_rows * ggml_kvtc_rows_read (const uint8_t * data, size_t size);
GGML_API void                    ggml_kvtc_rows_free (struct ggml_kvtc_rows * model);
GGML_API size_t                  ggml_kvtc_row_bytes (const struct ggml_kvtc_rows * model);

// Most bytes that a block of n_rows rows takes.
GGML_API size_t ggml_kvtc_rows_bound (const struct ggml_kvtc_rows * model, int64_t n_rows);
// Bytes of the block, written to data, which has room for `bound`; 0 if a row has a value that the model gives no frequency.
GGML_API size_t ggml_kvtc_rows_encode(const struct ggml_kvtc_rows * model, const uint8_t * rows, int64_t n_rows, uint8_t * data);
// False unless data is a whole block of n_rows rows. Uses AVX2 where the processor has it; GGML_KVTC_NO_VECTORS in the environment keeps it from that.
GGML_API bool   ggml_kvtc_rows_decode(const struct ggml_kvtc_rows * model, const uint8_t * data, size_t size, uint8_t * rows, int64_t n_rows);

// The CRC-32 of zlib, of bytes that follow those of `crc`; 0 to begin with.
GGML_API uint32_t ggml_kvtc_crc32(uint32_t crc, const uint8_t * data, size_t size);

#ifdef __cplusplus
}
#endif
