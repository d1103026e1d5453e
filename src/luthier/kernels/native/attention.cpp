// Causal attention of texts that lie end to end, forward and backward. A text sees its own tokens up to each one, and
// before them whatever rows of keys it is said to see: the texts it descends from, or keys from outside.
//
// A block of queries of one head meets all keys up to its last one at once: scores, softmax and both products stay in the
// cache of a core, and nothing of the size of a text squared reaches memory. A task is a text with all heads that share
// its keys, so no two tasks write to the same place. What a text owes to keys that are not its own is set aside, and
// added in the order of the texts when all are done: results do not depend on the number of threads. The equations are those of causal.py; softmax and sums in
// float32, products in float32, or of bfloat16 pairs where the processor has them.
//
// Flat tensors are (rows, heads, size), contiguous, and `size` is even. Keys and values may have more rows than queries:
// `outside` of them come before those of the first text. Both functions return 0, or 1 when there is no memory.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>

#include "packing.h"
#include "softmax.h"

namespace {

constexpr int64_t BLOCK = 48;  // queries at once: a multiple of TILE_ROWS and of 2

// The place and sizes of one call. `starts` has one entry more than there are texts; text t sees the rows of `ranges`
// (first row, count) from number `firsts[t]` to number `firsts[t + 1]`, and `firsts` is null when none sees any.
struct Call {
    const int64_t* starts;
    const int64_t* firsts;
    const int64_t* ranges;
    int64_t texts, outside, heads, groups, size;
    float scale;
    int64_t length(int64_t text) const { return starts[text + 1] - starts[text]; }
    int64_t before(int64_t text) const {
        int64_t rows = 0;
        if (firsts != nullptr)
            for (int64_t i = firsts[text]; i < firsts[text + 1]; i++) rows += ranges[2 * i + 1];
        return rows;
    }
    int64_t most_keys() const {
        int64_t most = 0;
        for (int64_t text = 0; text < texts; text++) {
            int64_t keys = before(text) + length(text);
            most = keys > most ? keys : most;
        }
        return up_to(most, LANES);
    }
};

// The keys or values of a text with one head: where they lie, or gathered in `room` when some lie elsewhere.
template <typename T> struct Rows {
    const T* at;
    int64_t stride;
    Rows(const T* flat, const Call& call, int64_t text, int64_t group, T* room) {
        const int64_t far = call.groups * call.size;
        const T* own = flat + (call.outside + call.starts[text]) * far + group * call.size;
        at = own;
        stride = far;
        if (call.firsts == nullptr || call.firsts[text] == call.firsts[text + 1]) return;
        at = room;
        stride = call.size;
        for (int64_t i = call.firsts[text]; i < call.firsts[text + 1]; i++)
            for (int64_t row = 0; row < call.ranges[2 * i + 1]; row++, room += call.size)
                std::memcpy(room, flat + (call.ranges[2 * i] + row) * far + group * call.size, sizeof(T) * call.size);
        for (int64_t row = 0; row < call.length(text); row++, room += call.size)
            std::memcpy(room, own + row * far, sizeof(T) * call.size);
    }
};

// Texts by falling length, so that the last task is a short one.
std::vector<int64_t> by_length(const Call& call) {
    std::vector<int64_t> order(call.texts);
    for (int64_t i = 0; i < call.texts; i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return call.length(a) > call.length(b); });
    return order;
}

template <typename Step, typename T>
int forward(const T* query, const T* key, const T* value, T* out, float* log_sums, const Call& call) {
    const int64_t size = call.size, steps = size / Step::NUMBERS, wide = up_to(size, LANES);
    const int64_t query_stride = call.heads * size, share = call.heads / call.groups, most_keys = call.most_keys();
    const std::vector<int64_t> order = by_length(call);
    typedef typename Step::Word Word;
    const Rooms rooms(4 * (3 * most_keys * wide + 2 * BLOCK * most_keys + BLOCK * (steps + wide) + 16 * 7));
    if (rooms.at == nullptr) return 1;
#pragma omp parallel
    {
        auto shelf = rooms.own();
        Word* keys = shelf.template take<Word>(steps * most_keys);
        Word* values = shelf.template take<Word>(most_keys * wide);
        Word* block = shelf.template take<Word>(BLOCK * steps);
        Word* weights = shelf.template take<Word>(BLOCK * most_keys);
        float* scores = shelf.template take<float>(BLOCK * most_keys);
        float* heads_out = shelf.template take<float>(BLOCK * wide);
        T* gathered = shelf.template take<T>(most_keys * size);
        float most[BLOCK], sum[BLOCK];
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < call.texts * call.groups; task++) {
            const int64_t text = order[task / call.groups], group = task % call.groups, start = call.starts[text];
            const int64_t length = call.length(text), before = call.before(text), all = before + length;
            const int64_t padded = up_to(all, LANES);
            const Rows<T> own_keys(key, call, text, group, gathered);
            pack_across<Step, T>(own_keys.at, own_keys.stride, all, size, padded, keys);
            const Rows<T> own_values(value, call, text, group, gathered);
            pack_along<Step, T>(own_values.at, own_values.stride, all, size, wide, values);
            for (int64_t head = group * share; head < (group + 1) * share; head++)
                for (int64_t first = 0; first < length; first += BLOCK) {
                    const int64_t rows = length - first < BLOCK ? length - first : BLOCK;
                    const int64_t reached = before + first + rows, seen = up_to(reached, LANES);
                    const int64_t at = (start + first) * query_stride + head * size;
                    const Left<Step, T> asked(query + at, query_stride, rows, size, block);
                    product<Step, false>(asked.at, asked.row, 1, keys, padded, steps, scores, seen, rows, seen);
                    scores_to_weights(scores, rows, before + first, EVERYTHING, seen, call.scale, most, sum);
                    words_of_rows<Step>(scores, rows, seen, weights);
                    product<Step, false>(weights, seen / Step::NUMBERS, 1, values, wide,
                                         up_to(reached, Step::NUMBERS) / Step::NUMBERS, heads_out, wide, rows,
                                         wide);
                    for (int64_t row = 0; row < rows; row++) {
                        T* to = out + at + row * query_stride;
                        const float factor = 1.0f / sum[row];
#pragma omp simd
                        for (int64_t i = 0; i < size; i++) to[i] = narrow<T>(heads_out[row * wide + i] * factor);
                        log_sums[(start + first + row) * call.heads + head] = most[row] + std::log(sum[row]);
                    }
                }
        }
    }
    return 0;
}

// Gradients of keys and values where a key is seen by several texts: each text's share of each row it saw, set aside in
// float32 and added up in the order of the texts. Takes 8 bytes for each number of a key that is seen.
struct Elsewhere {
    std::vector<int64_t> places;  // of the first row of each text
    float* at[2] = {nullptr, nullptr};
    bool failed = false;
    explicit Elsewhere(const Call& call) {
        if (call.firsts == nullptr) return;
        int64_t rows = 0;
        for (int64_t text = 0; text < call.texts; text++) {
            places.push_back(rows);
            rows += call.before(text) + call.length(text);
        }
        for (float*& one : at) {
            one = static_cast<float*>(std::aligned_alloc(64, up_to(4 * rows * call.groups * call.size + 64, 64)));
            failed = failed || one == nullptr;
        }
    }
    ~Elsewhere() {
        for (float* one : at) std::free(one);
    }
    Elsewhere(const Elsewhere&) = delete;

    void keep(const Call& call, int64_t text, int64_t group, const float* keys, const float* values, int64_t wide) {
        const int64_t rows = call.before(text) + call.length(text);
        for (int64_t row = 0; row < rows; row++) {
            const int64_t to = ((places[text] + row) * call.groups + group) * call.size;
            std::memcpy(at[0] + to, keys + row * wide, sizeof(float) * call.size);
            std::memcpy(at[1] + to, values + row * wide, sizeof(float) * call.size);
        }
    }

    template <typename T> void add_up(const Call& call, T* grad_key, T* grad_value) const {
        const int64_t all = call.outside + call.starts[call.texts], far = call.groups * call.size;
        // Where each row of keys was seen: as a row of which text.
        std::vector<std::vector<int64_t>> seen(all);
        for (int64_t text = 0; text < call.texts; text++) {
            int64_t row = places[text];
            for (int64_t i = call.firsts[text]; i < call.firsts[text + 1]; i++)
                for (int64_t k = 0; k < call.ranges[2 * i + 1]; k++) seen[call.ranges[2 * i] + k].push_back(row++);
            for (int64_t k = 0; k < call.length(text); k++) seen[call.outside + call.starts[text] + k].push_back(row++);
        }
#pragma omp parallel for
        for (int64_t row = 0; row < all; row++)
            for (int64_t i = 0; i < far; i++) {
                float key = 0.0f, value = 0.0f;
                for (int64_t from : seen[row]) {
                    key += at[0][from * far + i];
                    value += at[1][from * far + i];
                }
                grad_key[row * far + i] = narrow<T>(key);
                grad_value[row * far + i] = narrow<T>(value);
            }
    }
};

template <typename Step, typename T>
int backward(const T* grad, const T* query, const T* key, const T* value, const T* out, const float* log_sums,
              T* grad_query, T* grad_key, T* grad_value, const Call& call) {
    const int64_t size = call.size, steps = size / Step::NUMBERS, wide = up_to(size, LANES);
    const int64_t query_stride = call.heads * size, share = call.heads / call.groups, most_keys = call.most_keys();
    const std::vector<int64_t> order = by_length(call);
    typedef typename Step::Word Word;
    const Rooms rooms(4 * (6 * most_keys * wide + 3 * BLOCK * most_keys + BLOCK * (steps + 2 * wide) + 16 * 12));
    Elsewhere elsewhere(call);
    if (rooms.at == nullptr || elsewhere.failed) return 1;
#pragma omp parallel
    {
        auto shelf = rooms.own();
        Word* keys = shelf.template take<Word>(steps * most_keys);
        Word* values = shelf.template take<Word>(steps * most_keys);
        Word* keys_along = shelf.template take<Word>(most_keys * wide);
        Word* block = shelf.template take<Word>(BLOCK * steps);
        Word* block_along = shelf.template take<Word>(BLOCK * wide);
        Word* words = shelf.template take<Word>(BLOCK * most_keys);
        float* weights = shelf.template take<float>(BLOCK * most_keys);
        float* slopes = shelf.template take<float>(BLOCK * most_keys);
        float* back = shelf.template take<float>(BLOCK * wide);
        float* sum_keys = shelf.template take<float>(most_keys * wide);
        float* sum_values = shelf.template take<float>(most_keys * wide);
        T* gathered = shelf.template take<T>(most_keys * size);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < call.texts * call.groups; task++) {
            const int64_t text = order[task / call.groups], group = task % call.groups, start = call.starts[text];
            const int64_t length = call.length(text), before = call.before(text), all = before + length;
            const int64_t padded = up_to(all, LANES);
            const Rows<T> own_values(value, call, text, group, gathered);
            pack_across<Step, T>(own_values.at, own_values.stride, all, size, padded, values);
            const Rows<T> own_keys(key, call, text, group, gathered);
            pack_across<Step, T>(own_keys.at, own_keys.stride, all, size, padded, keys);
            pack_along<Step, T>(own_keys.at, own_keys.stride, all, size, wide, keys_along);
            std::memset(sum_keys, 0, sizeof(float) * padded * wide);
            std::memset(sum_values, 0, sizeof(float) * padded * wide);
            for (int64_t head = group * share; head < (group + 1) * share; head++)
                for (int64_t first = 0; first < length; first += BLOCK) {
                    const int64_t rows = length - first < BLOCK ? length - first : BLOCK;
                    const int64_t reached = before + first + rows, seen = up_to(reached, LANES);
                    const int64_t even = up_to(rows, Step::NUMBERS);
                    const int64_t at = (start + first) * query_stride + head * size;
                    // Scores, and what each weight gets from above.
                    const Left<Step, T> asked(query + at, query_stride, rows, size, block);
                    product<Step, false>(asked.at, asked.row, 1, keys, padded, steps, weights, seen, rows, seen);
                    const Left<Step, T> given(grad + at, query_stride, rows, size, block);
                    product<Step, false>(given.at, given.row, 1, values, padded, steps, slopes, seen, rows, seen);
                    for (int64_t row = 0; row < rows; row++) {
                        const T* from = grad + at + row * query_stride;
                        const T* result = out + at + row * query_stride;
                        float along = 0.0f;
#pragma omp simd reduction(+ : along)
                        for (int64_t i = 0; i < size; i++) along += widen(from[i]) * widen(result[i]);
                        const float log_sum = log_sums[(start + first + row) * call.heads + head];
                        const int64_t visible = before + first + row + 1;
                        float* p = weights + row * seen;
                        float* s = slopes + row * seen;
#pragma omp simd
                        for (int64_t i = 0; i < visible; i++) {
                            p[i] = exponential(p[i] * call.scale - log_sum);
                            s[i] = p[i] * (s[i] - along) * call.scale;
                        }
                        for (int64_t i = visible; i < seen; i++) p[i] = s[i] = 0.0f;
                    }
                    for (int64_t row = rows; row < even; row++) {
                        std::memset(weights + row * seen, 0, sizeof(float) * seen);
                        std::memset(slopes + row * seen, 0, sizeof(float) * seen);
                    }
                    const int64_t pairs = even / Step::NUMBERS;
                    // Values: each gets the gradients of the queries that saw it, by weight.
                    words_of_columns<Step>(weights, even, seen, words);
                    pack_along<Step, T>(grad + at, query_stride, rows, size, wide, block_along);
                    product<Step, true>(words, 1, seen, block_along, wide, pairs, sum_values, wide, reached,
                                        wide);
                    // Keys: likewise from the queries, by slope.
                    words_of_columns<Step>(slopes, even, seen, words);
                    pack_along<Step, T>(query + at, query_stride, rows, size, wide, block_along);
                    product<Step, true>(words, 1, seen, block_along, wide, pairs, sum_keys, wide, reached, wide);
                    // Queries: from the keys they saw.
                    words_of_rows<Step>(slopes, rows, seen, words);
                    product<Step, false>(words, seen / Step::NUMBERS, 1, keys_along, wide,
                                         up_to(reached, Step::NUMBERS) / Step::NUMBERS, back, wide, rows, wide);
                    for (int64_t row = 0; row < rows; row++)
                        for (int64_t i = 0; i < size; i++)
                            grad_query[at + row * query_stride + i] = narrow<T>(back[row * wide + i]);
                }
            if (call.firsts != nullptr) {
                elsewhere.keep(call, text, group, sum_keys, sum_values, wide);
                continue;
            }
            for (int64_t row = 0; row < length; row++)
                for (int64_t i = 0; i < size; i++) {
                    const int64_t to = ((start + row) * call.groups + group) * size + i;
                    grad_key[to] = narrow<T>(sum_keys[row * wide + i]);
                    grad_value[to] = narrow<T>(sum_values[row * wide + i]);
                }
        }
    }
    if (call.firsts != nullptr) elsewhere.add_up<T>(call, grad_key, grad_value);
    return 0;
}

}  // namespace

#define FOR_BOTH(T, STEP, NAME)                                                                                        \
    extern "C" int attend_##NAME(const T* query, const T* key, const T* value, T* out, float* log_sums,                \
                                 const int64_t* starts, const int64_t* firsts, const int64_t* ranges, int64_t texts,   \
                                 int64_t outside, int64_t heads, int64_t groups, int64_t size, float scale) {          \
        const Call call{starts, firsts, ranges, texts, outside, heads, groups, size, scale};                           \
        try {                                                                                                          \
            return forward<STEP, T>(query, key, value, out, log_sums, call);                                           \
        } catch (const std::bad_alloc&) {                                                                              \
            return 1;                                                                                                  \
        }                                                                                                              \
    }                                                                                                                  \
    extern "C" int attend_backward_##NAME(                                                                             \
        const T* grad, const T* query, const T* key, const T* value, const T* out, const float* log_sums,              \
        T* grad_query, T* grad_key, T* grad_value, const int64_t* starts, const int64_t* firsts, const int64_t* ranges,\
        int64_t texts, int64_t outside, int64_t heads, int64_t groups, int64_t size, float scale) {                    \
        const Call call{starts, firsts, ranges, texts, outside, heads, groups, size, scale};                           \
        try {                                                                                                          \
            return backward<STEP, T>(grad, query, key, value, out, log_sums, grad_query, grad_key, grad_value, call);  \
        } catch (const std::bad_alloc&) {                                                                              \
            return 1;                                                                                                  \
        }                                                                                                              \
    }

FOR_BOTH(float, Single, float32)
FOR_BOTH(bf16, StepOfHalves, bfloat16)
