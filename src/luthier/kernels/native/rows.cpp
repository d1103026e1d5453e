// Operations over rows: norms, gated activations, rotations, and log-probabilities of labels. One pass over memory each.
//
// Every function is parallel over rows and sums within a row in a fixed order, so a result does not depend on the number
// of threads. The equations and the tests are those of torch_backend.py.

#include <cmath>

#include "numbers.h"
#include "team.h"

namespace {

constexpr int64_t ALONE = 64 << 10;  // numbers below which a second thread is not worth waking
constexpr int64_t STRETCH = 512;     // logits that are looked through at once for the greatest

template <typename T> void norm_rows(const T* x, const T* weight, T* out, float* inverse, int64_t n, int64_t d,
                                     float eps, bool known) {
#pragma omp parallel for if (n * d > ALONE)
    for (int64_t row = 0; row < n; row++) {
        const T* from = x + row * d;
        T* to = out + row * d;
        if (!known) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < d; i++) sum += widen(from[i]) * widen(from[i]);
            inverse[row] = 1.0f / std::sqrt(sum / float(d) + eps);
        }
        float factor = inverse[row];
#pragma omp simd
        for (int64_t i = 0; i < d; i++)
            to[i] = narrow<T>(widen(narrow<T>(widen(from[i]) * factor)) * widen(weight[i]));
    }
}

template <typename T, bool Adds> void norm_back(const T* grad, const T* x, const T* weight, const float* inverse,
                                                const T* added, T* out, int64_t n, int64_t d) {
#pragma omp parallel for if (n * d > ALONE)
    for (int64_t row = 0; row < n; row++) {
        const T* g = grad + row * d;
        const T* from = x + row * d;
        T* to = out + row * d;
        float factor = inverse[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += widen(g[i]) * widen(weight[i]) * widen(from[i]);
        float along = sum * factor * factor / float(d);
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            float slope = (widen(g[i]) * widen(weight[i]) - widen(from[i]) * along) * factor;
            to[i] = narrow<T>(Adds ? slope + widen(added[row * d + i]) : slope);
        }
    }
}

template <typename T> void gate_rows(const T* gate, const T* up, T* out, int64_t count) {
#pragma omp parallel for simd if (parallel : count > ALONE)
    for (int64_t i = 0; i < count; i++) {
        float z = widen(gate[i]);
        out[i] = narrow<T>(z * sigmoid(z) * widen(up[i]));
    }
}

template <typename T> void gate_back(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up,
                                     int64_t count) {
#pragma omp parallel for simd if (parallel : count > ALONE)
    for (int64_t i = 0; i < count; i++) {
        float g = widen(grad[i]), z = widen(gate[i]), u = widen(up[i]);
        float s = sigmoid(z);
        grad_up[i] = narrow<T>(g * z * s);
        grad_gate[i] = narrow<T>(g * u * s * (1.0f + z * (1.0f - s)));
    }
}

// x and out may be the same: a pair of numbers is read before it is written.
template <typename T> void rotate(const T* x, const T* cosines, const T* sines, T* out, int64_t n, int64_t heads,
                                  int64_t half, float sign) {
#pragma omp parallel for if (n * heads * half > ALONE)
    for (int64_t row = 0; row < n; row++) {
        const T* cosine = cosines + row * half;
        const T* sine = sines + row * half;
        for (int64_t head = 0; head < heads; head++) {
            const T* from = x + (row * heads + head) * 2 * half;
            T* to = out + (row * heads + head) * 2 * half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = widen(from[i]), b = widen(from[half + i]);
                float c = widen(cosine[i]), s = sign * widen(sine[i]);
                to[i] = narrow<T>(a * c - b * s);
                to[half + i] = narrow<T>(b * c + a * s);
            }
        }
    }
}

// log p(label), and in place of the logits 1_label - p if slopes are asked for.
template <typename T> void labels_of(T* logits, const int64_t* labels, float* log_probs, int64_t n, int64_t size, bool slopes) {
#pragma omp parallel for if (n * size > ALONE)
    for (int64_t row = 0; row < n; row++) {
        T* own = logits + row * size;
        float most = widen(own[0]), sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < size; i++) most = widen(own[i]) > most ? widen(own[i]) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += exponential(widen(own[i]) - most);
        float normaliser = most + std::log(sum), label = widen(own[labels[row]]) - normaliser;
        log_probs[row] = label;
        if (!slopes) continue;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) own[i] = narrow<T>(-exponential(widen(own[i]) - normaliser));
        own[labels[row]] = narrow<T>(1.0f - std::exp(label));
    }
}

// The place of the greatest logit of each row, the first of equal ones, and log sum exp of the row. A row is one piece:
// who waits for a token waits for all rows. Not-a-number ends in the second number, as infinity does.
template <typename T> void best_rows(const T* logits, int64_t* best, float* normalisers, int64_t n, int64_t size) {
    const auto work = [&](int64_t row, int) {
        const T* own = logits + row * size;
        float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < size; i++) most = widen(own[i]) > most ? widen(own[i]) : most;
        int64_t place = 0;
        for (; place + STRETCH < size; place += STRETCH) {
            int32_t here = 0;
#pragma omp simd reduction(| : here)
            for (int64_t i = place; i < place + STRETCH; i++) here |= widen(own[i]) == most;
            if (here != 0) break;
        }
        while (place < size - 1 && widen(own[place]) != most) place++;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += exponential(widen(own[i]) - most);
        best[row] = place;
        normalisers[row] = most + std::log(sum);
    };
    Team::run(n, work, n * size > ALONE);
}

}  // namespace

#define FOR_BOTH(T, NAME)                                                                                              \
    extern "C" void norm_##NAME(const T* x, const T* weight, T* out, float* inverse, int64_t n, int64_t d, float eps,  \
                                int64_t known) {                                                                       \
        norm_rows(x, weight, out, inverse, n, d, eps, known != 0);                                                     \
    }                                                                                                                  \
    extern "C" void norm_backward_##NAME(const T* grad, const T* x, const T* weight, const float* inverse,             \
                                         const T* added, T* out, int64_t n, int64_t d) {                               \
        if (added == nullptr) norm_back<T, false>(grad, x, weight, inverse, added, out, n, d);                         \
        else norm_back<T, true>(grad, x, weight, inverse, added, out, n, d);                                           \
    }                                                                                                                  \
    extern "C" void gated_##NAME(const T* gate, const T* up, T* out, int64_t count) { gate_rows(gate, up, out, count); } \
    extern "C" void gated_backward_##NAME(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up,         \
                                          int64_t count) {                                                             \
        gate_back(grad, gate, up, grad_gate, grad_up, count);                                                          \
    }                                                                                                                  \
    extern "C" void rotated_##NAME(const T* x, const T* cosines, const T* sines, T* out, int64_t n, int64_t heads,     \
                                   int64_t half, float sign) {                                                         \
        rotate(x, cosines, sines, out, n, heads, half, sign);                                                          \
    }                                                                                                                  \
    extern "C" void label_slopes_##NAME(T* logits, const int64_t* labels, float* log_probs, int64_t n, int64_t size,   \
                                        int64_t slopes) {                                                              \
        labels_of(logits, labels, log_probs, n, size, slopes != 0);                                                    \
    }                                                                                                                  \
    extern "C" void best_##NAME(const T* logits, int64_t* best, float* normalisers, int64_t n, int64_t size) {         \
        best_rows(logits, best, normalisers, n, size);                                                                 \
    }

FOR_BOTH(float, float32)
FOR_BOTH(bf16, bfloat16)
