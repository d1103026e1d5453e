// x W^T + b for a few rows of x: see few.h. W is as it is, in float or bfloat16.

#include "few.h"

namespace {

// Rows of W where they lie; widened first where bfloat16 cannot be multiplied as it is.
template <typename Kind, typename T> struct Plain {
    typedef typename Kind::Number Number;
    const T* weight;
    const T* bias;
    int64_t size, outs;
    int64_t row_bytes() const { return size * int64_t(sizeof(T)); }
    Piece<Number> piece(int64_t first, int64_t count, int64_t from, int64_t until, Number* room) const {
        const T* own = weight + first * size + from;
        if constexpr (sizeof(T) == sizeof(Number)) {
            if (until <= size && count == OUTS) {
                const T* next = first + 2 * OUTS <= outs ? own + OUTS * size : nullptr;
                return {reinterpret_cast<const Number*>(own), size, reinterpret_cast<const Number*>(next)};
            }
        }
        const int64_t there = std::min(until, size) - from;
        for (int64_t o = 0; o < OUTS; o++) {
            const int64_t held = o < count ? there : 0;
            for (int64_t i = 0; i < held; i++) room[o * PIECE + i] = narrow<Number>(widen(own[o * size + i]));
            for (int64_t i = held; i < until - from; i++) room[o * PIECE + i] = narrow<Number>(0.0f);
        }
        return {room, PIECE, nullptr};
    }
    float finish(int64_t out, float sum) const { return bias == nullptr ? sum : sum + widen(bias[out]); }
};

template <typename T> int product_of_few(const T* x, const T* weight, const T* bias, T* y, int64_t n, int64_t size, int64_t outs) {
    typedef typename KindOf<T>::Kind Kind;
    const FewRows<Kind, T> rows(x, n, size);
    return few<Kind, T>(Plain<Kind, T>{weight, bias, size, outs}, rows, y, outs);
}

}  // namespace

extern "C" int product_float32(const float* x, const float* weight, const float* bias, float* y, int64_t n,
                               int64_t size, int64_t outs) {
    return product_of_few(x, weight, bias, y, n, size, outs);
}

extern "C" int product_bfloat16(const bf16* x, const bf16* weight, const bf16* bias, bf16* y, int64_t n, int64_t size,
                                int64_t outs) {
    return product_of_few(x, weight, bias, y, n, size, outs);
}
