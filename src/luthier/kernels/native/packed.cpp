// x W^T for a few rows of x and a weight in fewer bits: see few.h. A few rows of W at a time become numbers in the
// cache of a core, bfloat16 or float as those of x, and are multiplied there; W as numbers is never in memory.

#include "few.h"
#include "lookup.h"

namespace {

// Whole numbers of eight bits with a scale for each row, which is multiplied in at the end.
template <typename Number> static inline void whole_numbers(const int8_t* from, int64_t count, Number* to) {
    int64_t i = 0;
    if constexpr (sizeof(Number) == sizeof(float))
        for (; i + LANES <= count; i += LANES) *reinterpret_cast<Vector*>(to + i) = widened(from + i);
    for (; i < count; i++) to[i] = narrow<Number>(float(from[i]));
}
#if defined(__AVX512BF16__)
template <> inline void whole_numbers<bf16>(const int8_t* from, int64_t count, bf16* to) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512 low = (__m512)widened(from + i), high = (__m512)widened(from + i + LANES);
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    for (; i < count; i++) to[i] = narrow<bf16>(float(from[i]));
}
#endif

template <typename Number> static inline void filled_up(Number* to, int64_t from, int64_t until) {
    for (int64_t i = from; i < until; i++) to[i] = narrow<Number>(0.0f);
}

// What is read for the block after this one should be on its way.
static inline void fetch(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) fetch_once(static_cast<const char*>(from) + at);
}

// A vector of numbers as they are multiplied.
template <typename Kind> static inline Vector vector_of(const int8_t* from) { return widened(from); }
#if defined(__AVX512BF16__)
template <> inline Vector vector_of<Halves>(const int8_t* from) {
    return (Vector)_mm512_cvtne2ps_pbh((__m512)widened(from + LANES), (__m512)widened(from));
}
#endif

template <typename Kind> struct Bytes {
    typedef typename Kind::Number Number;
    const int8_t* codes;
    const float* scales;
    int64_t size, outs;
    static constexpr bool LINES = true;
    static constexpr int together(int rows) { return rows == 1 ? 4 : 2; }
    struct Line {
        const int8_t* from;
        Vector at(int64_t k) const { return vector_of<Kind>(from + k); }
        void fetch(int64_t k, int64_t ahead) const {
            // Some vectors of them lie in one line of the cache.
            if (k % 64 == 0) fetch_once(from + k + ahead);
        }
    };
    Line line(int64_t out) const { return {codes + out * size}; }
    int64_t row_bytes() const { return size; }
    Piece<Number> piece(int64_t first, int64_t count, int64_t from, int64_t until, Number* room) const {
        const int64_t there = std::min(until, size) - from;
        for (int64_t o = 0; o < OUTS; o++) {
            const int8_t* own = codes + (first + o) * size + from;
            if (first + o + OUTS < outs) fetch(own + OUTS * size, there);
            if (o < count) whole_numbers<Number>(own, there, room + o * PIECE);
            filled_up(room + o * PIECE, o < count ? there : 0, until - from);
        }
        return {room, PIECE, nullptr, 0, 0};
    }
    Four finish(int64_t first, int64_t count, Four sums) const {
        for (int64_t o = 0; o < count; o++) sums.at[o] *= scales[first + o];
        return sums;
    }
};

// Codes of four bits and the scale of each block of numbers, which may be kept as a code with a scale and a mean.
struct Scales {
    const float* numbers;
    const uint8_t* codes;
    const float* levels;
    float mean;
    int64_t group;
    float of(int64_t block) const {
        return codes == nullptr ? numbers[block] : levels[codes[block]] * numbers[block / group] + mean;
    }
};

template <typename Kind> struct Coded {
    typedef typename Kind::Number Number;
    const uint8_t* codes;
    Scales scales;
    const float* levels;
    int64_t each, size, outs;  // numbers of a block of codes, numbers of a row, rows
    static constexpr bool LINES = false;
    int64_t row_bytes() const { return size / 2; }
    Piece<Number> piece(int64_t first, int64_t count, int64_t from, int64_t until, Number* room) const {
        const int64_t there = std::min(until, size) - from;
        for (int64_t o = 0; o < OUTS; o++) {
            int64_t at = (first + o) * size + from;
            const int64_t end = o < count ? at + there : at;
            if (first + o + OUTS < outs) fetch(codes + (at + OUTS * size) / 2, there / 2);
            for (Number* to = room + o * PIECE; at < end;) {
                // Blocks do not end with the rows.
                const int64_t next = std::min(end, (at / each + 1) * each);
                look_up_scaled<Number>(codes + at / 2, levels, scales.of(at / each), to, (next - at) / 2);
                to += next - at;
                at = next;
            }
            filled_up(room + o * PIECE, o < count ? there : 0, until - from);
        }
        return {room, PIECE, nullptr, 0, 0};
    }
    Four finish(int64_t, int64_t, Four sums) const { return sums; }
};

template <typename T>
int product_of_bytes(const T* x, const int8_t* codes, const float* scales, T* y, int64_t n, int64_t size, int64_t outs) {
    typedef typename KindOf<T>::Kind Kind;
    const FewRows<Kind, T> rows(x, n, size);
    return few<Kind, T>(Bytes<Kind>{codes, scales, size, outs}, rows, y, outs);
}

template <typename T>
int product_of_codes(const T* x, const uint8_t* codes, const Scales& scales, const float* levels, T* y, int64_t n,
                     int64_t size, int64_t outs, int64_t each) {
    typedef typename KindOf<T>::Kind Kind;
    const FewRows<Kind, T> rows(x, n, size);
    return few<Kind, T>(Coded<Kind>{codes, scales, levels, each, size, outs}, rows, y, outs);
}

}  // namespace

#define FOR_BOTH(T, NAME)                                                                                              \
    extern "C" int product_of_bytes_##NAME(const T* x, const int8_t* codes, const float* scales, T* y, int64_t n,      \
                                           int64_t size, int64_t outs) {                                               \
        return product_of_bytes(x, codes, scales, y, n, size, outs);                                                   \
    }                                                                                                                  \
    extern "C" int product_of_codes_##NAME(const T* x, const uint8_t* codes, const float* scales,                      \
                                           const uint8_t* scale_codes, const float* scale_levels, const float* levels, \
                                           T* y, float mean, int64_t group, int64_t n, int64_t size, int64_t outs,     \
                                           int64_t each) {                                                             \
        return product_of_codes(x, codes, {scales, scale_codes, scale_levels, mean, group}, levels, y, n, size, outs,  \
                                each);                                                                                 \
    }

FOR_BOTH(float, float32)
FOR_BOTH(bf16, bfloat16)
