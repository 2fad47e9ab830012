// Attention from the codes where both sides have kvtc types.
#include "decode-kernel.cuh"

namespace kvtc {

namespace {

template <int D, int NQ, int MT>
void launch(const attn_args & a, const decode_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const auto kernel = p.in_shared ? decode_cells<D, NQ, MT, true, coded_sides> : decode_cells<D, NQ, MT, false, coded_sides>;
    launch_decode(kernel, a, p, coded_sides(), values, meta, stream);
}

} // namespace

void decode(const attn_args & a, int d, const decode_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const bool two = p.nq == 2;
    switch (d) {
        case  64: return two ? launch< 64, 2, 1>(a, p, values, meta, stream) : launch< 64, 1, 2>(a, p, values, meta, stream);
        case  80: return two ? launch< 80, 2, 1>(a, p, values, meta, stream) : launch< 80, 1, 2>(a, p, values, meta, stream);
        case  96: return two ? launch< 96, 2, 1>(a, p, values, meta, stream) : launch< 96, 1, 2>(a, p, values, meta, stream);
        case 128: return two ? launch<128, 2, 1>(a, p, values, meta, stream) : launch<128, 1, 2>(a, p, values, meta, stream);
        case 256: return launch<256, 1, 1>(a, p, values, meta, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", d);
    }
}

} // namespace kvtc
