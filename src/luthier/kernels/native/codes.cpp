// Codes of four bits back to numbers: sixteen levels times the scale of a block, looked up.
//
// A block's sixteen products fit into one register, so a lookup is one permutation of it. Two codes share a byte, the
// first of them in its high half.

#include <cstdint>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "numbers.h"

namespace {

// `count` pairs of codes; `products` has 16 entries.
template <typename T> inline void look_up(const uint8_t* codes, const T* products, T* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        out[2 * i] = products[codes[i] >> 4];
        out[2 * i + 1] = products[codes[i] & 15];
    }
}

#ifdef __AVX512BW__
template <> inline void look_up<bf16>(const uint8_t* codes, const bf16* products, bf16* out, int64_t count) {
    __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)products));
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
        __m512i low = _mm512_slli_epi32(_mm512_and_si512(pairs, _mm512_set1_epi32(15)), 16);
        __m512i places = _mm512_or_si512(_mm512_srli_epi32(pairs, 4), low);
        _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(places, table));
    }
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
#endif

template <typename T> void unpack(const uint8_t* codes, const float* scales, const float* levels, T* out,
                                  int64_t numbers, int64_t block) {
    int64_t blocks = (numbers + block - 1) / block;
#pragma omp parallel for
    for (int64_t b = 0; b < blocks; b++) {
        T products[16];
        for (int64_t i = 0; i < 16; i++) products[i] = narrow<T>(levels[i] * scales[b]);
        int64_t first = b * block, own = first + block < numbers ? block : numbers - first;
        look_up<T>(codes + first / 2, products, out + first, own / 2);
        if (own % 2) out[first + own - 1] = products[codes[(first + own - 1) / 2] >> 4];
    }
}

}  // namespace

extern "C" void unpacked_float32(const uint8_t* codes, const float* scales, const float* levels, float* out,
                                 int64_t numbers, int64_t block) {
    unpack(codes, scales, levels, out, numbers, block);
}

extern "C" void unpacked_bfloat16(const uint8_t* codes, const float* scales, const float* levels, bf16* out,
                                  int64_t numbers, int64_t block) {
    unpack(codes, scales, levels, out, numbers, block);
}
