// The inverse of a decode matrix, which is the encode matrix; the loader derives one from the other.
#pragma once

constexpr double KVTC_INVERSE_TOLERANCE = 1e-3; // worst entry of inverse*matrix - 1; real calibrations stay below 1e-9

// matrix^-1 [d][d] by Gauss-Jordan elimination in place with partial pivoting, in f64. False if f32 cannot hold one. The same bits
// with and without AVX2; GGML_KVTC_NO_VECTORS in the environment keeps it from that.
bool kvtc_invert(const float * matrix, float * inverse, int d);
