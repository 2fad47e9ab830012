// Which tables suit rows best: histograms of their fields, clustered so that fields share tables, which would else cost more than
// they save in short states. What is found here is written down with the rows, so nobody else must find the same.
#include "kvtc-rows-model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace {

constexpr int64_t SAMPLE = 2048; // rows that tell how often codes occur; bytes, of 256 values, are counted in all rows
constexpr int     ROUNDS = 8;
constexpr double  UNSEEN = 0.3;  // what a value counts that a table has not seen, while fields look for theirs

using histogram = std::vector<uint32_t>;

struct clustering {
    double                            bits = INFINITY; // of everything: tables, indices and the fields themselves
    std::vector<std::vector<uint8_t>> levels; // of each table
    std::vector<uint8_t>              index;
};

uint32_t get_field(const uint8_t * row, size_t bit, int bits) {
    uint32_t v = row[bit/8];
    if (bit % 8 + (size_t) bits > 8) {
        v |= (uint32_t) row[bit/8 + 1] << 8;
    }
    return v >> bit % 8 & ((1u << bits) - 1);
}

// Counts to levels whose differences are multiples of 2^shift. Codes that the sample does not hold may still occur; bytes that do
// not occur in it do not.
std::vector<uint8_t> to_levels(const std::vector<double> & counts, int shift) {
    const bool   all   = counts.size() < 256;
    const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
    std::vector<uint8_t> levels(counts.size());
    for (size_t v = 0; v < counts.size(); ++v) {
        if (counts[v] > 0 || all) {
            int level = kvtc_nearest_level(std::max(1.0, total > 0 ? counts[v]*KVTC_PROB_SUM/total : 0));
            if (v > 0 && levels[v - 1] > 0) {
                const int before = levels[v - 1];
                const int step   = (int) std::lround((double) (level - before)/(1 << shift));
                level = before + step*(1 << shift);
                level += level < 1 ? 1 << shift : level >= KVTC_LEVELS ? -(1 << shift) : 0;
            }
            levels[v] = (uint8_t) level;
        }
    }
    if (total == 0 && !all) {
        levels[0] = 1;
    }
    return levels;
}

// bits of a value under a table; of one without a frequency, which cannot be coded, more than other values make up for
std::vector<float> value_costs(const kvtc_table & table) {
    std::vector<float> cost;
    for (uint32_t f : table) {
        cost.push_back(f > 0 ? (float) (GGML_KVTC_PROB_BITS - std::log2((double) f)) : 1e6f);
    }
    return cost;
}

// As fine as pays: the table's own bits and those of what it codes, of which `counts` are a sample.
std::vector<uint8_t> best_levels(const std::vector<double> & counts, double scale) {
    std::vector<uint8_t> best;
    double least = INFINITY;
    for (int shift = 0; shift <= 3; ++shift) {
        std::vector<uint8_t>     levels = to_levels(counts, shift);
        const std::vector<float> cost   = value_costs(kvtc_to_frequencies(levels));
        double bits = (double) kvtc_table_cost(levels);
        for (size_t v = 0; v < counts.size(); ++v) {
            bits += counts[v] > 0 ? scale*counts[v]*cost[v] : 0;
        }
        if (bits < least) {
            least = bits;
            best  = std::move(levels);
        }
    }
    return best;
}

// What orders fields by their distribution: of bytes, which are halves of f16 or gains, the magnitude; of codes, how far out they are.
double spread(const histogram & h) {
    double sum   = 0;
    double total = 0;
    for (size_t v = 0; v < h.size(); ++v) {
        sum   += h[v]*(double) (h.size() == 256 ? v & 127 : h.size() == 2 ? v : std::min(v, h.size() - 1 - v));
        total += h[v];
    }
    return total > 0 ? sum/total : 0;
}

// a field's values that occur, and how often
using occurrences = std::vector<std::pair<uint16_t, float>>;

double total_cost(const occurrences & field, const std::vector<float> & cost) {
    float sum = 0;
    for (const auto & value : field) {
        sum += value.second*cost[value.first];
    }
    return sum;
}

// k-means under the cost of coding, from groups of equal size in the order of `order`
clustering cluster(const std::vector<occurrences> & fields, size_t n_values, const std::vector<uint32_t> & order, size_t k, double scale) {
    clustering best;
    best.index.resize(fields.size());
    for (size_t i = 0; i < order.size(); ++i) {
        best.index[order[i]] = (uint8_t) (i*k/order.size());
    }
    std::vector<std::vector<double>> counts;
    const auto count = [&] {
        counts.assign(k, std::vector<double>(n_values, 0.0));
        for (size_t f = 0; f < fields.size(); ++f) {
            for (const auto & value : fields[f]) {
                counts[best.index[f]][value.first] += value.second;
            }
        }
    };
    count();
    bool changed = k > 1;
    for (int round = 0; round < ROUNDS && changed; ++round) {
        std::vector<std::vector<float>> cost(k, std::vector<float>(n_values));
        for (size_t t = 0; t < k; ++t) {
            const double total = std::accumulate(counts[t].begin(), counts[t].end(), UNSEEN*(double) n_values);
            for (size_t v = 0; v < n_values; ++v) {
                cost[t][v] = (float) std::log2(total/(counts[t][v] + UNSEEN));
            }
        }
        changed = false;
        for (size_t f = 0; f < fields.size(); ++f) {
            const uint8_t before = best.index[f];
            double least = total_cost(fields[f], cost[before]);
            for (size_t t = 0; t < k; ++t) {
                const double bits = total_cost(fields[f], cost[t]);
                if (bits < least) {
                    least = bits;
                    best.index[f] = (uint8_t) t;
                }
            }
            changed = changed || best.index[f] != before;
        }
        count();
    }

    // the tables themselves, without those that no field is left for
    std::vector<uint8_t>            place(k);
    std::vector<std::vector<float>> cost;
    best.bits = 0;
    for (size_t t = 0; t < k; ++t) {
        place[t] = (uint8_t) cost.size();
        if (std::find(best.index.begin(), best.index.end(), t) != best.index.end()) {
            best.levels.push_back(best_levels(counts[t], scale));
            best.bits += (double) kvtc_table_cost(best.levels.back());
            cost.push_back(value_costs(kvtc_to_frequencies(best.levels.back())));
        }
    }
    for (size_t f = 0; f < fields.size(); ++f) {
        best.index[f] = place[best.index[f]];
        best.bits += total_cost(fields[f], cost[best.index[f]])*scale;
    }
    best.bits += (double) kvtc_index_cost(best.index, best.levels.size());
    return best;
}

} // namespace

ggml_kvtc_rows * ggml_kvtc_rows_fit(const ggml_kvtc_run * runs, int n_runs, const uint8_t * rows, int64_t n_rows) {
    auto * model = new ggml_kvtc_rows();
    model->runs.assign(runs, runs + n_runs);
    size_t row_bytes = 0;
    for (const ggml_kvtc_run & run : model->runs) {
        row_bytes += (size_t) run.bits*run.count/8;
    }
    std::vector<histogram> fields[9];
    std::vector<size_t>    places[9]; // in model->index
    size_t bit = 0;
    for (const ggml_kvtc_run & run : model->runs) {
        const int w = kvtc_table_bits(run);
        for (int i = 0; i < run.count; ++i, bit += run.bits) {
            if (w == 0) {
                continue;
            }
            const int64_t step = w == 8 ? 1 : std::max<int64_t>(1, n_rows/SAMPLE);
            histogram h((size_t) 1 << w);
            for (int64_t t = 0; t < n_rows; t += step) {
                ++h[get_field(rows + (size_t) t*row_bytes, bit + run.bits - w, w)];
            }
            fields[w].push_back(std::move(h));
            places[w].push_back(model->index.size());
            model->index.push_back(0);
        }
    }
    for (int w = 1; w <= 8; ++w) {
        if (fields[w].empty()) {
            continue;
        }
        std::vector<uint32_t> order(fields[w].size());
        std::iota(order.begin(), order.end(), 0);
        std::vector<double> keys;
        for (const histogram & h : fields[w]) {
            keys.push_back(spread(h));
        }
        std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return keys[a] < keys[b]; });
        const double scale = w == 8 ? 1.0 : (double) std::max<int64_t>(1, n_rows/SAMPLE);
        std::vector<occurrences> sparse;
        for (const histogram & h : fields[w]) {
            sparse.emplace_back();
            for (size_t v = 0; v < h.size(); ++v) {
                if (h[v] > 0) {
                    sparse.back().push_back({ (uint16_t) v, (float) h[v] });
                }
            }
        }
        clustering best;
        for (size_t k = 1, worse = 0; k <= std::min<size_t>(GGML_KVTC_TABLES, fields[w].size()) && worse < 2; k += (k + 2)/3) {
            clustering found = cluster(sparse, (size_t) 1 << w, order, k, scale);
            worse = found.bits < best.bits ? 0 : worse + 1; // more tables cost more than they save
            if (worse == 0) {
                best = std::move(found);
            }
        }
        model->levels[w] = std::move(best.levels);
        for (size_t i = 0; i < places[w].size(); ++i) {
            model->index[places[w][i]] = best.index[i];
        }
    }
    model->derive();
    return model;
}
