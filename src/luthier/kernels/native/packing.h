// Room for a call's threads, and tensors laid out as the small products of products.h take them.

#pragma once

#include <omp.h>

#include "products.h"
#include "scratch.h"

static inline int64_t up_to(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

// Memory for all threads of a call, taken before they start: a failure there can be told, and not within.
struct Rooms {
    int64_t each;
    Scratch scratch;
    char* at;
    explicit Rooms(int64_t bytes)
        : each(up_to(bytes, 64)), scratch(each * omp_get_max_threads()), at(scratch.at()) {}
    // The parts of this thread's room, one after the other.
    struct Shelf {
        char* at;
        template <typename Word> Word* take(int64_t count) {
            char* own = at;
            at += up_to(count * int64_t(sizeof(Word)), 64);
            return reinterpret_cast<Word*>(own);
        }
    };
    Shelf own() const { return of(omp_get_thread_num()); }
    Shelf of(int member) const { return Shelf{at + each * member}; }
};

// Word number `step` of a row.
template <typename Step, typename T> static inline typename Step::Word word_of(const T* row, int64_t step) {
    if constexpr (Step::NUMBERS == 1) return Step::word(widen(row[step]));
    else return Step::word(widen(row[2 * step]), widen(row[2 * step + 1]));
}

// Rows as A: where they lie if their numbers are words already, else in `room`; and how far apart they are then.
template <typename Step, typename T> struct Left {
    typedef typename Step::Word Word;
    static constexpr bool LIES_THERE = sizeof(T) * Step::NUMBERS == sizeof(Word);
    const Word* at;
    int64_t row;
    Left(const T* from, int64_t stride, int64_t rows, int64_t size, Word* room) {
        if constexpr (LIES_THERE) {
            at = reinterpret_cast<const Word*>(from);
            row = stride / Step::NUMBERS;
        } else {
            at = room;
            row = size;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t k = 0; k < size; k++) room[i * size + k] = widen(from[i * stride + k]);
        }
    }
};

#if defined(__AVX512BF16__)
// The words of 16 rows that lie at `at` and behind, turned: word k of all rows at to[k * padded].
static inline void turn_words(const char* at, int64_t stride, uint32_t* to, int64_t padded) {
    __m512i rows[16], next[16];
    for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(at + i * stride);
    for (int i = 0; i < 8; i++) {
        next[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        next[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        rows[4 * i] = _mm512_unpacklo_epi64(next[4 * i], next[4 * i + 2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(next[4 * i], next[4 * i + 2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(next[4 * i + 1], next[4 * i + 3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(next[4 * i + 1], next[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i low = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
        const __m512i high_odd = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
        _mm512_storeu_si512(to + i * padded, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(to + (4 + i) * padded, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
        _mm512_storeu_si512(to + (8 + i) * padded, _mm512_shuffle_i32x4(low, high, 0xdd));
        _mm512_storeu_si512(to + (12 + i) * padded, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
    }
}
#endif

// Rows as B of a product over their numbers: (steps, padded rows) words; rows beyond the last are zero.
template <typename Step, typename T>
static void pack_across(const T* from, int64_t stride, int64_t rows, int64_t size, int64_t padded, typename Step::Word* to) {
    const int64_t steps = size / Step::NUMBERS;
    int64_t row = 0;
#if defined(__AVX512BF16__)
    if constexpr (Step::NUMBERS * sizeof(T) == sizeof(uint32_t))
        for (; row + 16 <= rows; row += 16) {
            int64_t k = 0;
            const char* own = reinterpret_cast<const char*>(from + row * stride);
            const int64_t bytes = stride * int64_t(sizeof(T));
            for (; k + 16 <= steps; k += 16)
                turn_words(own + 4 * k, bytes, reinterpret_cast<uint32_t*>(to) + k * padded + row, padded);
            for (; k < steps; k++)
                for (int64_t i = row; i < row + 16; i++) to[k * padded + i] = word_of<Step, T>(from + i * stride, k);
        }
#endif
    for (; row < rows; row++)
        for (int64_t k = 0; k < steps; k++) to[k * padded + row] = word_of<Step, T>(from + row * stride, k);
    // Compilers make a call of each of these loops, whole or empty.
    for (int64_t k = 0; rows < padded && k < steps; k++)
        for (int64_t row = rows; row < padded; row++) to[k * padded + row] = 0;
}

constexpr int64_t ROWS_AHEAD = 8;  // how many rows before they are packed they are fetched

// Numbers of two rows as pairs.
template <typename Step, typename T>
static inline void pair_up(const T* first, const T* second, int64_t size, typename Step::Word* to) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2)
        for (; i + 16 <= size; i += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + i)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + i)));
            _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
#endif
    for (; i < size; i++) to[i] = Step::word(widen(first[i]), widen(second[i]));
}

// Rows as B of a product over the rows: (steps of rows, padded size) words; rows beyond the last are zero.
template <typename Step, typename T>
static void pack_along(const T* from, int64_t stride, int64_t rows, int64_t size, int64_t padded, typename Step::Word* to) {
    int64_t steps = up_to(rows, Step::NUMBERS) / Step::NUMBERS;
    for (int64_t k = 0; k < steps; k++) {
        typename Step::Word* row = to + k * padded;
        const T* first = from + k * Step::NUMBERS * stride;
        // Steps of more than a page are not seen coming by the processor.
        for (int64_t ahead = ROWS_AHEAD; ahead < ROWS_AHEAD + Step::NUMBERS; ahead++)
            for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(first + ahead * stride + i);
        if constexpr (Step::NUMBERS == 1) {
            for (int64_t i = 0; i < size; i++) row[i] = widen(first[i]);
        } else if (2 * k + 1 < rows) {
            pair_up<Step, T>(first, first + stride, size, row);
        } else {
            for (int64_t i = 0; i < size; i++) row[i] = Step::word(widen(first[i]), 0.0f);
        }
        if (size < padded)
            for (int64_t i = size; i < padded; i++) row[i] = 0;
    }
}

// Floats (rows, columns) as A over the columns, row by row.
template <typename Step>
static void words_of_rows(const float* from, int64_t rows, int64_t columns, typename Step::Word* to) {
    if constexpr (Step::NUMBERS == 1) {
        std::memcpy(to, from, sizeof(float) * rows * columns);
    } else {
        // Two numbers are one word, so the rounded numbers in their order are the words.
        uint16_t* halves = reinterpret_cast<uint16_t*>(to);
#pragma omp simd
        for (int64_t i = 0; i < rows * columns; i++) halves[i] = rounded_bits(from[i]);
    }
}

// Floats (rows, columns) as A over the rows: word (k, column) holds the rows of step k. `rows` is a multiple of NUMBERS.
template <typename Step>
static void words_of_columns(const float* from, int64_t rows, int64_t columns, typename Step::Word* to) {
    if constexpr (Step::NUMBERS == 1) {
        std::memcpy(to, from, sizeof(float) * rows * columns);
    } else {
        for (int64_t k = 0; k < rows / 2; k++) {
            const float* first = from + 2 * k * columns;
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) to[k * columns + i] = Step::word(first[i], first[columns + i]);
        }
    }
}
