// The inverse of a decode matrix, which is the encode matrix; the loader derives one from the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

constexpr double KVTC_INVERSE_TOLERANCE = 1e-3; // worst entry of inverse*matrix - 1; real calibrations stay below 1e-9

// matrix^-1 [d][d] by Gauss-Jordan elimination with partial pivoting, in f64. False if f32 cannot hold one.
inline bool kvtc_invert(const float * matrix, float * inverse, int d) {
    std::vector<double> a((size_t) d*2*d, 0.0);
    for (int i = 0; i < d; ++i) {
        for (int j = 0; j < d; ++j) {
            a[(size_t) i*2*d + j] = matrix[(size_t) i*d + j];
        }
        a[(size_t) i*2*d + d + i] = 1.0;
    }
    for (int c = 0; c < d; ++c) {
        int pivot = c;
        for (int i = c + 1; i < d; ++i) {
            if (std::fabs(a[(size_t) i*2*d + c]) > std::fabs(a[(size_t) pivot*2*d + c])) {
                pivot = i;
            }
        }
        double * row = &a[(size_t) c*2*d];
        if (pivot != c) {
            std::swap_ranges(row, row + 2*d, &a[(size_t) pivot*2*d]);
        }
        if (!(std::fabs(row[c]) > 0.0)) {
            return false;
        }
        const double f = 1.0/row[c];
        for (int j = c; j < 2*d; ++j) {
            row[j] *= f;
        }
        for (int i = 0; i < d; ++i) {
            double * other = &a[(size_t) i*2*d];
            const double m = other[c];
            if (i == c || m == 0.0) {
                continue;
            }
            for (int j = c; j < 2*d; ++j) {
                other[j] -= m*row[j];
            }
        }
    }
    for (int i = 0; i < d; ++i) {
        for (int j = 0; j < d; ++j) {
            inverse[(size_t) i*d + j] = (float) a[(size_t) i*2*d + d + j];
        }
    }
    // nearly singular: rounding leaves an inverse, but of another matrix
    std::vector<double> product(d);
    for (int i = 0; i < d; ++i) {
        std::fill(product.begin(), product.end(), 0.0);
        for (int k = 0; k < d; ++k) {
            const double x = inverse[(size_t) i*d + k];
            for (int j = 0; j < d; ++j) {
                product[j] += x*matrix[(size_t) k*d + j];
            }
        }
        product[i] -= 1.0;
        for (double x : product) {
            if (!(std::fabs(x) <= KVTC_INVERSE_TOLERANCE)) {
                return false;
            }
        }
    }
    return true;
}
