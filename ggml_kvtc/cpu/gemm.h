// C[M][N] = start + A[M][K] * B[K][N], row-major f32, N a multiple of GGML_KVTC_PAD. One kernel serves the three products of
// the attention: decode matrix x components, queries x keys, weights x components.
#pragma once

#include "simd.h"

namespace kvtc {

// MR rows by NV vectors of C stay in registers: 6 x 4 of the 32 of AVX-512, 6 x 2 of the 16 of AVX2
constexpr int GEMM_MR = 6;
constexpr int GEMM_NV = W == 16 ? 4 : 2;

// what the products are added to
struct gemm_start {
    bool          add; // to C
    const float * row; // else to one number for each row, or nullptr

    gemm_start(bool add)          : add(add),   row(nullptr) {}
    gemm_start(const float * row) : add(false), row(row) {}

    gemm_start from(int m) const { gemm_start s = *this; s.row = row ? row + m : nullptr; return s; }
};

template <int MR, int NV>
inline void gemm_block(int K, const float * A, int lda, const float * B, int ldb, float * C, int ldc, gemm_start start) {
    vf c[MR][NV];
    for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NV; ++n) {
            c[m][n] = start.add ? load(C + (size_t) m*ldc + n*W) : set1(start.row ? start.row[m] : 0.0f);
        }
    }
    for (int k = 0; k < K; ++k) {
        vf b[NV];
        for (int n = 0; n < NV; ++n) {
            b[n] = load(B + (size_t) k*ldb + n*W);
        }
        for (int m = 0; m < MR; ++m) {
            const vf a = set1(A[(size_t) m*lda + k]);
            for (int n = 0; n < NV; ++n) {
                c[m][n] = fma(a, b[n], c[m][n]);
            }
        }
    }
    for (int m = 0; m < MR; ++m) {
        for (int n = 0; n < NV; ++n) {
            store(C + (size_t) m*ldc + n*W, c[m][n]);
        }
    }
}

template <int NV>
inline void gemm_panel(int M, int K, const float * A, int lda, const float * B, int ldb, float * C, int ldc, gemm_start start) {
    int m = 0;
    for (; m + GEMM_MR <= M; m += GEMM_MR) {
        gemm_block<GEMM_MR, NV>(K, A + (size_t) m*lda, lda, B, ldb, C + (size_t) m*ldc, ldc, start.from(m));
    }
    const float * a = A + (size_t) m*lda;
    float       * c = C + (size_t) m*ldc;
    start = start.from(m);
    switch (M - m) {
        case 5: gemm_block<5, NV>(K, a, lda, B, ldb, c, ldc, start); break;
        case 4: gemm_block<4, NV>(K, a, lda, B, ldb, c, ldc, start); break;
        case 3: gemm_block<3, NV>(K, a, lda, B, ldb, c, ldc, start); break;
        case 2: gemm_block<2, NV>(K, a, lda, B, ldb, c, ldc, start); break;
        case 1: gemm_block<1, NV>(K, a, lda, B, ldb, c, ldc, start); break;
        default: break;
    }
}

inline void gemm(int M, int N, int K, const float * A, int lda, const float * B, int ldb, float * C, int ldc, gemm_start start) {
    int n = 0;
    for (; n + GEMM_NV*W <= N; n += GEMM_NV*W) {
        gemm_panel<GEMM_NV>(M, K, A, lda, B + n, ldb, C + n, ldc, start);
    }
    for (; n < N; n += W) {
        gemm_panel<1>(M, K, A, lda, B + n, ldb, C + n, ldc, start);
    }
}

} // namespace kvtc
