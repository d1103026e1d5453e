// Blocks of a model over kept keys, when a few tokens are made: the operations of few.cpp, packed.cpp, rows.cpp and
// pages.cpp one after another, and nothing between them. What they compute is what they compute when they are called one
// by one, bit for bit; what is saved is the way to them, which takes longer than a small product.

#include <algorithm>
#include <cstring>

#include "codes.h"
#include "numbers.h"
#include "packing.h"
#include "scratch.h"

#define DECLARED(T, NAME)                                                                                              \
    extern "C" void norm_##NAME(const T*, const T*, T*, float*, int64_t, int64_t, float, int64_t);                     \
    extern "C" void gated_##NAME(const T*, const T*, T*, int64_t);                                                     \
    extern "C" void rotated_##NAME(const T*, const T*, const T*, T*, int64_t, int64_t, int64_t, float);                \
    extern "C" int products_##NAME(const T*, const T*, const T*, T*, const T*, const T*, T*, const T*, const T*, T*,   \
                                   int64_t, int64_t, int64_t, int64_t, int64_t);                                       \
    extern "C" void thin_##NAME(const T*, T*, const int64_t*, const float*, const int64_t*, const int64_t*,            \
                                const int64_t*, const float*, int64_t, int64_t, int64_t);                              \
    extern "C" int products_of_bytes_##NAME(const T*, const int8_t*, const float*, T*, const int8_t*, const float*,    \
                                            T*, const int8_t*, const float*, T*, int64_t, int64_t, int64_t, int64_t,   \
                                            int64_t);                                                                  \
    extern "C" int products_of_codes_##NAME(const T*, const Pairs*, T*, const Pairs*, T*, const Pairs*, T*, int64_t,   \
                                            int64_t, int64_t, int64_t, int64_t);                                       \
    extern "C" int attend_pages_##NAME(const T*, const T*, const T*, T*, const int64_t*, const int64_t*,               \
                                       const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float,    \
                                       int64_t);

DECLARED(float, float32)
DECLARED(bf16, bfloat16)

namespace {

template <typename T> struct Calls;
#define CALLS(T, NAME)                                                                                                 \
    template <> struct Calls<T> {                                                                                      \
        static constexpr auto norm = norm_##NAME;                                                                      \
        static constexpr auto gated = gated_##NAME;                                                                    \
        static constexpr auto rotated = rotated_##NAME;                                                                \
        static constexpr auto products = products_##NAME;                                                              \
        static constexpr auto bytes = products_of_bytes_##NAME;                                                        \
        static constexpr auto pairs = products_of_codes_##NAME;                                                        \
        static constexpr auto thin = thin_##NAME;                                                                      \
        static constexpr auto attend = attend_pages_##NAME;                                                            \
    };
CALLS(float, float32)
CALLS(bf16, bfloat16)

// A linear layer: numbers as they are, or, where there are scales, codes of eight bits; or codes of four bits.
template <typename T> struct Linear {
    const void* weight;
    const float* scales;
    const Pairs* pairs;
    const T* bias;
    int kind() const { return pairs != nullptr ? 2 : scales != nullptr ? 1 : 0; }
};

// The terms that are added to the output of a layer, by number, or nothing: see thin.cpp.
struct Terms {
    const int64_t* table;
    const float* scales;
};

// A block as Python lays it out: see native_tokens.py.
template <typename T> struct Block {
    Linear<T> query, key, value, output, gate, up, down;
    const T* norm;
    const T* inner_norm;
    const T* query_norm;  // of each head, or nothing
    const T* key_norm;
    int64_t heads, groups, head, inner, window;
    float eps, inner_eps, head_eps, scale;
};

// The terms on its seven layers.
struct BlockTerms {
    Terms query, key, value, output, gate, up, down;
};

// Where the keys of new rows go in the blocks of one group, and the pages of the texts there.
struct Group {
    const int64_t *rows, *pages, *counts;
    int64_t most;
};

// What all blocks of a pass have in common: the new rows, the texts, and which rows take which terms.
template <typename T> struct Pass {
    int64_t n, width;
    const T *cosines, *sines;
    const int64_t* starts;
    int64_t texts, page;
    const int64_t *tiles, *firsts, *numbers;
    const float* weights;
    int64_t count_of_tiles;
};

template <typename T> void add(T* to, const T* one, const T* other, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) to[i] = narrow<T>(widen(one[i]) + widen(other[i]));
}

// Up to three layers over the same rows: in one call where all are kept in one way.
template <typename T> int layers(const T* x, const Linear<T>* const (&each)[3], T* const (&y)[3],
                                 const int64_t (&outs)[3], int64_t n, int64_t size) {
    static constexpr Linear<T> none = {};
    const Linear<T>* own[3];
    for (int i = 0; i < 3; i++) own[i] = each[i] == nullptr ? &none : each[i];
    const auto& [a, b, c] = own;
    const int kind = a->kind();
    for (int i = 1; i < 3 && each[i] != nullptr; i++) {
        if (own[i]->kind() == kind) continue;
        for (int j = 0; j < 3 && each[j] != nullptr; j++)
            if (layers<T>(x, {each[j]}, {y[j]}, {outs[j]}, n, size)) return 1;
        return 0;
    }
    if (kind == 0) {
        const auto number = [](const Linear<T>* one) { return static_cast<const T*>(one->weight); };
        return Calls<T>::products(x, number(a), a->bias, y[0], number(b), b->bias, y[1], number(c), c->bias, y[2], n, size,
                                  outs[0], outs[1], outs[2]);
    }
    const auto codes = [](const Linear<T>* one) { return static_cast<const int8_t*>(one->weight); };
    const int failed = kind == 1 ? Calls<T>::bytes(x, codes(a), a->scales, y[0], codes(b), b->scales, y[1], codes(c),
                                                   c->scales, y[2], n, size, outs[0], outs[1], outs[2])
                                 : Calls<T>::pairs(x, a->pairs, y[0], b->pairs, y[1], c->pairs, y[2], n, size, outs[0],
                                                   outs[1], outs[2]);
    for (int i = 0; i < 3 && !failed; i++)
        for (int64_t row = 0; own[i]->bias != nullptr && row < n; row++)
            add(y[i] + row * outs[i], y[i] + row * outs[i], own[i]->bias, outs[i]);
    return failed;
}

template <typename T>
int one_block(const T* x, T* out, const Block<T>& block, const BlockTerms& terms, T* keys, T* values,
              const Group& group, const Pass<T>& pass, Rooms::Shelf shelf) {
    const int64_t n = pass.n, width = pass.width, head = block.head, inner = block.inner;
    const int64_t all = block.heads * head, side = block.groups * head;
    float* const inverse = shelf.take<float>(n * block.heads);
    const auto rows = [&](int64_t size) { return shelf.take<T>(n * size); };
    T *h = rows(width), *query = rows(all), *key = rows(side), *value = rows(side), *attended = rows(all);
    T *gate = rows(inner), *up = rows(inner);
    const auto more = [&](const Terms& own, const T* from, T* to, int64_t in, int64_t outs) {
        if (own.table != nullptr && pass.count_of_tiles > 0)
            Calls<T>::thin(from, to, own.table, own.scales, pass.tiles, pass.firsts, pass.numbers, pass.weights,
                           pass.count_of_tiles, in, outs);
    };
    Calls<T>::norm(x, block.norm, h, inverse, n, width, block.eps, 0);
    if (layers<T>(h, {&block.query, &block.key, &block.value}, {query, key, value}, {all, side, side}, n, width))
        return 1;
    more(terms.query, h, query, width, all);
    more(terms.key, h, key, width, side);
    more(terms.value, h, value, width, side);
    if (block.query_norm != nullptr) {
        Calls<T>::norm(query, block.query_norm, query, inverse, n * block.heads, head, block.head_eps, 0);
        Calls<T>::norm(key, block.key_norm, key, inverse, n * block.groups, head, block.head_eps, 0);
    }
    Calls<T>::rotated(query, pass.cosines, pass.sines, query, n, block.heads, head / 2, 1.0f);
    Calls<T>::rotated(key, pass.cosines, pass.sines, key, n, block.groups, head / 2, 1.0f);
    for (int64_t i = 0; i < n; i++) {
        std::memcpy(keys + group.rows[i] * side, key + i * side, sizeof(T) * side);
        std::memcpy(values + group.rows[i] * side, value + i * side, sizeof(T) * side);
    }
    if (Calls<T>::attend(query, keys, values, attended, group.pages, group.counts, pass.starts, pass.texts, group.most,
                         pass.page, block.heads, block.groups, head, block.scale, block.window)) return 1;
    if (layers<T>(attended, {&block.output}, {h}, {width}, n, all)) return 1;
    more(terms.output, attended, h, all, width);
    // x may lie where the output goes.
    add(out, h, x, n * width);
    Calls<T>::norm(out, block.inner_norm, h, inverse, n, width, block.inner_eps, 0);
    if (layers<T>(h, {&block.gate, &block.up}, {gate, up}, {inner, inner}, n, width)) return 1;
    more(terms.gate, h, gate, width, inner);
    more(terms.up, h, up, width, inner);
    Calls<T>::gated(gate, up, gate, n * inner);
    if (layers<T>(gate, {&block.down}, {h}, {width}, n, inner)) return 1;
    more(terms.down, gate, h, inner, width);
    add(out, h, out, n * width);
    return 0;
}

// All of them in turn. `kept` has keys and values of each, `of` the group of each, `terms` those of each or is nothing.
template <typename T>
int all_blocks(const Block<T>* blocks, T* const* kept, const Group* groups, const int64_t* of, const BlockTerms* terms,
               int64_t count, const T* x, T* out, const Pass<T>& pass) {
    int64_t wide = 0, heads = 0;
    for (int64_t i = 0; i < count; i++) {
        const Block<T>& own = blocks[i];
        const int64_t both = (2 * own.heads + 2 * own.groups) * own.head;
        wide = std::max(wide, pass.n * (pass.width + both + 2 * own.inner));
        heads = std::max(heads, own.heads);
    }
    // Eight rooms, each from a whole line of the cache on: a vector that lies in two of them takes twice as long to read.
    const Scratch scratch(sizeof(T) * wide + sizeof(float) * pass.n * heads + 8 * 64);
    if (scratch.at() == nullptr) return 1;
    const BlockTerms none = {};
    int failed = 0;
    for (int64_t i = 0; i < count && !failed; i++)
        failed = one_block<T>(i == 0 ? x : out, out, blocks[i], terms == nullptr ? none : terms[i], kept[2 * i],
                              kept[2 * i + 1], groups[of[i]], pass, {scratch.at()});
    return failed;
}

}  // namespace

#define FOR_BOTH(T, NAME)                                                                                              \
    extern "C" int token_blocks_##NAME(const Block<T>* blocks, T* const* kept, const Group* groups, const int64_t* of, \
                                       const BlockTerms* terms, const T* x, T* out, const T* cosines, const T* sines,  \
                                       const int64_t* starts, const int64_t* tiles, const int64_t* firsts,             \
                                       const int64_t* numbers, const float* weights, int64_t count, int64_t n,         \
                                       int64_t width, int64_t texts, int64_t page, int64_t count_of_tiles) {           \
        const Pass<T> pass = {n,    width, cosines, sines,   starts,  texts,                                           \
                              page, tiles, firsts,  numbers, weights, count_of_tiles};                                 \
        return all_blocks<T>(blocks, kept, groups, of, terms, count, x, out, pass);                                    \
    }

FOR_BOTH(float, float32)
FOR_BOTH(bf16, bfloat16)
