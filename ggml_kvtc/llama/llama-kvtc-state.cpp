// kvtc's part of saved states: whose codes these are, and the exact rows of sinks and window.
//
//   u32 magic | u32 version | u64 calibration hash | i32 n_sink | i32 n_window | u32 n_layer | u32 n_rows
//   n_layer * { i32 il, type of K, type of V }
//   n_rows * i32: which cell, counted in the order the cells are saved in (partial: its position)
//   u32 FNV-1a of all of the above and of the positions of all saved cells
//   rows, by layer, side, kv head and row: head_dim * F16
#include "llama-kvtc.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cells.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>

namespace {

constexpr uint32_t MAGIC   = 0x6374766b; // "kvtc"
constexpr uint32_t VERSION = 1;

struct head {
    uint32_t magic   = MAGIC;
    uint32_t version = VERSION;
    uint64_t hash;
    int32_t  n_sink;
    int32_t  n_window;
    uint32_t n_layer;
    uint32_t n_rows;
};

struct head_layer {
    int32_t il;
    int32_t type[2];
};

uint32_t fnv(uint32_t hash, const void * data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        hash = (hash ^ ((const uint8_t *) data)[i])*16777619u;
    }
    return hash;
}

template <typename T>
uint32_t fnv(uint32_t hash, const std::vector<T> & v) {
    return fnv(hash, v.data(), v.size()*sizeof(T));
}

uint32_t checksum(const head & h, const std::vector<head_layer> & layers, const std::vector<int32_t> & keys, const std::vector<int32_t> & positions) {
    return fnv(fnv(fnv(fnv(2166136261u, &h, sizeof(h)), layers), keys), positions);
}

std::string type_name(int32_t type) {
    return type >= 0 && type < GGML_TYPE_COUNT ? ggml_type_name((ggml_type) type) : std::to_string(type);
}

[[noreturn]] void refuse(const std::string & what) {
    throw std::runtime_error(what);
}

template <typename T>
void write_vector(llama_io_write_i & io, const std::vector<T> & v) {
    io.write(v.data(), v.size()*sizeof(T));
}

template <typename T>
void read_vector(llama_io_read_i & io, std::vector<T> & v, size_t n) {
    v.resize(n);
    io.read(v.data(), n*sizeof(T));
}

} // namespace

// Everything but the rows. Positions are those of all saved cells, so that a state whose cells were damaged is refused, too.
void llama_kvtc::write_head(llama_io_write_i & io, const std::vector<int32_t> & keys, const std::vector<int32_t> & positions) const {
    head h;
    h.hash     = calibration_hash;
    h.n_sink   = params.n_sink;
    h.n_window = params.n_window;
    h.n_layer  = (uint32_t) layers.size();
    h.n_rows   = (uint32_t) keys.size();
    std::vector<head_layer> types;
    for (const layer & l : layers) {
        types.push_back({ (int32_t) l.il, { l.cache[0]->type, l.cache[1]->type } });
    }
    io.write(&h, sizeof(h));
    write_vector(io, types);
    write_vector(io, keys);
    const uint32_t sum = checksum(h, types, keys, positions);
    io.write(&sum, sizeof(sum));
}

std::vector<int32_t> llama_kvtc::read_head(llama_io_read_i & io, const std::vector<int32_t> & positions) const {
    head h;
    io.read(&h, sizeof(h));
    if (h.magic != MAGIC) {
        refuse("the state was not saved from a kvtc cache, or it is damaged");
    }
    if (h.version != VERSION) {
        refuse("the state is of version " + std::to_string(h.version) + ", this program reads version " + std::to_string(VERSION));
    }
    if (h.hash != calibration_hash) {
        refuse("the state was saved under another calibration than " + source + ", or it is damaged");
    }
    if (h.n_sink != params.n_sink || h.n_window != params.n_window) {
        refuse("the state was saved with --kvtc-sink " + std::to_string(h.n_sink) + " --kvtc-window " + std::to_string(h.n_window) +
               ", this context has " + std::to_string(params.n_sink) + " and " + std::to_string(params.n_window));
    }
    if (h.n_layer != layers.size()) {
        refuse("the state holds " + std::to_string(h.n_layer) + " layers, this context " + std::to_string(layers.size()));
    }
    std::vector<head_layer> types;
    read_vector(io, types, h.n_layer);
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & have = layers[i].cache;
        if (types[i].il != (int32_t) layers[i].il || types[i].type[0] != (int32_t) have[0]->type || types[i].type[1] != (int32_t) have[1]->type) {
            refuse("the state holds " + type_name(types[i].type[0]) + "/" + type_name(types[i].type[1]) + " for layer " + std::to_string(types[i].il) +
                   ", this context " + ggml_type_name(have[0]->type) + "/" + ggml_type_name(have[1]->type) + " for layer " + std::to_string(layers[i].il));
        }
    }
    if (h.n_rows > owners.size()) {
        refuse("the state holds " + std::to_string(h.n_rows) + " exact rows, this context has room for " + std::to_string(owners.size()));
    }
    std::vector<int32_t> keys;
    read_vector(io, keys, h.n_rows);
    uint32_t sum;
    io.read(&sum, sizeof(sum));
    if (sum != checksum(h, types, keys, positions)) {
        refuse("the state is damaged");
    }
    return keys;
}

// f(tensor, offset, size) for the rows in slots, those side by side in one call
template <typename F>
void llama_kvtc::for_each_row(const std::vector<int32_t> & slots, F && f) const {
    for (const layer & l : layers) {
        for (const ggml_tensor * t : l.rows) {
            for (int64_t h = 0; t && h < t->ne[2]; ++h) {
                for (size_t i = 0, j = 0; i < slots.size(); i = j) {
                    for (j = i + 1; j < slots.size() && slots[j] == slots[j - 1] + 1; ++j) {}
                    f(l.exact, t->view_offs + h*t->nb[2] + slots[i]*t->nb[1], (j - i)*t->nb[1]);
                }
            }
        }
    }
}

void llama_kvtc::write_rows(llama_io_write_i & io, const std::vector<int32_t> & slots) const {
    for_each_row(slots, [&](ggml_tensor * t, size_t offset, size_t size) { io.write_tensor(t, offset, size); });
}

void llama_kvtc::read_rows(llama_io_read_i & io, const std::vector<int32_t> & slots) const {
    for_each_row(slots, [&](ggml_tensor * t, size_t offset, size_t size) { io.read_tensor(t, offset, size); });
}

std::vector<int32_t> llama_kvtc::slots_for(uint32_t stream, size_t n) const {
    std::vector<int32_t> slots;
    for (const auto & found : find_slots(stream, n)) {
        slots.push_back(found.second);
    }
    if (slots.size() < n) {
        refuse("the state's " + std::to_string(n) + " exact rows have no room here");
    }
    std::sort(slots.begin(), slots.end()); // longer runs
    return slots;
}

void llama_kvtc::cells_write(llama_io_write_i & io, uint32_t stream, const std::vector<std::pair<uint32_t, uint32_t>> & ranges, llama_seq_id seq_id) {
    commit();
    std::vector<int32_t> positions;
    std::vector<int32_t> keys;
    std::vector<int32_t> slots;
    for (const auto & range : ranges) {
        for (uint32_t cell = range.first; cell < range.second; ++cell) {
            const int32_t slot = slot_of[stream][cell];
            if (slot >= 0 && must_keep(stream, cell, seq_id)) {
                keys .push_back((int32_t) positions.size());
                slots.push_back(slot);
            }
            positions.push_back(cells[stream].pos_get(cell));
        }
    }
    write_head(io, keys, positions);
    write_rows(io, slots);
}

bool llama_kvtc::cells_read(llama_io_read_i & io, uint32_t stream, const std::vector<uint32_t> & idxs) {
    commit();
    std::vector<int32_t> positions;
    for (uint32_t cell : idxs) {
        set_slot(stream, cell, -1); // was another token's
        positions.push_back(cells[stream].pos_get(cell));
    }
    try {
        const std::vector<int32_t> keys  = read_head(io, positions);
        const std::vector<int32_t> slots = slots_for(stream, keys.size());
        for (int32_t key : keys) {
            if (key < 0 || key >= (int32_t) idxs.size()) {
                refuse("the state is damaged");
            }
        }
        read_rows(io, slots);
        for (size_t i = 0; i < keys.size(); ++i) {
            set_owner(slots[i], stream, idxs[keys[i]]);
        }
    } catch (const std::exception & err) {
        refusal = err.what();
        return false;
    }
    return true;
}

void llama_kvtc::state_write_partial(llama_io_write_i & io, llama_seq_id seq_id) {
    commit();
    const uint32_t stream = stream_of(seq_id);
    std::vector<int32_t> keys;
    std::vector<int32_t> slots;
    for (uint32_t cell = 0; cell < cells[stream].size(); ++cell) {
        const int32_t slot = slot_of[stream][cell];
        if (slot >= 0 && must_keep(stream, cell, seq_id)) {
            keys .push_back(cells[stream].pos_get(cell));
            slots.push_back(slot);
        }
    }
    write_head(io, keys, {});
    write_rows(io, slots);
}

void llama_kvtc::state_read_partial(llama_io_read_i & io, llama_seq_id seq_id) {
    commit();
    const uint32_t stream = stream_of(seq_id);
    const llama_kv_cells & c = cells[stream];
    const std::vector<int32_t> keys = read_head(io, {});

    // cells by position; images have several at one
    std::multimap<llama_pos, uint32_t> by_pos;
    for (uint32_t cell = 0; cell < c.size(); ++cell) {
        if (!c.is_empty(cell) && c.seq_has(cell, seq_id)) {
            by_pos.emplace(c.pos_get(cell), cell);
            if (c.seq_count(cell) == 1) {
                set_slot(stream, cell, -1); // makes room: the sequence's window is about to be that of the state
            }
        }
    }
    const std::vector<int32_t> slots = slots_for(stream, keys.size());
    read_rows(io, slots);
    for (size_t i = 0; i < keys.size(); ++i) {
        const auto it = by_pos.find(keys[i]);
        if (it != by_pos.end()) {
            if (slot_of[stream][it->second] < 0) { // else another sequence's copy of the row is there
                set_owner(slots[i], stream, it->second);
            }
            by_pos.erase(it);
        }
    }
}

bool llama_kvtc::is_lost(llama_seq_id seq_id, llama_pos pos) {
    commit();
    const uint32_t stream = stream_of(seq_id);
    const llama_kv_cells & c = cells[stream];
    for (uint32_t cell = 0; cell < c.size(); ++cell) {
        if (!c.is_empty(cell) && c.seq_has(cell, seq_id) && slot_of[stream][cell] < 0) {
            const llama_pos p = c.pos_get(cell);
            if (p < pos && pos - p <= params.n_window) {
                return true;
            }
        }
    }
    return false;
}
