// The softmax of a block of queries.

#pragma once

#include "packing.h"

constexpr int64_t EVERYTHING = INT64_MAX;  // as a window

// Scores of a block of queries, the first of which sees keys up to number `first`, `window` of them at most, as
// unnormalised probabilities: exp(scale s - most), with zeros before the window, after the diagonal and up to `padded`.
// Never a copy for one row: GCC 12 makes branches of its minima and then no vectors.
__attribute__((noinline, noclone)) static void scores_to_weights(float* scores, int64_t rows, int64_t first, int64_t window, int64_t padded,
                                     float scale, float* most, float* sum) {
    for (int64_t row = 0; row < rows; row++) {
        float* own = scores + row * padded;
        const int64_t visible = first + row + 1, hidden = visible > window ? visible - window : 0;
        float top = own[hidden], total = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t i = hidden; i < visible; i++) top = own[i] > top ? own[i] : top;
        top *= scale;
#pragma omp simd reduction(+ : total)
        for (int64_t i = hidden; i < visible; i++) {
            own[i] = exponential(own[i] * scale - top);
            total += own[i];
        }
        for (int64_t i = 0; i < hidden; i++) own[i] = 0.0f;
        for (int64_t i = visible; i < padded; i++) own[i] = 0.0f;
        most[row] = top;
        sum[row] = total;
    }
}
