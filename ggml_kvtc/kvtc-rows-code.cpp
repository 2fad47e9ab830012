// Coding blocks of rows: static rANS (Duda, arXiv 1311.2540), 32 states that share one stream of 16-bit words.
//
//   block := stored bytes, field by field | u32 x 32: the states | u16 x n: the words
//
// Columns one after the other, each over all rows of the block, row t by state t mod 32: a column's table is built once and stays in
// the nearest cache, and the states keep four vectors of AVX2 busy. States live in [2^16, 2^32); the encoder works backwards and
// starts at 2^16 plus the last column's last 64 values, two to a state, which would else be coded: what lies below 2^16 is for free.
// A decoder that ends at such states, with no word left, has seen the whole block.
#include "kvtc-rows-lanes.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace {

constexpr int LANES = GGML_KVTC_LANES;

void store16(uint8_t * p, uint32_t v) {
    p[0] = (uint8_t) v;
    p[1] = (uint8_t) (v >> 8);
}

uint32_t load32(const uint8_t * p) {
    return (uint32_t) p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[2] << 16 | (uint32_t) p[3] << 24;
}

// Values of the last column that the first states hold, those of its last rows.
int64_t n_held(const ggml_kvtc_rows * model, int64_t n_rows) {
    return model->columns.empty() ? 0 : std::min<int64_t>(n_rows, 2*LANES);
}

// The columns of a unit, values: [8][n_values].
void take_apart(const kvtc_unit & unit, const uint8_t * rows, size_t stride, int64_t n, uint8_t * values, size_t n_values) {
    const uint32_t mask = (1u << unit.column_bits) - 1;
    for (int64_t t = 0; t < n; ++t) {
        const uint8_t * row = rows + (size_t) t*stride + unit.byte;
        uint64_t word = 0;
        for (int i = 0; i < unit.n_bytes; ++i) {
            word |= (uint64_t) row[i] << 8*i;
        }
        for (int c = 0; c < unit.n_columns; ++c) {
            values[c*n_values + (size_t) t] = (uint8_t) (word >> unit.column_bits*c & mask);
        }
    }
}

bool padding_is_zero(const ggml_kvtc_rows * model, const uint8_t * rows, int64_t n_rows) {
    size_t at = 0;
    for (const ggml_kvtc_run & run : model->runs) {
        const size_t n = (size_t) run.bits*run.count/8;
        for (int64_t t = 0; run.kind == GGML_KVTC_FIELD_ZERO && t < n_rows; ++t) {
            const uint8_t * row = rows + (size_t) t*model->row_bytes;
            if (std::any_of(row + at, row + at + n, [](uint8_t v) { return v != 0; })) {
                return false;
            }
        }
        at += n;
    }
    return true;
}

} // namespace

size_t ggml_kvtc_rows_bound(const ggml_kvtc_rows * model, int64_t n_rows) {
    return 2 + 4*LANES + 2*model->columns.size()*(size_t) n_rows; // a column gives at most a word for every row
}

size_t ggml_kvtc_rows_encode(const ggml_kvtc_rows * model, const uint8_t * rows, int64_t n_rows, uint8_t * data) {
    if (!padding_is_zero(model, rows, n_rows)) {
        return 0;
    }
    uint8_t * const words = data + model->n_stored*(size_t) n_rows;
    uint8_t * const end   = data + ggml_kvtc_rows_bound(model, n_rows);
    uint8_t * stored = words;
    uint8_t * p      = end; // both backwards
    uint32_t x[LANES];
    std::fill_n(x, LANES, KVTC_LOW);
    const int64_t held = n_held(model, n_rows);
    std::vector<uint8_t> values(8*(size_t) n_rows);
    for (size_t u = model->units.size(); u-- > 0;) {
        const kvtc_unit   & unit    = model->units[u];
        const kvtc_column * columns = &model->columns[unit.first];
        take_apart(unit, rows, model->row_bytes, n_rows, values.data(), (size_t) n_rows);
        for (int c = unit.n_columns; c-- > 0;) {
            const uint8_t * column = &values[(size_t) (c*n_rows)];
            if (columns[c].stored) {
                stored -= n_rows;
                memcpy(stored, column, (size_t) n_rows);
                continue;
            }
            const uint16_t * frequencies = &model->frequencies[columns[c].frequencies];
            uint32_t starts[256];
            for (uint32_t v = 0, sum = 0; v < 1u << unit.column_bits; sum += frequencies[v++]) {
                starts[v] = sum;
            }
            int64_t n = n_rows;
            if (&columns[c] == &model->columns.back()) {
                n -= held;
                for (int64_t i = 0; i < held; ++i) {
                    x[i/2] += (uint32_t) column[n + i] << 8*(i % 2);
                }
            }
            for (int64_t t = n - 1; t >= 0; --t) {
                const uint32_t f = frequencies[column[t]];
                if (f == 0) {
                    return 0;
                }
                uint32_t each = x[t % LANES];
                // no branch: whether a word is due is as good as random; `bound` leaves room for one that is not
                const uint32_t full = each >> (32 - GGML_KVTC_PROB_BITS) >= f;
                store16(p - 2, each & 0xffff);
                p -= 2*full;
                each >>= 16*full;
                x[t % LANES] = (each/f << GGML_KVTC_PROB_BITS) + each % f + starts[column[t]];
            }
        }
    }
    for (int i = LANES - 1; i >= 0; --i) {
        store16(p -= 2, x[i] >> 16);
        store16(p -= 2, x[i] & 0xffff);
    }
    memmove(words, p, (size_t) (end - p));
    return (size_t) (words - data) + (size_t) (end - p);
}

bool ggml_kvtc_rows_decode(const ggml_kvtc_rows * model, const uint8_t * data, size_t size, uint8_t * rows, int64_t n_rows) {
    const size_t n_stored = model->n_stored*(size_t) n_rows;
    if (size < n_stored + 4*LANES) {
        return false;
    }
    kvtc_lanes in;
    in.p   = data + n_stored;
    in.end = data + size;
    for (uint32_t & x : in.x) {
        x = load32(in.p);
        in.p += 4;
        if (x < KVTC_LOW) {
            return false;
        }
    }
    size_t at = 0;
    for (const ggml_kvtc_run & run : model->runs) {
        const size_t n = (size_t) run.bits*run.count/8;
        for (int64_t t = 0; run.kind == GGML_KVTC_FIELD_ZERO && t < n_rows; ++t) {
            memset(rows + (size_t) t*model->row_bytes + at, 0, n);
        }
        at += n;
    }
    const int64_t held = n_held(model, n_rows);
    std::vector<uint8_t> values(8*(size_t) n_rows);
    kvtc_places      places;
    const uint16_t * filled = nullptr; // neighbours often share their table
    for (const kvtc_unit & unit : model->units) {
        const kvtc_column * columns = &model->columns[unit.first];
        for (int c = 0; c < unit.n_columns; ++c) {
            uint8_t * column = &values[(size_t) (c*n_rows)];
            if (columns[c].stored) {
                memcpy(column, data, (size_t) n_rows);
                data += n_rows;
                continue;
            }
            const uint16_t * frequencies = &model->frequencies[columns[c].frequencies];
            const int        n_values    = 1 << unit.column_bits;
            const bool       last        = &columns[c] == &model->columns.back();
            const int64_t    n           = n_rows - (last ? held : 0);
            const uint16_t * only        = std::find(frequencies, frequencies + n_values, KVTC_PROB_SUM);
            if (only != frequencies + n_values) { // takes no bits
                memset(column, (int) (only - frequencies), (size_t) n);
            } else {
                if (frequencies != filled) {
                    kvtc_fill_places(places, frequencies, n_values);
                    filled = frequencies;
                }
                if (!kvtc_decode_column(in, places, column, n)) {
                    return false;
                }
            }
            for (int64_t i = 0; last && i < held; ++i) {
                const uint32_t v = in.x[i/2] >> 8*(i % 2) & 255;
                if (v >= (uint32_t) n_values) {
                    return false;
                }
                column[n + i] = (uint8_t) v;
                in.x[i/2] -= v << 8*(i % 2);
            }
        }
        kvtc_put_columns(unit, values.data(), (size_t) n_rows, rows, model->row_bytes, n_rows);
    }
    if (std::any_of(in.x, in.x + LANES, [](uint32_t x) { return x != KVTC_LOW; })) {
        return false;
    }
    return in.p == in.end;
}

uint32_t ggml_kvtc_crc32(uint32_t crc, const uint8_t * data, size_t size) {
    // eight bytes a step: table[k] takes a byte that k others follow
    static const auto table = [] {
        std::array<std::array<uint32_t, 256>, 8> t {};
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t c = i;
            for (int k = 0; k < 8; ++k) {
                c = (c >> 1) ^ (0xedb88320u & (0u - (c & 1)));
            }
            t[0][i] = c;
        }
        for (size_t k = 1; k < 8; ++k) {
            for (size_t i = 0; i < 256; ++i) {
                t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 255];
            }
        }
        return t;
    }();
    crc = ~crc;
    for (; size >= 8; data += 8, size -= 8) {
        const uint32_t a = crc ^ load32(data);
        const uint32_t b = load32(data + 4);
        crc = table[7][a & 255] ^ table[6][a >> 8 & 255] ^ table[5][a >> 16 & 255] ^ table[4][a >> 24] ^
              table[3][b & 255] ^ table[2][b >> 8 & 255] ^ table[1][b >> 16 & 255] ^ table[0][b >> 24];
    }
    for (; size > 0; ++data, --size) {
        crc = table[0][(crc ^ *data) & 255] ^ crc >> 8;
    }
    return ~crc;
}
