// x W^T + b for a few rows of x and one weight or several: see few.h. W is as it is, in float or bfloat16.

#include "few.h"

namespace {

// Rows of W where they lie; widened first where bfloat16 cannot be multiplied as it is.
template <typename Kind, typename T> struct Plain {
    typedef typename Kind::Number Number;
    const T* weight;
    const T* bias;
    int64_t size, outs;
    static constexpr bool LINES = true, AS_IT_IS = sizeof(T) == sizeof(Number);
    static constexpr int together(int rows) { return AS_IT_IS ? 1 : rows == 1 ? 4 : 2; }
    struct Line {
        const T* from;
        typename Kind::Right at(int64_t k) const {
            if constexpr (AS_IT_IS) return Kind::load(reinterpret_cast<const Number*>(from + k));
            else return widened(from + k);
        }
        void fetch(int64_t k, int64_t ahead) const { fetch_once(reinterpret_cast<const char*>(from + k) + ahead); }
    };
    static bool has_lines() { return true; }
    Line line(int64_t out) const { return {weight + out * size}; }
    int64_t row_bytes() const { return size * int64_t(sizeof(T)); }
    Piece<Number> where(int64_t first) const {
        return {reinterpret_cast<const Number*>(weight + first * size), size, nullptr, 0, 0};
    }
    Piece<Number> piece(int64_t first, int64_t count, int64_t from, int64_t until, Number* room) const {
        const T* own = weight + first * size + from;
        const char* next = first + 2 * OUTS <= outs ? reinterpret_cast<const char*>(own + OUTS * size) : nullptr;
        const int64_t step = Kind::WIDE * int64_t(sizeof(T));
        if constexpr (AS_IT_IS) {
            if (until <= size && count == OUTS) {
                return {reinterpret_cast<const Number*>(own), size, next, row_bytes(), step};
            }
        }
        const int64_t there = std::min(until, size) - from;
        for (int64_t o = 0; o < OUTS; o++) {
            const int64_t held = o < count ? there : 0;
            for (int64_t i = 0; i < held; i++) room[o * PIECE + i] = narrow<Number>(widen(own[o * size + i]));
            for (int64_t i = held; i < until - from; i++) room[o * PIECE + i] = narrow<Number>(0.0f);
        }
        return {room, PIECE, next, row_bytes(), step};
    }
    Vector beside(int64_t first, int64_t count) const {
        return beginning(bias == nullptr ? nullptr : bias + first, count);
    }
    static Vector finish(Vector sums, Vector beside) { return sums + beside; }
};

// A weight that may be wanted.
template <typename T> struct Asked {
    const T* weight;
    const T* bias;
    T* y;
    int64_t outs;
};

// Up to three products of the same rows; the first that has no weight is the end.
template <typename T> int products_of_few(const T* x, const Asked<T> (&asked)[3], int64_t n, int64_t size) {
    typedef typename KindOf<T>::Kind Kind;
    const FewRows<Kind, T> rows(x, n, size);
    Wanted<T, Plain<Kind, T>> wanted[3];
    int count = 0;
    for (; count < 3 && asked[count].weight != nullptr; count++) {
        const Asked<T>& one = asked[count];
        wanted[count] = {{one.weight, one.bias, size, one.outs}, one.y};
    }
    return few<Kind, T>(rows, wanted, count);
}

}  // namespace

#define FOR_BOTH(T, NAME)                                                                                              \
    extern "C" int products_##NAME(const T* x, const T* weight, const T* bias, T* y, const T* second_weight,           \
                                   const T* second_bias, T* second_y, const T* third_weight, const T* third_bias,      \
                                   T* third_y, int64_t n, int64_t size, int64_t outs, int64_t second_outs,             \
                                   int64_t third_outs) {                                                               \
        return products_of_few<T>(x, {{weight, bias, y, outs}, {second_weight, second_bias, second_y, second_outs},    \
                                      {third_weight, third_bias, third_y, third_outs}}, n, size);                      \
    }

FOR_BOTH(float, float32)
FOR_BOTH(bf16, bfloat16)
