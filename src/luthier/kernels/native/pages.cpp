// Attention of the new tokens of texts over all keys of each, which lie in pages.
//
// A text with a few new tokens, as one that speaks, reads its keys where they lie: a task is a token with one key head
// and a run of keys, whose softmax is put together with those of the other runs in their order. Runs are of one length,
// so neither the number of threads nor other texts change a bit. A text with many new tokens, as a prompt, gathers its
// keys once and goes on as attention.cpp does, in products of a block of queries with all keys they see.
// The equations are those of causal.py; softmax and sums in float32.
//
// Flat tensors are (rows, heads, size), contiguous, and `size` is even. Returns 0, or 1 when there is no memory.

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "few.h"
#include "softmax.h"

namespace {

constexpr int64_t BLOCK = 48;      // queries at once
constexpr int64_t PART = 4;        // blocks of queries of one task
constexpr int64_t SPEAKS = 8;      // new tokens up to which a text reads its keys where they lie
constexpr int64_t RUN = 256;       // keys of one task then
constexpr int64_t HEADS = 8;       // heads that share a value at once
constexpr int64_t ALONE = 1 << 15; // products of numbers below which a second thread is not worth waking

struct Call {
    const int64_t *pages, *counts, *starts;
    int64_t texts, most, page, heads, groups, size;
    float scale;
    int64_t window;
    int64_t share() const { return heads / groups; }
    int64_t row(int64_t text, int64_t place) const {
        return pages[text * most + place / page] * page + place % page;
    }
    int64_t fresh(int64_t text) const { return starts[text + 1] - starts[text]; }
    // The first key that a token at `place` of its text sees.
    int64_t first_seen(int64_t place) const { return place + 1 > window ? place + 1 - window : 0; }
};

// A new token with a key head and a run of keys, or a part of a text's new tokens with a key head and all keys.
struct Task {
    int64_t text, group, from, until;
    int64_t token, slot;  // the row of the query, and where the result of the run is kept; slot -1 marks a part
};

template <typename Number> static inline Vector widened(const Number* from) {
    Vector found;
    for (int i = 0; i < LANES; i++) found[i] = widen(from[i]);
    return found;
}
template <> inline Vector widened<float>(const float* from) { return *reinterpret_cast<const Vector*>(from); }
#if defined(__AVX512F__)
template <> inline Vector widened<bf16>(const bf16* from) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return (Vector)_mm512_slli_epi32(words, 16);
}
#endif

// Weights of some heads times values, summed over a run: `weights` is (heads, RUN), `sums` (heads, wide).
template <typename Number, int COUNT>
static void weigh(const float* weights, const Number* const* values, int64_t run, int64_t wide, float* sums) {
    for (int64_t i = 0; i < wide; i += LANES) {
        Vector own[COUNT] = {};
        for (int64_t k = 0; k < run; k++) {
            const Vector value = widened(values[k] + i);
            for (int h = 0; h < COUNT; h++) own[h] += weights[h * RUN + k] * value;
        }
        for (int h = 0; h < COUNT; h++) *reinterpret_cast<Vector*>(sums + h * wide + i) = own[h];
    }
}

template <typename Number>
static void weigh_heads(const float* weights, const Number* const* values, int64_t run, int64_t wide, int64_t heads, float* sums) {
    for (int64_t h = 0; h < heads; h += HEADS) {
        const float* w = weights + h * RUN;
        float* s = sums + h * wide;
        switch (std::min(HEADS, heads - h)) {
            case 1: weigh<Number, 1>(w, values, run, wide, s); break;
            case 2: weigh<Number, 2>(w, values, run, wide, s); break;
            case 3: weigh<Number, 3>(w, values, run, wide, s); break;
            case 4: weigh<Number, 4>(w, values, run, wide, s); break;
            case 5: weigh<Number, 5>(w, values, run, wide, s); break;
            case 6: weigh<Number, 6>(w, values, run, wide, s); break;
            case 7: weigh<Number, 7>(w, values, run, wide, s); break;
            default: weigh<Number, 8>(w, values, run, wide, s);
        }
    }
}

// Scores of a head with a run of keys, four at a time; `keys` has entries up to a multiple of four.
template <typename Kind>
static void score(const typename Kind::Number* query, const typename Kind::Number* const* keys, int64_t run, int64_t wide, float* scores) {
    for (int64_t k = 0; k < run; k += 4) {
        Vector sums[4] = {};
        for (int64_t i = 0; i < wide; i += Kind::WIDE) {
            const Vector own = Kind::load(query + i);
            for (int j = 0; j < 4; j++) sums[j] = Kind::dot(sums[j], Kind::load(keys[k + j] + i), own);
        }
        const Four found = totals(sums[0], sums[1], sums[2], sums[3]);
        std::memcpy(scores + k, &found, sizeof(found));
    }
}

// What a thread needs for runs.
template <typename Number> struct RunRoom {
    Number *query, *keys, *values;
    float *scores, *sums;
    const Number* key_rows[RUN + 4];
    const Number* value_rows[RUN];
};

// Copies of numbers filled up with zeros to whole vectors.
template <typename Number, typename T> static void copied(const T* from, int64_t size, int64_t wide, Number* to) {
    for (int64_t i = 0; i < size; i++) to[i] = narrow<Number>(widen(from[i]));
    for (int64_t i = size; i < wide; i++) to[i] = narrow<Number>(0.0f);
}

// One run: for each head of the group its maximum, its sum and the weighted values, into `kept` (share, wide + 2).
template <typename Kind, typename T>
static void attend_run(const Call& call, const Task& task, const T* query, const T* keys, const T* values,
                       RunRoom<typename Kind::Number>& room, int64_t wide, float* kept) {
    typedef typename Kind::Number Number;
    const int64_t size = call.size, run = task.until - task.from, share = call.share();
    const bool near = sizeof(T) == sizeof(Number) && wide == size;
    for (int64_t k = 0; k < run; k++) {
        const int64_t at = (call.row(task.text, task.from + k) * call.groups + task.group) * size;
        if (near) {
            room.key_rows[k] = reinterpret_cast<const Number*>(keys + at);
            room.value_rows[k] = reinterpret_cast<const Number*>(values + at);
            continue;
        }
        copied(keys + at, size, wide, room.keys + k * wide);
        copied(values + at, size, wide, room.values + k * wide);
        room.key_rows[k] = room.keys + k * wide;
        room.value_rows[k] = room.values + k * wide;
    }
    for (int64_t k = run; k < up_to(run, 4); k++) room.key_rows[k] = room.key_rows[run - 1];
    for (int64_t h = 0; h < share; h++) {
        copied(query + (task.token * call.heads + task.group * share + h) * size, size, wide, room.query);
        float* scores = room.scores + h * RUN;
        score<Kind>(room.query, room.key_rows, run, wide, scores);
        scores_to_weights(scores, 1, run - 1, EVERYTHING, run, call.scale, kept + h * (wide + 2), kept + h * (wide + 2) + 1);
    }
    weigh_heads(room.scores, room.value_rows, run, wide, share, room.sums);
    for (int64_t h = 0; h < share; h++)
        std::memcpy(kept + h * (wide + 2) + 2, room.sums + h * wide, sizeof(float) * wide);
}

// The runs of a token with a head, put together in their order; the maximum of each becomes its factor.
template <typename T> static void put_together(float* kept, int64_t runs, int64_t apart, int64_t size, T* out) {
    float most = kept[0], sum = 0.0f;
    for (int64_t run = 1; run < runs; run++) most = kept[run * apart] > most ? kept[run * apart] : most;
    for (int64_t run = 0; run < runs; run++) {
        kept[run * apart] = runs == 1 ? 1.0f : std::exp(kept[run * apart] - most);
        sum += kept[run * apart] * kept[run * apart + 1];
    }
    for (int64_t i = 0; i < size; i++) {
        float found = 0.0f;
        for (int64_t run = 0; run < runs; run++) found += kept[run * apart] * kept[run * apart + 2 + i];
        out[i] = narrow<T>(found / sum);
    }
}

// What a thread needs for the parts of texts with many new tokens.
template <typename Step, typename T> struct PartRoom {
    typename Step::Word *keys, *values, *block, *weights;
    float *scores, *heads_out;
    T* gathered;
};

template <typename Step, typename T>
static void attend_part(const Call& call, const Task& task, const T* query, const T* keys, const T* values, T* out,
                        const PartRoom<Step, T>& room) {
    const int64_t size = call.size, steps = size / Step::NUMBERS, wide = up_to(size, LANES), share = call.share();
    const int64_t stride = call.heads * size, start = call.starts[task.text];
    const int64_t before = call.counts[task.text] - call.fresh(task.text);
    const int64_t low = call.first_seen(before + task.from), all = before + task.until - low;
    const int64_t padded = up_to(all, LANES);
    const auto gather = [&](const T* flat) {
        for (int64_t k = 0; k < all; k++)
            std::memcpy(static_cast<void*>(room.gathered + k * size),
                        flat + (call.row(task.text, low + k) * call.groups + task.group) * size, sizeof(T) * size);
    };
    gather(keys);
    pack_across<Step, T>(room.gathered, size, all, size, padded, room.keys);
    gather(values);
    pack_along<Step, T>(room.gathered, size, all, size, wide, room.values);
    float most[BLOCK], sum[BLOCK];
    for (int64_t head = task.group * share; head < (task.group + 1) * share; head++)
        for (int64_t first = task.from; first < task.until; first += BLOCK) {
            const int64_t rows = std::min(BLOCK, task.until - first), last = before + first - low;
            const int64_t reached = last + rows, seen = up_to(reached, LANES);
            const int64_t at = (start + first) * stride + head * size;
            const Left<Step, T> asked(query + at, stride, rows, size, room.block);
            product<Step, false>(asked.at, asked.row, 1, room.keys, padded, steps, room.scores, seen, rows, seen);
            scores_to_weights(room.scores, rows, last, call.window, seen, call.scale, most, sum);
            words_of_rows<Step>(room.scores, rows, seen, room.weights);
            product<Step, false>(room.weights, seen / Step::NUMBERS, 1, room.values, wide,
                                 up_to(reached, Step::NUMBERS) / Step::NUMBERS, room.heads_out, wide, rows, wide);
            for (int64_t row = 0; row < rows; row++) {
                T* to = out + at + row * stride;
                const float factor = 1.0f / sum[row];
#pragma omp simd
                for (int64_t i = 0; i < size; i++) to[i] = narrow<T>(room.heads_out[row * wide + i] * factor);
            }
        }
}

// The tasks of a call, parts first, and where the runs of each token with each key head begin.
struct Plan {
    std::vector<Task> tasks;
    struct Token { int64_t row, group, slot, runs; };
    std::vector<Token> tokens;
    int64_t slots = 0, most_keys = 0, work = 0;
    explicit Plan(const Call& call) {
        for (int64_t text = 0; text < call.texts; text++) {
            const int64_t fresh = call.fresh(text), before = call.counts[text] - fresh;
            work += fresh * call.counts[text] * call.heads * call.size;
            if (fresh <= SPEAKS) continue;
            for (int64_t from = 0; from < fresh; from += PART * BLOCK) {
                const int64_t until = std::min(fresh, from + PART * BLOCK);
                most_keys = std::max(most_keys, before + until - call.first_seen(before + from));
                for (int64_t group = 0; group < call.groups; group++) tasks.push_back({text, group, from, until, 0, -1});
            }
        }
        for (int64_t text = 0; text < call.texts; text++) {
            const int64_t fresh = call.fresh(text), before = call.counts[text] - fresh;
            for (int64_t i = 0; fresh <= SPEAKS && i < fresh; i++) {
                const int64_t place = before + i, low = call.first_seen(place), row = call.starts[text] + i;
                for (int64_t group = 0; group < call.groups; group++) {
                    tokens.push_back({row, group, slots, 0});
                    for (int64_t from = low; from <= place; from += RUN) {
                        tasks.push_back({text, group, from, std::min(place + 1, from + RUN), row, slots++});
                        tokens.back().runs++;
                    }
                }
            }
        }
    }
};

template <typename Step, typename T>
int attend(const T* query, const T* keys, const T* values, T* out, const Call& call) {
    typedef typename KindOf<T>::Kind Kind;
    typedef typename Kind::Number Number;
    typedef typename Step::Word Word;
    const Plan plan(call);
    const int64_t size = call.size, steps = size / Step::NUMBERS, lanes = up_to(size, LANES), share = call.share();
    const int64_t wide = up_to(size, Kind::WIDE), apart = share * (wide + 2), most_keys = up_to(plan.most_keys, LANES);
    // Keys are only copied where they cannot be read as they lie.
    const int64_t runs = sizeof(T) == sizeof(Number) && wide == size ? 0 : RUN;
    const int64_t tokens = plan.tokens.size(), tasks = plan.tasks.size();
    std::vector<float> kept(plan.slots * apart);
    const int64_t rows = most_keys > 0 ? BLOCK : 0;
    const Rooms rooms(4 * (3 * most_keys * lanes + 2 * rows * most_keys + rows * (steps + lanes)) +
                      4 * (2 * runs * wide + share * (RUN + wide) + wide) + 64 * 13);
    if (rooms.at == nullptr) return 1;
    const auto work = [&](int64_t i, int member) {
        auto shelf = rooms.of(member);
        PartRoom<Step, T> part;
        part.keys = shelf.template take<Word>(steps * most_keys);
        part.values = shelf.template take<Word>(most_keys * lanes);
        part.block = shelf.template take<Word>(rows * steps);
        part.weights = shelf.template take<Word>(rows * most_keys);
        part.scores = shelf.template take<float>(rows * most_keys);
        part.heads_out = shelf.template take<float>(rows * lanes);
        part.gathered = shelf.template take<T>(most_keys * size);
        RunRoom<Number> room;
        room.query = shelf.template take<Number>(wide);
        room.keys = shelf.template take<Number>(runs * wide);
        room.values = shelf.template take<Number>(runs * wide);
        room.scores = shelf.template take<float>(share * RUN);
        room.sums = shelf.template take<float>(share * wide);
        const Task& task = plan.tasks[i];
        if (task.slot < 0) attend_part<Step, T>(call, task, query, keys, values, out, part);
        else attend_run<Kind, T>(call, task, query, keys, values, room, wide, kept.data() + task.slot * apart);
    };
    Team::run(tasks, work, plan.work > ALONE);
    for (int64_t i = 0; i < tokens; i++) {
        const Plan::Token& token = plan.tokens[i];
        for (int64_t h = 0; h < share; h++) {
            T* to = out + (token.row * call.heads + token.group * share + h) * size;
            put_together(kept.data() + token.slot * apart + h * (wide + 2), token.runs, apart, size, to);
        }
    }
    return 0;
}

}  // namespace

#define FOR_BOTH(T, STEP, NAME)                                                                                        \
    extern "C" int attend_pages_##NAME(const T* query, const T* keys, const T* values, T* out, const int64_t* pages,   \
                                       const int64_t* counts, const int64_t* starts, int64_t texts, int64_t most,      \
                                       int64_t page, int64_t heads, int64_t groups, int64_t size, float scale,         \
                                       int64_t window) {                                                               \
        const Call call{pages, counts, starts, texts, most, page, heads, groups, size, scale, window};                 \
        try {                                                                                                          \
            return attend<STEP, T>(query, keys, values, out, call);                                                    \
        } catch (const std::bad_alloc&) {                                                                              \
            return 1;                                                                                                  \
        }                                                                                                              \
    }

FOR_BOTH(float, Single, float32)
FOR_BOTH(bf16, StepOfHalves, bfloat16)
