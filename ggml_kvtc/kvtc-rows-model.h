// A row model in memory, shared by what fits, stores and codes with it.
#pragma once

#include "kvtc-rows.h"

#include <array>
#include <cstdint>
#include <vector>

constexpr uint32_t KVTC_PROB_SUM = 1u << GGML_KVTC_PROB_BITS;

// frequencies of a field's values, summing to KVTC_PROB_SUM
using kvtc_table = std::vector<uint16_t>;

// One symbol of the entropy coder: neighbouring fields of a run, together at most 8 bits. One symbol of eight bits decodes as fast
// as one of two, and the product of the fields' frequencies loses nothing against coding each.
struct kvtc_column {
    uint8_t  shift; // where it begins in its unit
    uint8_t  bits;
    bool     stored;
    uint32_t steps; // where its frequencies are in ggml_kvtc_rows::steps
};

// Up to 8 bytes of a row, taken apart and put together at once.
struct kvtc_unit {
    uint32_t byte; // where it begins in the row
    uint8_t  n_bytes;
    uint8_t  n_columns; // up to 8
    uint32_t first;     // of its columns
};

struct ggml_kvtc_rows {
    std::vector<ggml_kvtc_run>             runs;
    std::array<std::vector<kvtc_table>, 9> tables; // by width
    std::vector<uint8_t>                   index;  // of each coded field of the row: its table among those of its width

    // derived
    size_t                   row_bytes = 0;
    size_t                   n_stored  = 0; // bytes of a row that are kept as they are
    std::vector<kvtc_unit>   units;
    std::vector<kvtc_column> columns;
    std::vector<uint32_t>    steps;   // frequency << 16 | sum of those before it, for each value of a column; columns share them

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
