// Which tables suit rows best: histograms of their fields, clustered so that fields share tables, which would else cost more than
// they save in short states. What is found here is written down with the rows, so nobody else must find the same.
#include "kvtc-rows-model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace {

constexpr int64_t SAMPLE = 2048; // rows that tell how often codes occur; bytes, of 256 values, are counted in all rows
constexpr int     ROUNDS = 8;

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

// Counts to levels. Codes that the sample does not hold may still occur; bytes that do not occur in it do not.
std::vector<uint8_t> to_levels(const std::vector<double> & counts) {
    const bool   all   = counts.size() < 256;
    const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
    std::vector<uint8_t> levels(counts.size());
    for (size_t v = 0; v < counts.size(); ++v) {
        const double f = total > 0 ? counts[v]*KVTC_PROB_SUM/total : 0;
        levels[v] = counts[v] > 0 || all ? kvtc_nearest_level(std::max(1.0, f)) : 0;
    }
    if (total == 0 && !all) {
        levels[0] = 1;
    }
    return levels;
}

// What orders fields by their distribution: of bytes, which are halves of f16 or gains, the magnitude; of codes, how far out they are.
double spread(const histogram & h) {
    double sum   = 0;
    double total = 0;
    for (size_t v = 0; v < h.size(); ++v) {
        sum   += h[v]*(double) (h.size() == 256 ? v & 127 : std::min(v, h.size() - 1 - v));
        total += h[v];
    }
    return total > 0 ? sum/total : 0;
}

// k-means under the cost of coding, from groups of equal size in the order of `order`
clustering cluster(const std::vector<histogram> & fields, const std::vector<uint32_t> & order, size_t k, double scale) {
    const size_t n_values = fields[0].size();
    clustering best;
    best.index.resize(fields.size());
    for (size_t i = 0; i < order.size(); ++i) {
        best.index[order[i]] = (uint8_t) (i*k/order.size());
    }
    std::vector<std::vector<float>> cost(k, std::vector<float>(n_values)); // bits of a value under a table
    double bits = 0;
    for (int round = 0; round < (k > 1 ? ROUNDS : 1); ++round) {
        std::vector<std::vector<double>> counts(k, std::vector<double>(n_values, 0.0));
        for (size_t f = 0; f < fields.size(); ++f) {
            for (size_t v = 0; v < n_values; ++v) {
                counts[best.index[f]][v] += fields[f][v];
            }
        }
        best.levels.clear();
        for (size_t t = 0; t < k; ++t) {
            best.levels.push_back(to_levels(counts[t]));
            const kvtc_table table = kvtc_to_frequencies(best.levels[t]);
            for (size_t v = 0; v < n_values; ++v) {
                // a value without a frequency cannot be coded: bits that no field's other values make up for
                cost[t][v] = table[v] > 0 ? (float) (GGML_KVTC_PROB_BITS - std::log2((double) table[v])) : 1e6f;
            }
        }
        bits = 0;
        const bool last = round + 1 == (k > 1 ? ROUNDS : 1);
        for (size_t f = 0; f < fields.size(); ++f) {
            std::vector<std::pair<uint32_t, float>> used; // of bytes few values occur
            for (size_t v = 0; v < n_values; ++v) {
                if (fields[f][v] > 0) {
                    used.push_back({ (uint32_t) v, (float) fields[f][v] });
                }
            }
            double least = INFINITY;
            for (size_t t = 0; t < k; ++t) {
                if (last && t != best.index[f]) {
                    continue; // the tables are made from this assignment
                }
                float sum = 0;
                for (const auto & u : used) {
                    sum += u.second*cost[t][u.first];
                }
                if (sum < least) {
                    least = sum;
                    best.index[f] = (uint8_t) t;
                }
            }
            bits += least;
        }
    }
    best.bits = bits*scale;
    for (const auto & levels : best.levels) {
        best.bits += (double) kvtc_table_cost(levels);
    }
    best.bits += (double) kvtc_index_cost(best.index, k);
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
        clustering best;
        for (size_t k = 1; k <= GGML_KVTC_TABLES; k *= 2) {
            clustering found = cluster(fields[w], order, std::min(k, fields[w].size()), scale);
            if (found.bits >= best.bits) {
                break; // more tables cost more than they save
            }
            best = std::move(found);
        }
        model->levels[w] = std::move(best.levels);
        for (size_t i = 0; i < places[w].size(); ++i) {
            model->index[places[w][i]] = best.index[i];
        }
    }
    model->derive();
    return model;
}
