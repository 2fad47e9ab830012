// Writes packs for CUDA devices: the plans of one layer, laid out for the kernels in cuda/ (kvtc-pack-cuda.h).
#include "kvtc-bump.h"
#include "kvtc-calibration.h"
#include "kvtc-pack-cuda.h"
#include "kvtc-pack.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

static_assert(sizeof(ggml_kvtc_cuda_pack) % 16 == 0 && sizeof(ggml_kvtc_cuda_head) % 16 == 0, "heads are 16-byte aligned");
static_assert(sizeof(ggml_kvtc_cuda_limits) == GGML_KVTC_N_LIMITS*sizeof(int32_t), "kvtc.h has another number of limits");

namespace {

uint32_t table_bytes(int w) {
    return w == 0 ? 0 : w <= 3 ? 4*4u << 2*w : 8*2u << w;
}

uint32_t round_up(uint32_t n, uint32_t to) {
    return (n + to - 1)/to*to;
}

// Where each group has its tables of pairs, or single levels, and their size in all. Tables of pairs lie in chunks of four columns of
// GGML_KVTC_CUDA_COLUMN bytes: a group's four are at the same place of each. The larger come first, so that all are aligned to their size.
// Single levels fill what the last chunk's first column leaves; the others come before the chunks. Kernels look them up in pairs too, and
// take nothing of what they find: that ends before the tables do.
uint32_t place_pairs(const int8_t * w, int G, const std::vector<bool> & single, std::vector<uint32_t> & at) {
    const uint32_t COLUMN = GGML_KVTC_CUDA_COLUMN(8*G);
    std::vector<int> order(G);
    for (int g = 0; g < G; ++g) {
        order[g] = g;
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return w[a] > w[b]; });
    at.resize(G);
    uint32_t n_chunk = 0;
    uint32_t column  = COLUMN; // bytes used of the last chunk's columns
    uint32_t zeros   = 0;      // of these, behind them
    for (int g : order) {
        if (single[g]) {
            continue;
        }
        const uint32_t size = 4u << 2*w[g];
        if (column + size > COLUMN) {
            n_chunk++;
            column = 0;
        }
        at[g]   = (n_chunk - 1)*4*COLUMN + column;
        zeros   = w[g] == 0 ? size : 0;
        column += size - zeros; // groups without bits share their zeros
    }
    uint32_t hole  = column + zeros;
    uint32_t front = 0;
    std::vector<bool> before(G);
    for (int g : order) {
        if (single[g]) {
            const uint32_t size = 16u << w[g];
            const uint32_t from = round_up(hole, 2u << w[g]); // to a component's levels
            before[g] = from + size > COLUMN;
            at[g]     = before[g] ? front : (n_chunk - 1)*4*COLUMN + from;
            hole      = before[g] ? hole  : from + size;
            front    += before[g] ? size  : 0;
        }
    }
    uint32_t end = front;
    for (int g = 0; g < G; ++g) {
        at[g] += before[g] ? 0 : round_up(front, COLUMN);
        end    = std::max(end, at[g] + (single[g] ? 4 : 4u << 2*w[g]) + 3*COLUMN);
    }
    return round_up(end, 16);
}

// The same for values below 256 components, of which each lane has banks of its own (kvtc-pack-cuda.h). Groups that have single levels
// come first, then the sets of pairs, then the first set. most: bits of groups of pairs
uint32_t place_banks(const int8_t * w, int G, int most, std::vector<uint32_t> & at, std::vector<bool> & single) {
    const uint32_t COLUMN = GGML_KVTC_CUDA_COLUMN(8*G);
    at.resize(G);
    single.resize(G);
    uint32_t end = 0;
    std::vector<int> widest((G + 7)/8, 0);
    for (int g = 0; g < G; ++g) {
        single[g] = w[g] > (g < 8 ? 5 : most);
        if (single[g]) {
            at[g] = end;
            end  += 16u << w[g];
        } else {
            widest[g/8] = std::max(widest[g/8], (int) w[g]);
        }
    }
    for (int set = (int) widest.size() - 1; set >= 0; --set) {
        end = set > 0 ? end : round_up(end, COLUMN);
        for (int g = 8*set; g < std::min(G, 8*set + 8); ++g) {
            at[g] = single[g] ? at[g] : end + g%8*(GGML_KVTC_CUDA_LEVEL/8);
        }
        end += set > 0 ? GGML_KVTC_CUDA_LEVEL << 2*widest[set] : 3*COLUMN + (GGML_KVTC_CUDA_LEVEL << widest[set]);
    }
    return end;
}

// Does each lane look up in banks of its own?
bool has_banks(ggml_kvtc_side which, int d) {
    return which == GGML_KVTC_V && d < 256;
}

// What a head's tables may have: bytes of keys' pairs, and bits of the pairs in values' banks.
struct table_room {
    uint32_t key_pairs;
    int      bank_bits;
};

// Which groups have tables of pairs, and where: of keys as far as there is room, the widest that may being the first to have single levels.
uint32_t choose_tables(const int8_t * w, int G, ggml_kvtc_side which, const table_room & room, std::vector<uint32_t> & at, std::vector<bool> & single) {
    if (has_banks(which, 8*G)) {
        return place_banks(w, G, room.bank_bits, at, single);
    }
    const uint32_t most = which == GGML_KVTC_K ? room.key_pairs : UINT32_MAX;
    // Groups fall in width. Below 256 components all four of a step of keys have tables of the same kind
    const int step   = 8*G < 256 ? 4 : 1;
    const int widest = 8*G < 256 ? 5 : 4;
    int n_single = 0;
    while (n_single < G && w[n_single] > widest) {
        n_single += step;
    }
    const auto place = [&] {
        single.assign(G, false);
        std::fill_n(single.begin(), std::min(n_single, G), true);
        return place_pairs(w, G, single, at);
    };
    uint32_t used = place();
    while (used > most && n_single < G && w[n_single] == widest) {
        n_single += step;
        used = place();
    }
    return used;
}

void put_head(ggml_kvtc_bump & out, const ggml_kvtc_side_calibration & side, ggml_kvtc_side which, int h, int budget,
              uint32_t payload, const table_room & room) {
    const uint32_t place = (uint32_t) GGML_KVTC_CUDA_HEAD_AT(which, h);
    const int d = side.d;
    const int G = d/8;
    const int8_t * w = side.group_widths(h, budget);
    const int n_book = side.turbo ? 1 : G; // groups that have tables of their own

    size_t n_levels = 0;
    size_t n_bounds = 0;
    ggml_kvtc_cuda_head tmp = {};
    for (int g = 0; g < G; ++g) {
        tmp.rank = w[g] > 0 ? 8*(g + 1) : tmp.rank;
        if (g >= n_book) {
            continue;
        }
        tmp.first_level[g] = (uint32_t) n_levels;
        tmp.first_bound[g] = (uint32_t) n_bounds;
        if (w[g] > 0) {
            n_levels += (size_t) 8 << w[g];
            n_bounds += 8*(((size_t) 1 << w[g]) - 1);
        }
        tmp.n_tables += table_bytes(w[g]);
    }
    std::vector<uint32_t> pairs_at(G);
    std::vector<bool>     single(G);
    if (!side.turbo) {
        tmp.n_pairs = choose_tables(w, G, which, room, pairs_at, single);
        for (int g = 0; g < G; ++g) {
            tmp.n_wide = single[g] ? g + 1 : tmp.n_wide;
        }
    }
    uint8_t * widths; ggml_fp16_t * levels; float * bounds; float * mean; ggml_fp16_t * decode; uint8_t * tables;
    ggml_kvtc_cuda_pair_code * pair_codes; uint8_t * pairs;
    tmp.payload   = payload;
    tmp.n_bytes   = side.head_bytes(h, budget) - (side.turbo ? sizeof(ggml_fp16_t) : 0);
    tmp.gain_base = side.gain[2*h];
    tmp.keep_norm = side.gain[2*h + 1] != 0.0f;
    tmp.widths    = out.put(G, &widths);
    tmp.levels_at = place + offsetof(ggml_kvtc_cuda_head, first_level);
    tmp.levels    = out.put(n_levels, &levels);
    tmp.bounds_at = place + offsetof(ggml_kvtc_cuda_head, first_bound);
    tmp.bounds    = out.put(n_bounds, &bounds);
    tmp.inv_scale = place + offsetof(ggml_kvtc_cuda_head, inverse_scale);
    tmp.mean      = out.put(d, &mean);
    tmp.decode    = out.put((size_t) d*d, &decode);
    tmp.codes     = place + offsetof(ggml_kvtc_cuda_head, group_code);
    tmp.tables    = out.put(tmp.n_tables, &tables);
    tmp.pair_codes = out.put(side.turbo ? 0 : G, &pair_codes);
    tmp.pairs      = out.put(tmp.n_pairs, &pairs);
    if (!out.base) {
        return;
    }
    ggml_kvtc_cuda_code * codes = tmp.group_code;
    const uint32_t * first_level = tmp.first_level;
    const uint32_t * first_bound = tmp.first_bound;

    uint32_t at    = side.turbo ? 0 : 8; // behind the gain code
    uint32_t table = 0;
    for (int g = 0; g < G; ++g) {
        widths   [g] = (uint8_t) w[g];
        codes    [g] = { (uint16_t) (at/8), (uint8_t) w[g], (uint8_t) (std::find_if(w + g, w + G, [&](int8_t x) { return x != w[g]; }) - (w + g)), table };
        const bool     bank = has_banks(which, d);
        const bool     pair = w[g] > 0 && !single[g] && !bank;
        const uint32_t swap = pair ? 4u*(g % 8) & ((1u << 2*w[g]) - 1) : 0; // neighbouring groups have their likely codes in different banks
        if (!side.turbo) {
            const uint32_t last = single[g] || d >= 256 ? 0 : bank ? at % 32 + 4u*w[g] : pair ? at % 32 + 6u*w[g] - 2 : 0;
            const uint32_t mask = single[g] ? 0 : bank ? ((1u << (g < 8 ? 1 : 2)*w[g]) - 1)*GGML_KVTC_CUDA_LEVEL : pair ? ((1u << 2*w[g]) - 1) << 2 : 0;
            pair_codes[g] = { pairs_at[g] | swap*4, at/32*4, at % 32 | (single[g] ? GGML_KVTC_CUDA_SINGLE : 0) | 2u*w[g] << 8 | last << 16, mask };
        }
        at += 8*w[g];
        if (w[g] == 0 || g >= n_book) {
            continue;
        }
        const int n = 1 << w[g];
        const float * level = &side.levels[side.book_start(h, g, w[g])];
        for (int c = 0; c < 8; ++c) {
            for (int i = 0; i < n; ++i) {
                levels[first_level[g] + c*n + i] = ggml_fp32_to_fp16(level[c*n + i]);
            }
            for (int i = 0; i + 1 < n; ++i) {
                bounds[first_bound[g] + i*8 + c] = (level[c*n + i] + level[c*n + i + 1])*0.5f;
            }
        }
        const auto put_pairs = [&](uint8_t * to, int stride, uint32_t swap) {
            for (int p = 0; p < 4; ++p) {
                auto * entry = (ggml_fp16_t *) (to + p*stride);
                for (int i = 0; i < n*n; ++i) {
                    entry[2*(i ^ swap)]     = levels[first_level[g] + 2*p*n + i%n];
                    entry[2*(i ^ swap) + 1] = levels[first_level[g] + (2*p + 1)*n + i/n];
                }
            }
        };
        const auto put_banks = [&](uint8_t * to) {
            for (int p = 0; p < 4; ++p) {
                const ggml_fp16_t * of_pair[2] = { levels + first_level[g] + 2*p*n, levels + first_level[g] + (2*p + 1)*n };
                for (int i = 0; i < n && g < 8; ++i) {
                    auto * entry = (ggml_fp16_t *) (to + p*GGML_KVTC_CUDA_COLUMN(d) + i*GGML_KVTC_CUDA_LEVEL);
                    for (int j = 0; j < 8; ++j) { // four times both
                        entry[j] = of_pair[j%2][i];
                    }
                }
                for (int i = 0; i < n*n && g >= 8; ++i) {
                    auto * entry = (ggml_fp16_t *) (to + 4*p + i*GGML_KVTC_CUDA_LEVEL);
                    entry[0] = of_pair[0][i%n];
                    entry[1] = of_pair[1][i/n];
                }
            }
        };
        const auto put_single = [&](uint8_t * to) {
            std::copy_n(levels + first_level[g], 8*n, (ggml_fp16_t *) to);
        };
        w[g] <= 3 ? put_pairs(tables + table, 4*n*n, 0)                 : put_single(tables + table);
        if (side.turbo) {
            continue; // the next groups have this table
        }
        single[g] ? put_single(pairs + pairs_at[g]) :
        bank      ? put_banks(pairs + pairs_at[g]) : put_pairs(pairs + pairs_at[g], GGML_KVTC_CUDA_COLUMN(d), swap);
        table += table_bytes(w[g]);
    }
    const float * scale = &side.scale[(size_t) h*d];
    const float   floor = 1e-3f**std::max_element(scale, scale + d);
    for (int i = 0; i < d; ++i) {
        tmp.inverse_scale[i] = 1.0f/std::max(scale[i], floor);
        mean[i] = side.mean[(size_t) h*d + i];
        for (int c = 0; c < d; ++c) {
            // K: row i gives channel i;  V: row c gives what component c adds
            const ggml_fp16_t x = ggml_fp32_to_fp16(side.decode[((size_t) h*d + i)*d + c]);
            decode[which == GGML_KVTC_K ? (size_t) i*d + c : (size_t) c*d + i] = x;
        }
    }
    memcpy(out.base + place, &tmp, sizeof(tmp));
}

// bytes of a side's rows in a block's shared memory, as plan.h stages them
uint32_t get_staged(const ggml_kvtc_calibration & cal, int il, ggml_kvtc_side which, int bits) {
    if (bits == 0) {
        return 0;
    }
    const ggml_kvtc_side_calibration & side = *cal.find(il, which);
    const int budget = side.budget_index(bits);
    uint32_t most = 0;
    for (int h = 0; h < side.H; ++h) {
        most = std::max(most, (uint32_t) side.head_bytes(h, budget));
    }
    return GGML_KVTC_CUDA_STAGED*((round_up(most + 12, 16)/16) | 1)*16;
}

// Bytes of a block's shared memory that a side's rows and tables take.
uint32_t get_taken(const ggml_kvtc_calibration & cal, int il, ggml_kvtc_side which, int bits, const table_room & room) {
    if (bits == 0) {
        return 0;
    }
    const ggml_kvtc_side_calibration & side = *cal.find(il, which);
    const int budget = side.budget_index(bits);
    uint32_t tables = 0;
    std::vector<uint32_t> at;
    std::vector<bool> single;
    for (int h = 0; h < side.H && !side.turbo; ++h) {
        tables = std::max(tables, choose_tables(side.group_widths(h, budget), side.d/8, which, room, at, single));
    }
    return round_up(tables, GGML_KVTC_CUDA_COLUMN(side.d)) + get_staged(cal, il, which, bits);
}

table_room get_room(const ggml_kvtc_calibration & cal, int il, int bits_k, int bits_v) {
    const int d_k = bits_k > 0 ? cal.find(il, GGML_KVTC_K)->d : 0;
    const int d_v = bits_v > 0 ? cal.find(il, GGML_KVTC_V)->d : 0;
    table_room room = { d_k == 256 ? GGML_KVTC_CUDA_MOST_PAIRS : UINT32_MAX, 4 };
    if (d_k < 256 && d_v < 256) {
        const uint32_t keys = get_taken(cal, il, GGML_KVTC_K, bits_k, { 0, room.bank_bits });
        if (keys + get_taken(cal, il, GGML_KVTC_V, bits_v, room) > GGML_KVTC_CUDA_MOST_BLOCK) {
            room.bank_bits = 3;
        }
        const uint32_t taken = get_taken(cal, il, GGML_KVTC_V, bits_v, room) + get_staged(cal, il, GGML_KVTC_K, bits_k);
        room.key_pairs = GGML_KVTC_CUDA_MOST_BLOCK > taken ? GGML_KVTC_CUDA_MOST_BLOCK - taken : 0;
    }
    return room;
}

void put_side(ggml_kvtc_bump & out, const ggml_kvtc_calibration & cal, int il, ggml_kvtc_side which, int bits, const table_room & room, ggml_kvtc_cuda_pack * pack) {
    if (bits == 0) {
        return;
    }
    const ggml_kvtc_side_calibration & side = *cal.find(il, which);
    const int budget = side.budget_index(bits);
    const std::vector<ggml_kvtc_place> places = side.places(budget);

    for (int h = 0; h < side.H; ++h) {
        if (!side.turbo) {
            put_head(out, side, which, h, budget, places[h].gain, room);
        } else if (h == 0) {
            put_head(out, side, which, h, budget, places[h].codes, room);
        } else if (pack) { // all heads of turbo types share what the first has
            auto * head = (ggml_kvtc_cuda_head *) (out.base + GGML_KVTC_CUDA_HEAD_AT(which, h));
            memcpy(head, out.base + GGML_KVTC_CUDA_HEAD_AT(which, 0), sizeof(*head));
            head->payload = places[h].codes;
        }
    }
    if (pack) {
        pack->side[which] = { (uint32_t) bits, (uint32_t) side.H, (uint32_t) side.d, side.row_bytes(bits) };
    }
}

// A side of an ordinary type, whose values take part in what kernels do with those of coded sides: they are their own components.
void put_plain(ggml_kvtc_bump & out, ggml_kvtc_side which, int H, int d, ggml_kvtc_cuda_pack * pack) {
    ggml_kvtc_cuda_head head = {};
    float * mean; ggml_fp16_t * decode;
    head.mean   = out.put(d, &mean);
    head.decode = out.put(which == GGML_KVTC_V ? (size_t) d*d : 0, &decode);
    for (int i = 0; pack && which == GGML_KVTC_V && i < d; ++i) {
        decode[(size_t) i*d + i] = ggml_fp32_to_fp16(1.0f); // the rest of the pack is zeros
    }
    for (int h = 0; pack && h < H; ++h) {
        memcpy(out.base + GGML_KVTC_CUDA_HEAD_AT(which, h), &head, sizeof(head));
    }
}

// the channel in column c of an operand
int column_channel(int c, const ggml_kvtc_cuda_pack & pack) {
    const int n_rot = (int) pack.rope_n_rot;
    const int first = c/16*16 + c%8*2 + c/8%2; // where rotation pairs are neighbours
    return pack.rope_type == GGML_KVTC_ROPE_NEOX && first < n_rot ? first/2 + first%2*(n_rot/2) : first;
}

// The decode matrices and means of keys as operands, in the columns' order that the rotation asks for.
void put_operands(ggml_kvtc_cuda_pack * pack) {
    char    * base   = (char *) pack;
    const int d      = (int) pack->side[GGML_KVTC_K].d;
    const int n_head = (int) pack->side[GGML_KVTC_K].n_head;
    const int n_all  = std::max(n_head, (int) pack->side[GGML_KVTC_V].n_head);
    for (int h = 0; h < n_head && pack->operands; ++h) {
        const auto & head = *(const ggml_kvtc_cuda_head *) (base + GGML_KVTC_CUDA_HEAD_AT(GGML_KVTC_K, h));
        const auto * from = (const ggml_fp16_t *) (base + head.decode);
        const auto * mean = (const float *)       (base + head.mean);
        auto       * to   = (ggml_fp16_t *)       (base + GGML_KVTC_CUDA_OPERAND_AT(n_all, d, h));
        for (int c = 0; c < d; ++c) {
            const int channel = column_channel(c, *pack);
            for (int i = 0; i < d; ++i) { // components: of 32, number 8*p + 2*j + x is half 2*p + x of group j
                const int group = i/32*4 + i%8/2;
                to[((size_t) group*d + c)*8 + i/8%4*2 + i%2] = from[channel*d + i];
            }
            ggml_fp16_t * last = to + ((size_t) d/8*d + c)*8;
            std::fill_n(last, 8, ggml_fp32_to_fp16(0.0f));
            last[0] = ggml_fp32_to_fp16(mean[channel]);
            last[1] = ggml_fp32_to_fp16(mean[channel] - ggml_fp16_to_fp32(last[0]));
        }
        auto * parts = (ggml_fp16_t *) (base + GGML_KVTC_CUDA_PARTS_AT(n_all, d, h));
        for (int g = 0; g <= d/8 && GGML_KVTC_CUDA_HAS_PARTS(d); ++g) {
            for (int c = 0; c < d; ++c) {
                for (int i = 0; i < 8; ++i) {
                    const int lane = 4*i + c%8/2;
                    parts[((g*(d/32) + c/32)*32 + lane)*8 + c%32/8*2 + c%2] = to[((size_t) g*d + c)*8 + i];
                }
            }
        }
    }
}

// The rotations of the first positions; without RoPE, of no angle: kernels use them all the same
void put_turns(ggml_kvtc_cuda_pack * pack) {
    char           * base   = (char *) pack;
    const int        d      = (int) pack->side[GGML_KVTC_K].d;
    const int        n_head = (int) std::max(pack->side[GGML_KVTC_K].n_head, pack->side[GGML_KVTC_V].n_head);
    const uint64_t * freq   = (const uint64_t *) (base + pack->freq);
    auto           * turns  = (ggml_fp16_t *)    (base + GGML_KVTC_CUDA_TURNS_AT(n_head, d));
    const ggml_fp16_t one = ggml_fp32_to_fp16(1.0f), zero = ggml_fp32_to_fp16(0.0f);
    for (int pos = 0; pos < GGML_KVTC_CUDA_TURNS && pack->operands; ++pos) {
        for (int p = 0; p < d/2; ++p) {
            const bool   rests = freq[p] == 0; // all pairs of a new pack, of which most get a rotation later: not computed twice
            const double angle = (double) ((uint64_t) pos*freq[p])*3.4061215800304515e-19; // 2*pi/2^64
            const int    word  = pos*GGML_KVTC_CUDA_TURN_WORDS(d) + p/16*16 + p/4%2*8 + p/8%2*2 + p/2%2*4;
            turns[2*word + p%2]     = rests ? one  : ggml_fp32_to_fp16((float) cos(angle));
            turns[2*word + p%2 + 2] = rests ? zero : ggml_fp32_to_fp16((float) sin(angle));
        }
    }
}

size_t put_pack(const ggml_kvtc_calibration & cal, int il, int bits_k, int bits_v, char * base) {
    ggml_kvtc_bump out { base };
    out.align = 16;
    ggml_kvtc_cuda_pack * pack;
    out.put(1, &pack);
    const int n_head = std::max(bits_k > 0 ? cal.find(il, GGML_KVTC_K)->H : 0, bits_v > 0 ? cal.find(il, GGML_KVTC_V)->H : 0);
    out.reserve(2*(size_t) n_head*sizeof(ggml_kvtc_cuda_head));
    const bool turns = bits_k > 0 && !cal.find(il, GGML_KVTC_K)->turbo; // keys are rebuilt and rotated
    const int  d_k   = turns ? cal.find(il, GGML_KVTC_K)->d : 0;
    if (GGML_KVTC_CUDA_HAS_OPERAND(d_k)) {
        const uint32_t at = out.reserve((1 + GGML_KVTC_CUDA_HAS_PARTS(d_k))*n_head*GGML_KVTC_CUDA_OPERAND_BYTES(d_k) + GGML_KVTC_CUDA_TURNS_BYTES(d_k));
        GGML_ASSERT(at == GGML_KVTC_CUDA_OPERAND_AT(n_head, d_k, 0));
    }
    const table_room room = get_room(cal, il, bits_k, bits_v);
    put_side(out, cal, il, GGML_KVTC_K, bits_k, room, pack);
    put_side(out, cal, il, GGML_KVTC_V, bits_v, room, pack);
    if (bits_k == 0 || bits_v == 0) {
        const ggml_kvtc_side_calibration & other = *cal.find(il, bits_k == 0 ? GGML_KVTC_V : GGML_KVTC_K);
        put_plain(out, bits_k == 0 ? GGML_KVTC_K : GGML_KVTC_V, other.H, other.d, pack);
    }

    const uint32_t freq = turns ? out.reserve(d_k/2*sizeof(uint64_t)) : 0;
    const size_t size = (out.used + 63)/64*64;
    if (pack) {
        pack->magic     = GGML_KVTC_CUDA_PACK_MAGIC;
        pack->version   = GGML_KVTC_VERSION;
        pack->size      = size;
        pack->rope_type = GGML_KVTC_ROPE_NONE;
        pack->freq      = freq;
        pack->operands  = GGML_KVTC_CUDA_HAS_OPERAND(d_k);
        put_operands(pack);
        put_turns(pack);
    }
    return size;
}

// inv_freq/(2*pi) modulo 1, in units of 2^-64
uint64_t get_turns(double inv_freq) {
    const long double turns = (long double) inv_freq/6.283185307179586476925286766559L;
    const long double part  = turns - std::floor(turns);
    return (uint64_t) std::ldexp(part, 64); // below 2^64, since part is below 1
}

// rotation pairs up to the last that does not turn slowly
int32_t count_fast(const ggml_kvtc_cuda_pack & pack) {
    const auto * freq = (const uint64_t *) ((const char *) &pack + pack.freq);
    const double most = GGML_KVTC_CUDA_SLOW_ANGLE/GGML_KVTC_CUDA_SLOW_REACH/6.283185307179586;
    int32_t n = (int32_t) pack.side[GGML_KVTC_K].d/2;
    while (n > 0 && std::ldexp((double) std::min(freq[n - 1], -freq[n - 1]), -64) <= most) {
        n--;
    }
    return n;
}

} // namespace

size_t ggml_kvtc_cuda_pack_size(const ggml_kvtc_calibration * cal, int il, int bits_k, int bits_v) {
    return put_pack(*cal, il, bits_k, bits_v, nullptr);
}

void ggml_kvtc_cuda_pack_write(const ggml_kvtc_calibration * cal, int il, int bits_k, int bits_v, void * pack) {
    memset(pack, 0, ggml_kvtc_cuda_pack_size(cal, il, bits_k, bits_v));
    put_pack(*cal, il, bits_k, bits_v, (char *) pack);
}

void ggml_kvtc_cuda_pack_set_rope(void * data, const ggml_kvtc_rope * rope) {
    auto * pack = (ggml_kvtc_cuda_pack *) data;
    GGML_ASSERT(pack->magic == GGML_KVTC_CUDA_PACK_MAGIC);
    GGML_ASSERT(rope->n_rot % 2 == 0 && rope->n_rot <= (int) pack->side[GGML_KVTC_K].d);

    pack->rope_type   = rope->type;
    pack->rope_n_rot  = (uint32_t) rope->n_rot;
    pack->rope_mscale = rope->mscale;
    uint64_t * freq = (uint64_t *) ((char *) data + pack->freq);
    for (int p = 0; p < (int) pack->side[GGML_KVTC_K].d/2; ++p) {
        freq[p] = p < rope->n_rot/2 && rope->type != GGML_KVTC_ROPE_NONE ? get_turns(rope->inv_freq[p]) : 0;
    }
    put_operands(pack);
    put_turns(pack);
}

void ggml_kvtc_cuda_pack_limits(const void * data, int32_t limits[GGML_KVTC_N_LIMITS]) {
    const auto * pack = (const ggml_kvtc_cuda_pack *) data;
    GGML_ASSERT(pack->magic == GGML_KVTC_CUDA_PACK_MAGIC);
    std::fill_n(limits, GGML_KVTC_N_LIMITS, 0);
    for (int s = 0; s < 2; ++s) {
        for (uint32_t h = 0; h < pack->side[s].n_head; ++h) {
            const auto & head = *(const ggml_kvtc_cuda_head *) ((const char *) data + GGML_KVTC_CUDA_HEAD_AT(s, h));
            limits[s]     = std::max(limits[s], (int32_t) head.n_bytes);
            limits[2 + s] = std::max(limits[2 + s], (int32_t) head.n_tables);
            limits[4 + s] = std::max(limits[4 + s], (int32_t) head.n_pairs);
        }
    }
    if (pack->operands) {
        limits[6] = count_fast(*pack);
    }
}
