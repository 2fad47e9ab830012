// Attention from the codes where keys are of another kind than kvtc's.
#include "decode-kernel.cuh"

namespace kvtc {

namespace {

template <int D, int MT>
void launch(const attn_args & a, const attn_shape & s, const decode_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    const other_sides sides = { { make_side_rows(s, GGML_KVTC_K), make_side_rows(s, GGML_KVTC_V) } };
    launch_decode(decode_cells<D, 1, MT, false, other_sides>, a, p, sides, values, meta, stream);
}

} // namespace

void decode_sides(const attn_args & a, const attn_shape & s, const decode_plan & p, float * values, float2 * meta, cudaStream_t stream) {
    switch (s.d) {
        case  64: return launch< 64, 2>(a, s, p, values, meta, stream);
        case  80: return launch< 80, 2>(a, s, p, values, meta, stream);
        case  96: return launch< 96, 2>(a, s, p, values, meta, stream);
        case 128: return launch<128, 2>(a, s, p, values, meta, stream);
        case 256: return launch<256, 1>(a, s, p, values, meta, stream);
        default:  GGML_ABORT("kvtc: no kernel for head_dim %d", s.d);
    }
}

} // namespace kvtc
