// Numbers as they lie in memory (float, or bfloat16 as its 16 bits) and as they are computed with (float).
//
// Everything here is free of branches, so that the compiler makes vectors of loops over it. Not-a-number and infinity
// pass through: what a model computes wrongly has to be seen, so no flag that assumes finite numbers may be set.

#pragma once

#include <cstddef>
#include <cstdint>

struct bf16 {
    uint16_t bits;
};

static inline float bits_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
static inline uint32_t float_as_bits(float number) { return __builtin_bit_cast(uint32_t, number); }

static inline float widen(float number) { return number; }
static inline float widen(bf16 number) { return bits_as_float(uint32_t(number.bits) << 16); }

// To the nearest, ties to even, as torch rounds; not-a-number stays one.
static inline uint16_t rounded_bits(float number) {
    uint32_t bits = float_as_bits(number);
    uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t(number != number ? 0x7fc0 : even);
}

template <typename T> static inline T narrow(float number);
template <> inline float narrow<float>(float number) { return number; }
template <> inline bf16 narrow<bf16>(float number) { return bf16{rounded_bits(number)}; }

// e^x: 2^n e^r with n = round(x log2 e) and a polynomial in r; relative error below 2e-7 from -87 to 88. Smaller
// arguments give about 1e-38, larger ones about 2e38: no caller adds up or divides anything for which that matters.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shift = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
    float shifted = x * 1.44269504088896341f + shift;
    float n = shifted - shift;
    float r = x - n * 0.693145751953125f - n * 1.428606765330187e-6f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float found = bits_as_float(float_as_bits(p) + (float_as_bits(shifted) << 23));
    return x != x ? x : found;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
