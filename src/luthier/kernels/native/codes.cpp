// Codes back to numbers. Those of four bits are sixteen levels times the scale of a block, looked up: see lookup.h. Those
// of eight bits are whole numbers, times the scale of their row.

#include "lookup.h"

namespace {

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

template <typename T> void unpack_rows(const int8_t* codes, const float* scales, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        const int8_t* from = codes + row * size;
        T* to = out + row * size;
        const float scale = scales[row];
#pragma omp simd
        for (int64_t i = 0; i < size; i++) to[i] = narrow<T>(float(from[i]) * scale);
    }
}

}  // namespace

extern "C" void unpacked_rows_float32(const int8_t* codes, const float* scales, float* out, int64_t rows, int64_t size) {
    unpack_rows(codes, scales, out, rows, size);
}

extern "C" void unpacked_rows_bfloat16(const int8_t* codes, const float* scales, bf16* out, int64_t rows, int64_t size) {
    unpack_rows(codes, scales, out, rows, size);
}

extern "C" void unpacked_float32(const uint8_t* codes, const float* scales, const float* levels, float* out,
                                 int64_t numbers, int64_t block) {
    unpack(codes, scales, levels, out, numbers, block);
}

extern "C" void unpacked_bfloat16(const uint8_t* codes, const float* scales, const float* levels, bf16* out,
                                  int64_t numbers, int64_t block) {
    unpack(codes, scales, levels, out, numbers, block);
}
