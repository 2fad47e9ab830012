// Packing: what llama.cpp writes of a cache with kvtc types, and what it reads again, goes through here. Rows become sections of a
// container (llama-kvtc-container.h), all else plain items between them, in the order in which they come.
#include "llama-kvtc.h"

#include "llama-kvtc-container.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cells.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <random>
#include <stdexcept>

struct llama_kvtc_rows_place {
    kvtc_place place;
    size_t     row_bytes;
};

namespace {

const ggml_tensor * root(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

uint64_t hash_bytes(uint64_t hash, const void * data, size_t size) {
    const uint8_t * p = (const uint8_t *) data;
    for (; size > 0;) {
        uint64_t     word = 0;
        const size_t n    = std::min<size_t>(8, size);
        memcpy(&word, p, n);
        hash = (hash ^ word)*0x9e3779b97f4a7c15u;
        hash ^= hash >> 32;
        p    += n;
        size -= n;
    }
    return hash;
}

} // namespace

// Whose rows lie at an offset of a tensor of the cache, or of its exact rows.
bool llama_kvtc::find_place(const ggml_tensor * t, size_t offset, llama_kvtc_rows_place & place) const {
    for (const layer & l : layers) {
        for (int s = 0; s < 2; ++s) {
            if (l.cache[s] && root(l.cache[s]) == root(t)) {
                place = { { (kvtc_what) s, (uint16_t) l.il, 0 }, ggml_row_size(l.cache[s]->type, l.cache[s]->ne[0]) };
                return true;
            }
            const ggml_tensor * rows = l.rows[s];
            if (rows && t == l.exact && offset >= rows->view_offs && offset < rows->view_offs + rows->ne[2]*rows->nb[2]) {
                place = { { (kvtc_what) (KVTC_WHAT_EXACT_K + s), (uint16_t) l.il, (uint16_t) ((offset - rows->view_offs)/rows->nb[2]) }, rows->nb[1] };
                return true;
            }
        }
    }
    return false;
}

// what both directions need of a cache
class llama_kvtc_packer {
public:
    explicit llama_kvtc_packer(llama_kvtc & kvtc) : kvtc(kvtc) {}

protected:
    llama_kvtc_rows_place find(const ggml_tensor * t, size_t offset) const {
        llama_kvtc_rows_place result;
        GGML_ASSERT(kvtc.find_place(t, offset, result)); // llama.cpp writes tensors of the cache alone
        return result;
    }

    // fields of a row; none of a type that is not ours
    std::vector<ggml_kvtc_run> runs(const llama_kvtc_rows_place & rows) const {
        if (rows.place.what >= KVTC_WHAT_EXACT_K) {
            return { { 16, GGML_KVTC_FIELD_HALF, (uint16_t) (rows.row_bytes/2) } };
        }
        const ggml_type type = kvtc.get_layer(rows.place.layer).cache[rows.place.what]->type;
        if (!ggml_kvtc_is_type(type)) {
            return {};
        }
        const auto side = (ggml_kvtc_side) rows.place.what;
        const int  bits = ggml_kvtc_type_bits(type);
        const int  n    = ggml_kvtc_cache_runs(kvtc.calibration.get(), rows.place.layer, side, bits, rows.row_bytes, nullptr, 0);
        std::vector<ggml_kvtc_run> result(n);
        ggml_kvtc_cache_runs(kvtc.calibration.get(), rows.place.layer, side, bits, rows.row_bytes, result.data(), n);
        return result;
    }

    [[noreturn]] void refuse(const std::string & what) const {
        kvtc.refusal = what;
        throw std::runtime_error(what);
    }

    [[noreturn]] void damaged(const std::string & where) const { refuse("the state is damaged: " + where); }

    auto & packed() { return kvtc.packed; }
    size_t n_cells() const { return kvtc.cells[0].size(); }

private:
    llama_kvtc & kvtc;
};

namespace {

class packing_writer : public llama_io_write_i, llama_kvtc_packer {
public:
    packing_writer(llama_kvtc & kvtc, llama_io_write_i & io) : llama_kvtc_packer(kvtc), io(io) {
        const uint32_t head[2] = { KVTC_CONTAINER_MAGIC, KVTC_CONTAINER_VERSION };
        io.write(head, sizeof(head));
    }

    void write(const void * src, size_t size) override {
        begin(true, {});
        pending.insert(pending.end(), (const uint8_t *) src, (const uint8_t *) src + size);
    }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        if (size > 0) {
            begin(false, find(tensor, offset));
            pending.resize(pending.size() + size);
            ggml_backend_tensor_get(tensor, pending.data() + pending.size() - size, offset, size);
        }
    }

    size_t n_bytes() override { return io.n_bytes(); }

    void finish() {
        flush();
        const auto bytes = end.bytes();
        io.write(bytes.data(), bytes.size());
        if (!io.only_counts()) {
            packed().clear();
        }
    }

private:
    // what comes next belongs to another item than what is pending
    void begin(bool next_plain, const llama_kvtc_rows_place & next) {
        if (next_plain != plain || (!plain && !(next.place == rows.place))) {
            flush();
            plain = next_plain;
            rows  = next;
        }
    }

    void flush() {
        if (pending.empty()) {
            return;
        }
        uint64_t hash = hash_bytes(plain, &rows.place, plain ? 0 : sizeof(rows.place));
        hash = hash_bytes(hash, pending.data(), pending.size());
        const size_t i = n_items++;
        std::vector<uint8_t> bytes;
        if (i < packed().size() && packed()[i].hash == hash) {
            bytes = std::move(packed()[i].bytes); // packed when the size was asked for
        } else if (plain) {
            bytes = kvtc_write_plain(pending.data(), pending.size());
        } else {
            bytes = kvtc_write_section(rows.place, runs(rows), rows.row_bytes, pending.data(), pending.size()/rows.row_bytes);
        }
        end.add(bytes);
        io.write(bytes.data(), bytes.size());
        if (io.only_counts()) {
            packed().resize(i);
            packed().push_back({ hash, std::move(bytes) });
        }
        pending.clear();
    }

    llama_io_write_i    & io;
    bool                  plain = true;
    llama_kvtc_rows_place rows  = {};
    std::vector<uint8_t>  pending;
    size_t                n_items = 0;
    kvtc_end              end;
};

class packing_reader : public llama_io_read_i, llama_kvtc_packer {
public:
    packing_reader(llama_kvtc & kvtc, llama_io_read_i & io) : llama_kvtc_packer(kvtc), io(io) {
        items = kvtc_read_container([&](void * data, size_t size) { io.read(data, size); });
    }

    void read(void * dst, size_t size) override {
        for (uint8_t * out = (uint8_t *) dst; size > 0;) {
            if (used == data.size()) {
                next(true);
            }
            const size_t n = std::min(size, data.size() - used);
            if (!plain || n == 0) {
                damaged("rows where there should be none");
            }
            memcpy(out, &data[used], n);
            out  += n;
            used += n;
            size -= n;
        }
    }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        if (size == 0) {
            return;
        }
        const llama_kvtc_rows_place expected = find(tensor, offset);
        if (used == data.size()) {
            next(false);
        }
        if (plain || !(place == expected.place) || row_bytes != expected.row_bytes || size > data.size() - used) {
            damaged("other rows than those of " + expected.place.name());
        }
        ggml_backend_tensor_set(tensor, &data[used], offset, size);
        used += size;
    }

    size_t n_bytes() override { return io.n_bytes(); }

    void finish() {
        if (used != data.size() || at != items.size()) {
            damaged("more than this context takes");
        }
    }

private:
    void next(bool want_plain) {
        if (at == items.size() || items[at].plain != want_plain) {
            damaged(want_plain ? "rows where there should be none" : "rows are missing");
        }
        kvtc_item item = std::move(items[at++]);
        plain = item.plain;
        place = item.place;
        used  = 0;
        if (plain) {
            data = std::move(item.blocks[0].data);
            return;
        }
        try {
            const kvtc_section_reader section(item);
            row_bytes = section.row_bytes();
            if (item.n_rows > n_cells() || row_bytes > GGML_KVTC_MAX_ROW) {
                damaged(place.name() + ", more than the cache has");
            }
            data.resize(item.n_rows*row_bytes);
            section.decode(data.data());
        } catch (const std::exception & err) {
            refuse(err.what());
        }
    }

    llama_io_read_i      & io;
    std::vector<kvtc_item> items;
    size_t                 at = 0;

    // the item in use
    bool                 plain     = true;
    kvtc_place           place     = {};
    size_t               row_bytes = 0;
    std::vector<uint8_t> data;
    size_t               used = 0;
};

} // namespace

bool llama_kvtc::state_write(llama_io_write_i & io, llama_seq_id seq_id, uint32_t flags, const std::function<void(llama_io_write_i &)> & write) {
    const bool partial = !sliding && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    if (dynamic_cast<packing_writer *>(&io)) {
        return false;
    }
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        if (partial) {
            state_write_partial(io, seq_id);
        }
        return partial;
    }
    packing_writer writer(*this, io);
    if (partial) {
        state_write_partial(writer, seq_id);
    } else {
        write(writer);
    }
    writer.finish();
    return true;
}

void llama_kvtc::state_read(llama_io_read_i & io, llama_seq_id seq_id, uint32_t flags, const std::function<void(llama_io_read_i &)> & read,
                            const std::function<void()> & clear) {
    const bool partial = !sliding && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    const auto read_all = [&](llama_io_read_i & from) {
        if (partial) {
            state_read_partial(from, seq_id);
        } else {
            read(from);
        }
    };
    refusal.clear();
    try {
        if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
            read_all(io);
            return;
        }
        packing_reader reader(*this, io);
        read_all(reader);
        reader.finish();
    } catch (const std::exception & err) {
        // llama.cpp forgets the reason of what goes wrong below it, and says what it found itself
        if (refusal.empty() && strncmp(err.what(), "the state", 9) == 0) {
            refusal = err.what();
        }
        if (!refusal.empty()) {
            LLAMA_LOG_ERROR("kvtc: %s\n", refusal.c_str());
        }
        if (!partial) { // else the codes are still what they were
            clear();
        }
        throw;
    }
}

void llama_kvtc_check_left(size_t left, size_t wanted) {
    if (wanted > left) {
        throw std::runtime_error("the state file is truncated");
    }
}

// other processes may save to the same name
std::string llama_kvtc_part_file(const char * path) {
    return std::string(path) + ".part" + std::to_string(std::random_device()());
}

void llama_kvtc_replace_file(const std::string & part, const char * path) {
    std::filesystem::rename(std::filesystem::u8path(part), std::filesystem::u8path(path));
}

void llama_kvtc_remove_file(const std::string & part) {
    std::error_code ignored; // it may never have been made
    std::filesystem::remove(std::filesystem::u8path(part), ignored);
}
