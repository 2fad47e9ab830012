#include "llama-kvtc-container.h"
#include "kvtc-threads.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

using rows_ptr = std::unique_ptr<ggml_kvtc_rows, decltype(&ggml_kvtc_rows_free)>;

[[noreturn]] void refuse(const std::string & what) {
    throw std::runtime_error(what);
}

std::string block_name(const kvtc_record & r) {
    switch (r.kind) {
        case KVTC_RECORD_PLAIN: return "what goes with the cells";
        case KVTC_RECORD_END:   return "the end";
        default: break;
    }
    const std::string place = kvtc_place { (kvtc_what) r.what, r.layer, r.head }.name();
    if (r.kind == KVTC_RECORD_MODEL) {
        return place + ", the model";
    }
    return place + ", rows " + std::to_string(r.first) + " to " + std::to_string((uint64_t) r.first + r.n_rows - 1);
}

uint32_t checksum(const kvtc_record & r) {
    return ggml_kvtc_crc32(0, (const uint8_t *) &r, offsetof(kvtc_record, head_crc));
}

void append(std::vector<uint8_t> & out, kvtc_record r, const std::vector<uint8_t> & data) {
    r.size     = (uint32_t) data.size();
    r.crc      = r.kind == KVTC_RECORD_END ? r.crc : ggml_kvtc_crc32(0, data.data(), data.size());
    r.head_crc = checksum(r);
    out.insert(out.end(), (const uint8_t *) &r, (const uint8_t *) &r + sizeof(r));
    out.insert(out.end(), data.begin(), data.end());
}

bool in_range(const kvtc_record & r) {
    if (r.zero != 0 || r.size > KVTC_MAX_BYTES || r.coder > KVTC_CODER_EIGHT || r.what > KVTC_WHAT_EXACT_V) {
        return false;
    }
    if (r.coder == KVTC_CODER_EIGHT && (r.kind != KVTC_RECORD_MODEL || r.what < KVTC_WHAT_EXACT_K)) {
        return false;
    }
    switch (r.kind) {
        case KVTC_RECORD_PLAIN:
        case KVTC_RECORD_MODEL: return r.n_rows == 0 && r.first == 0;
        case KVTC_RECORD_BLOCK: return r.n_rows > 0 && r.n_rows <= KVTC_MAX_ROWS && (uint64_t) r.first + r.n_rows <= UINT32_MAX;
        case KVTC_RECORD_END:   return r.size == 0;
        default:                return false;
    }
}

// A row in 8 bits, f16 step | n bytes of 128 + how many steps, to n f16.
void widen(const uint8_t * narrow, size_t n, uint8_t * row) {
    ggml_fp16_t half;
    memcpy(&half, narrow, sizeof(half));
    const float step = ggml_fp16_to_fp32(half);
    for (size_t i = 0; i < n; ++i) {
        half = ggml_fp32_to_fp16(step*(float) (narrow[KVTC_EIGHT_STEP + i] - 128));
        memcpy(row + 2*i, &half, sizeof(half));
    }
}

} // namespace

std::string kvtc_place::name() const {
    static const char * const names[] = { "keys", "values", "exact keys", "exact values" };
    std::string result = "layer " + std::to_string(layer) + " " + names[what];
    if (what == KVTC_WHAT_EXACT_K || what == KVTC_WHAT_EXACT_V) {
        result += " of head " + std::to_string(head);
    }
    return result;
}

std::vector<uint8_t> kvtc_write_plain(const uint8_t * data, size_t size) {
    std::vector<uint8_t> out;
    for (size_t at = 0; at < size; at += KVTC_MAX_BYTES) {
        kvtc_record r;
        r.kind = KVTC_RECORD_PLAIN;
        append(out, r, { data + at, data + std::min(size, at + KVTC_MAX_BYTES) });
    }
    return out;
}

std::vector<uint8_t> kvtc_write_section(kvtc_place place, const std::vector<ggml_kvtc_run> & runs, size_t row_bytes, const uint8_t * rows, size_t n_rows) {
    kvtc_record r;
    r.kind  = KVTC_RECORD_MODEL;
    r.what  = place.what;
    r.layer = place.layer;
    r.head  = place.head;

    rows_ptr model(runs.empty() ? nullptr : ggml_kvtc_rows_fit(runs.data(), (int) runs.size(), rows, (int64_t) n_rows), ggml_kvtc_rows_free);
    std::vector<uint8_t> bytes;
    if (model) {
        r.coder = KVTC_CODER_RANS;
        bytes.resize(ggml_kvtc_rows_write(model.get(), nullptr, 0));
        ggml_kvtc_rows_write(model.get(), bytes.data(), bytes.size());
    } else {
        const uint32_t size = (uint32_t) row_bytes;
        bytes.assign((const uint8_t *) &size, (const uint8_t *) (&size + 1));
    }

    const size_t step = std::max<size_t>(1, std::min<size_t>(KVTC_BLOCK_ROWS, KVTC_MAX_BYTES/row_bytes));
    std::vector<kvtc_block> blocks((n_rows + step - 1)/step);
    kvtc_for_each(blocks.size(), [&](size_t i) {
        kvtc_record          & b    = blocks[i].record;
        std::vector<uint8_t> & data = blocks[i].data;
        b = r;
        b.kind   = KVTC_RECORD_BLOCK;
        b.first  = (uint32_t) (i*step);
        b.n_rows = (uint32_t) std::min(step, n_rows - i*step);
        const uint8_t * from = rows + i*step*row_bytes;
        if (model) {
            data.resize(ggml_kvtc_rows_bound(model.get(), b.n_rows));
            data.resize(ggml_kvtc_rows_encode(model.get(), from, b.n_rows, data.data()));
        }
        if (data.empty() || data.size() >= b.n_rows*row_bytes) { // the smaller of the two
            b.coder = KVTC_CODER_STORED;
            data.assign(from, from + b.n_rows*row_bytes);
        }
    });

    std::vector<uint8_t> out;
    append(out, r, bytes);
    for (const kvtc_block & block : blocks) {
        append(out, block.record, block.data);
    }
    return out;
}

void kvtc_end::add(const std::vector<uint8_t> & item) {
    for (size_t at = 0; at < item.size();) {
        kvtc_record r;
        memcpy(&r, &item[at], sizeof(r));
        crc = ggml_kvtc_crc32(crc, (const uint8_t *) &r.head_crc, sizeof(r.head_crc));
        ++n_records;
        at += sizeof(r) + r.size;
    }
}

std::vector<uint8_t> kvtc_end::bytes() const {
    kvtc_record r;
    r.kind   = KVTC_RECORD_END;
    r.n_rows = n_records;
    r.crc    = crc;
    std::vector<uint8_t> out;
    append(out, r, {});
    return out;
}

std::vector<kvtc_item> kvtc_read_container(const std::function<void(void * data, size_t size)> & pull) {
    uint32_t head[2];
    pull(head, sizeof(head));
    if (head[0] != KVTC_CONTAINER_MAGIC) {
        refuse("the state was not saved from a kvtc cache, or it is damaged");
    }
    if (head[1] != KVTC_CONTAINER_VERSION) {
        refuse("the state is of version " + std::to_string(head[1]) + ", this program reads version " + std::to_string(KVTC_CONTAINER_VERSION));
    }
    std::vector<kvtc_item> items;
    uint32_t n_records = 0;
    uint32_t crc       = 0;
    std::string after  = "the head";
    for (;; ++n_records) {
        kvtc_block block;
        kvtc_record & r = block.record;
        try {
            pull(&r, sizeof(r));
        } catch (const std::exception &) {
            refuse("the state is damaged: it ends after " + after);
        }
        if (r.head_crc != checksum(r) || !in_range(r)) {
            refuse("the state is damaged: the block after " + after);
        }
        if (r.kind == KVTC_RECORD_END) {
            if (r.n_rows != n_records || r.crc != crc) {
                refuse("the state is damaged: blocks are missing or in another order");
            }
            return items;
        }
        after = block_name(r);
        try {
            block.data.resize(r.size);
            pull(block.data.data(), r.size);
        } catch (const std::exception &) {
            refuse("the state is damaged: it ends in " + after);
        }
        if (ggml_kvtc_crc32(0, block.data.data(), block.data.size()) != r.crc) {
            refuse("the state is damaged: " + after);
        }
        crc = ggml_kvtc_crc32(crc, (const uint8_t *) &r.head_crc, sizeof(r.head_crc));
        const kvtc_place place = { (kvtc_what) r.what, r.layer, r.head };
        if (r.kind == KVTC_RECORD_BLOCK) {
            if (items.empty() || items.back().plain || !(items.back().place == place) || r.first != items.back().n_rows) {
                refuse("the state is damaged: " + after + " belong elsewhere");
            }
            items.back().n_rows += r.n_rows;
            items.back().blocks.push_back(std::move(block));
            continue;
        }
        items.emplace_back();
        items.back().place = place;
        items.back().plain = r.kind == KVTC_RECORD_PLAIN;
        if (items.back().plain) {
            items.back().blocks.push_back(std::move(block));
        } else {
            items.back().model = std::move(block);
        }
    }
}

std::vector<kvtc_item> kvtc_read_container(const uint8_t * data, size_t size, size_t & used) {
    used = 0;
    return kvtc_read_container([&](void * to, size_t n) {
        if (n > size - used) {
            refuse("the state is truncated");
        }
        if (n > 0) {
            memcpy(to, data + used, n);
        }
        used += n;
    });
}

kvtc_section_reader::kvtc_section_reader(const kvtc_item & section) : section(section), model(nullptr, ggml_kvtc_rows_free) {
    const auto & data = section.model.data;
    bool ok;
    if (section.model.record.coder == KVTC_CODER_STORED) {
        uint32_t size = 0;
        ok = data.size() == sizeof(size);
        if (ok) {
            memcpy(&size, data.data(), sizeof(size));
        }
        stride = size;
    } else {
        model.reset(ggml_kvtc_rows_read(data.data(), data.size()));
        eight  = section.model.record.coder == KVTC_CODER_EIGHT;
        stride = model ? ggml_kvtc_row_bytes(model.get()) : 0;
        ok     = stride > (eight ? KVTC_EIGHT_STEP : 0);
    }
    if (!ok) {
        refuse("the state is damaged: " + block_name(section.model.record));
    }
}

void kvtc_section_reader::decode(const kvtc_block & block, uint8_t * rows) const {
    const kvtc_record & r = block.record;
    std::vector<uint8_t> narrow(eight ? r.n_rows*stride : 0);
    uint8_t * into = eight ? narrow.data() : rows;
    bool ok = false;
    if (r.coder == KVTC_CODER_RANS) {
        ok = model && ggml_kvtc_rows_decode(model.get(), block.data.data(), block.data.size(), into, r.n_rows);
    } else if ((ok = block.data.size() == r.n_rows*stride)) {
        memcpy(into, block.data.data(), block.data.size());
    }
    if (!ok) {
        refuse("the state is damaged: " + block_name(r));
    }
    for (size_t row = 0; eight && row < r.n_rows; ++row) {
        widen(narrow.data() + row*stride, stride - KVTC_EIGHT_STEP, rows + row*row_bytes());
    }
}

void kvtc_section_reader::decode(uint8_t * rows) const {
    std::vector<std::string> errors(section.blocks.size());
    kvtc_for_each(section.blocks.size(), [&](size_t i) {
        try {
            decode(section.blocks[i], rows + section.blocks[i].record.first*row_bytes());
        } catch (const std::exception & err) { // must not leave the thread
            errors[i] = err.what();
        }
    });
    for (const std::string & error : errors) {
        if (!error.empty()) {
            refuse(error);
        }
    }
}

bool llama_kvtc_container_check(const uint8_t * data, size_t size, char * err, size_t err_size) {
    size_t used = 0;
    try {
        for (const kvtc_item & item : kvtc_read_container(data, size, used)) {
            if (item.plain) {
                continue;
            }
            const kvtc_section_reader section(item);
            for (const kvtc_block & block : item.blocks) {
                if (section.row_bytes()*block.record.n_rows > KVTC_MAX_BYTES) {
                    refuse(block_name(block.record) + " are too many");
                }
                std::vector<uint8_t> rows(section.row_bytes()*block.record.n_rows);
                section.decode(block, rows.data());
            }
        }
        if (used != size) {
            refuse("the state is damaged: bytes after its end");
        }
        return true;
    } catch (const std::exception & e) {
        snprintf(err, err_size, "%s", e.what());
        return false;
    }
}
