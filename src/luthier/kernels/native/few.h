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
// and four rows at once. benchmarks/few_rows.py measures it.

#pragma once

#include <algorithm>
#include <new>

#include "packing.h"
#include "team.h"

// What a vector holds and how two of them are multiplied: floats, or bfloat16 numbers in pairs where the processor
// has them.
struct Floats {
    typedef float Number;
    static constexpr int WIDE = LANES;
    static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
    static inline Vector dot(Vector sum, Vector a, Vector b) { return fused(sum, a, b); }
};

#if defined(__AVX512BF16__)
struct Halves {
    typedef bf16 Number;
    static constexpr int WIDE = 2 * LANES;
    static inline Vector load(const bf16* from) { return (Vector)_mm512_loadu_ps(from); }
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
struct Four { float at[4]; };
#if defined(__AVX512F__)
static inline Four totals(Vector a, Vector b, Vector c, Vector d) {
    const __m512 ab = (__m512)_mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 cd = (__m512)_mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 parts = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(parts), 1));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(parts), upper);
    Four found;
    _mm_storeu_ps(found.at, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    return found;
}
#elif defined(__AVX2__)
static inline Four totals(Vector a, Vector b, Vector c, Vector d) {
    const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    const __m256 halves = _mm256_hadd_ps(ab, cd);
    Four found;
    _mm_storeu_ps(found.at, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    return found;
}
#else
static inline float total(Vector sums) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}
static inline Four totals(Vector a, Vector b, Vector c, Vector d) { return {{total(a), total(b), total(c), total(d)}}; }
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

constexpr int64_t OUTS = 4;           // rows of W at once
constexpr int64_t LINE_ROWS = 4;      // rows of x, at most, for which W is read row by row
constexpr int64_t GROUP = LANES == 16 ? 4 : 3;  // rows of x at once otherwise: with OUTS rows of W their sums fill the registers
constexpr int64_t PIECE = 1024;       // numbers of a row at once: with OUTS rows they stay in the nearest cache
constexpr int64_t LEAST = 64 << 10;   // bytes of W that a thread takes at once, and the most where there is much of it
constexpr int64_t MOST = 512 << 10;
constexpr int64_t SHARES = 6;         // parts that a weight is at least taken in, if these are not too small
constexpr int64_t ALONE = 96 << 10;   // bytes of W below which a second thread is not worth waking
constexpr int64_t AHEAD = 2048;       // bytes that are fetched before they are needed, where W is read row by row
constexpr int64_t BLOCK_AHEAD = 8192; // where a few rows are read together and are not longer: those after them

static inline void fetch_once(const void* from) { __builtin_prefetch(from, 0, 0); }

// A vector that stays in its register: GCC would read x from memory once for each row of W, and there are two loads a
// cycle. The registers are enough for OUTS by GROUP sums, GROUP vectors of x and one of W.
static inline Vector in_register(Vector vector) {
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

// Pieces of `count` numbers of ROWS rows of x with those of OUTS rows of W, added to `sums` (ROWS, OUTS), or written
// there when they are the FIRST. Meanwhile FETCHED rows from `next` on come nearer. A function of its own, so that all
// sums stay in registers.
template <typename Kind, int ROWS, int FETCHED, bool FIRST>
__attribute__((noinline)) static void dots(const Piece<typename Kind::Number> w, const typename Kind::Number* x,
                                           int64_t x_stride, int64_t count, const char* next, Vector* sums) {
    Vector own[OUTS][ROWS];
    for (int o = 0; o < OUTS; o++)
        for (int r = 0; r < ROWS; r++) own[o][r] = FIRST ? Vector{} : sums[r * OUTS + o];
    for (int64_t k = 0; k < count; k += Kind::WIDE) {
        for (int o = 0; o < FETCHED; o++) fetch_once(next + o * w.next_stride);
        if (FETCHED > 0) next += w.next_step;
        Vector left[ROWS];
        for (int r = 0; r < ROWS; r++) left[r] = in_register(Kind::load(x + r * x_stride + k));
        for (int o = 0; o < OUTS; o++) {
            const Vector right = in_register(Kind::load(w.at + o * w.stride + k));
            for (int r = 0; r < ROWS; r++) own[o][r] = Kind::dot(own[o][r], right, left[r]);
        }
    }
    for (int o = 0; o < OUTS; o++)
        for (int r = 0; r < ROWS; r++) sums[r * OUTS + o] = own[o][r];
}

template <typename Kind, int FETCHED, bool FIRST>
static inline void some_dots(const Piece<typename Kind::Number>& w, const typename Kind::Number* x, int64_t x_stride,
                             int64_t rows, int64_t count, const char* next, Vector* sums) {
    if (rows == 1) dots<Kind, 1, FETCHED, FIRST>(w, x, x_stride, count, next, sums);
    else if (rows == 2) dots<Kind, 2, FETCHED, FIRST>(w, x, x_stride, count, next, sums);
    else if (rows == 3) dots<Kind, 3, FETCHED, FIRST>(w, x, x_stride, count, next, sums);
    else dots<Kind, 4, FETCHED, FIRST>(w, x, x_stride, count, next, sums);
}

// A piece of OUTS rows of W with that of all rows of x, which begins at `x`. What comes next is fetched evenly over the
// time that this takes.
template <typename Kind, bool FIRST>
static inline void piece_dots(const Piece<typename Kind::Number>& w, const typename Kind::Number* x, int64_t x_stride,
                              int64_t rows, int64_t count, Vector* sums) {
    const int64_t groups = (rows + GROUP - 1) / GROUP;
    int64_t row = 0, left = w.next == nullptr ? 0 : OUTS;
    const char* next = w.next;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t take = rows * (group + 1) / groups - row;
        const int64_t share = groups == 1 ? left : groups - group < left ? 2 : left > 0 ? 1 : 0;
        const typename Kind::Number* from = x + row * x_stride;
        Vector* own = sums + row * OUTS;
        if (share == 0) some_dots<Kind, 0, FIRST>(w, from, x_stride, take, count, next, own);
        else if (share == 1) some_dots<Kind, 1, FIRST>(w, from, x_stride, take, count, next, own);
        else if (share == 2) some_dots<Kind, 2, FIRST>(w, from, x_stride, take, count, next, own);
        else some_dots<Kind, OUTS, FIRST>(w, from, x_stride, take, count, next, own);
        row += take;
        left -= share;
        next += share * w.next_stride;
    }
}

// TOGETHER rows of W with ROWS rows of x, into every OUTS-th of `sums`. `line.at(k)` is a vector of a row. Each sum waits
// for the one before it: where a vector is small, or takes long to make, other rows fill that time.
template <typename Kind, int ROWS, int TOGETHER, typename Source>
static inline void line_dots(const Source& source, int64_t first, const typename Kind::Number* x, int64_t x_stride,
                             int64_t count, Vector* sums) {
    typename Source::Line each[TOGETHER];
    for (int t = 0; t < TOGETHER; t++) each[t] = source.line(first + t);
    const int64_t block = TOGETHER * source.row_bytes();
    const int64_t ahead = TOGETHER > 1 && block <= BLOCK_AHEAD ? block : AHEAD;
    Vector own[TOGETHER][ROWS];
    for (int t = 0; t < TOGETHER; t++)
        for (int r = 0; r < ROWS; r++) own[t][r] = Vector{};
    for (int64_t k = 0; k < count; k += Kind::WIDE) {
        Vector right[TOGETHER];
        for (int t = 0; t < TOGETHER; t++) {
            each[t].fetch(k, ahead);
            right[t] = each[t].at(k);
        }
        for (int r = 0; r < ROWS; r++) {
            const Vector left = Kind::load(x + r * x_stride + k);
            for (int t = 0; t < TOGETHER; t++) own[t][r] = Kind::dot(own[t][r], right[t], left);
        }
    }
    for (int t = 0; t < TOGETHER; t++)
        for (int r = 0; r < ROWS; r++) sums[r * OUTS + t] = own[t][r];
}

// OUTS rows of W from `first` on, the first `count` of which are there, a few after another with a group of rows of x.
template <typename Kind, int ROWS, typename T, typename Source>
__attribute__((noinline)) static void lines_dots(const Source& source, const FewRows<Kind, T>& x, int64_t first,
                                                 int64_t count, Vector* sums) {
    constexpr int TOGETHER = Source::together(ROWS);
    int64_t o = 0;
    for (; o + TOGETHER <= count; o += TOGETHER)
        line_dots<Kind, ROWS, TOGETHER>(source, first + o, x.at, x.stride, x.whole, sums + o);
    for (; o < count; o++) line_dots<Kind, ROWS, 1>(source, first + o, x.at, x.stride, x.whole, sums + o);
    for (; o < OUTS; o++)
        for (int r = 0; r < ROWS; r++) sums[r * OUTS + o] = Vector{};
}

template <typename Kind, typename T, typename Source>
static inline void lines(const Source& source, const FewRows<Kind, T>& x, int64_t first, int64_t count, Vector* sums) {
    if (x.rows == 1) lines_dots<Kind, 1>(source, x, first, count, sums);
    else if (x.rows == 2) lines_dots<Kind, 2>(source, x, first, count, sums);
    else if (x.rows == 3) lines_dots<Kind, 3>(source, x, first, count, sums);
    else lines_dots<Kind, 4>(source, x, first, count, sums);
}

// The sums of all rows of x with OUTS rows of W, piece by piece.
template <typename Kind, typename T, typename Source>
static inline void pieces(const Source& source, const FewRows<Kind, T>& x, int64_t first, int64_t count,
                          typename Kind::Number* room, Vector* sums) {
    const int64_t padded = x.whole + (x.rest ? Kind::WIDE : 0);
    for (int64_t from = 0, until; from < padded; from = until) {
        until = std::min(from + PIECE, from < x.whole ? x.whole : padded);
        const auto piece = source.piece(first, count, from, until, room);
        if (from == 0) piece_dots<Kind, true>(piece, x.at, x.stride, x.rows, until, sums);
        else piece_dots<Kind, false>(piece, x.at + from, x.stride, x.rows, until - from, sums);
    }
}

// Numbers of a row of y, rounded: all OUTS of them at once, or some.
template <typename T> static inline void put(Four found, int64_t count, T* to) {
    for (int64_t o = 0; o < count; o++) to[o] = narrow<T>(found.at[o]);
}
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
template <> inline void put<bf16>(Four found, int64_t count, bf16* to) {
    if (count == OUTS) _mm_storel_epi64((__m128i*)to, (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(found.at)));
    else for (int64_t o = 0; o < count; o++) to[o] = narrow<bf16>(found.at[o]);
}
#endif

// y (rows, outs) = x W^T, rounded to T. `source.piece(first, count, from, until, room)` gives numbers `from` to `until` of
// OUTS rows of W, the first `count` of which are there, in `room` where they have to be made: PIECE apart, with zeros
// behind the end of a row. `source.line(out)` is a row that is read vector by vector, where `source.LINES`.
// `source.finish(first, sums)` are numbers of y from their sums. Returns 1 when there is no memory.
template <typename Kind, typename T, typename Source>
static int few(const Source& source, const FewRows<Kind, T>& x, T* y, int64_t outs) {
    typedef typename Kind::Number Number;
    const Rooms rooms(sizeof(Number) * OUTS * PIECE + sizeof(Vector) * OUTS * x.rows + 64 * 3);
    if (rooms.at == nullptr || x.failed) return 1;
    const int64_t blocks = (outs + OUTS - 1) / OUTS, row_bytes = source.row_bytes();
    const int64_t taken = std::min(MOST, std::max(LEAST, outs * row_bytes / SHARES));
    const int64_t share = std::max<int64_t>(1, taken / (OUTS * row_bytes + 1)), parts = (blocks + share - 1) / share;
    const bool by_line = Source::LINES && x.rest == 0 && x.rows <= LINE_ROWS;
    const auto work = [&](int64_t part, int member) {
        auto shelf = rooms.of(member);
        Number* room = shelf.template take<Number>(OUTS * PIECE);
        Vector* sums = shelf.template take<Vector>(OUTS * x.rows);
        for (int64_t block = part * share; block < std::min(blocks, (part + 1) * share); block++) {
            const int64_t first = block * OUTS, count = std::min(OUTS, outs - first);
            if constexpr (Source::LINES) {
                if (by_line) lines<Kind, T>(source, x, first, count, sums);
            }
            if (!by_line) pieces<Kind, T>(source, x, first, count, room, sums);
            for (int64_t row = 0; row < x.rows; row++) {
                const Vector* own = sums + row * OUTS;
                const Four found = source.finish(first, count, totals(own[0], own[1], own[2], own[3]));
                put<T>(found, count, y + row * outs + first);
            }
        }
    };
    Team::run(parts, work, outs * row_bytes * ((x.rows + GROUP - 1) / GROUP) > ALONE);
    return 0;
}
