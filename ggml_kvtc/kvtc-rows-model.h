// A row model in memory, shared by what fits, stores and codes with it.
#pragma once

#include "kvtc-rows.h"

#include <array>
#include <cstdint>
#include <vector>

constexpr uint32_t KVTC_PROB_SUM = 1u << GGML_KVTC_PROB_BITS;
constexpr uint32_t KVTC_LOW      = 1u << 16; // the coder's states live in [KVTC_LOW, 2^32)

// frequencies of a field's values, summing to KVTC_PROB_SUM
using kvtc_table = std::vector<uint16_t>;

// One symbol of the entropy coder: neighbouring fields of a run, together at most 8 bits. One symbol of eight bits decodes as fast
// as one of two, and the product of the fields' frequencies loses nothing against coding each.
struct kvtc_column {
    bool     stored;
    uint32_t frequencies; // where they are in ggml_kvtc_rows::frequencies
};

// Up to 8 bytes of a row, taken apart and put together at once: columns of equal width, side by side.
struct kvtc_unit {
    uint32_t byte; // where it begins in the row
    uint8_t  n_bytes;
    uint8_t  n_columns;   // up to 8
    uint8_t  column_bits;
    uint32_t first;       // of its columns
};

struct ggml_kvtc_rows {
    std::vector<ggml_kvtc_run>             runs;
    std::array<std::vector<std::vector<uint8_t>>, 9> levels; // of the tables, by width: as they are written
    std::vector<uint8_t>                   index;  // of each coded field of the row: its table among those of its width

    // derived
    std::array<std::vector<kvtc_table>, 9> tables;
    size_t                   row_bytes = 0;
    size_t                   n_stored  = 0; // bytes of a row that are kept as they are
    std::vector<kvtc_unit>   units;
    std::vector<kvtc_column> columns;
    std::vector<uint16_t>    frequencies; // of each value of a column; columns share them

    void derive();
};

// is a byte or more of the run coded, and under tables of which width
inline int kvtc_table_bits(const ggml_kvtc_run & run) {
    return run.kind == GGML_KVTC_FIELD_CODE ? run.bits : run.kind == GGML_KVTC_FIELD_HALF ? 8 : 0;
}

// fields of w bits that make a column
inline int kvtc_join(int w) {
    return w == 1 ? 8 : w == 2 ? 4 : w == 3 || w == 4 ? 2 : 1;
}

// What rounding is off by goes to, or comes from, the frequencies of at least the average, one each, in order, so that they sum to
// KVTC_PROB_SUM. They must be nearly there, and one of them above 0.
void kvtc_settle(kvtc_table & table);

// Tables are written as levels, eight to an octave.
constexpr int KVTC_LEVELS = 81; // weights 0 ... 4096

uint8_t    kvtc_nearest_level(double weight);
kvtc_table kvtc_to_frequencies(const std::vector<uint8_t> & levels); // one of them above 0
size_t     kvtc_table_cost    (const std::vector<uint8_t> & levels); // bits
// Bits of the fields' tables among n.
size_t     kvtc_index_cost    (const std::vector<uint8_t> & index, size_t n_tables);
