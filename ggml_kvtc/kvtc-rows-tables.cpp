// The bytes of a row model (README.md, "Stored states"). The numpy twin is python/kvtc_gguf/row_tables.py.
#include "kvtc-rows-model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

namespace {

constexpr int      STEPS      = 8; // levels to an octave
constexpr uint32_t RAW        = 7; // in place of a Rice code's parameter: numbers of a fixed width
constexpr int      ZEROS_RICE = 3; // parameter for runs of zeros
constexpr int      MOST_SHIFT = 3; // of differences of levels
constexpr uint32_t MOST_ONES  = 255;

// numbers of some bits each, from the low bit of the first byte on
struct bit_writer {
    std::vector<uint8_t> bytes;
    size_t               n = 0;

    void put(uint32_t v, int bits) {
        for (int i = 0; i < bits; ++i, ++n) {
            if (n % 8 == 0) {
                bytes.push_back(0);
            }
            bytes.back() = (uint8_t) (bytes.back() | (v >> i & 1) << n % 8);
        }
    }
    void rice(uint32_t v, int k) {
        for (uint32_t i = 0; i < v >> k; ++i) {
            put(1, 1);
        }
        put(0, 1);
        put(v, k);
    }
};

// the same of bytes that nobody vouches for
struct bit_reader {
    const uint8_t * data;
    size_t          size;
    size_t          n  = 0;
    bool            ok = true;

    uint32_t get(int bits) {
        uint32_t v = 0;
        for (int i = 0; i < bits; ++i, ++n) {
            ok = ok && n < 8*size;
            v |= ok ? (uint32_t) (data[n/8] >> n % 8 & 1) << i : 0;
        }
        return v;
    }
    uint32_t rice(int k) {
        uint32_t ones = 0;
        while (ok && get(1)) {
            ok = ok && ++ones <= MOST_ONES;
        }
        return ones << k | get(k);
    }
};

uint32_t zigzag(int d) {
    return d < 0 ? (uint32_t) -2*d - 1 : (uint32_t) 2*d;
}

int unzigzag(uint32_t v) {
    return v & 1 ? -(int) (v/2) - 1 : (int) (v/2);
}

uint32_t weight(uint8_t level) {
    return level < STEPS ? level : (uint32_t) (STEPS + level % STEPS) << (level/STEPS - 1);
}

int bit_length(uint32_t v) {
    int bits = 0;
    while (v >> bits > 0) {
        ++bits;
    }
    return bits;
}

int index_bits(size_t n_tables) {
    return bit_length((uint32_t) n_tables - 1);
}

// how many times all differences of neighbouring levels can be halved
int common_shift(const std::vector<uint8_t> & levels) {
    int all = 1 << MOST_SHIFT;
    for (size_t v = 1; v < levels.size(); ++v) {
        if (levels[v] > 0 && levels[v - 1] > 0) {
            all |= levels[v] - levels[v - 1];
        }
    }
    int shift = 0;
    while ((all >> shift & 1) == 0) {
        ++shift;
    }
    return shift;
}

// A table's numbers in order: `whole` gets levels as they are, `rice` the halved differences to the one before and, after a level of 0,
// how many more follow, with ZEROS_RICE in place of the table's own parameter.
template <typename Whole, typename Rice, typename Zeros>
void for_each_number(const std::vector<uint8_t> & levels, int shift, Whole && whole, Rice && rice, Zeros && zeros) {
    for (size_t v = 0; v < levels.size();) {
        if (v == 0 || levels[v - 1] == 0) {
            whole(levels[v]);
        } else {
            rice(zigzag(((int) levels[v] - levels[v - 1]) >> shift)); // a level of 0 is what is nearest to it and not above
        }
        ++v;
        if (levels[v - 1] == 0) {
            uint32_t more = 0;
            while (v < levels.size() && levels[v] == 0) {
                ++v;
                ++more;
            }
            zeros(more);
        }
    }
}

// bits of a table with the parameter that suits it best
size_t table_cost(const std::vector<uint8_t> & levels, int & best_k) {
    size_t fixed = 3 + 2;
    std::array<size_t, RAW> cost {};
    for_each_number(levels, common_shift(levels),
        [&](uint8_t)    { fixed += 7; },
        [&](uint32_t v) { for (uint32_t k = 0; k < RAW; ++k) { cost[k] += (v >> k) + 1 + k; } },
        [&](uint32_t v) { fixed += (v >> ZEROS_RICE) + 1 + ZEROS_RICE; });
    best_k = (int) (std::min_element(cost.begin(), cost.end()) - cost.begin());
    return fixed + cost[best_k];
}

void write_table(bit_writer & out, const std::vector<uint8_t> & levels) {
    const int shift = common_shift(levels);
    int k;
    table_cost(levels, k);
    out.put((uint32_t) k, 3);
    out.put((uint32_t) shift, 2);
    for_each_number(levels, shift,
        [&](uint8_t level) { out.put(level, 7); },
        [&](uint32_t v)    { out.rice(v, k); },
        [&](uint32_t v)    { out.rice(v, ZEROS_RICE); });
}

bool read_table(bit_reader & in, std::vector<uint8_t> & levels, size_t n) {
    const int k     = (int) in.get(3);
    const int shift = (int) in.get(2);
    bool any = false;
    while (levels.size() < n && in.ok) {
        const bool whole = levels.empty() || levels.back() == 0;
        const int  level = whole ? (int) in.get(7) : std::max(0, levels.back() + unzigzag(in.rice(k))*(1 << shift));
        if (level >= KVTC_LEVELS) {
            return false;
        }
        levels.push_back((uint8_t) level);
        any = any || level > 0;
        if (level == 0) {
            const size_t more = in.rice(ZEROS_RICE);
            if (more > n - levels.size()) {
                return false;
            }
            levels.insert(levels.end(), more, 0);
        }
    }
    return in.ok && any;
}

// The same for which tables fields have: differences to the field before, or numbers of a fixed width.
size_t code_index(const std::vector<uint8_t> & index, size_t n_tables, uint32_t k, bit_writer * out) {
    size_t cost = 3;
    if (out) {
        out->put(k, 3);
    }
    int before = 0;
    for (uint8_t i : index) {
        const uint32_t v = zigzag(i - before);
        cost += k == RAW ? index_bits(n_tables) : (v >> k) + 1 + k;
        if (out && k == RAW) {
            out->put(i, index_bits(n_tables));
        } else if (out) {
            out->rice(v, (int) k);
        }
        before = i;
    }
    return cost;
}

uint32_t best_index_rice(const std::vector<uint8_t> & index, size_t n_tables) {
    uint32_t best = RAW;
    for (uint32_t k = 0; k < RAW; ++k) {
        best = code_index(index, n_tables, k, nullptr) < code_index(index, n_tables, best, nullptr) ? k : best;
    }
    return best;
}

// widths of all coded fields of a row
std::vector<uint8_t> field_widths(const std::vector<ggml_kvtc_run> & runs) {
    std::vector<uint8_t> widths;
    for (const ggml_kvtc_run & run : runs) {
        widths.insert(widths.end(), kvtc_table_bits(run) > 0 ? run.count : 0, (uint8_t) kvtc_table_bits(run));
    }
    return widths;
}

} // namespace

uint8_t kvtc_nearest_level(double w) {
    if (w < STEPS) {
        return (uint8_t) std::lround(w);
    }
    int octave = 1;
    while (w >= 2*STEPS - 0.5) {
        w /= 2;
        ++octave;
    }
    return (uint8_t) std::min<long>(KVTC_LEVELS - 1, octave*STEPS + std::lround(w) - STEPS);
}

kvtc_table kvtc_to_frequencies(const std::vector<uint8_t> & levels) {
    uint64_t total = 0;
    for (uint8_t level : levels) {
        total += weight(level);
    }
    kvtc_table table;
    for (uint8_t level : levels) {
        table.push_back((uint16_t) (level == 0 ? 0 : std::max<uint64_t>(1, (weight(level)*KVTC_PROB_SUM + total/2)/total)));
    }
    kvtc_settle(table);
    return table;
}

size_t kvtc_table_cost(const std::vector<uint8_t> & levels) {
    int k;
    return table_cost(levels, k);
}

size_t kvtc_index_cost(const std::vector<uint8_t> & index, size_t n_tables) {
    return n_tables == 1 ? 0 : code_index(index, n_tables, best_index_rice(index, n_tables), nullptr);
}

size_t ggml_kvtc_rows_write(const ggml_kvtc_rows * model, uint8_t * data, size_t size) {
    bit_writer out;
    out.put((uint32_t) model->runs.size(), 16);
    for (const ggml_kvtc_run & run : model->runs) {
        const int bits = bit_length(run.count);
        out.put(run.bits, 5);
        out.put(run.kind, 2);
        out.put((uint32_t) bits - 1, 4);
        out.put(run.count & ((1u << (bits - 1)) - 1), bits - 1); // the upper one is known
    }
    const std::vector<uint8_t> widths = field_widths(model->runs);
    for (int w = 1; w <= 8; ++w) {
        const auto & tables = model->levels[w];
        if (tables.empty()) {
            continue;
        }
        out.put((uint32_t) tables.size() - 1, 6);
        for (const auto & levels : tables) {
            write_table(out, levels);
        }
        if (tables.size() > 1) {
            std::vector<uint8_t> index;
            for (size_t field = 0; field < widths.size(); ++field) {
                if (widths[field] == w) {
                    index.push_back(model->index[field]);
                }
            }
            code_index(index, tables.size(), best_index_rice(index, tables.size()), &out);
        }
    }
    std::copy_n(out.bytes.begin(), std::min(size, out.bytes.size()), data);
    return out.bytes.size();
}

ggml_kvtc_rows * ggml_kvtc_rows_read(const uint8_t * data, size_t size) {
    bit_reader in { data, size };
    auto model = std::make_unique<ggml_kvtc_rows>();
    const uint32_t n_runs = in.get(16);
    for (uint32_t i = 0; i < n_runs && in.ok; ++i) {
        ggml_kvtc_run run;
        run.bits  = (uint8_t) in.get(5);
        run.kind  = (uint8_t) in.get(2);
        const int bits = (int) in.get(4);
        run.count = (uint16_t) (1u << bits | in.get(bits));
        model->runs.push_back(run);
    }
    if (!in.ok || !ggml_kvtc_runs_valid(model->runs.data(), (int) n_runs)) {
        return nullptr;
    }
    const std::vector<uint8_t> widths = field_widths(model->runs);
    model->index.resize(widths.size());
    for (int w = 1; w <= 8; ++w) {
        if (std::find(widths.begin(), widths.end(), w) == widths.end()) {
            continue;
        }
        const int n_tables = 1 + (int) in.get(6);
        model->levels[w].resize(n_tables);
        for (auto & levels : model->levels[w]) {
            if (!read_table(in, levels, (size_t) 1 << w)) {
                return nullptr;
            }
        }
        const uint32_t k = n_tables > 1 ? in.get(3) : 0;
        int before = 0;
        for (size_t field = 0; field < widths.size() && n_tables > 1; ++field) {
            if (widths[field] != w) {
                continue;
            }
            before = k == RAW ? (int) in.get(index_bits((size_t) n_tables)) : before + unzigzag(in.rice((int) k));
            if (!in.ok || before < 0 || before >= n_tables) {
                return nullptr;
            }
            model->index[field] = (uint8_t) before;
        }
    }
    const size_t left = 8*size - std::min(in.n, 8*size);
    if (!in.ok || left >= 8 || in.get((int) left) != 0) {
        return nullptr;
    }
    model->derive();
    return model.release();
}
