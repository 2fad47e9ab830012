// A calibration in memory: validated, with the encode matrices derived. Shared by the loader and the pack writer.
#pragma once

#include "kvtc.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

constexpr int KVTC_WIDTHS[GGML_KVTC_N_WIDTHS] = { 0, 1, 2, 3, 4, 5, 6, 8 };

// one layer's K or V; H heads of dimension d, G = d/8 groups, B budgets
struct ggml_kvtc_side_calibration {
    int H = 0;
    int d = 0;

    std::vector<float>   mean;      // [H][d]
    std::vector<float>   scale;     // [H][d]
    std::vector<float>   gain;      // [H][2] base, rule
    std::vector<float>   decode;    // [H][d][d] x_i = sum_c decode[i][c] z_c + mean_i
    std::vector<float>   encode;    // [H][d][d] its inverse
    std::vector<int8_t>  widths;    // [H][B][G]
    std::vector<float>   levels;    // all codebooks, in file order
    std::vector<int64_t> book;      // [H][G][9] start of the group's codebook of w bits in levels, -1 if absent

    const int8_t * group_widths(int h, int budget, int n_budgets) const { return &widths[((size_t) h*n_budgets + budget)*(d/8)]; }
    int64_t        book_start  (int h, int g, int w)              const { return book[((size_t) h*(d/8) + g)*9 + w]; }
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

// bytes of head h in a row of the given budget, its gain code included
uint32_t ggml_kvtc_head_bytes(const ggml_kvtc_side_calibration & side, int h, int budget, int n_budgets);
