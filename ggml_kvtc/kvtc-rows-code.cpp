// Coding blocks of rows: static rANS (Duda, arXiv 1311.2540), eight states that share one stream of 16-bit words.
//
//   block := stored bytes, field by field | u32 x 8: the states | u16 x n: the words
//
// Columns one after the other, each over all rows of the block, row t by state t mod 8: a column's table is built once and stays in
// the nearest cache, and eight independent states keep the core busy. States live in [2^16, 2^32); the encoder starts at 2^16
// and works backwards, so a decoder that ends there, with no word left, has seen the whole block.
#include "kvtc-rows-model.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace {

constexpr uint32_t LOW   = 1u << 16;
constexpr int      LANES = GGML_KVTC_LANES;

uint32_t load16(const uint8_t * p) {
    return (uint32_t) p[0] | (uint32_t) p[1] << 8;
}

void store16(uint8_t * p, uint32_t v) {
    p[0] = (uint8_t) v;
    p[1] = (uint8_t) (v >> 8);
}

uint32_t load32(const uint8_t * p) {
    return load16(p) | load16(p + 2) << 16;
}

// n <= 8 bytes
uint64_t load_bytes(const uint8_t * p, int n) {
    uint64_t v = 0;
    for (int i = 0; i < n; ++i) {
        v |= (uint64_t) p[i] << 8*i;
    }
    return v;
}

void store_bytes(uint8_t * p, uint64_t v, int n) {
    for (int i = 0; i < n; ++i) {
        p[i] = (uint8_t) (v >> 8*i);
    }
}

// the states and what is left of the words
struct lanes {
    uint32_t        x[LANES];
    const uint8_t * p;
    const uint8_t * end;
};

// values of a table by their place among 4096, with room to write 16 at once
using place_table = std::array<uint8_t, KVTC_PROB_SUM + 16>;

void fill_places(place_table & places, const uint32_t * steps, int bits) {
    for (uint32_t v = 0; v < 1u << bits; ++v) {
        const uint32_t n     = steps[v] >> 16;
        const uint32_t first = steps[v] & 0xffff;
        const uint64_t eight = 0x0101010101010101u*v;
        for (uint32_t i = 0; i < n; i += 16) {
            memcpy(&places[first + i],     &eight, 8);
            memcpy(&places[first + i + 8], &eight, 8);
        }
    }
}

inline uint32_t decode_one(uint32_t & x, const place_table & places, const uint32_t * steps) {
    const uint32_t place = x & (KVTC_PROB_SUM - 1);
    const uint32_t v     = places[place];
    x = (steps[v] >> 16)*(x >> GGML_KVTC_PROB_BITS) + place - (steps[v] & 0xffff);
    return v;
}

// The values of a column, row by row. False if the words end too early.
bool decode_column(lanes & in, const place_table & places, const uint32_t * steps, uint8_t * values, int64_t n) {
    int64_t t = 0;
    lanes cur = in; // values are bytes, which the compiler takes for aliases of anything but locals
    for (; t + LANES <= n && cur.end - cur.p >= 2*LANES; t += LANES) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES; ++i) {
            uint32_t x = cur.x[i];
            values[t + i] = (uint8_t) decode_one(x, places, steps);
            // no branch: whether a word is due is as good as random
            const uint32_t full = x << 16 | load16(cur.p);
            const uint32_t low  = x < LOW;
            cur.x[i] = x + ((full - x) & (0u - low));
            cur.p   += 2*low;
        }
    }
    in = cur;
    for (; t < n; ++t) { // near the end of the words, and what is no multiple of the lanes
        uint32_t & x = in.x[t % LANES];
        values[t] = (uint8_t) decode_one(x, places, steps);
        if (x < LOW) {
            if (in.end - in.p < 2) {
                return false;
            }
            x = x << 16 | load16(in.p);
            in.p += 2;
        }
    }
    return true;
}

// Units are eight columns of B bits in B bytes, but for the last of a run. values: [n_columns][n].

template <int B>
void take_eight(const uint8_t * rows, size_t stride, int64_t n, uint8_t * values) {
    for (int64_t t = 0; t < n; ++t, rows += stride) {
        const uint64_t word = load_bytes(rows, B);
        for (int c = 0; c < 8; ++c) {
            values[c*n + t] = (uint8_t) (word >> B*c & ((1u << B) - 1));
        }
    }
}

template <int B>
void put_eight(const uint8_t * values, uint8_t * rows, size_t stride, int64_t n) {
    for (int64_t t = 0; t < n; ++t, rows += stride) {
        uint64_t word = 0;
        for (int c = 0; c < 8; ++c) {
            word |= (uint64_t) values[c*n + t] << B*c;
        }
        store_bytes(rows, word, B);
    }
}

void take_apart(const kvtc_unit & unit, const kvtc_column * columns, const uint8_t * rows, size_t stride, int64_t n, uint8_t * values) {
    rows += unit.byte;
    switch (unit.n_columns == 8 ? unit.n_bytes : 0) {
        case 5: return take_eight<5>(rows, stride, n, values);
        case 6: return take_eight<6>(rows, stride, n, values);
        case 8: return take_eight<8>(rows, stride, n, values);
        default: break;
    }
    for (int64_t t = 0; t < n; ++t, rows += stride) {
        const uint64_t word = load_bytes(rows, unit.n_bytes);
        for (int c = 0; c < unit.n_columns; ++c) {
            values[c*n + t] = (uint8_t) (word >> columns[c].shift & ((1u << columns[c].bits) - 1));
        }
    }
}

void put_together(const kvtc_unit & unit, const kvtc_column * columns, const uint8_t * values, uint8_t * rows, size_t stride, int64_t n) {
    rows += unit.byte;
    switch (unit.n_columns == 8 ? unit.n_bytes : 0) {
        case 5: return put_eight<5>(values, rows, stride, n);
        case 6: return put_eight<6>(values, rows, stride, n);
        case 8: return put_eight<8>(values, rows, stride, n);
        default: break;
    }
    for (int64_t t = 0; t < n; ++t, rows += stride) {
        uint64_t word = 0;
        for (int c = 0; c < unit.n_columns; ++c) {
            word |= (uint64_t) values[c*n + t] << columns[c].shift;
        }
        store_bytes(rows, word, unit.n_bytes);
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
    return 4*LANES + 2*model->columns.size()*(size_t) n_rows; // a column gives at most a word for every row
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
    for (uint32_t & each : x) {
        each = LOW;
    }
    std::vector<uint8_t> values(8*(size_t) n_rows);
    for (size_t u = model->units.size(); u-- > 0;) {
        const kvtc_unit   & unit    = model->units[u];
        const kvtc_column * columns = &model->columns[unit.first];
        take_apart(unit, columns, rows, model->row_bytes, n_rows, values.data());
        for (int c = unit.n_columns; c-- > 0;) {
            const uint8_t * column = &values[(size_t) (c*n_rows)];
            if (columns[c].stored) {
                stored -= n_rows;
                memcpy(stored, column, (size_t) n_rows);
                continue;
            }
            const uint32_t * steps = &model->steps[columns[c].steps];
            for (int64_t t = n_rows - 1; t >= 0; --t) {
                const uint32_t step = steps[column[t]];
                const uint32_t f    = step >> 16;
                if (f == 0) {
                    return 0;
                }
                uint32_t & each = x[t % LANES];
                if (each >> (32 - GGML_KVTC_PROB_BITS) >= f) {
                    store16(p -= 2, each & 0xffff);
                    each >>= 16;
                }
                each = (each/f << GGML_KVTC_PROB_BITS) + each % f + (step & 0xffff);
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
    lanes in;
    in.p   = data + n_stored;
    in.end = data + size;
    for (uint32_t & x : in.x) {
        x = load32(in.p);
        in.p += 4;
        if (x < LOW) {
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
    std::vector<uint8_t> values(8*(size_t) n_rows);
    place_table places;
    const uint32_t * filled = nullptr; // neighbours often share their table
    for (const kvtc_unit & unit : model->units) {
        const kvtc_column * columns = &model->columns[unit.first];
        for (int c = 0; c < unit.n_columns; ++c) {
            uint8_t * column = &values[(size_t) (c*n_rows)];
            if (columns[c].stored) {
                memcpy(column, data, (size_t) n_rows);
                data += n_rows;
                continue;
            }
            const uint32_t * steps = &model->steps[columns[c].steps];
            if (steps != filled) {
                fill_places(places, steps, columns[c].bits);
                filled = steps;
            }
            if (!decode_column(in, places, steps, column, n_rows)) {
                return false;
            }
        }
        put_together(unit, columns, values.data(), rows, model->row_bytes, n_rows);
    }
    for (uint32_t x : in.x) {
        if (x != LOW) {
            return false;
        }
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
