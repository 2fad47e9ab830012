// Staging: 16 rows of codes on their way to shared memory while those before are worked on.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace kvtc {

// A side's rows as a warp copies them; a thread has one piece of every 32/lanes-th row. plan: has the members of `staging`
struct row_copy {
    const uint8_t * source; // of the thread's piece, in the stream's first row
    uint8_t       * target; // in its first row of the 16
    int             n;      // rows of the 16 that it copies a piece of

    template <typename plan>
    __device__ __forceinline__ row_copy(const attn_args & a, const plan & p, int side, const ggml_kvtc_cuda_head & h, int stream, int skew, uint8_t * stage) {
        const int lane   = threadIdx.x % 32;
        const int c      = lane & ((1 << p.lanes[side]) - 1);
        const int j      = lane >> p.lanes[side];
        const int n_copy = (skew + (int) h.n_bytes + p.unit - 1)/p.unit;
        source = a.rows[side] + stream*a.nb_stream[side] + h.payload - skew + c*p.unit;
        target = stage + j*p.stride[side] + c*p.unit;
        n      = c < n_copy && j < 16 ? max(1, (16 << p.lanes[side])/32) : 0;
    }

    // first: the first of the 16 cells; inside: whether there are any; whole: whether all are cells of the cache. Commits in any case
    template <typename plan>
    __device__ __forceinline__ void start(const attn_args & a, const plan & p, int side, int first, bool inside, bool whole) const {
        const int row   = first + (threadIdx.x % 32 >> p.lanes[side]);
        const int step  = 32 >> p.lanes[side];
        const int count = inside ? n : 0;
        uint8_t * to    = target;
        const uint8_t * from = source + (int64_t) row*(int) a.nb_row[side];
        if (p.unit == 16 && whole) {
            const int jump = step*(int) a.nb_row[side];
#pragma unroll 2
            for (int i = 0; i < count; ++i) {
                copy_async<16>(to, from);
                from += jump;
                to   += step*p.stride[side];
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
                from = source + (int64_t) min(row + i*step, a.n_kv - 1)*(int) a.nb_row[side];
                if (p.unit == 16) {
                    copy_async<16>(to, from);
                } else if (p.unit == 8) {
                    copy_async<8>(to, from);
                } else {
                    copy_async<4>(to, from);
                }
                to += step*p.stride[side];
            }
        }
        copy_commit();
    }
};

} // namespace kvtc
