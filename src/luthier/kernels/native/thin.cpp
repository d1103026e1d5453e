// The low-rank terms of many adapters, each added to rows of its own: y += sum_j w_j s_j B_j A_j x.
//
// A tile is a few rows of one range, which read each factor together; tiles are spread over threads. What is added to an
// output is summed in float32 over all terms of its row, in the order of the terms, and rounded once; of so many ranks that
// they do not fit into RANKS, once for each RANKS of them, which others on other rows do not change. Both factors have
// a row for each rank. Rows without terms are not touched. The tests are those of thin.py's functions in plain torch.

#include "few.h"

namespace {

constexpr int VECTORS = LANES == 16 ? 4 : 2;  // of outputs at once: with four rows their sums stay in registers
constexpr int64_t RANKS = 1024, WIDE = VECTORS * LANES;

// How many of `size` outputs are in vector v.
static inline int64_t there(int64_t size, int64_t v) { return std::clamp<int64_t>(size - v * LANES, 0, LANES); }

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

// How rows of x and of a factor are multiplied, WIDE numbers at once: see few.h.
template <typename T> struct Together {
    static constexpr int WIDE = LANES;
    static inline Vector dot(Vector sum, const T* a, const T* b) { return Floats::dot(sum, widened(a), widened(b)); }
};
#if defined(__AVX512BF16__)
template <> struct Together<bf16> {
    static constexpr int WIDE = Halves::WIDE;
    static inline Vector dot(Vector sum, const bf16* a, const bf16* b) {
        return Halves::dot(sum, Halves::load(a), Halves::load(b));
    }
};
#endif

// Four ranks of A x of COUNT rows, added up in one order however many rows there are. Ranks that are not there are the
// last one again.
template <typename T, int COUNT>
static inline void four_ranks(const T* x, const T* const (&down)[4], int64_t in, Four (&found)[COUNT]) {
    constexpr int WIDE = Together<T>::WIDE;
    const int64_t whole = in / WIDE * WIDE;
    Vector sums[COUNT * 4];
    times<COUNT * 4>([&](auto i) INLINED { sums[i] = Vector{}; });
    for (int64_t i = 0; i < whole; i += WIDE)
        times<COUNT>([&](auto t) INLINED {
            times<4>([&](auto r) INLINED {
                sums[t * 4 + r] = Together<T>::dot(sums[t * 4 + r], down[r] + i, x + t * in + i);
            });
        });
    // Never number by number: a compiler rounds once or twice there, as it likes, for one row and for several.
    for (int64_t i = whole; i < in; i += LANES) {
        const int64_t rest = std::min<int64_t>(LANES, in - i);
        times<COUNT>([&](auto t) INLINED {
            const Vector own = beginning(x + t * in + i, rest);
            times<4>([&](auto r) INLINED {
                sums[t * 4 + r] = Floats::dot(sums[t * 4 + r], beginning(down[r] + i, rest), own);
            });
        });
    }
    times<COUNT>([&](auto t) INLINED { found[t] = totals(sums[t * 4], sums[t * 4 + 1], sums[t * 4 + 2], sums[t * 4 + 3]); });
}

// A x of COUNT rows for each rank, scaled; `low` is (rank, COUNT).
template <typename T, int COUNT>
void narrowed(const T* x, const T* down, float* low, int64_t rank, int64_t in, float factor) {
    for (int64_t k = 0; k < rank; k += 4) {
        const T* each[4];
        for (int64_t r = 0; r < 4; r++) each[r] = down + std::min(k + r, rank - 1) * in;
        Four found[COUNT];
        four_ranks<T, COUNT>(x, each, in, found);
        for (int64_t r = 0; r < std::min<int64_t>(4, rank - k); r++)
            for (int t = 0; t < COUNT; t++) low[(k + r) * COUNT + t] = found[t][r] * factor;
    }
}

// Adds what these ranks make of `low` to WIDE outputs, or to the `size` last ones.
template <typename T, int COUNT>
void broadened(T* y, const Site& site, const Parts& parts, const Ranks& ranks, const float* low, int64_t first,
               int64_t size) {
    Vector sums[COUNT * VECTORS];
    times<COUNT * VECTORS>([&](auto i) INLINED { sums[i] = Vector{}; });
    int64_t before = 0;
    for (int64_t p = 0; p < parts.count; p++) {
        const int64_t* own = site.table + 3 * parts.numbers[p];
        const Ranks some = ranks.of(before, own[2]);
        before += own[2];
        const T* up = reinterpret_cast<const T*>(own[1]) + some.first * site.out + first;
        for (int64_t k = some.first; k < some.stop; k++, up += site.out, low += COUNT) {
            Vector each[VECTORS];
            if (size == WIDE) times<VECTORS>([&](auto v) INLINED { each[v] = widened(up + v * LANES); });
            else times<VECTORS>([&](auto v) INLINED { each[v] = beginning(up + v * LANES, there(size, v)); });
            times<COUNT>([&](auto t) INLINED {
                const Vector factor = Vector{} + low[t];
                times<VECTORS>([&](auto v) INLINED {
                    sums[t * VECTORS + v] = fused(sums[t * VECTORS + v], each[v], factor);
                });
            });
        }
    }
    times<COUNT>([&](auto t) INLINED {
        times<VECTORS>([&](auto v) INLINED {
            const int64_t count = there(size, v);
            T* const to = y + t * site.out + first + v * LANES;
            put<T>(beginning(to, count) + sums[t * VECTORS + v], count, to);
        });
    });
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
        broadened<T, COUNT>(y, site, parts, ranks, low, first, std::min(WIDE, site.out - first));
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
