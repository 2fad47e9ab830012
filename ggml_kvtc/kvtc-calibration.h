// A calibration in memory: validated, with the encode matrices derived. Shared by the loader and the pack writer.
#pragma once

#include "kvtc.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

constexpr int KVTC_WIDTHS[GGML_KVTC_N_WIDTHS] = { 0, 1, 2, 3, 4, 5, 6, 8 };

// where a head lies in a row, in bytes
struct ggml_kvtc_place {
    uint32_t gain;
    uint32_t codes;
};

// one layer's K or V; H heads of dimension d, G = d/8 groups, B budgets
struct ggml_kvtc_side_calibration {
    int  H     = 0;
    int  d     = 0;
    bool turbo = false; // rows of a turbo type: the codes of all heads, then their gains in f16

    std::vector<int> bits;          // [B] the budgets, rising

    std::vector<float>   mean;      // [H][d]
    std::vector<float>   scale;     // [H][d]
    std::vector<float>   gain;      // [H][2] base, rule
    std::vector<float>   decode;    // [H][d][d] x_i = sum_c decode[i][c] z_c + mean_i
    std::vector<float>   encode;    // [H][d][d] its inverse
    std::vector<int8_t>  widths;    // [H][B][G]
    std::vector<float>   levels;    // all codebooks, in file order
    std::vector<int64_t> book;      // [H][G][9] start of the group's codebook of w bits in levels, -1 if absent

    const int8_t * group_widths(int h, int budget)   const { return &widths[((size_t) h*bits.size() + budget)*(d/8)]; }
    int64_t        book_start  (int h, int g, int w) const { return book[((size_t) h*(d/8) + g)*9 + w]; }

    int      budget_index(int b)             const; // -1 if it has no such budget
    uint32_t head_bytes  (int h, int budget) const; // of head h in a row, its gain code included
    uint32_t row_bytes (int bits)            const;
    std::vector<ggml_kvtc_place> places(int budget) const; // of its heads in a row
};

struct ggml_kvtc_calibration {
    std::string      fingerprint;
    std::string      bits_text;
    std::vector<int> bits;

    std::map<int, ggml_kvtc_side_calibration> layers[2]; // by side
    std::vector<int32_t> layer_bits[2];                  // [B][block_count] bits kept where a budget is asked for, 0: no cache

    int budget_index(int b) const; // -1 if the file cannot serve it
    const ggml_kvtc_side_calibration * find(int il, ggml_kvtc_side side) const;
};
