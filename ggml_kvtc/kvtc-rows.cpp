// Row models: their layout, their bytes, and the frequencies of columns. Integers only, so that every machine derives the same.
#include "kvtc-rows-model.h"

#include <algorithm>
#include <map>
#include <memory>

namespace {

// Products of two tables, the first's value in the low bits, scaled back to KVTC_PROB_SUM. What occurs keeps at least 1; what the
// rounding is off by goes to, or comes from, the frequencies of at least the average, one each, in order.
kvtc_table multiply(const kvtc_table & low, const kvtc_table & high) {
    kvtc_table out(low.size()*high.size());
    int32_t  missing = KVTC_PROB_SUM;
    uint32_t n_used  = 0;
    for (size_t j = 0; j < high.size(); ++j) {
        for (size_t i = 0; i < low.size(); ++i) {
            const uint32_t product = (uint32_t) low[i]*high[j];
            const uint32_t f = product == 0 ? 0 : std::max(1u, (product + KVTC_PROB_SUM/2) >> GGML_KVTC_PROB_BITS);
            out[j*low.size() + i] = (uint16_t) f;
            missing -= (int32_t) f;
            n_used  += f > 0;
        }
    }
    const uint32_t average = std::max(2u, KVTC_PROB_SUM/n_used);
    for (uint32_t least = average; missing != 0; least = 2) { // a second round over all that can give
        for (bool changed = true; missing != 0 && changed;) {
            changed = false;
            for (size_t i = 0; i < out.size() && missing != 0; ++i) {
                if (out[i] >= least) {
                    out[i] = (uint16_t) (out[i] + (missing > 0 ? 1 : -1));
                    missing += missing > 0 ? -1 : 1;
                    changed = true;
                }
            }
        }
    }
    return out;
}

// little-endian numbers from bytes that nobody vouches for
struct reader {
    const uint8_t * data;
    size_t          size;
    size_t          at = 0;
    bool            ok = true;

    uint32_t byte() {
        ok = ok && at < size;
        return ok ? data[at++] : 0;
    }
    uint32_t pair() {
        const uint32_t low = byte();
        return low | byte() << 8;
    }
    uint32_t varint() { // up to 14 bits
        const uint32_t low = byte();
        return low < 128 ? low : (low & 127) | byte() << 7;
    }
};

struct writer {
    uint8_t * data;
    size_t    size;
    size_t    at = 0;

    void byte(uint32_t v) {
        if (at < size) {
            data[at] = (uint8_t) v;
        }
        ++at;
    }
    void pair(uint32_t v) {
        byte(v & 255);
        byte(v >> 8);
    }
    void varint(uint32_t v) {
        byte(v < 128 ? v : (v & 127) | 128);
        if (v >= 128) {
            byte(v >> 7);
        }
    }
};

// frequencies; after a zero, how many more zeros follow
void write_table(writer & out, const kvtc_table & table) {
    for (size_t i = 0; i < table.size(); ++i) {
        out.varint(table[i]);
        if (table[i] == 0) {
            size_t n = 0;
            while (i + 1 < table.size() && table[i + 1] == 0 && n < 255) {
                ++i;
                ++n;
            }
            out.byte((uint32_t) n);
        }
    }
}

bool read_table(reader & in, kvtc_table & table, int bits) {
    const size_t n = (size_t) 1 << bits;
    uint32_t sum = 0;
    while (table.size() < n && in.ok) {
        const uint32_t f = in.varint();
        table.insert(table.end(), f == 0 ? 1 + in.byte() : 1, (uint16_t) f);
        sum += f;
    }
    return in.ok && table.size() == n && sum == KVTC_PROB_SUM;
}

int index_bits(size_t n_tables) {
    int bits = 0;
    while (((size_t) 1 << bits) < n_tables) {
        ++bits;
    }
    return bits;
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
    std::map<std::vector<uint8_t>, uint32_t> known; // width and tables of a column
    size_t field = 0;

    // a column of n fields, the next ones
    const auto put_column = [&](int shift, int w, int n) {
        std::vector<uint8_t> key(index.begin() + field, index.begin() + field + n);
        key.push_back((uint8_t) w);
        const auto found = known.emplace(key, (uint32_t) steps.size());
        if (found.second) {
            kvtc_table table = tables[w][key[0]];
            for (int j = 1; j < n; ++j) {
                table = multiply(table, tables[w][key[j]]);
            }
            uint32_t sum = 0;
            for (uint32_t f : table) {
                steps.push_back(f << 16 | sum);
                sum += f;
            }
        }
        columns.push_back({ (uint8_t) shift, (uint8_t) (n*w), false, found.first->second });
        field += n;
    };

    for (const ggml_kvtc_run & run : runs) {
        const int w = kvtc_table_bits(run);
        int left = run.bits*run.count/8;
        if (w == 0) {
            row_bytes += left;
            continue;
        }
        const int most = run.bits == 16 ? 8 : 8/run.bits > 0 ? 8/run.bits*run.bits : run.bits; // 8 fields, or as many times 8 as fit
        while (left > 0) {
            kvtc_unit unit = { (uint32_t) row_bytes, (uint8_t) std::min(most, left), 0, (uint32_t) columns.size() };
            const int n = 8*unit.n_bytes/run.bits; // fields
            if (run.kind == GGML_KVTC_FIELD_HALF) {
                for (int i = 0; i < n; ++i) {
                    columns.push_back({ (uint8_t) (16*i), 8, true, 0 });
                    put_column(16*i + 8, 8, 1);
                }
                n_stored += n;
            } else {
                const int join = kvtc_join(w);
                for (int i = 0; i < n; i += join) {
                    put_column(i*w, w, std::min(join, n - i));
                }
            }
            unit.n_columns = (uint8_t) (columns.size() - unit.first);
            units.push_back(unit);
            row_bytes += unit.n_bytes;
            left      -= unit.n_bytes;
        }
    }
}

size_t ggml_kvtc_rows_write(const ggml_kvtc_rows * model, uint8_t * data, size_t size) {
    writer out { data, size };
    out.pair((uint32_t) model->runs.size());
    for (const ggml_kvtc_run & run : model->runs) {
        out.byte(run.bits);
        out.byte(run.kind);
        out.pair(run.count);
    }
    for (int w = 1; w <= 8; ++w) {
        const auto & tables = model->tables[w];
        if (tables.empty()) {
            continue;
        }
        out.byte((uint32_t) tables.size());
        for (const kvtc_table & table : tables) {
            write_table(out, table);
        }
        const int bits = index_bits(tables.size());
        uint32_t pending = 0;
        int      n       = 0;
        size_t   field   = 0;
        for (const ggml_kvtc_run & run : model->runs) {
            for (int i = 0; i < run.count && kvtc_table_bits(run) > 0; ++i, ++field) {
                if (kvtc_table_bits(run) == w) {
                    pending |= (uint32_t) model->index[field] << n;
                    for (n += bits; n >= 8; n -= 8, pending >>= 8) {
                        out.byte(pending & 255);
                    }
                }
            }
        }
        if (n > 0) {
            out.byte(pending);
        }
    }
    return out.at;
}

ggml_kvtc_rows * ggml_kvtc_rows_read(const uint8_t * data, size_t size) {
    reader in { data, size };
    auto model = std::make_unique<ggml_kvtc_rows>();
    const uint32_t n_runs = in.pair();
    for (uint32_t i = 0; i < n_runs && in.ok; ++i) {
        ggml_kvtc_run run;
        run.bits  = (uint8_t) in.byte();
        run.kind  = (uint8_t) in.byte();
        run.count = (uint16_t) in.pair();
        model->runs.push_back(run);
    }
    if (!in.ok || !ggml_kvtc_runs_valid(model->runs.data(), (int) n_runs)) {
        return nullptr;
    }
    std::vector<uint8_t> widths; // of every coded field
    for (const ggml_kvtc_run & run : model->runs) {
        widths.insert(widths.end(), kvtc_table_bits(run) > 0 ? run.count : 0, (uint8_t) kvtc_table_bits(run));
    }
    model->index.resize(widths.size());
    for (int w = 1; w <= 8; ++w) {
        if (std::find(widths.begin(), widths.end(), w) == widths.end()) {
            continue;
        }
        const uint32_t n_tables = in.byte();
        if (n_tables < 1 || n_tables > GGML_KVTC_TABLES) {
            return nullptr;
        }
        model->tables[w].resize(n_tables);
        for (kvtc_table & table : model->tables[w]) {
            if (!read_table(in, table, w)) {
                return nullptr;
            }
        }
        const int bits = index_bits(n_tables);
        uint32_t pending = 0;
        int      n       = 0;
        for (size_t field = 0; field < widths.size(); ++field) {
            if (widths[field] != w) {
                continue;
            }
            if (n < bits) {
                pending |= in.byte() << n;
                n += 8;
            }
            model->index[field] = (uint8_t) (pending & ((1u << bits) - 1));
            pending >>= bits;
            n -= bits;
            if (!in.ok || model->index[field] >= n_tables) {
                return nullptr;
            }
        }
    }
    if (in.at != size) {
        return nullptr;
    }
    model->derive();
    return model.release();
}

void ggml_kvtc_rows_free(ggml_kvtc_rows * model) {
    delete model;
}

size_t ggml_kvtc_row_bytes(const ggml_kvtc_rows * model) {
    return model->row_bytes;
}
