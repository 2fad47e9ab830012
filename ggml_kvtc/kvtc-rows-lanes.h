// The inner loops of decoding blocks of rows (kvtc-rows-code.cpp): one column of symbols, and the bytes of eight columns.
// AVX2 where the processor has it, else plain loops; both give the same.
#pragma once

#include "kvtc-rows-model.h"

#include <cstddef>
#include <cstdint>

// What decoding looks up: for each place among KVTC_PROB_SUM the value there << 24 | its frequency << 12 | places of the same value
// before it. Up to sixteen are written at once. A value that has every place is none that anything is looked up for.
struct kvtc_places {
    alignas(64) uint32_t at[KVTC_PROB_SUM + 16];
};
void kvtc_fill_places(kvtc_places & places, const uint16_t * frequencies, int n_values);

// the states of a block, and what is left of its words
struct kvtc_lanes {
    alignas(32) uint32_t x[GGML_KVTC_LANES];
    const uint8_t * p;
    const uint8_t * end;
};

// The values of a column of n rows. False if the words end too early.
bool kvtc_decode_column(kvtc_lanes & lanes, const kvtc_places & places, uint8_t * values, int64_t n);

// The bytes of a unit in every row from its columns; column c is values + c*n_values.
void kvtc_put_columns(const kvtc_unit & unit, const uint8_t * values, size_t n_values, uint8_t * rows, size_t stride, int64_t n);
