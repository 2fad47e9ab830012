// Row models: their layout, and the frequencies of columns. Integers only, so that every machine derives the same.
#include "kvtc-rows-model.h"

#include <algorithm>
#include <map>

namespace {

// Products of two tables, the first's value in the low bits, scaled back to KVTC_PROB_SUM. What occurs keeps at least 1.
kvtc_table multiply(const kvtc_table & low, const kvtc_table & high) {
    kvtc_table out(low.size()*high.size());
    for (size_t j = 0; j < high.size(); ++j) {
        for (size_t i = 0; i < low.size(); ++i) {
            const uint32_t product = (uint32_t) low[i]*high[j];
            out[j*low.size() + i] = (uint16_t) (product == 0 ? 0 : std::max(1u, (product + KVTC_PROB_SUM/2) >> GGML_KVTC_PROB_BITS));
        }
    }
    kvtc_settle(out);
    return out;
}

bool valid_width(const ggml_kvtc_run & run) {
    switch (run.kind) {
        case GGML_KVTC_FIELD_CODE: return (run.bits >= 1 && run.bits <= 6) || run.bits == 8;
        case GGML_KVTC_FIELD_HALF: return run.bits == 16;
        case GGML_KVTC_FIELD_ZERO: return run.bits == 8;
        default:                   return false;
    }
}

} // namespace

void kvtc_settle(kvtc_table & table) {
    int32_t  missing = KVTC_PROB_SUM;
    uint32_t n_used  = 0;
    for (uint32_t f : table) {
        missing -= (int32_t) f;
        n_used  += f > 0;
    }
    const uint32_t average = std::max(2u, KVTC_PROB_SUM/n_used);
    for (uint32_t least = average; missing != 0; least = 2) { // a second round over all that can give
        for (bool changed = true; missing != 0 && changed;) {
            changed = false;
            for (size_t i = 0; i < table.size() && missing != 0; ++i) {
                if (table[i] >= least) {
                    table[i] = (uint16_t) (table[i] + (missing > 0 ? 1 : -1));
                    missing += missing > 0 ? -1 : 1;
                    changed = true;
                }
            }
        }
    }
}

bool ggml_kvtc_runs_valid(const ggml_kvtc_run * runs, int n_runs) {
    uint64_t bytes = 0;
    uint64_t coded = 0;
    for (int i = 0; i < n_runs; ++i) {
        if (!valid_width(runs[i]) || runs[i].count == 0 || runs[i].bits*runs[i].count % 8 != 0) {
            return false;
        }
        bytes += (uint64_t) runs[i].bits*runs[i].count/8;
        coded += kvtc_table_bits(runs[i]) > 0 ? runs[i].count : 0;
    }
    return bytes > 0 && bytes <= GGML_KVTC_MAX_ROW && coded <= GGML_KVTC_MAX_CODED;
}

void ggml_kvtc_rows::derive() {
    for (int w = 1; w <= 8; ++w) {
        for (const auto & each : levels[w]) {
            tables[w].push_back(kvtc_to_frequencies(each));
        }
    }
    std::map<std::vector<uint8_t>, uint32_t> known; // width and tables of a column
    size_t field = 0;

    // a column of n fields, the next ones
    const auto put_column = [&](int w, int n) {
        std::vector<uint8_t> key(index.begin() + field, index.begin() + field + n);
        key.push_back((uint8_t) w);
        const auto found = known.emplace(key, (uint32_t) frequencies.size());
        if (found.second) {
            kvtc_table table = tables[w][key[0]];
            for (int j = 1; j < n; ++j) {
                table = multiply(table, tables[w][key[j]]);
            }
            frequencies.insert(frequencies.end(), table.begin(), table.end());
        }
        columns.push_back({ false, found.first->second });
        field += n;
    };

    for (const ggml_kvtc_run & run : runs) {
        const int w = kvtc_table_bits(run);
        int left = run.bits*run.count/8;
        if (w == 0) {
            row_bytes += left;
            continue;
        }
        const int join = kvtc_join(w);
        const int most = run.bits == 16 ? 8 : 8/run.bits > 0 ? 8/run.bits*run.bits : run.bits; // 8 fields, or as many times 8 as fit
        while (left > 0) {
            kvtc_unit unit = { (uint32_t) row_bytes, (uint8_t) std::min(most, left), 0, (uint8_t) (join*w), (uint32_t) columns.size() };
            const int n = 8*unit.n_bytes/run.bits; // fields, as many columns as they fill: runs are of whole bytes
            for (int i = 0; i < n; i += join) {
                if (run.kind == GGML_KVTC_FIELD_HALF) {
                    columns.push_back({ true, 0 });
                    ++n_stored;
                }
                put_column(w, join);
            }
            unit.n_columns = (uint8_t) (columns.size() - unit.first);
            units.push_back(unit);
            row_bytes += unit.n_bytes;
            left      -= unit.n_bytes;
        }
    }
}

void ggml_kvtc_rows_free(ggml_kvtc_rows * model) {
    delete model;
}

size_t ggml_kvtc_row_bytes(const ggml_kvtc_rows * model) {
    return model->row_bytes;
}
