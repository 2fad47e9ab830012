// The data-free types as calibrations made in memory: a signed rotation that spreads every vector evenly over its components,
// and the codebook that is best for a unit Gaussian, which these then nearly are. python/kvtc_gguf/reference_turbo.py is the same in numpy.
#include "kvtc-calibration.h"
#include "kvtc-invert.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// The upper halves of the Lloyd-Max codebooks of 2, 3 and 4 bits for a Gaussian of variance 1 (Max 1960, table I, to more digits):
// mean squared errors 0.117482, 0.034548, 0.009501. Lower halves are their negatives.
constexpr float LEVELS_2[] = { 0.4527800346f, 1.5104176085f };
constexpr float LEVELS_3[] = { 0.2450941789f, 0.7560052812f, 1.3439092785f, 2.1519457045f };
constexpr float LEVELS_4[] = { 0.1283950299f, 0.3880482995f, 0.6567591185f, 0.9423404565f, 1.2562311973f, 1.6180463860f, 2.0690172265f, 2.7325895710f };

const float * get_upper_levels(int bits) {
    return bits == 2 ? LEVELS_2 : bits == 3 ? LEVELS_3 : LEVELS_4;
}

// as the file format would have it
float through_f16(double x) {
    return ggml_fp16_to_fp32(ggml_fp32_to_fp16((float) x));
}

// Decode matrix [d][d], x_i = sum_c decode[i][c] z_c. d = m*2^k with m odd: the Kronecker product of the Hartley matrix of m, whose
// entries cos + sin are never 0 and at most sqrt(2), and the Hadamard matrix of 2^k; so all channels mix even where d is no power
// of two. Each channel i has a random sign. Divided by a power of two, which leaves f16 entries exact where m is 1.
std::vector<float> make_decode(int d) {
    const int size  = d & -d;
    const int m     = d/size;
    const int shift = (int) std::floor(std::log2((double) d))/2;

    std::vector<double> hartley((size_t) m);
    for (int i = 0; i < m; ++i) {
        const double angle = 2.0*3.14159265358979323846*i/m;
        hartley[i] = std::cos(angle) + std::sin(angle);
    }
    std::vector<float> decode((size_t) d*d);
    uint32_t random = 2463534242u; // xorshift32 and the seed of its author
    for (int i = 0; i < d; ++i) {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        for (int c = 0; c < d; ++c) {
            int odd = 0;
            for (int common = i % size & c % size; common; common &= common - 1) {
                odd ^= 1;
            }
            const double sign = odd != (int) (random >> 31) ? -1.0 : 1.0;
            decode[(size_t) i*d + c] = through_f16(std::ldexp(sign*hartley[(i/size)*(c/size) % m], -shift));
        }
    }
    return decode;
}

ggml_kvtc_side_calibration make_side(int H, int d, int bits) {
    ggml_kvtc_side_calibration side;
    side.H     = H;
    side.d     = d;
    side.turbo = true;
    side.bits  = { bits };
    side.mean .assign((size_t) H*d, 0.0f);
    side.scale.assign((size_t) H*d, 1.0f);
    side.widths.assign((size_t) H*(d/8), (int8_t) bits);
    for (int h = 0; h < H; ++h) {
        side.gain.insert(side.gain.end(), { 1.0f, 1.0f }); // a base that nothing reads; the rule that keeps the norm
    }

    std::vector<float> decode = make_decode(d);
    std::vector<float> encode(decode.size());
    GGML_ASSERT(kvtc_invert(decode.data(), encode.data(), d));
    for (int h = 0; h < H; ++h) {
        side.decode.insert(side.decode.end(), decode.begin(), decode.end());
        side.encode.insert(side.encode.end(), encode.begin(), encode.end());
    }

    const int     half  = 1 << (bits - 1);
    const float * upper = get_upper_levels(bits);
    for (int i = 0; i < 8*2*half; ++i) { // 8 components
        const int level = i % (2*half);
        side.levels.push_back(level < half ? -through_f16(upper[half - 1 - level]) : through_f16(upper[level - half]));
    }
    side.book.assign((size_t) H*(d/8)*9, -1);
    for (size_t g = 0; g < (size_t) H*(d/8); ++g) {
        side.book[9*g + bits] = 0; // one codebook for all
    }
    return side;
}

} // namespace

ggml_kvtc_calibration * ggml_kvtc_calibration_copy(const ggml_kvtc_calibration * cal) {
    return cal ? new ggml_kvtc_calibration(*cal) : new ggml_kvtc_calibration;
}

void ggml_kvtc_calibration_set_turbo(ggml_kvtc_calibration * cal, int il, ggml_kvtc_side which, ggml_type type, int n_head, int head_dim) {
    GGML_ASSERT(ggml_kvtc_is_turbo(type) && n_head > 0 && head_dim > 0 && head_dim % 8 == 0 && head_dim <= GGML_KVTC_MAX_DIM);
    cal->layers[which][il] = make_side(n_head, head_dim, ggml_kvtc_type_bits(type));
}
