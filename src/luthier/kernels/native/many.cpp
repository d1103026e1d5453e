// y = sum_s x_s W_s + b for many rows in bfloat16: a layer with its low-rank term, or what several layers send back to one input.
//
// PANEL columns of all W_s are packed at once, as a core's second cache holds them; then TILE_ROWS rows after another are
// multiplied by them. A tile is summed in float32 over all s and rounded once; where W is DEEP, as a head's is on the way
// back, a piece of it at a time, with the sums of some rows beside it. A sum takes its products in the order of s and k,
// so neither the number of threads nor other rows change a bit.
//
// And a^T b over many rows, as the gradient of a thin factor is: of STRETCH rows after another a panel of b
// is packed, and beside it BLOCK columns of a.

#include <algorithm>

#include "packing.h"
#include "team.h"

namespace {

constexpr int64_t PANEL = TILE_VECTORS * LANES;
constexpr int64_t PARTS = 4;         // for each thread at least, where there are rows enough
constexpr int64_t CHUNK = 192;       // rows for which it is worth packing a panel once more
constexpr int64_t DEEP = 2048;       // steps of W that are packed at once,
constexpr int64_t BESIDE = 384;      // and the rows whose sums are kept where there are more
constexpr int64_t STRETCH = 512;     // rows of a^T b that are packed at once,
constexpr int64_t BLOCK = 96;        // and columns of a
constexpr int64_t ALONE = 1 << 16;   // products of numbers below which a second thread is not worth waking

// One product: W is (size, outs) where it lies `across`, else (outs, size) as linear layers have it.
template <typename T> struct Summand {
    const T *x, *weight;
    int64_t x_stride, stride, size, across;
};

// Where the tiles of a panel come from and go to: its words, and the bias and the columns of y that are its own.
template <typename Step, typename T> struct Panel {
    const Summand<T>* parts;
    int64_t count;
    const typename Step::Word* words;
    typename Step::Word* room;  // for rows that have to be widened
    const T* bias;
    T* y;
    int64_t y_stride, held;
};

// The bias of `there` columns of a panel, or zeros.
template <typename Step, typename T>
static inline Vector beside_of(const Panel<Step, T>& panel, int64_t column, int64_t there) {
    return beginning(panel.bias == nullptr ? nullptr : panel.bias + column, there);
}

// ROWS rows of y from `row` on.
template <typename Step, typename T, int ROWS, int VECTORS>
__attribute__((noinline)) static void tile_of(const Panel<Step, T>& panel, int64_t row) {
    Vector sums[ROWS * VECTORS];
    times<ROWS * VECTORS>([&](auto i) INLINED { sums[i] = Vector{}; });
    const typename Step::Word* words = panel.words;
    for (int64_t s = 0; s < panel.count; s++) {
        const Summand<T>& own = panel.parts[s];
        const int64_t steps = own.size / Step::NUMBERS;
        const Left<Step, T> x(own.x + row * own.x_stride, own.x_stride, ROWS, own.size, panel.room);
        add_steps<Step, ROWS, VECTORS>(sums, x.at, x.row, 1, words, VECTORS * LANES, steps);
        words += steps * VECTORS * LANES;
    }
    times<VECTORS>([&](auto j) INLINED {
        const int64_t there = std::min<int64_t>(LANES, panel.held - j * LANES);
        T* const to = panel.y + row * panel.y_stride + j * LANES;
        const Vector beside = beside_of(panel, j * LANES, there);
        times<ROWS>([&](auto i) INLINED { put<T>(sums[i * VECTORS + j] + beside, there, to + i * panel.y_stride); });
    });
}

// Rows `begin` to `end` of a panel. A narrow one takes more rows at once: each sum waits for the one before it.
template <typename Step, typename T, int VECTORS>
static void tiles_of(const Panel<Step, T>& panel, int64_t begin, int64_t end) {
    constexpr int MOST = VECTORS == 1 ? 2 * TILE_ROWS : TILE_ROWS;
    int64_t row = begin;
    for (; row + MOST <= end; row += MOST) tile_of<Step, T, MOST, VECTORS>(panel, row);
    for (; row + 3 <= end; row += 3) tile_of<Step, T, 3, VECTORS>(panel, row);
    for (; row < end; row++) tile_of<Step, T, 1, VECTORS>(panel, row);
}

// Numbers `from` to `until` of the columns of W that a panel has, as B.
template <typename Step, typename T>
static void pack_panel(const Summand<T>& own, int64_t first, int64_t held, int64_t wide, int64_t from, int64_t until,
                       typename Step::Word* to) {
    if (own.across)
        pack_along<Step, T>(own.weight + from * own.stride + first, own.stride, until - from, held, wide, to);
    else
        pack_across<Step, T>(own.weight + first * own.stride + from, own.stride, held, until - from, wide, to);
}

// Rows `begin` to `end` of a panel, whose sums are kept in `sums`, PANEL apart, while W is packed piece by piece.
template <typename Step, typename T>
static void deep_tiles_of(const Panel<Step, T>& panel, typename Step::Word* words, int64_t first, int64_t begin,
                          int64_t end, float* sums) {
    const int64_t wide = up_to(panel.held, LANES), most = DEEP * Step::NUMBERS;
    std::fill(sums, sums + (end - begin) * PANEL, 0.0f);
    for (int64_t s = 0; s < panel.count; s++) {
        const Summand<T>& own = panel.parts[s];
        for (int64_t from = 0; from < own.size; from += most) {
            const int64_t until = std::min(own.size, from + most);
            pack_panel<Step, T>(own, first, panel.held, wide, from, until, words);
            for (int64_t row = begin; row < end; row += TILE_ROWS) {
                const int64_t rows = std::min<int64_t>(TILE_ROWS, end - row);
                const Left<Step, T> x(own.x + row * own.x_stride + from, own.x_stride, rows, until - from, panel.room);
                product<Step, true>(x.at, x.row, 1, words, wide, (until - from) / Step::NUMBERS,
                                    sums + (row - begin) * PANEL, PANEL, rows, wide);
            }
        }
    }
    for (int64_t j = 0; j < panel.held; j += LANES) {
        const int64_t there = std::min<int64_t>(LANES, panel.held - j);
        const Vector beside = beside_of(panel, j, there);
        for (int64_t row = begin; row < end; row++) {
            const Vector found = *reinterpret_cast<const Vector*>(sums + (row - begin) * PANEL + j);
            put<T>(found + beside, there, panel.y + row * panel.y_stride + j);
        }
    }
}

template <typename Step, typename T>
int product_sums(const Summand<T>* parts, int64_t count, const T* bias, T* y, int64_t y_stride, int64_t n, int64_t outs) {
    typedef typename Step::Word Word;
    int64_t steps = 0, widest = 0;
    for (int64_t s = 0; s < count; s++) steps += parts[s].size / Step::NUMBERS, widest = std::max(widest, parts[s].size);
    const bool deep = steps > DEEP;
    const int64_t panels = (outs + PANEL - 1) / PANEL, wanted = (PARTS * Team::most() + panels - 1) / panels;
    const int64_t least = deep ? (n + BESIDE - 1) / BESIDE : 1;
    const int64_t chunks = std::max(least, std::min(wanted, n / CHUNK));
    const int64_t rows_each = up_to((n + chunks - 1) / chunks, 2 * TILE_ROWS);
    const int64_t copied = Left<Step, T>::LIES_THERE ? 0 : 2 * TILE_ROWS * std::min(widest, deep ? DEEP * Step::NUMBERS : widest);
    const int64_t held_words = std::min(steps, DEEP) * PANEL, kept = deep ? rows_each * PANEL : 0;
    const Rooms rooms(sizeof(Word) * (held_words + copied) + sizeof(float) * kept + 64 * 3);
    if (rooms.at == nullptr) return 1;
    const auto work = [&](int64_t part, int member) {
        auto shelf = rooms.of(member);
        Word* const words = shelf.template take<Word>(held_words);
        Word* const room = shelf.template take<Word>(copied);
        float* const sums = shelf.template take<float>(kept);
        const int64_t first = part / chunks * PANEL, begin = part % chunks * rows_each;
        const int64_t end = std::min(n, begin + rows_each), held = std::min(PANEL, outs - first);
        const int64_t wide = up_to(held, LANES);
        if (begin >= end) return;
        const T* const own_bias = bias == nullptr ? nullptr : bias + first;
        const Panel<Step, T> panel = {parts, count, words, room, own_bias, y + first, y_stride, held};
        if (deep) return deep_tiles_of<Step, T>(panel, words, first, begin, end, sums);
        Word* at = words;
        for (int64_t s = 0; s < count; s++) {
            pack_panel<Step, T>(parts[s], first, held, wide, 0, parts[s].size, at);
            at += parts[s].size / Step::NUMBERS * wide;
        }
        static_assert(TILE_VECTORS <= 4, "a case for each number of vectors");
        if (wide == LANES) tiles_of<Step, T, 1>(panel, begin, end);
        else if (wide == 2 * LANES) tiles_of<Step, T, std::min(2, TILE_VECTORS)>(panel, begin, end);
        else if (wide == 3 * LANES) tiles_of<Step, T, std::min(3, TILE_VECTORS)>(panel, begin, end);
        else tiles_of<Step, T, TILE_VECTORS>(panel, begin, end);
    };
    Team::run(panels * chunks, work, n * outs * steps > ALONE);
    return 0;
}

// found (high, outs) = a^T b, number (i, j) at i * down + j * aside; as it is summed, or rounded.
template <typename Step, typename T, typename Found>
int product_crossed(const T* a, int64_t a_stride, const T* b, int64_t b_stride, Found* found, int64_t down,
                    int64_t aside, int64_t n, int64_t high, int64_t outs) {
    typedef typename Step::Word Word;
    const int64_t panels = (outs + PANEL - 1) / PANEL, blocks = (high + BLOCK - 1) / BLOCK;
    const int64_t most = std::min(high, BLOCK), steps = STRETCH / Step::NUMBERS;
    const Rooms rooms(sizeof(Word) * steps * (PANEL + most) + sizeof(float) * most * PANEL + 64 * 3);
    if (rooms.at == nullptr) return 1;
    const auto work = [&](int64_t part, int member) {
        auto shelf = rooms.of(member);
        Word* const words = shelf.template take<Word>(steps * PANEL);
        Word* const turned = shelf.template take<Word>(steps * most);
        float* const sums = shelf.template take<float>(most * PANEL);
        const int64_t first = part / blocks * PANEL, held = std::min(PANEL, outs - first), wide = up_to(held, LANES);
        const int64_t top = part % blocks * BLOCK, tall = std::min(BLOCK, high - top);
        for (int64_t row = 0; row < n; row += STRETCH) {
            const int64_t rows = std::min(STRETCH, n - row), own = up_to(rows, Step::NUMBERS) / Step::NUMBERS;
            pack_along<Step, T>(b + row * b_stride + first, b_stride, rows, held, wide, words);
            pack_along<Step, T>(a + row * a_stride + top, a_stride, rows, tall, tall, turned);
            if (row == 0) product<Step, false>(turned, 1, tall, words, wide, own, sums, PANEL, tall, wide);
            else product<Step, true>(turned, 1, tall, words, wide, own, sums, PANEL, tall, wide);
        }
        for (int64_t i = 0; i < tall; i++)
            for (int64_t j = 0; j < held; j++)
                found[(top + i) * down + (first + j) * aside] = narrow<Found>(sums[i * PANEL + j]);
    };
    Team::run(panels * blocks, work, n * high * outs > ALONE);
    return 0;
}

}  // namespace

extern "C" int product_sums_bfloat16(const Summand<bf16>* parts, const bf16* bias, bf16* y, int64_t count,
                                     int64_t y_stride, int64_t n, int64_t outs) {
    return product_sums<StepOfHalves, bf16>(parts, count, bias, y, y_stride, n, outs);
}

extern "C" int product_crossed_bfloat16(const bf16* a, const bf16* b, void* found, int64_t a_stride, int64_t b_stride,
                                        int64_t down, int64_t aside, int64_t n, int64_t high, int64_t outs,
                                        int64_t rounded) {
    if (rounded)
        return product_crossed<StepOfHalves>(a, a_stride, b, b_stride, static_cast<bf16*>(found), down, aside, n, high, outs);
    return product_crossed<StepOfHalves>(a, a_stride, b, b_stride, static_cast<float*>(found), down, aside, n, high, outs);
}
