// Products of a few rows: y = x W^T, where what takes the time is to read W.
//
// W is read once, in the order in which it lies. A row of it and a row of x are multiplied vector by vector into one
// vector of sums, which is added up at the end; several rows of both at once only fill the registers. So each number of
// y is summed in an order that depends on nothing but the length of a row: neither on how many rows there are, nor on
// the number of threads. Weights that are kept in fewer bits are unpacked a few rows at a time into the cache of the
// core that multiplies them, or vector by vector where few rows of x leave the time for it.
//
// What comes next has to be on its way. A core that is told to fetch a line forgets it when it waits for too many others,
// and what it can wait for at once is half of what memory gives it; the rest comes from what it guesses by itself, which
// it does for one stretch of memory that is read from its beginning to its end. So
// - one row of W follows another where there are up to LINE_ROWS rows of x, fetched past the outer caches (the hint for
//   data that are used once);
// - HALF rows of W, with twice as many rows of x, where these stay in the nearest cache: little is read again there, and
//   what follows is fetched in a line, evenly over all of the time;
// - OUTS rows of W and GROUP rows of x otherwise: x comes from the second cache each time, so each time has to be for
//   more of W. What follows goes to the second cache too where vectors are of 16 floats;
// - each thread stays where it has been, see team.h.
// benchmarks/few_rows.py measures it.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <new>
#include <type_traits>
#include <utility>

#include "packing.h"
#include "team.h"

// How a row of W and a row of x are multiplied: a row of W is of `Number`s, WIDE of them in a vector, a row of x is of
// `Word`s. Up to GROUP rows of x with OUTS rows of W have their sums in registers. whole.h has a kind whose rows of x
// are no such numbers.
template <typename Kept, int COUNT> struct Alike {
    typedef Kept Number;
    typedef Kept Word;
    typedef Vector Right;
    typedef Vector Left;
    typedef Vector Sum;
    static constexpr int WIDE = COUNT, GROUP = LANES == 16 ? 4 : 3;
    static constexpr bool HALVES = LANES == 16;  // whether it pays to take fewer rows of W beside rows of x that stay near
    static inline Vector load(const Kept* from) { return *reinterpret_cast<const Vector*>(from); }
    static inline Vector right(const Kept* from) { return load(from); }
    // A piece of a row of x from a number on, and a vector of it; what the sums with a row begin with; the sums as floats.
    static inline const Kept* piece(const Kept* row, int64_t from) { return row + from; }
    static inline Vector left(const Kept* piece, int64_t at) { return load(piece + at); }
    static inline Vector start(const Kept*) { return Vector{}; }
    static inline Vector floats(Vector sum, const Kept*) { return sum; }
};

struct Floats : Alike<float, LANES> {
    static inline Vector dot(Vector sum, Vector a, Vector b) { return fused(sum, a, b); }
};

#if defined(__AVX512BF16__)
// In pairs.
struct Halves : Alike<bf16, 2 * LANES> {
    static inline Vector dot(Vector sum, Vector a, Vector b) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// A vector of floats from what is kept: floats, bfloat16 numbers, or whole numbers of eight bits.
static inline Vector widened(const float* from) { return *reinterpret_cast<const Vector*>(from); }
static inline Vector widened(const bf16* from) {
    typedef uint16_t Kept __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(4 * LANES)));
    return (Vector)(__builtin_convertvector(*reinterpret_cast<const Kept*>(from), Wide) << 16);
}
#if defined(__AVX512F__)
static inline Vector widened(const int8_t* from) {
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
#elif defined(__AVX2__)
static inline Vector widened(const int8_t* from) {
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
#else
static inline Vector widened(const int8_t* from) {
    typedef int8_t Kept __attribute__((vector_size(LANES), aligned(1), may_alias));
    typedef int32_t Wide __attribute__((vector_size(4 * LANES)));
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Kept*>(from), Wide), Vector);
}
#endif

// How rows of a type are multiplied.
template <typename T> struct KindOf { typedef Floats Kind; };
#if defined(__AVX512BF16__)
template <> struct KindOf<bf16> { typedef Halves Kind; };
#endif

// The numbers of each of four vectors added up, in the same order for each of them.
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__AVX512F__)
static inline Four totals(Vector a, Vector b, Vector c, Vector d) {
    const __m512 ab = (__m512)_mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = (__m512)_mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 parts = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(parts), 1));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(parts), upper);
    return (Four)_mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
#elif defined(__AVX2__)
static inline Four totals(Vector a, Vector b, Vector c, Vector d) {
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 halves = _mm256_hadd_ps(ab, cd);
    return (Four)_mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
#else
static inline float total(Vector sums) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}
static inline Four totals(Vector a, Vector b, Vector c, Vector d) { return Four{total(a), total(b), total(c), total(d)}; }
#endif

// Rows of x as they are multiplied: where they lie, or widened and filled up with zeros to whole vectors.
template <typename Kind, typename T> struct FewRows {
    typedef typename Kind::Number Number;
    const Number* at;
    int64_t stride, rows, whole, rest;  // numbers of a row that are whole vectors, and those behind
    Scratch scratch;
    bool failed = false;
    FewRows(const T* x, int64_t rows, int64_t size)
        : stride(up_to(size, Kind::WIDE)), rows(rows), whole(size / Kind::WIDE * Kind::WIDE), rest(size % Kind::WIDE),
          scratch(lie_there(rest) ? 0 : sizeof(Number) * rows * stride + 64) {
        if (lie_there(rest)) {
            at = reinterpret_cast<const Number*>(x);
            return;
        }
        Number* const room = reinterpret_cast<Number*>(scratch.at());
        at = room;
        failed = room == nullptr;
        for (int64_t row = 0; row < rows && !failed; row++) {
            for (int64_t i = 0; i < size; i++) room[row * stride + i] = narrow<Number>(widen(x[row * size + i]));
            for (int64_t i = size; i < stride; i++) room[row * stride + i] = narrow<Number>(0.0f);
        }
    }
    static constexpr bool lie_there(int64_t rest) { return sizeof(T) == sizeof(Number) && rest == 0; }
};

constexpr int64_t OUTS = LANES == 16 ? 6 : 4;  // rows of W at once
constexpr int REGISTERS = LANES == 16 ? 32 : 16;
constexpr int64_t LINE_ROWS = 4;      // rows of x, at most, for which W is read row by row
constexpr int64_t LINE_BYTES = LANES == 16 ? 8 << 10 : 1 << 30;  // and bytes of them, if they are more than one
constexpr int64_t HALF = OUTS / 2;    // rows of W where rows of x stay near, with twice as many of these,
constexpr int64_t NEAR_AHEAD = 12 << 10;  // and bytes that are fetched before they are needed then
constexpr int64_t NEAREST = 32 << 10; // bytes of the nearest cache, where it does not tell
constexpr int64_t LINE = 64;          // bytes that are fetched together
constexpr int64_t PIECE = 1024;       // numbers of a row at once: with OUTS rows they stay in the nearest cache
constexpr int64_t PART = 64 << 10;    // bytes of W that a thread takes at once
constexpr int64_t ALONE = 96 << 10;   // bytes of W below which a second thread is not worth waking
constexpr int64_t AHEAD = 2048;       // bytes that are fetched before they are needed, where W is read row by row
constexpr int64_t BLOCK_AHEAD = 8192; // where a few rows are read together and are not longer: those after them

constexpr int NEARER = LANES == 16 ? 2 : 0;  // where pieces are fetched to, as a hint: the second cache, or once

// Bytes of x that stay in the nearest cache while rows of W pass through it.
static inline int64_t near_bytes() {
    static const int64_t bytes = [] {
        int64_t all = NEAREST;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
        all = std::max(all, int64_t(sysconf(_SC_LEVEL1_DCACHE_SIZE)));
#endif
        return all * 5 / 8;
    }();
    return bytes;
}

static inline void fetch_once(const void* from) { __builtin_prefetch(from, 0, 0); }

// A vector that stays in its register: GCC would read x from memory once for each row of W, and there are two loads a
// cycle. The registers are enough for OUTS by GROUP sums, GROUP vectors of x and one of W.
template <typename V> static inline V in_register(V vector) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    asm("" : "+x"(vector));
#endif
    return vector;
}

// A piece of each of some rows of W, and where the same piece of the rows after them lies as it is kept, if it shall come
// nearer: bytes from row to row of it, and of what becomes one vector.
template <typename Number> struct Piece {
    const Number* at;
    int64_t stride;
    const char* next;
    int64_t next_stride, next_step;
};

// Totals of four sums from `first` on, of `count` that are there: EACH with a row of x, EACH with the next one.
template <typename Kind, int EACH>
INLINED static inline Four four_of(const typename Kind::Sum* sums, int64_t first, int64_t count,
                                   const typename Kind::Word* x, int64_t x_stride) {
    const auto one = [&](int64_t i) INLINED {
        const int64_t there = std::min(first + i, count - 1);
        return Kind::floats(sums[there], x + there / EACH * x_stride);
    };
    return totals(one(0), one(1), one(2), one(3));
}

// Numbers `from` to `until` of ROWS rows of x with those of EACH rows of W, added to `sums` (ROWS, EACH), or written
// there when they are the first; with the last ones the totals go to `found`, as many floats, and up to three more
// behind them that mean nothing. Meanwhile FETCHED places from `next` on come nearer with each vector. A function of its
// own, so that all sums stay in registers.
template <typename Kind, int ROWS, int EACH, int FETCHED>
__attribute__((noinline)) static void dots(const Piece<typename Kind::Number>& w, const typename Kind::Word* x,
                                           int64_t x_stride, int64_t from, int64_t until, const char* next,
                                           typename Kind::Sum* sums, float* found) {
    typename Kind::Sum own[ROWS * EACH];
    if (from == 0) times<ROWS * EACH>([&](auto i) INLINED { own[i] = Kind::start(x + i / EACH * x_stride); });
    else times<ROWS * EACH>([&](auto i) INLINED { own[i] = sums[i]; });
    const typename Kind::Word* piece = Kind::piece(x, from);
    const typename Kind::Number* at = w.at;
    const int64_t stride = w.stride, next_stride = w.next_stride, next_step = w.next_step, count = until - from;
    for (int64_t k = 0; k < count; k += Kind::WIDE) {
        for (int o = 0; o < FETCHED; o++) __builtin_prefetch(next + o * next_stride, 0, NEARER);
        if (FETCHED > 0) next += next_step;
        if constexpr (ROWS * EACH + EACH < REGISTERS) {
            // W first: what waits for it would fill the queue that loads have to pass.
            typename Kind::Right right[EACH];
            times<EACH>([&](auto o) INLINED { right[o] = Kind::right(at + o * stride + k); });
            times<ROWS>([&](auto r) INLINED {
                const typename Kind::Left left = Kind::left(piece + r * x_stride, k);
                times<EACH>([&](auto o) INLINED { own[r * EACH + o] = Kind::dot(own[r * EACH + o], right[o], left); });
            });
        } else {
            typename Kind::Left left[ROWS];
            times<ROWS>([&](auto r) INLINED { left[r] = in_register(Kind::left(piece + r * x_stride, k)); });
            times<EACH>([&](auto o) INLINED {
                const typename Kind::Right right = in_register(Kind::right(at + o * stride + k));
                times<ROWS>([&](auto r) INLINED { own[r * EACH + o] = Kind::dot(own[r * EACH + o], right, left[r]); });
            });
        }
    }
    if (found == nullptr) times<ROWS * EACH>([&](auto i) INLINED { sums[i] = own[i]; });
    else times<(ROWS * EACH + 3) / 4>([&](auto i) INLINED {
        *reinterpret_cast<Four*>(found + 4 * i) = four_of<Kind, EACH>(own, 4 * i, ROWS * EACH, x, x_stride);
    });
}

template <typename Kind, int FETCHED>
static inline void some_dots(const Piece<typename Kind::Number>& w, const typename Kind::Word* x, int64_t x_stride,
                             int64_t rows, int64_t from, int64_t until, const char* next, typename Kind::Sum* sums,
                             float* found) {
    static_assert(Kind::GROUP <= 4, "a case for each number of rows");
    if (rows == 1) dots<Kind, 1, OUTS, FETCHED>(w, x, x_stride, from, until, next, sums, found);
    else if (rows == 2) dots<Kind, std::min(2, Kind::GROUP), OUTS, FETCHED>(w, x, x_stride, from, until, next, sums, found);
    else if (rows == 3) dots<Kind, std::min(3, Kind::GROUP), OUTS, FETCHED>(w, x, x_stride, from, until, next, sums, found);
    else dots<Kind, std::min(4, Kind::GROUP), OUTS, FETCHED>(w, x, x_stride, from, until, next, sums, found);
}

// Numbers `from` to `until` of OUTS rows of W with those of all rows of x. What comes next is fetched evenly over the time
// that this takes, but not while W comes to the nearest cache, where there is time left for it.
template <typename Kind, typename T>
static inline void piece_dots(const Piece<typename Kind::Number>& w, const FewRows<Kind, T>& x, int64_t from,
                              int64_t until, typename Kind::Sum* sums, float* found) {
    const int64_t groups = (x.rows + Kind::GROUP - 1) / Kind::GROUP;
    int64_t row = 0, left = w.next == nullptr ? 0 : OUTS;
    const char* next = w.next;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t take = x.rows * (group + 1) / groups - row, even = (left + groups - group - 1) / (groups - group);
        const int64_t share = group == 0 && groups > 2 ? 0 : even;
        const typename Kind::Word* own = x.at + row * x.stride;
        typename Kind::Sum* to = sums + row * OUTS;
        float* totals = found == nullptr ? nullptr : found + row * OUTS;
        if (share == 0) some_dots<Kind, 0>(w, own, x.stride, take, from, until, next, to, totals);
        else if (share == 1) some_dots<Kind, 1>(w, own, x.stride, take, from, until, next, to, totals);
        else if (share == 2) some_dots<Kind, 2>(w, own, x.stride, take, from, until, next, to, totals);
        else if (share <= OUTS / 2) some_dots<Kind, OUTS / 2>(w, own, x.stride, take, from, until, next, to, totals);
        else some_dots<Kind, OUTS>(w, own, x.stride, take, from, until, next, to, totals);
        row += take;
        left -= share;
        next += share * w.next_stride;
    }
}

// TOGETHER rows of W with ROWS rows of x, into every OUTS-th of `sums`. `line.at(k)` is a vector of a row. Each sum waits
// for the one before it: where a vector is small, or takes long to make, other rows fill that time.
template <typename Source, int... T>
static inline auto lines_of(const Source& source, int64_t first, std::integer_sequence<int, T...>) {
    return std::array<typename Source::Line, sizeof...(T)>{source.line(first + T)...};
}

template <typename Kind, int ROWS, int TOGETHER, typename Source>
static inline void line_dots(const Source& source, int64_t first, const typename Kind::Word* x, int64_t x_stride,
                             int64_t count, typename Kind::Sum* sums) {
    auto each = lines_of(source, first, std::make_integer_sequence<int, TOGETHER>());
    const int64_t block = TOGETHER * source.row_bytes();
    const int64_t ahead = TOGETHER > 1 && block <= BLOCK_AHEAD ? block : AHEAD;
    typename Kind::Sum own[ROWS * TOGETHER];
    times<ROWS * TOGETHER>([&](auto i) INLINED { own[i] = Kind::start(x + i / TOGETHER * x_stride); });
    const typename Kind::Word* piece = Kind::piece(x, 0);
    for (int64_t k = 0; k < count; k += Kind::WIDE) {
        typename Kind::Right right[TOGETHER];
        times<TOGETHER>([&](auto t) INLINED {
            each[t].fetch(k, ahead);
            right[t] = each[t].at(k);
        });
        times<ROWS>([&](auto r) INLINED {
            const typename Kind::Left left = Kind::left(piece + r * x_stride, k);
            times<TOGETHER>([&](auto t) INLINED {
                own[r * TOGETHER + t] = Kind::dot(own[r * TOGETHER + t], right[t], left);
            });
        });
    }
    times<ROWS * TOGETHER>([&](auto i) INLINED { sums[i / TOGETHER * OUTS + i % TOGETHER] = own[i]; });
}

// OUTS rows of W from `first` on, the first `count` of which are there, a few after another with a group of rows of x.
template <typename Kind, int ROWS, typename T, typename Source>
__attribute__((noinline)) static void lines_dots(const Source& source, const FewRows<Kind, T>& x, int64_t first,
                                                 int64_t count, typename Kind::Sum* sums) {
    constexpr int TOGETHER = Source::together(ROWS);
    int64_t o = 0;
    for (; o + TOGETHER <= count; o += TOGETHER)
        line_dots<Kind, ROWS, TOGETHER>(source, first + o, x.at, x.stride, x.whole, sums + o);
    for (; o < count; o++) line_dots<Kind, ROWS, 1>(source, first + o, x.at, x.stride, x.whole, sums + o);
    for (; o < OUTS; o++)
        for (int r = 0; r < ROWS; r++) sums[r * OUTS + o] = typename Kind::Sum{};
}

// The totals of OUTS sums with a row of x. They stay in registers: numbers that were just written four by four cannot be
// read together before all that is older has been done, and that are loads of W.
template <typename Kind>
static inline Vector totals_of(const typename Kind::Sum* sums, const typename Kind::Word* x) {
    const Four first = four_of<Kind, OUTS>(sums, 0, OUTS, x, 0);
#if defined(__AVX512F__)
    const Four second = four_of<Kind, OUTS>(sums, 4, OUTS, x, 0);
    return (Vector)_mm512_insertf32x4(_mm512_castps128_ps512((__m128)first), (__m128)second, 1);
#elif defined(__AVX2__)
    return (Vector)_mm256_castps128_ps256((__m128)first);
#else
    return (Vector)first;
#endif
}

template <typename Kind, typename T, typename Source>
static inline void lines(const Source& source, const FewRows<Kind, T>& x, int64_t first, int64_t count,
                         typename Kind::Sum* sums, T* y) {
    if (x.rows == 1) lines_dots<Kind, 1>(source, x, first, count, sums);
    else if (x.rows == 2) lines_dots<Kind, 2>(source, x, first, count, sums);
    else if (x.rows == 3) lines_dots<Kind, 3>(source, x, first, count, sums);
    else lines_dots<Kind, 4>(source, x, first, count, sums);
    const Vector beside = source.beside(first, count);
    for (int64_t row = 0; row < x.rows; row++) {
        const Vector own = totals_of<Kind>(sums + row * OUTS, x.at + row * x.stride);
        put<T>(source.finish(own, beside), count, y + row * source.outs + first);
    }
}

// The totals of all rows of x with OUTS rows of W, piece by piece.
template <typename Kind, typename T, typename Source>
static inline void pieces(const Source& source, const FewRows<Kind, T>& x, int64_t first, int64_t count,
                          typename Kind::Number* room, typename Kind::Sum* sums, float* found) {
    const int64_t padded = x.whole + (x.rest ? Kind::WIDE : 0);
    for (int64_t from = 0, until; from < padded; from = until) {
        until = std::min(from + PIECE, from < x.whole ? x.whole : padded);
        float* const to = until == padded ? found : nullptr;
        piece_dots<Kind>(source.piece(first, count, from, until, room), x, from, until, sums, to);
    }
}

// Numbers of y from the totals with EACH rows of W from `first` on, the first `count` of which are there.
template <int EACH, typename T, typename Source>
static inline void finish(const Source& source, int64_t rows, int64_t first, int64_t count, const float* found, T* y) {
    static_assert(EACH <= LANES, "the totals of a row are one vector");
    const Vector beside = source.beside(first, count);
    for (int64_t row = 0; row < rows; row++)
        put<T>(source.finish(widened(found + row * EACH), beside), count, y + row * source.outs + first);
}

// Totals of a group of rows of x that stay in the nearest cache with HALF rows of W where they lie.
template <typename Kind, int FETCHED>
static inline void near_dots(const Piece<typename Kind::Number>& w, const typename Kind::Word* x, int64_t x_stride,
                             int64_t rows, int64_t size, float* found) {
    constexpr int MOST_ROWS = 2 * Kind::GROUP;
    const auto own = [&](auto count) INLINED {
        dots<Kind, std::min<int>(count, MOST_ROWS), HALF, FETCHED>(w, x, x_stride, 0, size, w.next, nullptr, found);
    };
    static_assert(MOST_ROWS <= 8, "a case for each number of rows");
    // One row alone is read by line.
    if (rows == 2) own(std::integral_constant<int, 2>());
    else if (rows == 3) own(std::integral_constant<int, 3>());
    else if (rows == 4) own(std::integral_constant<int, 4>());
    else if (rows == 5) own(std::integral_constant<int, 5>());
    else if (rows == 6) own(std::integral_constant<int, 6>());
    else if (rows == 7) own(std::integral_constant<int, 7>());
    else own(std::integral_constant<int, 8>());
}

// Totals of all rows of x with HALF rows of W from `first` on, while what lies NEAR_AHEAD is fetched. Groups are of one
// size, and a row may be in two of them: where one instruction reads one group and another one the next, the processor
// guesses worse, which takes 15 % with 9 rows.
template <typename Kind, typename T, typename Source>
static inline void near(const Source& source, const FewRows<Kind, T>& x, int64_t first, float* found) {
    constexpr int64_t MOST_ROWS = 2 * Kind::GROUP;
    const int64_t groups = (x.rows + MOST_ROWS - 1) / MOST_ROWS, bytes = source.row_bytes();
    const int64_t vectors = x.whole / Kind::WIDE, step = (HALF * bytes + vectors * groups - 1) / (vectors * groups);
    const int64_t fetched = (step + LINE - 1) / LINE;
    Piece<typename Kind::Number> w = source.where(first);
    w.next = reinterpret_cast<const char*>(w.at) + std::min(NEAR_AHEAD, (source.outs - first - HALF) * bytes);
    w.next_step = step;
    w.next_stride = LINE;
    const int64_t take = (x.rows + groups - 1) / groups;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t row = std::min(group * take, x.rows - take);
        const typename Kind::Word* own = x.at + row * x.stride;
        if (fetched >= HALF) near_dots<Kind, HALF>(w, own, x.stride, take, x.whole, found + row * HALF);
        else if (fetched == 2) near_dots<Kind, 2>(w, own, x.stride, take, x.whole, found + row * HALF);
        else near_dots<Kind, 1>(w, own, x.stride, take, x.whole, found + row * HALF);
        w.next += step * vectors;
    }
}

// y (rows, outs) = x W^T, rounded to T. `source.piece(first, count, from, until, room)` gives numbers `from` to `until` of
// OUTS rows of W, the first `count` of which are there, in `room` where they have to be made: PIECE apart, with zeros
// behind the end of a row. `source.line(out)` is a row that is read vector by vector, where there is `source.LINES`
// and it `has_lines`.
// `source.finish(sums, source.beside(first, count))` are `count` numbers of y from their sums.
template <typename T, typename Source> struct Wanted {
    Source source;
    T* y;
};

// What is wanted of the same rows, in parts: so many blocks of OUTS rows of each W.
template <typename T, typename Source> struct Parts {
    struct Cut {
        int64_t blocks, each, until;  // of W, of one of its parts; where its parts end
    };
    Cut cuts[3];
    int count;
    int64_t work = 0;  // bytes of all W
    Parts(const Wanted<T, Source>* wanted, int count) : count(count) {
        int64_t all = 0;
        for (int i = 0; i < count; i++) {
            const int64_t row_bytes = wanted[i].source.row_bytes();
            Cut& cut = cuts[i];
            cut.blocks = (wanted[i].source.outs + OUTS - 1) / OUTS;
            cut.each = std::max<int64_t>(1, PART / (OUTS * row_bytes + 1));
            cut.until = all += (cut.blocks + cut.each - 1) / cut.each;
            work += wanted[i].source.outs * row_bytes;
        }
    }
    int64_t all() const { return cuts[count - 1].until; }
    int of(int64_t part) const { return part < cuts[0].until ? 0 : part < cuts[1].until ? 1 : 2; }
    // The block that a part of product i begins with, and the one behind its last.
    int64_t first(int i, int64_t part) const {
        return std::min(cuts[i].blocks, (part - (i > 0 ? cuts[i - 1].until : 0)) * cuts[i].each);
    }
};

// Up to three products of the same rows. Returns 1 when there is no memory.
template <typename Kind, typename T, typename Source>
static int few(const FewRows<Kind, T>& x, const Wanted<T, Source>* wanted, int count) {
    typedef typename Kind::Number Number;
    typedef typename Kind::Sum Sum;
    const Rooms rooms(sizeof(Number) * OUTS * PIECE + (sizeof(Sum) + 2 * sizeof(float)) * OUTS * x.rows + 64 * 7);
    if (rooms.at == nullptr || x.failed) return 1;
    const bool small = x.rows == 1 || x.rows * x.stride * int64_t(sizeof(typename Kind::Word)) <= LINE_BYTES;
    const bool is_near = x.rest == 0 && x.rows * x.stride * int64_t(sizeof(typename Kind::Word)) <= near_bytes();
    bool by_line = Source::LINES && x.rest == 0 && x.rows <= LINE_ROWS && small;
    if constexpr (Source::LINES)
        for (int i = 0; i < count; i++) by_line = by_line && wanted[i].source.has_lines();
    const Parts<T, Source> parts(wanted, count);
    const auto work = [&](int64_t part, int member) {
        auto shelf = rooms.of(member);
        Number* room = shelf.template take<Number>(OUTS * PIECE);
        Sum* sums = shelf.template take<Sum>(OUTS * x.rows);
        float* found[2];
        for (float*& each : found) each = shelf.template take<float>(OUTS * x.rows + LANES);
        const int i = parts.of(part);
        const Source& source = wanted[i].source;
        const int64_t begin = parts.first(i, part), end = parts.first(i, part + 1);
        const auto held = [&](int64_t block) { return std::min(OUTS, source.outs - block * OUTS); };
        if constexpr (Source::LINES) {
            for (int64_t block = begin; by_line && block < end; block++)
                lines<Kind, T>(source, x, block * OUTS, held(block), sums, wanted[i].y);
            if (by_line) return;
        }
        // Totals are read again a block later, for the same reason for which those of a row stay in registers.
        int64_t first = begin;
        if constexpr (Source::AS_IT_IS && Kind::HALVES) {
            const auto done = [&](int64_t half) {
                finish<HALF>(source, x.rows, half * HALF, HALF, found[half % 2], wanted[i].y);
            };
            if (is_near) first = std::max(begin, std::min(end, source.outs / OUTS));
            for (int64_t half = 2 * begin; half < 2 * first; half++) {
                near<Kind>(source, x, half * HALF, found[half % 2]);
                if (half > 2 * begin) done(half - 1);
                if (half == 2 * first - 1) done(half);
            }
        }
        const auto done = [&](int64_t block) {
            finish<OUTS>(source, x.rows, block * OUTS, held(block), found[block % 2], wanted[i].y);
        };
        for (int64_t block = first; block < end; block++) {
            pieces<Kind, T>(source, x, block * OUTS, held(block), room, sums, found[block % 2]);
            if (block > first) done(block - 1);
            if (block == end - 1) done(block);
        }
    };
    Team::run(parts.all(), work, parts.work * ((x.rows + LINE_ROWS - 1) / LINE_ROWS) > ALONE);
    return 0;
}
