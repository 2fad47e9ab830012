// The container of stored states (README.md, "Stored states"): records one behind the other, each with its checksum.
//
//   container := u32 "kvts" | u32 version | record* | end record
//   record    := kvtc_record | its bytes
//   section   := a model record, then the blocks of its rows
#pragma once

#include "kvtc-rows.h"
#include "llama.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

constexpr uint32_t KVTC_CONTAINER_MAGIC   = 0x7374766b; // "kvts"
constexpr uint32_t KVTC_CONTAINER_VERSION = 2;
constexpr uint32_t KVTC_BLOCK_ROWS        = 1024;
constexpr uint32_t KVTC_MAX_ROWS          = 1u << 16; // of a block
constexpr uint32_t KVTC_MAX_BYTES         = 1u << 24; // of a record, and of the rows of a block
constexpr size_t   KVTC_EIGHT_STEP        = 2;        // bytes of a row in 8 bits before its values

enum kvtc_record_kind : uint8_t {
    KVTC_RECORD_PLAIN = 1, // what llama.cpp writes besides rows
    KVTC_RECORD_MODEL = 2, // begins a section
    KVTC_RECORD_BLOCK = 3,
    KVTC_RECORD_END   = 4,
};

enum kvtc_coder : uint8_t {
    KVTC_CODER_STORED = 0, // rows as they are; as a model: u32 bytes of a row
    KVTC_CODER_RANS   = 1,
    KVTC_CODER_EIGHT  = 2, // of the model of exact rows: rANS of rows that are kept in 8 bits
};

// whose rows; of exact rows also of which head
enum kvtc_what : uint8_t {
    KVTC_WHAT_K       = 0,
    KVTC_WHAT_V       = 1,
    KVTC_WHAT_EXACT_K = 2,
    KVTC_WHAT_EXACT_V = 3,
};

struct kvtc_record {
    uint8_t  kind     = 0;
    uint8_t  coder    = 0;
    uint8_t  what     = 0;
    uint8_t  zero     = 0;
    uint16_t layer    = 0;
    uint16_t head     = 0;
    uint32_t first    = 0; // row of the section
    uint32_t n_rows   = 0;
    uint32_t size     = 0; // bytes that follow
    uint32_t crc      = 0; // of these; of the end record: of the checksums of all records before it
    uint32_t head_crc = 0; // of the fields above
};
static_assert(sizeof(kvtc_record) == 28, "as the format says");

// where rows belong
struct kvtc_place {
    kvtc_what what;
    uint16_t  layer;
    uint16_t  head;

    bool operator==(const kvtc_place & other) const {
        return what == other.what && layer == other.layer && head == other.head;
    }
    std::string name() const; // "layer 3 keys", "layer 3 exact values of head 1"
};

struct kvtc_block {
    kvtc_record          record;
    std::vector<uint8_t> data;
};

// a section, or plain bytes (one block, no model)
struct kvtc_item {
    bool                    plain = false;
    kvtc_place              place = {};
    kvtc_block              model;
    std::vector<kvtc_block> blocks;
    uint64_t                n_rows = 0;
};

// Bytes of an item's records.
std::vector<uint8_t> kvtc_write_plain  (const uint8_t * data, size_t size);
std::vector<uint8_t> kvtc_write_section(kvtc_place place, const std::vector<ggml_kvtc_run> & runs, // none: stored
                                                 size_t row_bytes, const uint8_t * rows, size_t n_rows);
// Bytes of the end record, after items of these bytes.
class kvtc_end {
public:
    void                 add(const std::vector<uint8_t> & item);
    std::vector<uint8_t> bytes() const;

private:
    uint32_t n_records = 0;
    uint32_t crc       = 0;
};

// Everything of a container, all checksums verified, nothing decoded. pull gives the next bytes or throws. Throws one line that
// names the block that is damaged. Allocates no more than KVTC_MAX_BYTES beyond what it has been given.
std::vector<kvtc_item> kvtc_read_container(const std::function<void(void * data, size_t size)> & pull);

// The same of a container in memory. used: its bytes; some may follow.
std::vector<kvtc_item> kvtc_read_container(const uint8_t * data, size_t size, size_t & used);

// A section's model, read once. Throws one line that names the model or the block that is none.
class kvtc_section_reader {
public:
    explicit kvtc_section_reader(const kvtc_item & section);

    size_t row_bytes() const { return eight ? 2*(stride - KVTC_EIGHT_STEP) : stride; }
    void   decode(uint8_t * rows) const; // [n_rows][row_bytes], blocks on several threads
    void   decode(const kvtc_block & block, uint8_t * rows) const;

private:
    const kvtc_item                                                 & section;
    std::unique_ptr<ggml_kvtc_rows, decltype(&ggml_kvtc_rows_free)>   model;
    bool                                                              eight = false;
    size_t                                                            stride; // bytes of a row in the blocks
};

// True if data is a container all of whose blocks decode, one after the other; else one line in err. For tests and fuzzers.
extern "C" LLAMA_API bool llama_kvtc_container_check(const uint8_t * data, size_t size, char * err, size_t err_size);
