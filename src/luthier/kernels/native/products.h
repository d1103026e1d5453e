// Small products that stay in the caches: C (+)= A B with a tile of C in registers.
//
// A is read one step of k at a time (a number, or a pair of bfloat16 numbers as one word) and spread over a vector; B is
// packed so that a step of k is a row of vectors. With AVX512-BF16 a step is two bfloat16 numbers, and the products are
// summed in float32; without it bfloat16 is widened when it is packed, and a step is one float.

#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "numbers.h"

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 6, TILE_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2;
#else
constexpr int LANES = 4, TILE_ROWS = 6, TILE_VECTORS = 3;
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// sum + a b, rounded once where the processor can: a compiler that is left to choose takes two roundings in one loop and
// one in another, and then a row's sums would depend on how many rows are beside it.
#if defined(__AVX512F__)
static inline Vector fused(Vector sum, Vector a, Vector b) {
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}
#elif defined(__AVX2__) && defined(__FMA__)
static inline Vector fused(Vector sum, Vector a, Vector b) {
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}
#else
static inline Vector fused(Vector sum, Vector a, Vector b) { return sum + a * b; }
#endif

// Numbers of a row of y, rounded.
template <typename T> static inline void put(Vector found, int64_t count, T* to) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 there = __mmask16((1u << count) - 1);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, there, (__m512)found);
    else _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh((__m512)found));
#else
    for (int64_t o = 0; o < count; o++) to[o] = narrow<T>(found[o]);
#endif
}

// The first numbers of a vector from where they lie, and zeros behind them; zeros where they lie nowhere.
template <typename T> static inline Vector beginning(const T* from, int64_t count) {
    Vector found = {};
    if (from == nullptr) return found;
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 there = __mmask16((1u << count) - 1);
    if constexpr (sizeof(T) == 4) return (Vector)_mm512_maskz_loadu_ps(there, from);
    else return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16);
#else
    for (int64_t i = 0; i < count; i++) found[i] = widen(from[i]);
    return found;
#endif
}

// each(0), each(1), ... with the numbers known to the compiler: only so does it keep an array in registers.
#define INLINED __attribute__((always_inline))
template <typename Do, int... I> INLINED static inline void times(const Do& each, std::integer_sequence<int, I...>) {
    (each(std::integral_constant<int, I>()), ...);
}
template <int COUNT, typename Do> INLINED static inline void times(const Do& each) {
    times(each, std::make_integer_sequence<int, COUNT>());
}

// A step of k as it is packed: one float, or two bfloat16 numbers, the lower one first.
struct Single {
    typedef float Word;
    static constexpr int NUMBERS = 1;
    typedef Vector Row;
    static inline Row row(const Word* at) { return *reinterpret_cast<const Vector*>(at); }
    static inline Row spread(Word factor) { return Vector{} + factor; }
    static inline Vector add(Vector sum, Row row, Row factor) { return fused(sum, row, factor); }
    static inline Word word(float number) { return number; }
};

#if defined(__AVX512BF16__)
struct Pair {
    typedef uint32_t Word __attribute__((may_alias));
    static constexpr int NUMBERS = 2;
    typedef __m512i Row;
    static inline Row row(const Word* at) { return _mm512_loadu_si512(at); }
    static inline Row spread(Word factor) { return _mm512_set1_epi32(int(factor)); }
    static inline Vector add(Vector sum, Row row, Row factor) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)factor);
    }
    static inline Word word(float first, float second) {
        return uint32_t(rounded_bits(first)) | uint32_t(rounded_bits(second)) << 16;
    }
};
#endif

#if defined(__AVX512BF16__)
typedef Pair StepOfHalves;
#else
typedef Single StepOfHalves;
#endif

// All steps of a tile. Each vector of B is loaded once, not for each row of A: loads would be what there is not enough of.
template <typename Step, int ROWS, int VECTORS>
INLINED static inline void add_steps(Vector (&sums)[ROWS * VECTORS], const typename Step::Word* a, int64_t a_row,
                                     int64_t a_step, const typename Step::Word* b, int64_t b_step, int64_t steps) {
    for (int64_t k = 0; k < steps; k++, a += a_step, b += b_step) {
        typename Step::Row own[VECTORS];
        times<VECTORS>([&](auto j) INLINED { own[j] = Step::row(b + j * LANES); });
        times<ROWS>([&](auto i) INLINED {
            const typename Step::Row factor = Step::spread(a[i * a_row]);
            times<VECTORS>([&](auto j) INLINED { sums[i * VECTORS + j] = Step::add(sums[i * VECTORS + j], own[j], factor); });
        });
    }
}

// One tile: ROWS rows of A, VECTORS vectors of B.
template <typename Step, int ROWS, int VECTORS, bool ADDS>
static inline void tile(const typename Step::Word* a, int64_t a_row, int64_t a_step, const typename Step::Word* b,
                        int64_t b_step, int64_t steps, float* c, int64_t c_row) {
    Vector sums[ROWS * VECTORS];
    const auto place = [&](int i) INLINED { return reinterpret_cast<Vector*>(c + i / VECTORS * c_row + i % VECTORS * LANES); };
    times<ROWS * VECTORS>([&](auto i) INLINED { sums[i] = ADDS ? *place(i) : Vector{}; });
    add_steps<Step, ROWS, VECTORS>(sums, a, a_row, a_step, b, b_step, steps);
    times<ROWS * VECTORS>([&](auto i) INLINED { *place(i) = sums[i]; });
}

template <typename Step, int ROWS, bool ADDS>
static inline void strip(const typename Step::Word* a, int64_t a_row, int64_t a_step, const typename Step::Word* b,
                         int64_t b_step, int64_t steps, float* c, int64_t c_row, int64_t columns) {
    int64_t at = 0;
    for (; at + TILE_VECTORS * LANES <= columns; at += TILE_VECTORS * LANES)
        tile<Step, ROWS, TILE_VECTORS, ADDS>(a, a_row, a_step, b + at, b_step, steps, c + at, c_row);
    for (; at < columns; at += LANES)
        tile<Step, ROWS, 1, ADDS>(a, a_row, a_step, b + at, b_step, steps, c + at, c_row);
}

// C (rows x columns, c_row apart) = A B, or += with ADDS. Word (i, k) of A lies at a[i a_row + k a_step], row k of B at
// b[k b_step]; `columns` is a multiple of LANES.
template <typename Step, bool ADDS>
static void product(const typename Step::Word* a, int64_t a_row, int64_t a_step, const typename Step::Word* b,
                    int64_t b_step, int64_t steps, float* c, int64_t c_row, int64_t rows, int64_t columns) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
        strip<Step, TILE_ROWS, ADDS>(a + i * a_row, a_row, a_step, b, b_step, steps, c + i * c_row, c_row, columns);
    for (; i + 4 <= rows; i += 4)
        strip<Step, 4, ADDS>(a + i * a_row, a_row, a_step, b, b_step, steps, c + i * c_row, c_row, columns);
    for (; i + 2 <= rows; i += 2)
        strip<Step, 2, ADDS>(a + i * a_row, a_row, a_step, b, b_step, steps, c + i * c_row, c_row, columns);
    if (i < rows) strip<Step, 1, ADDS>(a + i * a_row, a_row, a_step, b, b_step, steps, c + i * c_row, c_row, columns);
}
