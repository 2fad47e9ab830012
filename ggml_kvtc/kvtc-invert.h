// The inverse of a decode matrix, which is the encode matrix; the loader derives one from the other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

constexpr double KVTC_INVERSE_TOLERANCE = 1e-3; // worst entry of inverse*matrix - 1; real calibrations stay below 1e-9

// matrix^-1 [d][d] by Gauss-Jordan elimination in place with partial pivoting, in f64. False if f32 cannot hold one.
inline bool kvtc_invert(const float * matrix, float * inverse, int d) {
    std::vector<double> a(matrix, matrix + (size_t) d*d);
    std::vector<int> pivots(d);
    for (int c = 0; c < d; ++c) {
        int pivot = c;
        for (int i = c + 1; i < d; ++i) {
            if (std::fabs(a[(size_t) i*d + c]) > std::fabs(a[(size_t) pivot*d + c])) {
                pivot = i;
            }
        }
        pivots[c] = pivot;
        double * row = &a[(size_t) c*d];
        if (pivot != c) {
            std::swap_ranges(row, row + d, &a[(size_t) pivot*d]);
        }
        if (!(std::fabs(row[c]) > 0.0)) {
            return false;
        }
        const double f = 1.0/row[c];
        row[c] = 1.0; // column c of the unit matrix takes the place of the column that is done
        for (int j = 0; j < d; ++j) {
            row[j] *= f;
        }
        for (int i = 0; i < d; ++i) {
            double * other = &a[(size_t) i*d];
            const double m = other[c];
            if (i == c || m == 0.0) {
                continue;
            }
            other[c] = 0.0;
            for (int j = 0; j < d; ++j) {
                other[j] -= m*row[j];
            }
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
