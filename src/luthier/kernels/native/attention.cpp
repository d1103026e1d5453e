// Causal attention of separate texts that lie end to end, forward and backward.
//
// A block of queries of one head meets all keys up to its last one at once: scores, softmax and both products stay in the
// cache of a core, and nothing of the size of a text squared reaches memory. A task is a text with a head (forward) or
// with all heads that share its keys (backward), so no two tasks write to the same place and every sum has a fixed
// order: results do not depend on the number of threads. The equations are those of causal.py; softmax and sums in
// float32, products in float32, or of bfloat16 pairs where the processor has them.
//
// Flat tensors are (tokens, heads, size), contiguous, and `size` is even; `starts` has one entry more than there are
// texts. Both functions return 0, or 1 when there is no memory.

#include <omp.h>

#include <cmath>
#include <cstdlib>
#include <utility>
#include <vector>

#include "products.h"

namespace {

constexpr int64_t BLOCK = 48;  // queries at once: a multiple of TILE_ROWS and of 2

int64_t up_to(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

// Memory for all threads of a call, taken before they start: a failure there can be told, and not within.
struct Rooms {
    char* at;
    int64_t each;
    explicit Rooms(int64_t bytes) : at(nullptr), each(up_to(bytes, 64)) {
        at = static_cast<char*>(std::aligned_alloc(64, each * omp_get_max_threads()));
    }
    ~Rooms() { std::free(at); }
    Rooms(const Rooms&) = delete;
    // The parts of this thread's room, one after the other.
    struct Shelf {
        char* at;
        template <typename Word> Word* take(int64_t count) {
            char* own = at;
            at += up_to(count * int64_t(sizeof(Word)), 64);
            return reinterpret_cast<Word*>(own);
        }
    };
    Shelf own() const { return Shelf{at + each * omp_get_thread_num()}; }
};

// Word number `step` of a row.
template <typename Step, typename T> inline typename Step::Word word_of(const T* row, int64_t step) {
    if constexpr (Step::NUMBERS == 1) return Step::word(widen(row[step]));
    else return Step::word(widen(row[2 * step]), widen(row[2 * step + 1]));
}

// Rows as A: where they lie if their numbers are words already, else in `room`; and how far apart they are then.
template <typename Step, typename T> struct Left {
    typedef typename Step::Word Word;
    static constexpr bool LIES_THERE = sizeof(T) * Step::NUMBERS == sizeof(Word);
    const Word* at;
    int64_t row;
    Left(const T* from, int64_t stride, int64_t rows, int64_t size, Word* room) {
        if constexpr (LIES_THERE) {
            at = reinterpret_cast<const Word*>(from);
            row = stride / Step::NUMBERS;
        } else {
            at = room;
            row = size;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t k = 0; k < size; k++) room[i * size + k] = widen(from[i * stride + k]);
        }
    }
};

// Rows as B of a product over their numbers: (steps, padded rows) words; rows beyond the last are zero.
template <typename Step, typename T>
void pack_across(const T* from, int64_t stride, int64_t rows, int64_t size, int64_t padded, typename Step::Word* to) {
    const int64_t steps = size / Step::NUMBERS;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < steps; k++) to[k * padded + row] = word_of<Step, T>(from + row * stride, k);
    for (int64_t k = 0; k < steps; k++)
        for (int64_t row = rows; row < padded; row++) to[k * padded + row] = 0;
}

// Rows as B of a product over the rows: (steps of rows, padded size) words; rows beyond the last are zero.
template <typename Step, typename T>
void pack_along(const T* from, int64_t stride, int64_t rows, int64_t size, int64_t padded, typename Step::Word* to) {
    int64_t steps = up_to(rows, Step::NUMBERS) / Step::NUMBERS;
    for (int64_t k = 0; k < steps; k++) {
        typename Step::Word* row = to + k * padded;
        const T* first = from + k * Step::NUMBERS * stride;
        if constexpr (Step::NUMBERS == 1) {
            for (int64_t i = 0; i < size; i++) row[i] = widen(first[i]);
        } else if (2 * k + 1 < rows) {
            for (int64_t i = 0; i < size; i++) row[i] = Step::word(widen(first[i]), widen(first[stride + i]));
        } else {
            for (int64_t i = 0; i < size; i++) row[i] = Step::word(widen(first[i]), 0.0f);
        }
        for (int64_t i = size; i < padded; i++) row[i] = 0;
    }
}

// Floats (rows, columns) as A over the columns, row by row.
template <typename Step>
void words_of_rows(const float* from, int64_t rows, int64_t columns, typename Step::Word* to) {
    if constexpr (Step::NUMBERS == 1) {
        std::memcpy(to, from, sizeof(float) * rows * columns);
    } else {
        // Two numbers are one word, so the rounded numbers in their order are the words.
        uint16_t* halves = reinterpret_cast<uint16_t*>(to);
#pragma omp simd
        for (int64_t i = 0; i < rows * columns; i++) halves[i] = rounded_bits(from[i]);
    }
}

// Floats (rows, columns) as A over the rows: word (k, column) holds the rows of step k. `rows` is a multiple of NUMBERS.
template <typename Step>
void words_of_columns(const float* from, int64_t rows, int64_t columns, typename Step::Word* to) {
    if constexpr (Step::NUMBERS == 1) {
        std::memcpy(to, from, sizeof(float) * rows * columns);
    } else {
        for (int64_t k = 0; k < rows / 2; k++) {
            const float* first = from + 2 * k * columns;
#pragma omp simd
            for (int64_t i = 0; i < columns; i++) to[k * columns + i] = Step::word(first[i], first[columns + i]);
        }
    }
}

// The place and sizes of one call.
struct Call {
    const int64_t* starts;
    int64_t texts, heads, groups, size;
    float scale;
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t text = 0; text < texts; text++) {
            int64_t length = starts[text + 1] - starts[text];
            most = length > most ? length : most;
        }
        return most;
    }
};

// Texts by falling length, so that the last task is a short one.
std::vector<int64_t> by_length(const Call& call) {
    std::vector<int64_t> order(call.texts);
    for (int64_t i = 0; i < call.texts; i++) order[i] = i;
    auto length = [&](int64_t text) { return call.starts[text + 1] - call.starts[text]; };
    for (int64_t i = 1; i < call.texts; i++)
        for (int64_t j = i; j > 0 && length(order[j]) > length(order[j - 1]); j--) std::swap(order[j], order[j - 1]);
    return order;
}

// Scores of a block of queries, whose first is number `first` of its text, against `seen` keys, as unnormalised
// probabilities: exp(scale s - most) with zeros after the diagonal and up to `padded`.
void scores_to_weights(float* scores, int64_t rows, int64_t first, int64_t padded, float scale, float* most, float* sum) {
    for (int64_t row = 0; row < rows; row++) {
        float* own = scores + row * padded;
        int64_t visible = first + row + 1;
        float top = own[0], total = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < visible; i++) top = own[i] > top ? own[i] : top;
        top *= scale;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < visible; i++) {
            own[i] = exponential(own[i] * scale - top);
            total += own[i];
        }
        for (int64_t i = visible; i < padded; i++) own[i] = 0.0f;
        most[row] = top;
        sum[row] = total;
    }
}

template <typename Step, typename T>
int forward(const T* query, const T* key, const T* value, T* out, float* log_sums, const Call& call) {
    const int64_t size = call.size, steps = size / Step::NUMBERS, wide = up_to(size, LANES);
    const int64_t query_stride = call.heads * size, key_stride = call.groups * size, share = call.heads / call.groups;
    const int64_t most_keys = up_to(call.longest(), LANES);
    const std::vector<int64_t> order = by_length(call);
    typedef typename Step::Word Word;
    const Rooms rooms(4 * (2 * most_keys * wide + 2 * BLOCK * most_keys + BLOCK * (steps + wide) + 16 * 6));
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
        float most[BLOCK], sum[BLOCK];
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < call.texts * call.groups; task++) {
            const int64_t text = order[task / call.groups], group = task % call.groups, start = call.starts[text];
            const int64_t length = call.starts[text + 1] - start, padded = up_to(length, LANES);
            pack_across<Step, T>(key + start * key_stride + group * size, key_stride, length, size, padded, keys);
            pack_along<Step, T>(value + start * key_stride + group * size, key_stride, length, size, wide, values);
            for (int64_t head = group * share; head < (group + 1) * share; head++)
                for (int64_t first = 0; first < length; first += BLOCK) {
                    const int64_t rows = length - first < BLOCK ? length - first : BLOCK;
                    const int64_t seen = up_to(first + rows, LANES);
                    const int64_t at = (start + first) * query_stride + head * size;
                    const Left<Step, T> asked(query + at, query_stride, rows, size, block);
                    product<Step, false>(asked.at, asked.row, 1, keys, padded, steps, scores, seen, rows, seen);
                    scores_to_weights(scores, rows, first, seen, call.scale, most, sum);
                    words_of_rows<Step>(scores, rows, seen, weights);
                    product<Step, false>(weights, seen / Step::NUMBERS, 1, values, wide,
                                         up_to(first + rows, Step::NUMBERS) / Step::NUMBERS, heads_out, wide, rows,
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

template <typename Step, typename T>
int backward(const T* grad, const T* query, const T* key, const T* value, const T* out, const float* log_sums,
              T* grad_query, T* grad_key, T* grad_value, const Call& call) {
    const int64_t size = call.size, steps = size / Step::NUMBERS, wide = up_to(size, LANES);
    const int64_t query_stride = call.heads * size, key_stride = call.groups * size, share = call.heads / call.groups;
    const int64_t most_keys = up_to(call.longest(), LANES);
    const std::vector<int64_t> order = by_length(call);
    typedef typename Step::Word Word;
    const Rooms rooms(4 * (5 * most_keys * wide + 3 * BLOCK * most_keys + BLOCK * (steps + 2 * wide) + 16 * 11));
    if (rooms.at == nullptr) return 1;
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
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < call.texts * call.groups; task++) {
            const int64_t text = order[task / call.groups], group = task % call.groups, start = call.starts[text];
            const int64_t length = call.starts[text + 1] - start, padded = up_to(length, LANES);
            const T* own_key = key + start * key_stride + group * size;
            const T* own_value = value + start * key_stride + group * size;
            pack_across<Step, T>(own_key, key_stride, length, size, padded, keys);
            pack_across<Step, T>(own_value, key_stride, length, size, padded, values);
            pack_along<Step, T>(own_key, key_stride, length, size, wide, keys_along);
            std::memset(sum_keys, 0, sizeof(float) * padded * wide);
            std::memset(sum_values, 0, sizeof(float) * padded * wide);
            for (int64_t head = group * share; head < (group + 1) * share; head++)
                for (int64_t first = 0; first < length; first += BLOCK) {
                    const int64_t rows = length - first < BLOCK ? length - first : BLOCK;
                    const int64_t seen = up_to(first + rows, LANES), even = up_to(rows, Step::NUMBERS);
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
                        const int64_t visible = first + row + 1;
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
                    const int64_t reached = first + rows, pairs = even / Step::NUMBERS;
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
            for (int64_t row = 0; row < length; row++)
                for (int64_t i = 0; i < size; i++) {
                    const int64_t to = (start + row) * key_stride + group * size + i;
                    grad_key[to] = narrow<T>(sum_keys[row * wide + i]);
                    grad_value[to] = narrow<T>(sum_values[row * wide + i]);
                }
        }
    }
    return 0;
}

#if defined(__AVX512BF16__)
typedef Pair StepOfHalves;
#else
typedef Single StepOfHalves;
#endif

}  // namespace

#define FOR_BOTH(T, STEP, NAME)                                                                                        \
    extern "C" int attend_##NAME(const T* query, const T* key, const T* value, T* out, float* log_sums,               \
                                  const int64_t* starts, int64_t texts, int64_t heads, int64_t groups, int64_t size,   \
                                  float scale) {                                                                       \
        return forward<STEP, T>(query, key, value, out, log_sums, Call{starts, texts, heads, groups, size, scale});           \
    }                                                                                                                  \
    extern "C" int attend_backward_##NAME(const T* grad, const T* query, const T* key, const T* value, const T* out,  \
                                           const float* log_sums, T* grad_query, T* grad_key, T* grad_value,           \
                                           const int64_t* starts, int64_t texts, int64_t heads, int64_t groups,        \
                                           int64_t size, float scale) {                                                \
        return backward<STEP, T>(grad, query, key, value, out, log_sums, grad_query, grad_key, grad_value,                    \
                          Call{starts, texts, heads, groups, size, scale});                                            \
    }

FOR_BOTH(float, Single, float32)
FOR_BOTH(bf16, StepOfHalves, bfloat16)
