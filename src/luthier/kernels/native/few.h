// Products of a few rows: y = x W^T, where what takes the time is to read W.
//
// W is read once, in the order in which it lies. A row of it and a row of x are multiplied vector by vector into one
// vector of sums, which is added up at the end; several rows of both at once only fill the registers. So each number of
// y is summed in an order that depends on nothing but the length of a row: neither on how many rows there are, nor on
// the number of threads. Weights that are kept in fewer bits are unpacked a few rows at a time into the cache of the
// core that multiplies them, or vector by vector where few rows of x leave the time for it.
//
// What comes next is fetched past the outer caches (the hint for data that are used once), and with few rows of x one row
// of W follows another, in long stretches for each thread: more bytes a second than with the hint for the second cache
// and four rows at once. With more rows of x, which fill the nearest cache themselves, the second cache is the place
// for what comes next where vectors are of 16 floats. benchmarks/few_rows.py measures it.

#pragma once

#include <algorithm>
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
    static constexpr int WIDE = COUNT, GROUP = 3;
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
    Number* room = nullptr;
    bool failed = false;
    FewRows(const T* x, int64_t rows, int64_t size)
        : stride(size), rows(rows), whole(size / Kind::WIDE * Kind::WIDE), rest(size % Kind::WIDE) {
        if constexpr (sizeof(T) == sizeof(Number)) {
            if (rest == 0) {
                at = reinterpret_cast<const Number*>(x);
                return;
            }
        }
        stride = up_to(size, Kind::WIDE);
        at = room = static_cast<Number*>(std::aligned_alloc(64, up_to(sizeof(Number) * rows * stride + 64, 64)));
        failed = room == nullptr;
        for (int64_t row = 0; row < rows && !failed; row++) {
            for (int64_t i = 0; i < size; i++) room[row * stride + i] = narrow<Number>(widen(x[row * size + i]));
            for (int64_t i = size; i < stride; i++) room[row * stride + i] = narrow<Number>(0.0f);
        }
    }
    ~FewRows() { std::free(room); }
    FewRows(const FewRows&) = delete;
};

constexpr int64_t OUTS = LANES == 16 ? 8 : 4;  // rows of W at once
constexpr int64_t LINE_ROWS = 4;      // rows of x, at most, for which W is read row by row
constexpr int64_t LINE_BYTES = LANES == 16 ? 8 << 10 : 1 << 30;  // and bytes of them, if they are more than one
constexpr int64_t PIECE = 1024;       // numbers of a row at once: with OUTS rows they stay in the nearest cache
constexpr int64_t LEAST = 64 << 10;   // bytes of W that a thread takes at once, and the most where there is much of it
constexpr int64_t MOST = 512 << 10;
constexpr int64_t SHARES = 6;         // parts that a weight is at least taken in, if these are not too small
constexpr int64_t ALONE = 96 << 10;   // bytes of W below which a second thread is not worth waking
constexpr int64_t AHEAD = 2048;       // bytes that are fetched before they are needed, where W is read row by row
constexpr int64_t BLOCK_AHEAD = 8192; // where a few rows are read together and are not longer: those after them

// each(0), each(1), ... with the numbers known to the compiler: only so does it keep an array in registers.
#define INLINED __attribute__((always_inline))
template <typename Do, int... I> INLINED static inline void times(const Do& each, std::integer_sequence<int, I...>) {
    (each(std::integral_constant<int, I>()), ...);
}
template <int COUNT, typename Do> INLINED static inline void times(const Do& each) {
    times(each, std::make_integer_sequence<int, COUNT>());
}
constexpr int NEARER = LANES == 16 ? 2 : 0;  // where pieces are fetched to, as a hint: the second cache, or once

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

// Totals of four sums of a row of x.
template <typename Kind>
INLINED static inline Four four_of(const typename Kind::Sum* sums, const typename Kind::Word* row) {
    return totals(Kind::floats(sums[0], row), Kind::floats(sums[1], row), Kind::floats(sums[2], row),
                  Kind::floats(sums[3], row));
}

// Numbers `from` to `until` of ROWS rows of x with those of OUTS rows of W, added to `sums` (ROWS, OUTS), or written
// there when they are the first; with the last ones the totals go to `found`. Meanwhile FETCHED rows from `next` on come
// nearer. A function of its own, so that all sums stay in registers.
template <typename Kind, int ROWS, int FETCHED>
__attribute__((noinline)) static void dots(const Piece<typename Kind::Number>& w, const typename Kind::Word* x,
                                           int64_t x_stride, int64_t from, int64_t until, const char* next,
                                           typename Kind::Sum* sums, Four* found) {
    typename Kind::Sum own[ROWS * OUTS];
    if (from == 0) times<ROWS * OUTS>([&](auto i) INLINED { own[i] = Kind::start(x + i / OUTS * x_stride); });
    else times<ROWS * OUTS>([&](auto i) INLINED { own[i] = sums[i]; });
    const typename Kind::Word* piece = Kind::piece(x, from);
    const typename Kind::Number* at = w.at;
    const int64_t stride = w.stride, next_stride = w.next_stride, next_step = w.next_step, count = until - from;
    for (int64_t k = 0; k < count; k += Kind::WIDE) {
        for (int o = 0; o < FETCHED; o++) __builtin_prefetch(next + o * next_stride, 0, NEARER);
        if (FETCHED > 0) next += next_step;
        typename Kind::Left left[ROWS];
        times<ROWS>([&](auto r) INLINED { left[r] = in_register(Kind::left(piece + r * x_stride, k)); });
        times<OUTS>([&](auto o) INLINED {
            const typename Kind::Right right = in_register(Kind::right(at + o * stride + k));
            times<ROWS>([&](auto r) INLINED { own[r * OUTS + o] = Kind::dot(own[r * OUTS + o], right, left[r]); });
        });
    }
    if (found == nullptr) times<ROWS * OUTS>([&](auto i) INLINED { sums[i] = own[i]; });
    else times<ROWS * OUTS / 4>([&](auto i) INLINED { found[i] = four_of<Kind>(own + 4 * i, x + i * 4 / OUTS * x_stride); });
}

template <typename Kind, int FETCHED>
static inline void some_dots(const Piece<typename Kind::Number>& w, const typename Kind::Word* x, int64_t x_stride,
                             int64_t rows, int64_t from, int64_t until, const char* next, typename Kind::Sum* sums,
                             Four* found) {
    static_assert(Kind::GROUP <= 3, "a case for each number of rows");
    if (rows == 1) dots<Kind, 1, FETCHED>(w, x, x_stride, from, until, next, sums, found);
    else if (rows == 2) dots<Kind, std::min(2, Kind::GROUP), FETCHED>(w, x, x_stride, from, until, next, sums, found);
    else dots<Kind, std::min(3, Kind::GROUP), FETCHED>(w, x, x_stride, from, until, next, sums, found);
}

// Numbers `from` to `until` of OUTS rows of W with those of all rows of x. What comes next is fetched evenly over the time
// that this takes.
template <typename Kind, typename T>
static inline void piece_dots(const Piece<typename Kind::Number>& w, const FewRows<Kind, T>& x, int64_t from,
                              int64_t until, typename Kind::Sum* sums, Four* found) {
    const int64_t groups = (x.rows + Kind::GROUP - 1) / Kind::GROUP;
    int64_t row = 0, left = w.next == nullptr ? 0 : OUTS;
    const char* next = w.next;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t take = x.rows * (group + 1) / groups - row, share = (left + groups - group - 1) / (groups - group);
        const typename Kind::Word* own = x.at + row * x.stride;
        typename Kind::Sum* to = sums + row * OUTS;
        Four* four = found == nullptr ? nullptr : found + row * OUTS / 4;
        if (share == 0) some_dots<Kind, 0>(w, own, x.stride, take, from, until, next, to, four);
        else if (share == 1) some_dots<Kind, 1>(w, own, x.stride, take, from, until, next, to, four);
        else if (share == 2) some_dots<Kind, 2>(w, own, x.stride, take, from, until, next, to, four);
        else if (share <= 4) some_dots<Kind, 4>(w, own, x.stride, take, from, until, next, to, four);
        else some_dots<Kind, OUTS>(w, own, x.stride, take, from, until, next, to, four);
        row += take;
        left -= share;
        next += share * w.next_stride;
    }
}

// TOGETHER rows of W with ROWS rows of x, into every OUTS-th of `sums`. `line.at(k)` is a vector of a row. Each sum waits
// for the one before it: where a vector is small, or takes long to make, other rows fill that time.
template <typename Kind, int ROWS, int TOGETHER, typename Source>
static inline void line_dots(const Source& source, int64_t first, const typename Kind::Word* x, int64_t x_stride,
                             int64_t count, typename Kind::Sum* sums) {
    typename Source::Line each[TOGETHER];
    for (int t = 0; t < TOGETHER; t++) each[t] = source.line(first + t);
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

template <typename Kind, typename T, typename Source>
static inline void lines(const Source& source, const FewRows<Kind, T>& x, int64_t first, int64_t count,
                         typename Kind::Sum* sums, Four* found) {
    if (x.rows == 1) lines_dots<Kind, 1>(source, x, first, count, sums);
    else if (x.rows == 2) lines_dots<Kind, 2>(source, x, first, count, sums);
    else if (x.rows == 3) lines_dots<Kind, 3>(source, x, first, count, sums);
    else lines_dots<Kind, 4>(source, x, first, count, sums);
    for (int64_t i = 0; i < x.rows * OUTS / 4; i++)
        found[i] = four_of<Kind>(sums + 4 * i, x.at + i * 4 / OUTS * x.stride);
}

// The totals of all rows of x with OUTS rows of W, piece by piece.
template <typename Kind, typename T, typename Source>
static inline void pieces(const Source& source, const FewRows<Kind, T>& x, int64_t first, int64_t count,
                          typename Kind::Number* room, typename Kind::Sum* sums, Four* found) {
    const int64_t padded = x.whole + (x.rest ? Kind::WIDE : 0);
    for (int64_t from = 0, until; from < padded; from = until) {
        until = std::min(from + PIECE, from < x.whole ? x.whole : padded);
        Four* const to = until == padded ? found : nullptr;
        piece_dots<Kind>(source.piece(first, count, from, until, room), x, from, until, sums, to);
    }
}

// Numbers of a row of y, rounded: all four of them at once, or some.
template <typename T> static inline void put(Four found, int64_t count, T* to) {
    for (int64_t o = 0; o < count; o++) to[o] = narrow<T>(found[o]);
}
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
template <> inline void put<bf16>(Four found, int64_t count, bf16* to) {
    if (count == 4) _mm_storel_epi64((__m128i*)to, (__m128i)_mm_cvtneps_pbh((__m128)found));
    else for (int64_t o = 0; o < count; o++) to[o] = narrow<bf16>(found[o]);
}
#endif

// Numbers of y from the totals with OUTS rows of W from `first` on, the first `count` of which are there.
template <typename T, typename Source>
static inline void finish(const Source& source, int64_t rows, int64_t first, int64_t count, const Four* found, T* y) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t o = 0; o < count; o += 4) {
            const int64_t some = std::min<int64_t>(4, count - o);
            const Four four = source.finish(first + o, some, found[(row * OUTS + o) / 4]);
            put<T>(four, some, y + row * source.outs + first + o);
        }
}

// y (rows, outs) = x W^T, rounded to T. `source.piece(first, count, from, until, room)` gives numbers `from` to `until` of
// OUTS rows of W, the first `count` of which are there, in `room` where they have to be made: PIECE apart, with zeros
// behind the end of a row. `source.line(out)` is a row that is read vector by vector, where `source.LINES`.
// `source.finish(first, count, four)` are up to four numbers of y from their sums.
template <typename T, typename Source> struct Wanted {
    Source source;
    T* y;
};

// What is wanted of the same rows, in parts that threads take one after another: the blocks of OUTS rows of each W.
template <typename T, typename Source> struct Parts {
    const Wanted<T, Source>* wanted;
    int count;
    int64_t share[3], until[3], work = 0;  // blocks of a part, where the parts of a product end, and bytes of all W
    Parts(const Wanted<T, Source>* wanted, int count, bool by_line) : wanted(wanted), count(count) {
        int64_t all = 0;
        for (int i = 0; i < count; i++) {
            const int64_t row_bytes = wanted[i].source.row_bytes(), bytes = wanted[i].source.outs * row_bytes;
            // Long stretches where memory is waited for; short ones otherwise, so that all threads end at once.
            const int64_t taken = by_line ? std::min(MOST, std::max(LEAST, bytes / SHARES)) : LEAST;
            share[i] = std::max<int64_t>(1, taken / (OUTS * row_bytes + 1));
            until[i] = all += (blocks(i) + share[i] - 1) / share[i];
            work += bytes;
        }
    }
    int64_t blocks(int i) const { return (wanted[i].source.outs + OUTS - 1) / OUTS; }
    int64_t all() const { return until[count - 1]; }
    int of(int64_t part) const { return part < until[0] ? 0 : part < until[1] ? 1 : 2; }
    int64_t first(int i, int64_t part) const { return (part - (i > 0 ? until[i - 1] : 0)) * share[i]; }
};

// Up to three products of the same rows. Returns 1 when there is no memory.
template <typename Kind, typename T, typename Source>
static int few(const FewRows<Kind, T>& x, const Wanted<T, Source>* wanted, int count) {
    typedef typename Kind::Number Number;
    typedef typename Kind::Sum Sum;
    const Rooms rooms(sizeof(Number) * OUTS * PIECE + (sizeof(Sum) + sizeof(float)) * OUTS * x.rows + 64 * 4);
    if (rooms.at == nullptr || x.failed) return 1;
    const bool small = x.rows == 1 || x.rows * x.stride * int64_t(sizeof(typename Kind::Word)) <= LINE_BYTES;
    const bool by_line = Source::LINES && x.rest == 0 && x.rows <= LINE_ROWS && small;
    const Parts<T, Source> parts(wanted, count, by_line);
    const auto work = [&](int64_t part, int member) {
        auto shelf = rooms.of(member);
        Number* room = shelf.template take<Number>(OUTS * PIECE);
        Sum* sums = shelf.template take<Sum>(OUTS * x.rows);
        Four* found = shelf.template take<Four>(OUTS * x.rows / 4);
        const int i = parts.of(part);
        const Source& source = wanted[i].source;
        const int64_t begin = parts.first(i, part), end = std::min(parts.blocks(i), begin + parts.share[i]);
        for (int64_t block = begin; block < end; block++) {
            const int64_t first = block * OUTS, held = std::min(OUTS, source.outs - first);
            if constexpr (Source::LINES) {
                if (by_line) lines<Kind, T>(source, x, first, held, sums, found);
            }
            if (!by_line) pieces<Kind, T>(source, x, first, held, room, sums, found);
            finish<T>(source, x.rows, first, held, found, wanted[i].y);
        }
    };
    Team::run(parts.all(), work, parts.work * ((x.rows + LINE_ROWS - 1) / LINE_ROWS) > ALONE);
    return 0;
}
