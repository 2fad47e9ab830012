// The write of exact rows: the components of a batch's tokens, rounded to f16.
#pragma once

#include "device.cuh"

namespace kvtc {

// of one KVTC_SET_ROWS node
struct exact_side {
    const char    * z;            // f32 [d, token, head]
    int64_t         nb_z1, nb_z2;
    const int64_t * idxs;
    char          * rows;         // f16 [d, row, head]
    int64_t         nb_1, nb_2;
    bool            aligned;      // to 16 bytes: all vectors of z and rows
};

struct exact_rows {
    exact_side side[2]; // keys and values, or one of them
    int        n_side;  // 0: nothing is written
};

inline exact_side get_exact_side(const ggml_tensor * dst) {
    const ggml_tensor * z = dst->src[1];
    const bool aligned = ((uintptr_t) z->data | z->nb[1] | z->nb[2] | (uintptr_t) dst->data | dst->nb[1] | dst->nb[2]) % 16 == 0;
    return { (const char *) z->data, (int64_t) z->nb[1], (int64_t) z->nb[2], (const int64_t *) dst->src[2]->data,
             (char *) dst->data, (int64_t) dst->nb[1], (int64_t) dst->nb[2], aligned };
}

// a component between its load and its store
struct exact_component {
    float  x;
    half * to; // nullptr: the token is not stored
};

__device__ __forceinline__ exact_component load_component(const exact_side & s, int token, int head, int c) {
    const int64_t row = s.idxs[token];
    exact_component y;
    y.x  = *(const float *) (s.z + token*s.nb_z1 + head*s.nb_z2 + c*sizeof(float));
    y.to = row < 0 ? nullptr : (half *) (s.rows + row*s.nb_1 + head*s.nb_2) + c;
    return y;
}

__device__ __forceinline__ void store_component(const exact_component & y) {
    if (y.to) {
        *y.to = __float2half(y.x);
    }
}

// Eight neighbouring components from c on. A token that is not stored costs its index alone.
__device__ __forceinline__ void write_components(const exact_side & s, int token, int head, int c) {
    const int64_t row = s.idxs[token];
    if (row < 0) {
        return;
    }
    const float * z  = (const float *) (s.z + token*s.nb_z1 + head*s.nb_z2) + c;
    half        * to = (half *) (s.rows + row*s.nb_1 + head*s.nb_2) + c;
    if (s.aligned) {
        const float4 x = *(const float4 *) z;
        const float4 y = *(const float4 *) (z + 4);
        *(uint4 *) to = make_uint4(pack_half2(x.x, x.y), pack_half2(x.z, x.w), pack_half2(y.x, y.y), pack_half2(y.z, y.w));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            to[i] = __float2half(z[i]);
        }
    }
}

} // namespace kvtc
