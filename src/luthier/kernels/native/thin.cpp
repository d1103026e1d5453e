// The low-rank terms of many adapters, each added to rows of its own: y += sum_j w_j s_j B_j A_j x.
//
// A tile is a few rows of one range, which read each factor together; tiles are spread over threads. What is added to an
// output is summed in float32 over all terms of its row, in the order of the terms, and rounded once; of so many ranks that
// they do not fit into RANKS, once for each RANKS of them, which others on other rows do not change. Both factors have
// a row for each rank. Rows without terms are not touched. The tests are those of thin.py's functions in plain torch.

#include <algorithm>
#include <cstdint>

#include "numbers.h"

namespace {

constexpr int64_t TILE = 4, RANKS = 1024, WIDE = 64;

struct Site {
    const int64_t* table;  // of each term: where the first factor lies, where the second, and the rank
    const float* scales;
    int64_t in, out;
};

struct Parts {
    const int64_t* numbers;
    const float* weights;
    int64_t count;
};

// Of all ranks of a row's terms side by side those that are looked at together, and which of them are a term's own.
struct Ranks {
    int64_t first, stop;

    Ranks of(int64_t term, int64_t rank) const {
        return {std::clamp<int64_t>(first - term, 0, rank), std::clamp<int64_t>(stop - term, 0, rank)};
    }
};

// A x of COUNT rows for each rank, scaled; `low` is (rank, COUNT).
template <typename T, int COUNT>
void narrowed(const T* x, const T* down, float* low, int64_t rank, int64_t in, float factor) {
    for (int64_t k = 0; k < rank; k++) {
        const T* own = down + k * in;
        float sums[COUNT];
        for (int t = 0; t < COUNT; t++) {
            const T* row = x + t * in;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < in; i++) sum += widen(own[i]) * widen(row[i]);
            sums[t] = sum * factor;
        }
        for (int t = 0; t < COUNT; t++) low[k * COUNT + t] = sums[t];
    }
}

// Adds what these ranks make of `low` to WIDE outputs, or to the `size` last ones.
template <typename T, int COUNT>
void widened(T* y, const Site& site, const Parts& parts, const Ranks& ranks, const float* low, int64_t first, int64_t size) {
    float sums[COUNT][WIDE] = {};
    int64_t before = 0;
    for (int64_t p = 0; p < parts.count; p++) {
        const int64_t* own = site.table + 3 * parts.numbers[p];
        const Ranks some = ranks.of(before, own[2]);
        before += own[2];
        const T* up = reinterpret_cast<const T*>(own[1]) + some.first * site.out + first;
        for (int64_t k = some.first; k < some.stop; k++, up += site.out, low += COUNT) {
            if (size == WIDE) {
                for (int t = 0; t < COUNT; t++)
#pragma omp simd
                    for (int64_t o = 0; o < WIDE; o++) sums[t][o] += low[t] * widen(up[o]);
            } else {
                for (int t = 0; t < COUNT; t++)
                    for (int64_t o = 0; o < size; o++) sums[t][o] += low[t] * widen(up[o]);
            }
        }
    }
    for (int t = 0; t < COUNT; t++) {
        T* to = y + t * site.out + first;
        for (int64_t o = 0; o < size; o++) to[o] = narrow<T>(widen(to[o]) + sums[t][o]);
    }
}

template <typename T, int COUNT> void add_ranks(const T* x, T* y, const Site& site, const Parts& parts, const Ranks& ranks) {
    float low[RANKS * COUNT];
    int64_t before = 0, done = 0;
    for (int64_t p = 0; p < parts.count; p++) {
        const int64_t number = parts.numbers[p], *own = site.table + 3 * number;
        const Ranks some = ranks.of(before, own[2]);
        before += own[2];
        const T* down = reinterpret_cast<const T*>(own[0]) + some.first * site.in;
        const int64_t count = some.stop - some.first;
        narrowed<T, COUNT>(x, down, low + done * COUNT, count, site.in, site.scales[number] * parts.weights[p]);
        done += count;
    }
    for (int64_t first = 0; first < site.out; first += WIDE)
        widened<T, COUNT>(y, site, parts, ranks, low, first, std::min(WIDE, site.out - first));
}

template <typename T, int COUNT> void add_tile(const T* x, T* y, const Site& site, const Parts& parts) {
    int64_t all = 0;
    for (int64_t p = 0; p < parts.count; p++) all += site.table[3 * parts.numbers[p] + 2];
    for (int64_t first = 0; first < all; first += RANKS)
        add_ranks<T, COUNT>(x, y, site, parts, Ranks{first, std::min(all, first + RANKS)});
}

template <typename T>
void add_tiles(const T* x, T* y, const Site& site, const int64_t* tiles, const int64_t* firsts, const int64_t* numbers,
               const float* weights, int64_t count) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t tile = 0; tile < count; tile++) {
        const int64_t row = tiles[3 * tile], rows = tiles[3 * tile + 1], range = tiles[3 * tile + 2];
        const Parts parts{numbers + firsts[range], weights + firsts[range], firsts[range + 1] - firsts[range]};
        const T* from = x + row * site.in;
        T* to = y + row * site.out;
        if (rows == 1) add_tile<T, 1>(from, to, site, parts);
        else if (rows == 2) add_tile<T, 2>(from, to, site, parts);
        else if (rows == 3) add_tile<T, 3>(from, to, site, parts);
        else add_tile<T, 4>(from, to, site, parts);
    }
}

}  // namespace

#define FOR_BOTH(T, NAME)                                                                                              \
    extern "C" void thin_##NAME(const T* x, T* y, const int64_t* table, const float* scales, const int64_t* tiles,     \
                                const int64_t* firsts, const int64_t* numbers, const float* weights, int64_t count,    \
                                int64_t in, int64_t out) {                                                             \
        add_tiles<T>(x, y, Site{table, scales, in, out}, tiles, firsts, numbers, weights, count);                      \
    }

FOR_BOTH(float, float32)
FOR_BOTH(bf16, bfloat16)
