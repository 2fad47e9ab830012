// The beginning of a block that decodes: what it needs of the pack, and its queries.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace kvtc {

// All threads take part; what they copy asynchronously is the first group.
template <int D, int ROWS, bool in_shared>
__device__ __forceinline__ void load_block(const attn_args & a, const decode_plan & p, int head, int row0, int stream, uint8_t * smem) {
    constexpr int LD = D + 8;
    const char * base = a.pack;
    const ggml_kvtc_cuda_pack & pack = *(const ggml_kvtc_cuda_pack *) base;
    const ggml_kvtc_cuda_head & kh   = get_head(base, GGML_KVTC_K, head);
    const ggml_kvtc_cuda_head & vh   = get_head(base, GGML_KVTC_V, head);
    const int rope_type = (int) pack.rope_type;
    const int n_rot     = rope_type == GGML_KVTC_ROPE_NONE ? 0 : (int) pack.rope_n_rot;
    const int n_rp      = n_rot/2; // rotated pairs
    const int n_row     = a.n_tokens*a.group;
    float    * mean    = (float *)    (smem + p.at_mean);
    float    * queries = (float *)    (smem + p.at_queries);
    uint64_t * freq    = (uint64_t *) (smem + p.at_freq);
    uint2    * fine    = (uint2 *)    (smem + p.at_fine);
    auto     * codes   = (ggml_kvtc_cuda_code *) (smem + p.at_codes);
    uint8_t  * tables[2] = { smem + p.at_table[0], smem + p.at_table[1] };

    if constexpr (in_shared) {
        for (int i = threadIdx.x; i < D*(D/8); i += blockDim.x) {
            const int c = i/(D/8);
            copy_async<16>((half *) smem + c*LD + i%(D/8)*8, at<half>(base, kh.decode) + pair_channel(c, rope_type, n_rot)*D + i%(D/8)*8);
        }
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const ggml_kvtc_cuda_head & h = s == 0 ? kh : vh;
        for (int i = threadIdx.x; i < (int) h.n_tables/16; i += blockDim.x) {
            copy_async<16>(tables[s] + 16*i, base + h.tables + 16*i);
        }
        for (int i = threadIdx.x; i < D/8; i += blockDim.x) {
            copy_async<8>(codes + s*(D/8) + i, base + h.codes + 8*i);
        }
    }
    copy_commit();
    const uint64_t * pack_freq = at<uint64_t>(base, pack.freq);
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        mean[i] = at<float>(base, kh.mean)[pair_channel(i, rope_type, n_rot)];
        if (i < D/2) {
            freq[i] = i < n_rp ? pack_freq[i] : 0;
        }
    }
    const float scale = a.softcap != 0.0f ? a.scale/a.softcap : a.scale*LOG2E;
    for (int i = threadIdx.x; i < ROWS*D; i += blockDim.x) {
        const int r     = row0 + i/D;
        const int token = r/a.group;
        float x = 0.0f;
        if (r < n_row) {
            const int channel = pair_channel(i%D, rope_type, n_rot);
            x = *(const float *) (a.q + token*a.nb_q1 + (head*a.group + r%a.group)*a.nb_q2 + stream*a.nb_q3 + channel*sizeof(float));
            x *= i%D < n_rot ? scale*pack.rope_mscale : scale;
        }
        queries[i/D*LD + i%D] = x;
    }
    const int pair = threadIdx.x%(D/2);
    const uint64_t pair_freq = pair < n_rp ? pack_freq[pair] : 0;
    for (int i = threadIdx.x/(D/2); i < p.n_fine && n_rp > 0; i += max(1, (int) blockDim.x/(D/2))) {
        if (threadIdx.x/(D/2) >= max(1, blockDim.x/(D/2))) {
            break; // the rest of the threads
        }
        const float2 cs = get_rotation(i, pair_freq);
        fine[i*(D/2 + 4) + pair] = make_uint2(pack_half2(cs.x, cs.y), pack_half2(-cs.y, cs.x));
    }
}

} // namespace kvtc
