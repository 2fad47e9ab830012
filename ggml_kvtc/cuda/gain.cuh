// The norm and the gain of a vector from its sums in f64, with as few of f64's roots, divisions and logarithms as their results allow.
#pragma once

#include "device.cuh"

namespace kvtc {

// 1/sqrt(squares/d), rounded to f32 from what f64's operations give; 0 for a vector that is coded as zeros. A root in f32 and a step
// of Newton's are nearer than 2^-43: enough, unless they lie that close to the middle of two numbers.
__device__ __forceinline__ float get_inverse_norm(double squares, int d, double inv_d) {
    const double x = squares*inv_d;
    if (x > 1e-15 && x < 1e30) {
        const double y = rsqrtf((float) x);
        const double r = y*(1.5 - 0.5*x*y*y);
        const float lower = (float) (r*(1.0 - 0x1p-40));
        if (lower == (float) (r*(1.0 + 0x1p-40))) {
            return lower;
        }
    }
    const double norm = sqrt(squares/d);
    return norm >= 1e-9 && isfinite(norm) ? (float) (1.0/norm) : 0.0f;
}

// A turbo row's gain, in f16. sums: as below
__device__ __forceinline__ uint32_t get_gain_bits(double power, const double2 & sums) {
    const double gain = sums.y > 0.0 ? sqrt(power/sums.y) : 0.0;
    return __half_as_ushort(__float2half_rn((float) fmin(gain, 65504.0)));
}

// Code of a gain. sums: of the components' products with their levels, and of the levels' squares. f32 tells the step, unless it
// is close to the middle of two.
__device__ __forceinline__ uint8_t get_gain_code(double power, const double2 & sums, bool keep_norm, float base) {
    const double divisor = keep_norm ? sums.y : sums.x;
    if (divisor > 1e-30 && divisor < 1e30 && power > 1e-30 && power < 1e30 && base > 1e-30f) {
        const float ratio = log2f((float) power) - log2f((float) divisor);
        const float step  = GGML_KVTC_GAIN_STEPS*((keep_norm ? 0.5f*ratio : ratio) - log2f(base));
        const float whole = rintf(step);
        if (fabsf(step - whole) < 0.48f) {
            return (uint8_t) fminf(255.0f, fmaxf(1.0f, whole));
        }
    }
    const double gain = !(divisor > 0.0) ? 0.0 : keep_norm ? sqrt(power/divisor) : power/divisor;
    return gain > 0.0 ? (uint8_t) fmin(255.0, fmax(1.0, rint(GGML_KVTC_GAIN_STEPS*log2(gain/(double) base)))) : 0;
}

} // namespace kvtc
