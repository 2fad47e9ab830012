#include "kvtc-invert.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <utility>
#include <vector>

#if defined(__GNUC__) && defined(__x86_64__)
#define KVTC_AVX2   __attribute__((target("avx2"))) // without FMA, whose sums are others
#define KVTC_INLINE inline __attribute__((always_inline))
#else
#define KVTC_INLINE inline
#endif

namespace {

constexpr int PANEL = 8; // pivots whose rows are taken from all others together: a matrix of f64 does not fit L1
constexpr int ROWS  = 4; // of the inverse, multiplied by the matrix together

// x -= m[0]*rows[0] - m[1]*rows[1] ..., in this order, from column j0 on, before j1
template <int N>
KVTC_INLINE void take_rows(double * x, const double * m, const double * rows, int d, int j0, int j1) {
    for (int j = j0; j < j1; ++j) {
        double y = x[j];
        for (int k = 0; k < N; ++k) {
            y -= m[k]*rows[(size_t) k*d + j];
        }
        x[j] = y;
    }
}

KVTC_INLINE void take_some_rows(double * x, const double * m, const double * rows, int n, int d, int j0, int j1) {
    int k = 0;
    for (; k + PANEL <= n; k += PANEL) {
        take_rows<PANEL>(x, m + k, rows + (size_t) k*d, d, j0, j1);
    }
    for (; k < n; ++k) {
        take_rows<1>(x, m + k, rows + (size_t) k*d, d, j0, j1);
    }
}

KVTC_INLINE bool invert(const float * matrix, float * inverse, int d) {
    std::vector<double> a(matrix, matrix + (size_t) d*d);
    std::vector<int>    pivots(d);
    std::vector<double> rows((size_t) PANEL*d);  // the panel's pivot rows, each as it was taken from the others
    std::vector<double> due ((size_t) PANEL*d);  // [row][pivot] how often, outside the panel's columns, it is still to be taken
    for (int c0 = 0; c0 < d; c0 += PANEL) {
        const int n  = std::min(PANEL, d - c0);
        const int c1 = c0 + n;
        std::fill(due.begin(), due.end(), 0.0);
        for (int k = 0; k < n; ++k) {
            const int c = c0 + k;
            int pivot = c;
            for (int i = c + 1; i < d; ++i) {
                if (std::fabs(a[(size_t) i*d + c]) > std::fabs(a[(size_t) pivot*d + c])) {
                    pivot = i;
                }
            }
            pivots[c] = pivot;
            double * row = &a[(size_t) c*d];
            double * m   = &due[(size_t) c*PANEL];
            if (pivot != c) {
                std::swap_ranges(row, row + d, &a[(size_t) pivot*d]);
                std::swap_ranges(m, m + PANEL, &due[(size_t) pivot*PANEL]);
            }
            if (!(std::fabs(row[c]) > 0.0)) {
                return false;
            }
            take_some_rows(row, m, rows.data(), k, d, 0, c0);
            take_some_rows(row, m, rows.data(), k, d, c1, d);
            std::fill(m, m + PANEL, 0.0);
            const double f = 1.0/row[c];
            row[c] = 1.0; // column c of the unit matrix takes the place of the column that is done
            for (int j = 0; j < d; ++j) {
                row[j] *= f;
            }
            std::copy(row, row + d, &rows[(size_t) k*d]);
            for (int i = 0; i < d; ++i) {
                double * other = &a[(size_t) i*d];
                if (i != c) {
                    const double x = other[c];
                    other[c] = 0.0;
                    due[(size_t) i*PANEL + k] = x;
                    take_rows<1>(other, &x, row, d, c0, c1);
                }
            }
        }
        for (int i = 0; i < d; ++i) {
            take_some_rows(&a[(size_t) i*d], &due[(size_t) i*PANEL], rows.data(), n, d, 0, c0);
            take_some_rows(&a[(size_t) i*d], &due[(size_t) i*PANEL], rows.data(), n, d, c1, d);
        }
    }
    for (int i = 0; i < d; ++i) {
        double * row = &a[(size_t) i*d];
        for (int c = d - 1; c >= 0; --c) { // rows were exchanged, so are the inverse's columns, the last first
            std::swap(row[c], row[pivots[c]]);
        }
        for (int j = 0; j < d; ++j) {
            inverse[(size_t) i*d + j] = (float) row[j];
        }
    }
    // nearly singular: rounding leaves an inverse, but of another matrix
    std::vector<double> product((size_t) ROWS*d);
    for (int i = 0; i < d; i += ROWS) {
        const int n = std::min(ROWS, d - i);
        std::fill(product.begin(), product.end(), 0.0);
        for (int k = 0; k < d; ++k) {
            for (int r = 0; r < n; ++r) {
                const double x  = inverse[(size_t) (i + r)*d + k];
                double     * to = &product[(size_t) r*d];
                for (int j = 0; j < d; ++j) {
                    to[j] += x*matrix[(size_t) k*d + j];
                }
            }
        }
        for (int r = 0; r < n; ++r) {
            product[(size_t) r*d + i + r] -= 1.0;
        }
        for (size_t j = 0; j < (size_t) n*d; ++j) {
            if (!(std::fabs(product[j]) <= KVTC_INVERSE_TOLERANCE)) {
                return false;
            }
        }
    }
    return true;
}

#ifdef KVTC_AVX2
KVTC_AVX2 bool invert_avx2(const float * matrix, float * inverse, int d) {
    return invert(matrix, inverse, d);
}
#endif

} // namespace

bool kvtc_invert(const float * matrix, float * inverse, int d) {
#ifdef KVTC_AVX2
    if (__builtin_cpu_supports("avx2") && !getenv("GGML_KVTC_NO_VECTORS")) {
        return invert_avx2(matrix, inverse, d);
    }
#endif
    return invert(matrix, inverse, d);
}
