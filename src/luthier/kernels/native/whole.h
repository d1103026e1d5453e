// Rows of x as whole numbers of two bytes, to be multiplied with whole numbers of one byte as they lie.
//
// The processor multiplies 64 bytes without a sign by 64 with one and adds four products each to a sum of 32 bits. So a
// number of x is made of two bytes with a sign, x = step (256 high + low), and a byte of W gets 128 added, which is one
// bit turned; what that adds to a sum is known beforehand, and is what the sum begins with, with the other sign. Sums
// are exact, so their order is of no matter; they would be too large from two million numbers a row on.
// Each of the 16 sums of a vector has a step of its own: 2^(e - 14) where the largest of its numbers (four of each 64)
// lies from 2^e to 2^(e + 1). A bfloat16 number has eight bits: what is at least 2^(e - 7) is kept exactly, what is smaller
// to half a step, so an outlier takes bits of a sixteenth of its row alone. One number, the largest there can be, is
// kept to one step: it would need another bit. With infinity or not-a-number among them the step is not-a-number.

#pragma once

#include "few.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MULTIPLIES_WHOLE

struct Wholes {
    typedef int8_t Number;
    typedef int8_t Word;
    typedef __m512i Right;
    struct Left { __m512i high, low; };
    struct Sum { __m512i high, low; };
    static constexpr int WIDE = 64, GROUP = 2;
    static constexpr bool HALVES = false;
    // What lies before the bytes of a row of x: what its sums begin with, and steps.
    static constexpr int64_t LOW = 64, STEPS = 128, BYTES = 192;

    static inline __m512i load(const int8_t* from) { return _mm512_loadu_si512(from); }
    static inline Right right(const int8_t* from) { return _mm512_xor_si512(load(from), _mm512_set1_epi8(-128)); }
    static inline const Word* piece(const Word* row, int64_t from) { return row + BYTES + 2 * from; }
    static inline Left left(const Word* piece, int64_t at) { return {load(piece + 2 * at), load(piece + 2 * at + 64)}; }
    static inline Sum start(const Word* row) { return {load(row), load(row + LOW)}; }
    static inline Sum dot(Sum sum, Right w, Left x) {
        return {_mm512_dpbusd_epi32(sum.high, w, x.high), _mm512_dpbusd_epi32(sum.low, w, x.low)};
    }
    static inline Vector floats(Sum sum, const Word* row) {
        const __m512 high = _mm512_cvtepi32_ps(sum.high), low = _mm512_cvtepi32_ps(sum.low);
        const __m512 both = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), low);
        return (Vector)_mm512_mul_ps(both, _mm512_loadu_ps(reinterpret_cast<const float*>(row + STEPS)));
    }
};

// 32 numbers of a row from `at` on, with zeros behind its end.
static inline __m512i halves_of(const bf16* row, int64_t at, int64_t size) {
    const int64_t there = std::min<int64_t>(32, std::max<int64_t>(0, size - at));
    return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << there) - 1), row + at);
}

// The largest of each four, at all of their places.
static inline __m512i most_of_four(__m512i each) {
    const __m512i pairs = _mm512_max_epu16(each, _mm512_rol_epi64(each, 16));
    return _mm512_max_epu16(pairs, _mm512_rol_epi64(pairs, 32));
}

// Whole numbers of 16 bits: those of eight bits that 32 numbers have, moved by the difference of exponents.
static inline __m512i wholes_of(__m512i halves, __m512i exponents) {
    const __m512i own = _mm512_srli_epi16(_mm512_slli_epi16(halves, 1), 8);
    const __m512i bits = _mm512_or_si512(_mm512_slli_epi16(halves, 8), _mm512_set1_epi16(-32768));
    const __m512i moved = _mm512_srlv_epi16(bits, _mm512_sub_epi16(exponents, own));
    const __m512i rounded = _mm512_avg_epu16(moved, _mm512_setzero_si512());
    const __m512i sizes = _mm512_min_epu16(rounded, _mm512_set1_epi16(32639));
    return _mm512_mask_sub_epi16(sizes, _mm512_movepi16_mask(halves), _mm512_setzero_si512(), sizes);
}

static inline __m512i joined(__m256i first, __m256i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// The step of each sum from the exponents of its four places: 2^(e - 14), and for numbers that are not finite none.
static inline __m512 steps_of(__m512i first, __m512i second) {
    const __m512i both = joined(_mm512_cvtepi64_epi32(first), _mm512_cvtepi64_epi32(second));
    const __m512i exponents = _mm512_and_si512(both, _mm512_set1_epi32(0xffff));
    const __m512i bits = _mm512_slli_epi32(_mm512_sub_epi32(exponents, _mm512_set1_epi32(14)), 23);
    const __mmask16 bad = _mm512_cmpeq_epi32_mask(exponents, _mm512_set1_epi32(255));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, bad, _mm512_set1_epi32(0x7fc00000)));
}

static inline void as_wholes(const bf16* row, int64_t size, int8_t* to) {
    __m512i first = _mm512_setzero_si512(), second = first;
    const __m512i unsigned_bits = _mm512_set1_epi16(0x7fff);
    for (int64_t at = 0; at < size; at += 64) {
        first = _mm512_max_epu16(first, _mm512_and_si512(halves_of(row, at, size), unsigned_bits));
        second = _mm512_max_epu16(second, _mm512_and_si512(halves_of(row, at + 32, size), unsigned_bits));
    }
    // From 2^-95 on: below, numbers have fewer than eight bits, and all of a row's would have to be as small.
    const __m512i least = _mm512_set1_epi16(32);
    first = _mm512_max_epu16(_mm512_srli_epi16(most_of_four(first), 7), least);
    second = _mm512_max_epu16(_mm512_srli_epi16(most_of_four(second), 7), least);
    _mm512_storeu_ps(to + Wholes::STEPS, steps_of(first, second));
    const __m512i half = _mm512_set1_epi16(128), offset = _mm512_set1_epi8(-128);
    __m512i highs = _mm512_setzero_si512(), lows = highs;
    int8_t* bytes = to + Wholes::BYTES;
    for (int64_t at = 0; at < size; at += 64, bytes += 128) {
        const __m512i one = wholes_of(halves_of(row, at, size), first);
        const __m512i other = wholes_of(halves_of(row, at + 32, size), second);
        const __m512i low = joined(_mm512_cvtepi16_epi8(one), _mm512_cvtepi16_epi8(other));
        const __m512i high = joined(_mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(one, half), 8)),
                                    _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(other, half), 8)));
        _mm512_storeu_si512(bytes, high);
        _mm512_storeu_si512(bytes + 64, low);
        highs = _mm512_dpbusd_epi32(highs, offset, high);
        lows = _mm512_dpbusd_epi32(lows, offset, low);
    }
    _mm512_storeu_si512(to, _mm512_sub_epi32(_mm512_setzero_si512(), highs));
    _mm512_storeu_si512(to + Wholes::LOW, _mm512_sub_epi32(_mm512_setzero_si512(), lows));
}

template <> struct FewRows<Wholes, bf16> {
    int64_t stride, rows, whole, rest;
    Scratch scratch;
    int8_t* at;
    bool failed;
    FewRows(const bf16* x, int64_t rows, int64_t size)
        : stride(Wholes::BYTES + 2 * up_to(size, Wholes::WIDE)), rows(rows), whole(size / Wholes::WIDE * Wholes::WIDE),
          rest(size % Wholes::WIDE), scratch(rows * stride), at(reinterpret_cast<int8_t*>(scratch.at())),
          failed(at == nullptr) {
        for (int64_t row = 0; row < rows && !failed; row++) as_wholes(x + row * size, size, at + row * stride);
    }
};
#endif
