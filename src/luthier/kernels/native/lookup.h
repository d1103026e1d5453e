// Codes of four bits to what they stand for: sixteen numbers fit into one register, so a lookup is one permutation of it.
// Two codes share a byte, the first of them in its high half.

#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "numbers.h"

// `count` pairs of codes; `products` has 16 entries.
template <typename T> static inline void look_up(const uint8_t* codes, const T* products, T* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        out[2 * i] = products[codes[i] >> 4];
        out[2 * i + 1] = products[codes[i] & 15];
    }
}

#ifdef __AVX512BW__
// What sixteen pairs stand for. A table that is there twice looks at four bits of a place and at one more, which may be
// anything.
static inline __m512i looked_up(const uint8_t* codes, __m512i table) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    const __m512i places = _mm512_or_si512(_mm512_srli_epi32(pairs, 4), _mm512_slli_epi32(pairs, 16));
    return _mm512_permutexvar_epi16(places, table);
}

template <> inline void look_up<bf16>(const uint8_t* codes, const bf16* products, bf16* out, int64_t count) {
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)products));
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) _mm512_storeu_si512(out + 2 * i, looked_up(codes + i, table));
    for (; i < count; i++) {
        out[2 * i] = products[codes[i] >> 4];
        out[2 * i + 1] = products[codes[i] & 15];
    }
}

template <> inline void look_up<float>(const uint8_t* codes, const float* products, float* out, int64_t count) {
    __m512 table = _mm512_loadu_ps(products);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(codes + i)));
        __m512i low = _mm512_slli_epi64(_mm512_and_si512(pairs, _mm512_set1_epi64(15)), 32);
        __m512i places = _mm512_or_si512(_mm512_srli_epi64(pairs, 4), low);
        _mm512_storeu_ps(out + 2 * i, _mm512_permutexvar_ps(places, table));
    }
    for (; i < count; i++) {
        out[2 * i] = products[codes[i] >> 4];
        out[2 * i + 1] = products[codes[i] & 15];
    }
}
#elif defined(__AVX2__)
// A register holds half of the sixteen floats: both halves are looked up, and the highest bit of a code chooses.
template <> inline void look_up<float>(const uint8_t* codes, const float* products, float* out, int64_t count) {
    const __m256 lower = _mm256_loadu_ps(products), upper = _mm256_loadu_ps(products + 8);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        int32_t four;
        std::memcpy(&four, codes + i, sizeof(four));
        const __m256i pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        const __m256i low = _mm256_slli_epi64(_mm256_and_si256(pairs, _mm256_set1_epi64x(15)), 32);
        const __m256i places = _mm256_or_si256(_mm256_srli_epi64(pairs, 4), low);
        const __m256 first = _mm256_permutevar8x32_ps(lower, places), second = _mm256_permutevar8x32_ps(upper, places);
        const __m256 chosen = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28));
        _mm256_storeu_ps(out + 2 * i, _mm256_blendv_ps(first, second, chosen));
    }
    for (; i < count; i++) {
        out[2 * i] = products[codes[i] >> 4];
        out[2 * i + 1] = products[codes[i] & 15];
    }
}

// Sixteen bytes fit into a register: the lower bytes of the numbers are looked up, the upper ones, and put together.
template <> inline void look_up<bf16>(const uint8_t* codes, const bf16* products, bf16* out, int64_t count) {
    const __m128i one = _mm_loadu_si128((const __m128i*)products), two = _mm_loadu_si128((const __m128i*)(products + 8));
    const __m128i bytes = _mm_set1_epi16(255), nibble = _mm_set1_epi8(15);
    const __m128i lower = _mm_packus_epi16(_mm_and_si128(one, bytes), _mm_and_si128(two, bytes));
    const __m128i upper = _mm_packus_epi16(_mm_srli_epi16(one, 8), _mm_srli_epi16(two, 8));
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i pairs = _mm_loadl_epi64((const __m128i*)(codes + i));
        const __m128i places = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(pairs, 4), nibble), _mm_and_si128(pairs, nibble));
        const __m128i low = _mm_shuffle_epi8(lower, places), high = _mm_shuffle_epi8(upper, places);
        _mm_storeu_si128((__m128i*)(out + 2 * i), _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128((__m128i*)(out + 2 * i + 8), _mm_unpackhi_epi8(low, high));
    }
    for (; i < count; i++) {
        out[2 * i] = products[codes[i] >> 4];
        out[2 * i + 1] = products[codes[i] & 15];
    }
}
#endif

// The same for sixteen levels that are multiplied with a scale first.
template <typename T>
static inline void look_up_scaled(const uint8_t* codes, const float* levels, float scale, T* out, int64_t count) {
    T products[16];
    for (int i = 0; i < 16; i++) products[i] = narrow<T>(levels[i] * scale);
    look_up<T>(codes, products, out, count);
}

#ifdef __AVX512BF16__
// In registers: sixteen numbers that were just written one by one could not be read together for a while.
static inline __m512i scaled_table(const float* levels, float scale) {
    const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(products));
}

template <>
inline void look_up_scaled<bf16>(const uint8_t* codes, const float* levels, float scale, bf16* out, int64_t count) {
    const __m512i table = scaled_table(levels, scale);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) _mm512_storeu_si512(out + 2 * i, looked_up(codes + i, table));
    uint16_t last[16];
    if (i < count) _mm256_storeu_si256((__m256i*)last, _mm512_castsi512_si256(table));
    for (; i < count; i++) {
        out[2 * i] = bf16{last[codes[i] >> 4]};
        out[2 * i + 1] = bf16{last[codes[i] & 15]};
    }
}
#endif
