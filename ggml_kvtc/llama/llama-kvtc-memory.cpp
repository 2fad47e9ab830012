// What programs may ask about the kvtc cache of a context.
#include "llama-kvtc.h"

#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"

#include <algorithm>

// the cache that no sliding window ever prunes, of those a context may have
static llama_kvtc * get_kvtc(llama_context * ctx) {
    llama_memory_i * memory = llama_get_memory(ctx);
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return hybrid->get_mem_attn()->kvtc.get();
    }
    if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return hybrid->get_mem_attn()->get_base()->kvtc.get();
    }
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return iswa->get_base()->kvtc.get();
    }
    auto * kv = dynamic_cast<llama_kv_cache *>(memory);
    return kv ? kv->kvtc.get() : nullptr;
}

bool llama_kvtc_has_window(llama_context * ctx) {
    const llama_kvtc * kvtc = get_kvtc(ctx);
    return kvtc && kvtc->n_window() > 0;
}

bool llama_kvtc_is_lost(llama_context * ctx, llama_seq_id seq_id, llama_pos pos) {
    llama_kvtc * kvtc = get_kvtc(ctx);
    return kvtc && kvtc->is_lost(seq_id, pos);
}

llama_pos llama_kvtc_recompute_from(llama_context * ctx, llama_pos pos) {
    const llama_kvtc * kvtc = get_kvtc(ctx);
    return kvtc ? (llama_pos) std::max<int64_t>(0, pos - 2*(int64_t) kvtc->n_window()) : pos;
}
