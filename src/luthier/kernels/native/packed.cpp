// x W^T for a few rows of x and a weight in fewer bits: see few.h. A few rows of W at a time become numbers in the
// cache of a core, bfloat16 or float as those of x, and are multiplied there; W as numbers is never in memory. Or, where
// the processor multiplies whole numbers, those of eight bits are multiplied as they lie, see whole.h, with so few rows
// that to read W is what takes the time: it takes two products where bfloat16 numbers take one.

#include "codes.h"
#include "few.h"
#include "lookup.h"
#include "whole.h"

namespace {

// What multiplies whole numbers of eight bits with a few rows of a type, and with more of them.
template <typename T> struct BytesKind { typedef Floats Few, More; };
#if defined(MULTIPLIES_WHOLE) && defined(__AVX512BF16__)
template <> struct BytesKind<bf16> { typedef Wholes Few; typedef Halves More; };
#elif defined(MULTIPLIES_WHOLE)
template <> struct BytesKind<bf16> { typedef Wholes Few, More; };
#endif

// Rows that are multiplied by whole numbers, where there is another way for more: those among which a row is always the
// same (FEW of many.py).
constexpr int64_t FEW = 32;

template <typename Number> static inline void filled_up(Number* to, int64_t from, int64_t until) {
    for (int64_t i = from; i < until; i++) to[i] = Number{};
}

// What is read for the block after this one should be on its way.
static inline void fetch(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) fetch_once(static_cast<const char*>(from) + at);
}

static inline void whole_numbers(const int8_t* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) *reinterpret_cast<Vector*>(to + i) = widened(from + i);
    for (; i < count; i++) to[i] = from[i];
}
#if defined(__AVX512BF16__)
static inline void whole_numbers(const int8_t* from, int64_t count, bf16* to) {
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        const __m512 low = (__m512)widened(from + i), high = (__m512)widened(from + i + LANES);
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    for (; i < count; i++) to[i] = narrow<bf16>(from[i]);
}
#endif

// Whole numbers of eight bits with a scale for each row, which is multiplied in at the end.
template <typename Kind> struct Bytes {
    typedef typename Kind::Number Number;
    const int8_t* codes;
    const float* scales;
    int64_t size, outs;
    static constexpr bool AS_IT_IS = sizeof(Number) == 1, LINES = AS_IT_IS || sizeof(Number) == sizeof(float);
    static constexpr int together(int rows) { return AS_IT_IS ? 1 : rows == 1 ? 4 : 2; }
    struct Line {
        const int8_t* from;
        typename Kind::Right at(int64_t k) const {
            if constexpr (AS_IT_IS) return Kind::right(from + k);
            else return widened(from + k);
        }
        void fetch(int64_t k, int64_t ahead) const {
            // Some vectors of them lie in one line of the cache.
            if (k % 64 == 0) fetch_once(from + k + ahead);
        }
    };
    static bool has_lines() { return true; }
    Line line(int64_t out) const { return {codes + out * size}; }
    int64_t row_bytes() const { return size; }
    Piece<Number> piece(int64_t first, int64_t count, int64_t from, int64_t until, Number* room) const {
        const int64_t there = std::min(until, size) - from;
        if constexpr (AS_IT_IS) {
            const int8_t* own = codes + first * size + from;
            const bool more = first + 2 * OUTS <= outs;
            if (until <= size && count == OUTS)
                return {own, size, more ? reinterpret_cast<const char*>(own + OUTS * size) : nullptr, size, Kind::WIDE};
        }
        for (int64_t o = 0; o < OUTS; o++) {
            const int8_t* own = codes + (first + o) * size + from;
            if (first + o + OUTS < outs) fetch(own + OUTS * size, there);
            const int64_t held = o < count ? there : 0;
            Number* to = room + o * PIECE;
            if constexpr (AS_IT_IS) std::copy(own, own + held, to);
            else whole_numbers(own, held, to);
            filled_up(to, held, until - from);
        }
        return {room, PIECE, nullptr, 0, 0};
    }
    Vector beside(int64_t first, int64_t count) const {
        return beginning(scales + first, count);
    }
    static Vector finish(Vector sums, Vector beside) { return sums * beside; }
};

template <typename Kind> struct Coded {
    typedef typename Kind::Number Number;
    Pairs pairs;
    int64_t size, outs;
    static constexpr bool AS_IT_IS = false;
#if defined(__AVX512BF16__)
    // With few rows of x numbers are made where they are multiplied, and never written: a row begins with a block then.
    static constexpr bool LINES = Kind::WIDE == 2 * LANES;
    bool has_lines() const { return pairs.block % Kind::WIDE == 0 && size % pairs.block == 0; }
    static constexpr int together(int rows) { return rows == 1 ? 6 : rows == 2 ? 3 : 2; }  // parts of OUTS
    struct Line {
        const uint8_t* from;
        const float* levels;
        int64_t block, left;
        Walk scale;
        __m512i table;
        typename Kind::Right at(int64_t k) {
            if (left == 0) table = scaled_table(levels, scale.next()), left = block;
            left -= Kind::WIDE;
            return (typename Kind::Right)looked_up(from + k / 2, table);
        }
        void fetch(int64_t k, int64_t ahead) const {
            if (k % 128 == 0) fetch_once(from + k / 2 + ahead);
        }
    };
    Line line(int64_t out) const {
        const int64_t at = out * size;
        return {pairs.codes + at / 2, pairs.levels, pairs.block, 0, Walk(pairs, at / pairs.block), __m512i{}};
    }
#else
    static constexpr bool LINES = false;
#endif
    int64_t row_bytes() const { return size / 2; }
    Piece<Number> piece(int64_t first, int64_t count, int64_t from, int64_t until, Number* room) const {
        const int64_t there = std::min(until, size) - from;
        for (int64_t o = 0; o < OUTS; o++) {
            int64_t at = (first + o) * size + from;
            const int64_t end = o < count ? at + there : at;
            if (first + o + OUTS < outs) fetch(pairs.codes + (at + OUTS * size) / 2, there / 2);
            unpack(at, end, room + o * PIECE);
            filled_up(room + o * PIECE, o < count ? there : 0, until - from);
        }
        return {room, PIECE, nullptr, 0, 0};
    }
    // Numbers `at` to `end` of all. A function of its own, so that its numbers stay in registers.
    __attribute__((noinline)) void unpack(int64_t at, int64_t end, Number* to) const {
        // Blocks do not end with the rows.
        const int64_t block = at / pairs.block;
        Walk scale(pairs, block);
        for (int64_t next = (block + 1) * pairs.block; at < end; next += pairs.block) {
            const int64_t own = std::min(end, next) - at;
            look_up_scaled<Number>(pairs.codes + at / 2, pairs.levels, scale.next(), to, own / 2);
            to += own;
            at += own;
        }
    }
    static Vector beside(int64_t, int64_t) { return Vector{}; }
    static Vector finish(Vector sums, Vector) { return sums; }
};

// Codes that may be wanted.
template <typename T> struct Asked {
    const int8_t* codes;
    const float* scales;
    T* y;
    int64_t outs;
};

// Up to three products of the same rows; the first that has no codes is the end.
template <typename Kind, typename T>
int products_by(const T* x, const Asked<T> (&asked)[3], int64_t n, int64_t size) {
    const FewRows<Kind, T> rows(x, n, size);
    Wanted<T, Bytes<Kind>> wanted[3];
    int count = 0;
    for (; count < 3 && asked[count].codes != nullptr; count++) {
        const Asked<T>& one = asked[count];
        wanted[count] = {{one.codes, one.scales, size, one.outs}, one.y};
    }
    return few<Kind, T>(rows, wanted, count);
}

template <typename T> int products_of_bytes(const T* x, const Asked<T> (&asked)[3], int64_t n, int64_t size) {
    if (n <= FEW) return products_by<typename BytesKind<T>::Few>(x, asked, n, size);
    return products_by<typename BytesKind<T>::More>(x, asked, n, size);
}

template <typename T>
int products_of_pairs(const T* x, const Pairs* const (&asked)[3], T* const (&y)[3], const int64_t (&outs)[3], int64_t n,
                      int64_t size) {
    typedef typename KindOf<T>::Kind Kind;
    const FewRows<Kind, T> rows(x, n, size);
    Wanted<T, Coded<Kind>> wanted[3];
    int count = 0;
    for (; count < 3 && asked[count] != nullptr; count++) wanted[count] = {{*asked[count], size, outs[count]}, y[count]};
    return few<Kind, T>(rows, wanted, count);
}

}  // namespace

#define FOR_BOTH(T, NAME)                                                                                              \
    extern "C" int products_of_bytes_##NAME(const T* x, const int8_t* codes, const float* scales, T* y,                \
                                            const int8_t* second_codes, const float* second_scales, T* second_y,       \
                                            const int8_t* third_codes, const float* third_scales, T* third_y, int64_t n,\
                                            int64_t size, int64_t outs, int64_t second_outs, int64_t third_outs) {     \
        return products_of_bytes<T>(x, {{codes, scales, y, outs}, {second_codes, second_scales, second_y, second_outs},\
                                        {third_codes, third_scales, third_y, third_outs}}, n, size);                   \
    }                                                                                                                  \
    extern "C" int products_of_codes_##NAME(const T* x, const Pairs* codes, T* y, const Pairs* second_codes,             \
                                            T* second_y, const Pairs* third_codes, T* third_y, int64_t n, int64_t size, \
                                            int64_t outs, int64_t second_outs, int64_t third_outs) {                   \
        return products_of_pairs<T>(x, {codes, second_codes, third_codes}, {y, second_y, third_y},                     \
                                    {outs, second_outs, third_outs}, n, size);                                         \
    }

FOR_BOTH(float, float32)
FOR_BOTH(bf16, bfloat16)
