// libFuzzer target for the reader of stored states: `make fuzz` (clang). Containers of a few hundred bytes go to the reader as they
// are and with checksums that fit, or nothing beyond those would ever be reached. What it takes must decode to the same rows with
// vectors and without, and must be what the encoder writes of these rows, byte for byte. Reading through a model would take a
// thousand times as long; tests/llama/test_states.py does that for damage of chosen places. With KVTC_REPLAY (test_reader.py), a
// program that takes inputs from its standard input, each a u32 size and the bytes.
#include "llama-kvtc-container.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace {

constexpr size_t MOST_ROWS = 1 << 18; // bytes of a block's rows that are worth decoding: a few bytes may stand for 16 MiB of them

using bytes    = std::vector<uint8_t>;
using rows_ptr = std::unique_ptr<ggml_kvtc_rows, decltype(&ggml_kvtc_rows_free)>;

[[noreturn]] void found(const char * what) {
    fprintf(stderr, "kvtc: %s\n", what);
    abort();
}

// The bytes with checksums that fit, as far as records can be told.
bytes refit(const uint8_t * data, size_t size) {
    bytes out(data, data + size);
    uint32_t crc = 0;
    uint32_t n   = 0;
    for (size_t at = 8; size - std::min(at, size) >= sizeof(kvtc_record); ++n) {
        kvtc_record r;
        memcpy(&r, &out[at], sizeof(r));
        const size_t left = size - at - sizeof(r);
        if (r.kind == KVTC_RECORD_END) {
            r.n_rows = n;
            r.crc    = crc;
        } else {
            r.crc = ggml_kvtc_crc32(0, out.data() + at + sizeof(r), std::min<size_t>(r.size, left));
        }
        r.head_crc = ggml_kvtc_crc32(0, (const uint8_t *) &r, offsetof(kvtc_record, head_crc));
        crc = ggml_kvtc_crc32(crc, (const uint8_t *) &r.head_crc, sizeof(r.head_crc));
        memcpy(&out[at], &r, sizeof(r));
        at += sizeof(r) + std::min<size_t>(r.size, left);
    }
    return out;
}

// Rows of a block; empty if it is refused.
bytes decode(const kvtc_section_reader & section, const kvtc_block & block) {
    bytes rows(section.row_bytes()*block.record.n_rows);
    try {
        section.decode(block, rows.data());
    } catch (const std::exception &) {
        rows.clear();
    }
    return rows;
}

void check_block(const kvtc_item & item, const kvtc_section_reader & section, const kvtc_block & block) {
    unsetenv("GGML_KVTC_NO_VECTORS");
    const bytes rows = decode(section, block);
    setenv("GGML_KVTC_NO_VECTORS", "1", 1);
    if (decode(section, block) != rows) {
        found("vectors and plain loops read different rows");
    }
    if (rows.empty() || block.record.coder != KVTC_CODER_RANS || item.model.record.coder != KVTC_CODER_RANS) {
        return;
    }
    const rows_ptr model(ggml_kvtc_rows_read(item.model.data.data(), item.model.data.size()), ggml_kvtc_rows_free);
    bytes again(ggml_kvtc_rows_bound(model.get(), block.record.n_rows));
    again.resize(ggml_kvtc_rows_encode(model.get(), rows.data(), block.record.n_rows, again.data()));
    if (again != block.data) {
        found("a block that no encoder writes is taken");
    }
}

void check(const uint8_t * data, size_t size) {
    size_t used;
    try {
        for (const kvtc_item & item : kvtc_read_container(data, size, used)) {
            if (item.plain) {
                continue;
            }
            const kvtc_section_reader section(item);
            for (const kvtc_block & block : item.blocks) {
                if (section.row_bytes()*block.record.n_rows <= MOST_ROWS) {
                    check_block(item, section, block);
                }
            }
        }
    } catch (const std::runtime_error & err) { // refusals; std::bad_alloc and the like are findings
        if (err.what()[0] == 0) {
            found("a refusal without a reason");
        }
    }
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    check(data, size);
    const bytes fitting = refit(data, size);
    check(fitting.data(), fitting.size());
    return 0;
}

#ifdef KVTC_REPLAY
int main() {
    uint32_t size;
    uint64_t n = 0;
    for (; fread(&size, sizeof(size), 1, stdin) == 1; ++n) {
        bytes data(size);
        if (fread(data.data(), 1, size, stdin) != size) {
            return 1;
        }
        LLVMFuzzerTestOneInput(data.data(), size);
    }
    printf("%llu inputs\n", (unsigned long long) n);
}
#endif
