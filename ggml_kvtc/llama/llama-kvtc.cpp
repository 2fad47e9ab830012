#include "llama-kvtc.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cells.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

constexpr double MIB = 1024.0*1024.0;

[[noreturn]] void fail(const std::string & what) {
    throw std::runtime_error("kvtc: " + what);
}

} // namespace

std::shared_ptr<llama_kvtc> llama_kvtc::create(const config & cfg, const std::vector<llama_kvtc_layer> & layers, const std::vector<llama_kv_cells> & cells) {
    bool any = false;
    for (const auto & l : layers) {
        any = any || ggml_kvtc_is_type(l.k->type) || (l.v && ggml_kvtc_is_type(l.v->type));
    }
    if (!any) {
        return nullptr;
    }
    std::shared_ptr<llama_kvtc> result(new llama_kvtc(cfg, layers, cells));
    result->check_model(cfg, layers);
    result->find_calibration(cfg, layers);
    result->calibration_hash = ggml_kvtc_calibration_hash(result->calibration.get());
    result->create_layers(cfg, layers);
    result->print_info();
    return result;
}

llama_kvtc::llama_kvtc(const config & cfg, const std::vector<llama_kvtc_layer> & layers, const std::vector<llama_kv_cells> & cells) :
    model(cfg.model), hparams(cfg.hparams), cells(cells), n_seq_max(cfg.n_seq_max), params(llama_kvtc_default_params()) {
    bool calibrated = false;
    for (const auto & l : layers) {
        const ggml_tensor * cache[2] = { l.k, l.v };
        for (int s = 0; s < 2; ++s) {
            coded[s]   = coded[s] || (cache[s] && ggml_kvtc_is_type (cache[s]->type));
            turbo[s]   = turbo[s] || (cache[s] && ggml_kvtc_is_turbo(cache[s]->type)); // of one type in all layers
            calibrated = calibrated || (coded[s] && !turbo[s]);
        }
    }
    sliding = cfg.n_swa > 0;
    params.n_sink   = params.n_sink   == LLAMA_KVTC_BY_TYPE ? (calibrated ?   4 : 0) : params.n_sink;
    params.n_window = params.n_window == LLAMA_KVTC_BY_TYPE ? (calibrated ? 128 : 0) : params.n_window;
    slot_changes.resize(cells.size());
    slot_of.resize(cells.size());
    for (size_t s = 0; s < cells.size(); ++s) {
        slot_of[s].assign(cells[s].size(), -1);
    }
    // one stream for all sequences holds the exact rows of them all, at most one for each cell
    n_keep = params.n_window > 0 ? (int32_t) std::min<int64_t>((int64_t) params.n_window + LLAMA_KVTC_ROLLBACK, INT32_MAX) : 0;
    const uint64_t n_exact = ((uint64_t) params.n_sink + n_keep)*(cfg.n_stream == 1 ? n_seq_max : 1);
    n_slots = (uint32_t) std::min<uint64_t>(n_exact, cells[0].size());
    owners.resize(cells.size()*n_slots);
    // M-RoPE's tokens of an image share a position, ALiBi's mask has addends, and hybrid models' inputs fill their mask in any case
    if (cfg.hparams.n_pos_per_embd() == 1 && !cfg.hparams.use_alibi && !llm_arch_is_hybrid(cfg.model.arch)) {
        n_span = cfg.swa_type == LLAMA_SWA_TYPE_NONE ? INT32_MAX : cfg.swa_type == LLAMA_SWA_TYPE_STANDARD ? (int32_t) cfg.n_swa : 0;
    }
}

// That of the model where a side has a kvtc type; the sides of turbo types are added to it, or to an empty one.
void llama_kvtc::find_calibration(const config & cfg, const std::vector<llama_kvtc_layer> & src) {
    if ((coded[0] && !turbo[0]) || (coded[1] && !turbo[1])) {
        calibration = llama_kvtc_find_calibration(cfg.model, source);
    }
    for (const auto & l : src) {
        check_layer(cfg, l);
    }
    if (!turbo[0] && !turbo[1]) {
        return;
    }
    // contexts share what was read from a file: these sides are this one's alone
    calibration.reset(ggml_kvtc_calibration_copy(calibration.get()), ggml_kvtc_calibration_free);
    for (const auto & l : src) {
        for (int s = 0; s < 2; ++s) {
            if (turbo[s]) {
                const uint32_t d = s == GGML_KVTC_K ? cfg.hparams.n_embd_head_k(l.il) : cfg.hparams.n_embd_head_v(l.il);
                ggml_kvtc_calibration_set_turbo(calibration.get(), l.il, (ggml_kvtc_side) s, (s == GGML_KVTC_K ? l.k : l.v)->type,
                        cfg.hparams.n_head_kv(l.il), d);
            }
        }
    }
}

bool llama_kvtc::can_shift() const {
    return !turbo[GGML_KVTC_K] || hparams.rope_type == LLAMA_ROPE_TYPE_NONE;
}

void llama_kvtc::create_layers(const config & cfg, const std::vector<llama_kvtc_layer> & src) {
    const auto context_of = [&](ggml_backend_buffer_type_t buft, bool exact) {
        for (const auto & b : buffers) {
            if (b.buft == buft && b.exact == exact) {
                return b.ctx.get();
            }
        }
        buffers.push_back({ buft, exact, ggml_context_ptr(ggml_init({ src.size()*8*ggml_tensor_overhead(), nullptr, true })), nullptr });
        return buffers.back().ctx.get();
    };
    std::vector<std::vector<uint8_t>> packs;

    const int64_t n_rows = (int64_t) n_slots*cells.size();
    for (const auto & l : src) {
        layer out;
        out.il = l.il;
        out.cache[0] = l.k;
        out.cache[1] = l.v;
        int bits[2];
        int64_t n_exact = 0;
        const int64_t H    = cfg.hparams.n_head_kv(l.il);
        const int64_t d[2] = { cfg.hparams.n_embd_head_k(l.il), cfg.hparams.n_embd_head_v(l.il) };
        for (int s = 0; s < 2; ++s) {
            bits[s]  = ggml_kvtc_type_bits(out.cache[s]->type);
            n_exact += bits[s] > 0 ? d[s]*H*n_rows : 0;
        }

        // where the layer's cache is, so are its bases, its pack, in that device's layout, and its exact rows
        ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
        ggml_backend_dev_t dev = cfg.model.dev_layer(l.il);
        out.on_device = cfg.offload && !ggml_backend_buft_is_host(ggml_backend_dev_buffer_type(dev));
        std::vector<uint8_t> pack;
        if (out.on_device) {
            buft = ggml_backend_dev_buffer_type(dev);
            pack.resize(ggml_kvtc_cuda_pack_size(calibration.get(), l.il, bits[0], bits[1]));
            ggml_kvtc_cuda_pack_write(calibration.get(), l.il, bits[0], bits[1], pack.data());
            ggml_kvtc_cuda_pack_limits(pack.data(), out.limits);
        } else {
            pack.resize(ggml_kvtc_pack_size(calibration.get(), l.il, bits[0], bits[1]));
            ggml_kvtc_pack_write(calibration.get(), l.il, bits[0], bits[1], pack.data());
        }

        ggml_context * ctx = context_of(buft, false);
        for (int s = 0; s < 2; ++s) {
            if (bits[s] > 0) {
                out.encode[s] = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d[s], d[s], H);
                out.bias  [s] = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d[s], 1, H);
            }
        }
        out.pack = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, pack.size());
        if (out.on_device) {
            check_device(cfg, dev, out);
        }
        if (n_exact > 0) {
            ctx = context_of(buft, true);
            out.exact = ggml_new_tensor_1d(ctx, GGML_TYPE_F16, n_exact);
            size_t offset = 0;
            for (int s = 0; s < 2; ++s) {
                if (bits[s] > 0) {
                    const size_t row = d[s]*sizeof(ggml_fp16_t);
                    out.rows[s] = ggml_view_3d(ctx, out.exact, d[s], n_rows, H, row, row*n_rows, offset);
                    offset += row*n_rows*H;
                }
            }
        }
        layers.push_back(std::move(out));
        packs.push_back(std::move(pack));
    }

    for (buffer & b : buffers) {
        if (cfg.hparams.no_alloc) { // a dry run that only wants the sizes, as in llama_kv_cache
            b.buf.reset(ggml_backend_buft_alloc_buffer(b.buft, 0));
            for (ggml_tensor * t = ggml_get_first_tensor(b.ctx.get()); t; t = ggml_get_next_tensor(b.ctx.get(), t)) {
                t->buffer = b.buf.get();
            }
            continue;
        }
        b.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(b.ctx.get(), b.buft));
        if (!b.buf) {
            fail("failed to allocate the bases or the exact rows in " + std::string(ggml_backend_buft_name(b.buft)));
        }
        ggml_backend_buffer_clear(b.buf.get(), 0);
    }
    if (cfg.hparams.no_alloc) {
        return;
    }

    std::vector<float> encode;
    std::vector<float> bias;
    for (size_t i = 0; i < layers.size(); ++i) {
        const layer & l = layers[i];
        for (int s = 0; s < 2; ++s) {
            if (l.encode[s]) {
                encode.resize(ggml_nelements(l.encode[s]));
                bias  .resize(ggml_nelements(l.bias[s]));
                ggml_kvtc_encode_matrix(calibration.get(), l.il, (ggml_kvtc_side) s, encode.data(), bias.data());
                ggml_backend_tensor_set(l.encode[s], encode.data(), 0, ggml_nbytes(l.encode[s]));
                ggml_backend_tensor_set(l.bias[s],   bias.data(),   0, ggml_nbytes(l.bias[s]));
            }
        }
        ggml_backend_tensor_set(l.pack, packs[i].data(), 0, packs[i].size());
    }
}

void llama_kvtc::print_info() const {
    if (!source.empty()) {
        LLAMA_LOG_INFO("%s: calibration from %s\n", __func__, source.c_str());
    }

    double codes  = 0.0;
    double values = 0.0;
    const auto n_values = [&](const layer & l, int s) { return (double) (s == GGML_KVTC_K ? hparams.n_embd_k_gqa(l.il) : hparams.n_embd_v_gqa(l.il)); };
    const auto row_size = [](const layer & l, int s) { return (double) ggml_row_size(l.cache[s]->type, l.cache[s]->ne[0]); }; // with all it holds
    const auto bpv      = [&](const layer & l, int s) { return 8.0*row_size(l, s)/n_values(l, s); };
    double bits = 0.0;
    // neighbours of the same types share a line
    for (size_t i = 0, j = 0; i < layers.size(); i = j) {
        const auto same = [&](const layer & a, const layer & b, int s) { return a.cache[s]->type == b.cache[s]->type && bpv(a, s) == bpv(b, s); };
        for (j = i; j < layers.size() && same(layers[i], layers[j], 0) && same(layers[i], layers[j], 1); ++j) {
            for (int s = 0; s < 2; ++s) {
                codes  += ggml_nbytes(layers[j].cache[s]);
                bits   += 8.0*row_size(layers[j], s);
                values += n_values(layers[j], s);
            }
        }
        LLAMA_LOG_INFO("%s: layers %u to %u: K %s (%.2f bpv), V %s (%.2f bpv)\n", __func__, layers[i].il, layers[j - 1].il,
                ggml_type_name(layers[i].cache[0]->type), bpv(layers[i], 0), ggml_type_name(layers[i].cache[1]->type), bpv(layers[i], 1));
    }
    double sizes[2] = {};
    for (const buffer & b : buffers) {
        sizes[b.exact] += get_buffer_size(b)/MIB;
    }
    LLAMA_LOG_INFO("%s: %.3f bpv, codes %.2f MiB, exact rows %.2f MiB (%d sinks, window %d, rollback %d, %zu slots), bases %.2f MiB\n", __func__,
            bits/values, codes/MIB, sizes[1], params.n_sink, params.n_window, n_keep - params.n_window, owners.size(), sizes[0]);
}

// in a dry run, what it would be
size_t llama_kvtc::get_buffer_size(const buffer & b) const {
    return hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(b.ctx.get(), b.buft) : ggml_backend_buffer_get_size(b.buf.get());
}

void llama_kvtc::memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & sizes) const {
    for (const buffer & b : buffers) {
        sizes[b.buft] += get_buffer_size(b);
    }
}

llama_kvtc::layer & llama_kvtc::get_layer(int il) {
    for (layer & l : layers) {
        if ((int) l.il == il) {
            return l;
        }
    }
    fail("layer " + std::to_string(il) + " has no cache of its own");
}

const llama_kvtc::layer & llama_kvtc::get_layer(int il) const {
    return const_cast<llama_kvtc *>(this)->get_layer(il);
}

// How far behind the end of its sequences a cell is, -1 for sinks: the nearest of them, or the one asked for.
int32_t llama_kvtc::distance(uint32_t stream, uint32_t cell, llama_seq_id seq_id) const {
    const llama_kv_cells & c = cells[stream];
    if (c.is_empty(cell)) {
        return INT32_MAX;
    }
    const llama_pos pos = c.pos_get(cell);
    if (pos < params.n_sink) {
        return -1;
    }
    if (seq_id < 0 && c.seq_count(cell) == 1) {
        seq_id = c.seq_get(cell);
    }
    if (seq_id >= 0) {
        return c.seq_has(cell, seq_id) ? c.seq_pos_max(seq_id) - pos : INT32_MAX;
    }
    int32_t result = INT32_MAX;
    for (llama_seq_id seq = 0; seq < (llama_seq_id) n_seq_max; ++seq) {
        if (c.seq_has(cell, seq)) {
            result = std::min(result, c.seq_pos_max(seq) - pos);
        }
    }
    return result;
}

bool llama_kvtc::must_keep(uint32_t stream, uint32_t cell, llama_seq_id seq_id) const {
    return distance(stream, cell, seq_id) < n_keep;
}

// Up to n slots with how far behind their cells are, furthest first: free ones, then those of cells that should keep theirs,
// of which there are too many where cells share positions (a division, an image). Never those of sinks.
std::vector<std::pair<int32_t, int32_t>> llama_kvtc::find_slots(uint32_t stream, size_t n) const {
    std::vector<std::pair<int32_t, int32_t>> free;
    std::vector<std::pair<int32_t, int32_t>> held;
    for (uint32_t i = 0; i < n_slots && free.size() < n; ++i) {
        const int32_t slot = (int32_t) (stream*n_slots + i);
        const owner & o    = owners[slot];
        const bool owned   = o.cell >= 0 && slot_of[o.stream][o.cell] == slot;
        const int32_t dist = owned ? distance(o.stream, o.cell) : INT32_MAX;
        if (dist >= n_keep) {
            free.push_back({ INT32_MAX, slot });
        } else if (dist >= 0) {
            held.push_back({ dist, slot });
        }
    }
    std::sort(held.rbegin(), held.rend());
    for (size_t i = 0; i < held.size() && free.size() < n; ++i) {
        free.push_back(held[i]);
    }
    return free;
}

void llama_kvtc::set_slot(uint32_t stream, uint32_t cell, int32_t slot) {
    slot_of[stream][cell] = slot;
    slot_changes[stream].add(cell);
}

void llama_kvtc::set_owner(int32_t slot, uint32_t stream, uint32_t cell) {
    owner & o = owners[slot];
    if (o.cell >= 0 && slot_of[o.stream][o.cell] == slot) {
        set_slot(o.stream, o.cell, -1);
    }
    o = { (int32_t) stream, (int32_t) cell };
    set_slot(stream, cell, slot);
}

// The last ubatch has been computed: its tokens are no longer at hand but for those in the exact store.
void llama_kvtc::commit() {
    for (size_t i = 0; i < cells_cur.size(); ++i) {
        if (slot_of[cells_cur[i].stream][cells_cur[i].cell] == -(int32_t) i - 2) { // else it was overwritten since
            set_slot(cells_cur[i].stream, cells_cur[i].cell, -1);
            if (slots_cur[i] >= 0) {
                set_owner((int32_t) slots_cur[i], cells_cur[i].stream, cells_cur[i].cell);
            }
        }
    }
    cells_cur.clear();
}

void llama_kvtc::apply(const std::vector<llama_seq_id> & strm, const std::vector<std::vector<uint32_t>> & idxs, const llama_ubatch & ubatch, uint32_t n_kv) {
    commit();
    packed.clear();

    n_tokens_cur = ubatch.n_tokens;
    n_kv_cur     = n_kv;
    n_stream_cur = (uint32_t) strm.size();
    first_stream = (uint32_t) *std::min_element(strm.begin(), strm.end());
    slots_cur.assign(n_tokens_cur, -1);
    for (size_t s = 0; s < strm.size(); ++s) {
        for (uint32_t cell : idxs[s]) {
            set_slot(strm[s], cell, -(int32_t) cells_cur.size() - 2);
            cells_cur.push_back({ (int32_t) strm[s], (int32_t) cell });
        }
    }

    // slots whose rows nobody will need after this ubatch go to the tokens that must be kept: sinks, then the newest
    for (llama_seq_id stream : strm) {
        std::vector<int64_t> wanted;
        for (size_t i = 0; i < cells_cur.size(); ++i) {
            if (cells_cur[i].stream == stream && must_keep(stream, cells_cur[i].cell)) {
                wanted.push_back((int64_t) i);
            }
        }
        const auto behind = [&](int64_t i) { return distance(stream, cells_cur[i].cell); };
        std::stable_sort(wanted.begin(), wanted.end(), [&](int64_t a, int64_t b) { return behind(a) < behind(b); });
        const auto found = find_slots(stream, wanted.size());
        for (size_t i = 0; i < found.size() && found[i].first > behind(wanted[i]); ++i) {
            slots_cur[wanted[i]] = found[i].second;
        }
    }
}

void llama_kvtc::copy_cells(uint32_t src, uint32_t dst) {
    commit();
    std::fill(slot_of[dst].begin(), slot_of[dst].end(), -1);
    slot_changes[dst].add_all();
    for (uint32_t i = 0; i < n_slots; ++i) {
        const int32_t slot = (int32_t) (src*n_slots + i);
        const owner o = owners[slot];
        if (o.cell >= 0 && slot_of[o.stream][o.cell] == slot) {
            set_owner((int32_t) (dst*n_slots + i), dst, o.cell);
        }
    }
}

void llama_kvtc::copy_rows(uint32_t src, uint32_t dst) {
    std::vector<uint8_t> row;
    for (const layer & l : layers) {
        for (int s = 0; s < 2; ++s) {
            const ggml_tensor * t = l.rows[s];
            for (int64_t h = 0; t && n_slots > 0 && h < t->ne[2]; ++h) {
                const size_t head = t->view_offs + h*t->nb[2];
                const size_t size = n_slots*t->nb[1];
                row.resize(size);
                ggml_backend_tensor_get(l.exact, row.data(), head + src*size, size);
                ggml_backend_tensor_set(l.exact, row.data(), head + dst*size, size);
            }
        }
    }
}

int64_t llama_kvtc::info_size() const {
    return 2*(int64_t) n_kv_cur*n_stream_cur + n_tokens_cur;
}

bool llama_kvtc::needs_mask(const llama_ubatch & ubatch, const llama_cparams & cparams) const {
    // one stream for several sequences: their tokens see different cells
    return n_span == 0 || !cparams.causal_attn || (n_stream_cur == 1 && ubatch.n_seqs_unq > 1);
}

// (position, slot) of cells, -1 where they are empty. A plain loop: it may run over the whole context
static void write_cells(const llama_kv_cells & cells, const int32_t * __restrict slots, int32_t * __restrict out, uint32_t first, uint32_t end) {
    for (uint32_t i = first; i < end; ++i) {
        const int32_t pos = cells.is_empty(i) ? -1 : cells.pos_get(i);
        out[2*i]     = pos;
        out[2*i + 1] = pos < 0 ? -1 : slots[i];
    }
}

void llama_kvtc::set_info(ggml_tensor * info, const llama_ubatch & ubatch, bool needs_mask, info_written & written) const {
    GGML_ASSERT(ggml_nelements(info) == info_size());
    std::vector<int32_t> values;
    const bool host = ggml_backend_buffer_is_host(info->buffer);
    if (!host) {
        values.resize(info_size());
    }
    int32_t * out = host ? (int32_t *) info->data : values.data();
    const bool same = host && written.first_stream == first_stream && written.n_kv == n_kv_cur && written.parts.size() == n_stream_cur;
    info_written now = { first_stream, n_kv_cur, {} };
    for (uint32_t s = first_stream; s < first_stream + n_stream_cur; ++s, out += 2*n_kv_cur) {
        const int32_t * slots = slot_of[s].data();
        const llama_seq_id own = ubatch.seq_id[(s - first_stream)*(ubatch.n_tokens/n_stream_cur)][0];
        bool hides = false;
        for (llama_seq_id seq = 0; !needs_mask && seq < (llama_seq_id) n_seq_max; ++seq) {
            hides = hides || (seq != own && cells[s].seq_pos_max(seq) >= 0);
        }
        now.parts.push_back({ cells[s].changes.now(), slot_changes[s].now(), hides });
        const auto write = [&](uint32_t i) { write_cells(cells[s], slots, out, i, std::min(i + 1, n_kv_cur)); };
        const auto * last = same && !hides ? &written.parts[s - first_stream] : nullptr;
        if (last && !last->hides && cells[s].changes.for_each_since(last->positions, write) && slot_changes[s].for_each_since(last->slots, write)) {
            continue;
        }
        write_cells(cells[s], slots, out, 0, n_kv_cur);
        for (uint32_t i = 0; hides && i < n_kv_cur; ++i) {
            if (out[2*i] >= 0 && !cells[s].seq_has(i, own)) {
                out[2*i] = out[2*i + 1] = -1;
            }
        }
    }
    written = std::move(now);
    memcpy(out, ubatch.pos, n_tokens_cur*sizeof(int32_t));
    if (!host) {
        ggml_backend_tensor_set(info, values.data(), 0, ggml_nbytes(info));
    }
}

void llama_kvtc::set_slots(ggml_tensor * slots) const {
    ggml_backend_tensor_set(slots, slots_cur.data(), 0, slots_cur.size()*sizeof(int64_t));
}
