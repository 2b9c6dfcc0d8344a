// RMS norms.

#pragma once
#include "panels.h"

namespace [[gnu::visibility("hidden")]] smart {

// 1 / rms of x [d].
static inline float inverse_rms(const float* x, float eps, int64_t d) {
    const int64_t whole = d - d % VW;
    vf squares = {};
    for (int64_t i = 0; i < whole; i += VW) {
        vf v = loadu<vf>(x + i);
        squares += v * v;
    }
    float sum = sum_in_order(squares);
    for (int64_t i = whole; i < d; i++) sum += x[i] * x[i];
    return 1.0f / std::sqrt(sum / float(d) + eps);
}

static inline void rms_norm_row(const float* x, const float* weight, float eps, int64_t d,
                                float* out) {
    const int64_t whole = d - d % VW;
    const float scale = inverse_rms(x, eps, d);
    for (int64_t i = 0; i < whole; i += VW)
        storeu(out + i, loadu<vf>(x + i) * scale * loadu<vf>(weight + i));
    for (int64_t i = whole; i < d; i++) out[i] = x[i] * scale * weight[i];
}

// Rows are shared out among the threads of the running team; the caller places the barrier.
static inline void rms_norm_rows(const float* x, const float* weight, float eps, int rows,
                                 int64_t d, float* out) {
#pragma omp for schedule(static) nowait
    for (int r = 0; r < rows; r++) rms_norm_row(x + r * d, weight, eps, d, out + r * d);
}

// x += the norm of `added`, row by row, shared out alike.
static inline void add_norm_rows(const float* added, const float* weight, float eps, int rows,
                                 int64_t d, float* x) {
#pragma omp for schedule(static) nowait
    for (int r = 0; r < rows; r++) {
        const float* from = added + r * d;
        const float scale = inverse_rms(from, eps, d);
        for (int64_t i = 0; i < d; i++) x[r * d + i] += from[i] * scale * weight[i];
    }
}

}  // namespace smart
