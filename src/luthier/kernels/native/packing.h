// Room for a call's threads, and tensors laid out as the small products of products.h take them.

#pragma once

#include <omp.h>

#include <cstdlib>

#include "products.h"

static inline int64_t up_to(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

// Memory for all threads of a call, taken before they start: a failure there can be told, and not within.
struct Rooms {
    char* at;
    int64_t each;
    explicit Rooms(int64_t bytes) : at(nullptr), each(up_to(bytes, 64)) {
        at = static_cast<char*>(std::aligned_alloc(64, each * omp_get_max_threads()));
    }
    ~Rooms() { std::free(at); }
    Rooms(const Rooms&) = delete;
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

// Rows as B of a product over their numbers: (steps, padded rows) words; rows beyond the last are zero.
template <typename Step, typename T>
static void pack_across(const T* from, int64_t stride, int64_t rows, int64_t size, int64_t padded, typename Step::Word* to) {
    const int64_t steps = size / Step::NUMBERS;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < steps; k++) to[k * padded + row] = word_of<Step, T>(from + row * stride, k);
    for (int64_t k = 0; k < steps; k++)
        for (int64_t row = rows; row < padded; row++) to[k * padded + row] = 0;
}

// Rows as B of a product over the rows: (steps of rows, padded size) words; rows beyond the last are zero.
template <typename Step, typename T>
static void pack_along(const T* from, int64_t stride, int64_t rows, int64_t size, int64_t padded, typename Step::Word* to) {
    int64_t steps = up_to(rows, Step::NUMBERS) / Step::NUMBERS;
    for (int64_t k = 0; k < steps; k++) {
        typename Step::Word* row = to + k * padded;
        const T* first = from + k * Step::NUMBERS * stride;
        if constexpr (Step::NUMBERS == 1) {
            for (int64_t i = 0; i < size; i++) row[i] = widen(first[i]);
        } else if (2 * k + 1 < rows) {
            for (int64_t i = 0; i < size; i++) row[i] = Step::word(widen(first[i]), widen(first[stride + i]));
        } else {
            for (int64_t i = 0; i < size; i++) row[i] = Step::word(widen(first[i]), 0.0f);
        }
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
