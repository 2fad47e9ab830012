// How a cache row is made of fields: README.md, "One row" and "Turbo types".
#include "kvtc-calibration.h"
#include "kvtc-rows.h"

#include <algorithm>
#include <vector>

int ggml_kvtc_cache_runs(const ggml_kvtc_calibration * cal, int il, ggml_kvtc_side which, int bits, size_t row_bytes, ggml_kvtc_run * runs, int n_max) {
    const auto * side = cal->find(il, which);
    const int budget = side ? side->budget_index(bits) : -1;
    if (budget < 0) {
        return 0;
    }
    struct piece {
        size_t        byte;
        ggml_kvtc_run run;
    };
    std::vector<piece> pieces;
    const auto places = side->places(budget);
    for (int h = 0; h < side->H; ++h) {
        if (side->turbo) {
            pieces.push_back({ places[h].gain, { 16, GGML_KVTC_FIELD_HALF, 1 } });
        } else {
            pieces.push_back({ places[h].gain, { 8, GGML_KVTC_FIELD_CODE, 1 } });
        }
        size_t at = places[h].codes;
        for (int g = 0; g < side->d/8; ++g) {
            const int w = side->group_widths(h, budget)[g];
            if (w > 0) {
                pieces.push_back({ at, { (uint8_t) w, GGML_KVTC_FIELD_CODE, 8 } });
            }
            at += w;
        }
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const piece & a, const piece & b) { return a.byte < b.byte; });

    std::vector<ggml_kvtc_run> all;
    size_t at = 0;
    const auto pad = [&](size_t to) {
        if (to > at) {
            all.push_back({ 8, GGML_KVTC_FIELD_ZERO, (uint16_t) (to - at) });
            at = to;
        }
    };
    for (const piece & p : pieces) {
        pad(p.byte);
        if (!all.empty() && all.back().bits == p.run.bits && all.back().kind == p.run.kind && p.run.bits != 8) {
            all.back().count = (uint16_t) (all.back().count + p.run.count);
        } else {
            all.push_back(p.run);
        }
        at += (size_t) p.run.bits*p.run.count/8;
    }
    pad(row_bytes);
    std::copy_n(all.begin(), std::min(all.size(), (size_t) n_max), runs);
    return (int) all.size();
}
