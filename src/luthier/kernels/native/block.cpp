// A whole block of a model over kept keys, when a few tokens are made: the operations of few.cpp, packed.cpp, rows.cpp
// and pages.cpp one after another, and nothing between them. What they compute is what they compute when they are called
// one by one, bit for bit; what is saved is the way to them, which takes longer than a small product.

#include <cstdlib>
#include <cstring>

#include "numbers.h"

#define DECLARED(T, NAME)                                                                                              \
    extern "C" void norm_##NAME(const T*, const T*, T*, float*, int64_t, int64_t, float, int64_t);                     \
    extern "C" void gated_##NAME(const T*, const T*, T*, int64_t);                                                     \
    extern "C" void rotated_##NAME(const T*, const T*, const T*, T*, int64_t, int64_t, int64_t, float);                \
    extern "C" int products_##NAME(const T*, const T*, const T*, T*, const T*, const T*, T*, const T*, const T*, T*,   \
                                   int64_t, int64_t, int64_t, int64_t, int64_t);                                       \
    extern "C" void thin_##NAME(const T*, T*, const int64_t*, const float*, const int64_t*, const int64_t*,            \
                                const int64_t*, const float*, int64_t, int64_t, int64_t);                              \
    extern "C" int product_of_bytes_##NAME(const T*, const int8_t*, const float*, T*, int64_t, int64_t, int64_t);      \
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
        static constexpr auto bytes = product_of_bytes_##NAME;                                                         \
        static constexpr auto thin = thin_##NAME;                                                                      \
        static constexpr auto attend = attend_pages_##NAME;                                                            \
    };
CALLS(float, float32)
CALLS(bf16, bfloat16)

// A linear layer: numbers as they are, or, where there are scales, codes of eight bits.
template <typename T> struct Linear {
    const void* weight;
    const float* scales;
    const T* bias;
};

// The terms that are added to the output of a layer, by number, or nothing: see thin.cpp.
struct Terms {
    const int64_t* table;
    const float* scales;
};

// The parts of a block as Python hands them over.
template <typename T> struct Block {
    Linear<T> query, key, value, output, gate, up, down;
    const T* norm;
    const T* inner_norm;
    const T* query_norm;  // of each head, or nothing
    const T* key_norm;
    Terms query_terms, key_terms, value_terms, output_terms, gate_terms, up_terms, down_terms;
    const int64_t *tiles, *firsts, *numbers;  // which rows take which terms
    const float* weights;
};

struct Sizes {
    int64_t n, width, heads, groups, head, inner, tiles;
};

template <typename T> void add(T* to, const T* from, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) to[i] = narrow<T>(widen(to[i]) + widen(from[i]));
}

// Up to three layers over the same rows: in one call where all are as they are.
template <typename T> int layers(const T* x, const Linear<T>* const (&each)[3], T* const (&y)[3],
                                 const int64_t (&outs)[3], int64_t n, int64_t size) {
    bool plain = true;
    for (const Linear<T>* one : each) plain &= one == nullptr || one->scales == nullptr;
    if (plain) {
        const T *weights[3] = {}, *biases[3] = {};
        for (int i = 0; i < 3; i++)
            if (each[i] != nullptr) weights[i] = static_cast<const T*>(each[i]->weight), biases[i] = each[i]->bias;
        return Calls<T>::products(x, weights[0], biases[0], y[0], weights[1], biases[1], y[1], weights[2], biases[2],
                                  y[2], n, size, outs[0], outs[1], outs[2]);
    }
    for (int i = 0; i < 3 && each[i] != nullptr; i++) {
        const Linear<T>& one = *each[i];
        const T* weight = static_cast<const T*>(one.weight);
        if (one.scales == nullptr) {
            if (Calls<T>::products(x, weight, one.bias, y[i], nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, n,
                                   size, outs[i], 0, 0)) return 1;
            continue;
        }
        if (Calls<T>::bytes(x, static_cast<const int8_t*>(one.weight), one.scales, y[i], n, size, outs[i])) return 1;
        for (int64_t row = 0; one.bias != nullptr && row < n; row++) add(y[i] + row * outs[i], one.bias, outs[i]);
    }
    return 0;
}

template <typename T>
int run(const T* x, T* out, const Block<T>& block, const Sizes& sizes, const T* cosines, const T* sines, T* keys,
        T* values, const int64_t* rows, const int64_t* pages, const int64_t* counts, const int64_t* starts, int64_t texts,
        int64_t most, int64_t page, float eps, float inner_eps, float head_eps, float scale, int64_t window) {
    const int64_t n = sizes.n, width = sizes.width, side = sizes.groups * sizes.head, all = sizes.heads * sizes.head;
    const int64_t wide = n * (width + 2 * all + 2 * side + 2 * sizes.inner);
    float* const inverse = static_cast<float*>(std::malloc(sizeof(T) * wide + sizeof(float) * n * sizes.heads));
    if (inverse == nullptr) return 1;
    T *h = static_cast<T*>(static_cast<void*>(inverse + n * sizes.heads)), *query = h + n * width, *key = query + n * all, *value = key + n * side, *attended = value + n * side;
    T *gate = attended + n * all, *up = gate + n * sizes.inner;
    const auto more = [&](const Terms& terms, const T* from, T* to, int64_t in, int64_t outs) {
        if (terms.table != nullptr && sizes.tiles > 0)
            Calls<T>::thin(from, to, terms.table, terms.scales, block.tiles, block.firsts, block.numbers, block.weights,
                           sizes.tiles, in, outs);
    };
    const auto failed = [&] {
        Calls<T>::norm(x, block.norm, h, inverse, n, width, eps, 0);
        if (layers<T>(h, {&block.query, &block.key, &block.value}, {query, key, value}, {all, side, side}, n, width))
            return 1;
        more(block.query_terms, h, query, width, all);
        more(block.key_terms, h, key, width, side);
        more(block.value_terms, h, value, width, side);
        if (block.query_norm != nullptr) {
            Calls<T>::norm(query, block.query_norm, query, inverse, n * sizes.heads, sizes.head, head_eps, 0);
            Calls<T>::norm(key, block.key_norm, key, inverse, n * sizes.groups, sizes.head, head_eps, 0);
        }
        Calls<T>::rotated(query, cosines, sines, query, n, sizes.heads, sizes.head / 2, 1.0f);
        Calls<T>::rotated(key, cosines, sines, key, n, sizes.groups, sizes.head / 2, 1.0f);
        for (int64_t i = 0; i < n; i++) {
            std::memcpy(keys + rows[i] * side, key + i * side, sizeof(T) * side);
            std::memcpy(values + rows[i] * side, value + i * side, sizeof(T) * side);
        }
        if (Calls<T>::attend(query, keys, values, attended, pages, counts, starts, texts, most, page, sizes.heads,
                             sizes.groups, sizes.head, scale, window)) return 1;
        if (layers<T>(attended, {&block.output}, {out}, {width}, n, all)) return 1;
        more(block.output_terms, attended, out, all, width);
        add(out, x, n * width);
        Calls<T>::norm(out, block.inner_norm, h, inverse, n, width, inner_eps, 0);
        if (layers<T>(h, {&block.gate, &block.up}, {gate, up}, {sizes.inner, sizes.inner}, n, width)) return 1;
        more(block.gate_terms, h, gate, width, sizes.inner);
        more(block.up_terms, h, up, width, sizes.inner);
        Calls<T>::gated(gate, up, gate, n * sizes.inner);
        if (layers<T>(gate, {&block.down}, {h}, {width}, n, sizes.inner)) return 1;
        more(block.down_terms, gate, h, sizes.inner, width);
        add(h, out, n * width);
        std::memcpy(out, h, sizeof(T) * n * width);
        return 0;
    }();
    std::free(inverse);
    return failed;
}

}  // namespace

#define FOR_BOTH(T, NAME)                                                                                              \
    extern "C" int token_block_##NAME(const T* x, T* out, const Block<T>* block, const Sizes* sizes, const T* cosines, \
                                      const T* sines, T* keys, T* values, const int64_t* rows, const int64_t* pages,   \
                                      const int64_t* counts, const int64_t* starts, int64_t texts, int64_t most,       \
                                      int64_t page, float eps, float inner_eps, float head_eps, float scale,           \
                                      int64_t window) {                                                                \
        return run<T>(x, out, *block, *sizes, cosines, sines, keys, values, rows, pages, counts, starts, texts, most,  \
                      page, eps, inner_eps, head_eps, scale, window);                                                  \
    }

FOR_BOTH(float, float32)
FOR_BOTH(bf16, bfloat16)
