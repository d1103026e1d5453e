// Rows: what is worked out of the tokens of many rows, in one pass over them each. See ../rows.py.
//
// Idea: a row has a hundred tokens, for which a call of numpy takes longer than the work; a row asks for thirty such
// calls. Each function here does what a few of them do, for all rows of a batch, which stand one behind the other: row r
// has the tokens up to ends[r]. Of a row that is not as nearly all are it says that it does not know; the twins in Python
// then look at it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "spellings.h"

namespace {

struct Set {
    const int32_t* ids;
    int64_t count;
    bool has(int32_t id) const {
        for (int64_t place = 0; place < count; place++)
            if (ids[place] == id) return true;
        return false;
    }
};

constexpr uint64_t START[8] = {0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
                               0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179};
constexpr uint8_t ORDER[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

// BLAKE2b with a digest of eight bytes and no key (RFC 7693).
class Digest {
    uint64_t state[8];
    uint8_t block[128];
    uint64_t length = 0;
    int64_t held = 0;

    template <int round>
    static inline void mixed(uint64_t* v, const uint64_t* words) {
        constexpr auto& s = ORDER[round % 10];
        auto turned = [](uint64_t value, int by) { return value >> by | value << (64 - by); };
        auto quarter = [&](uint64_t& a, uint64_t& b, uint64_t& c, uint64_t& d, uint64_t one, uint64_t two) {
            a += b + one;
            d = turned(d ^ a, 32);
            c += d;
            b = turned(b ^ c, 24);
            a += b + two;
            d = turned(d ^ a, 16);
            c += d;
            b = turned(b ^ c, 63);
        };
        quarter(v[0], v[4], v[8], v[12], words[s[0]], words[s[1]]);
        quarter(v[1], v[5], v[9], v[13], words[s[2]], words[s[3]]);
        quarter(v[2], v[6], v[10], v[14], words[s[4]], words[s[5]]);
        quarter(v[3], v[7], v[11], v[15], words[s[6]], words[s[7]]);
        quarter(v[0], v[5], v[10], v[15], words[s[8]], words[s[9]]);
        quarter(v[1], v[6], v[11], v[12], words[s[10]], words[s[11]]);
        quarter(v[2], v[7], v[8], v[13], words[s[12]], words[s[13]]);
        quarter(v[3], v[4], v[9], v[14], words[s[14]], words[s[15]]);
    }

    template <int... round>
    static inline void all_mixed(uint64_t* v, const uint64_t* words, std::integer_sequence<int, round...>) {
        (mixed<round>(v, words), ...);
    }

    void mix(const uint8_t* from, bool last) {
        uint64_t words[16], v[16];
        std::memcpy(words, from, 128);
        std::copy(state, state + 8, v);
        std::copy(START, START + 8, v + 8);
        v[12] ^= length;
        if (last) v[14] = ~v[14];
        all_mixed(v, words, std::make_integer_sequence<int, 12>{});
        for (int i = 0; i < 8; i++) state[i] ^= v[i] ^ v[i + 8];
    }

public:
    Digest() {
        std::copy(START, START + 8, state);
        state[0] ^= 0x01010000 ^ 8;
    }

    void add(const void* bytes, int64_t count) {
        const uint8_t* from = static_cast<const uint8_t*>(bytes);
        while (count) {
            if (held == 128) {  // more follows, so that this block is not the last one
                length += 128;
                mix(block, false);
                held = 0;
            }
            for (; !held && count > 128; count -= 128, from += 128) {
                length += 128;
                mix(from, false);
            }
            int64_t part = std::min<int64_t>(count, 128 - held);
            std::memcpy(block + held, from, size_t(part));
            held += part;
            from += part;
            count -= part;
        }
    }

    uint64_t end() {
        length += uint64_t(held);
        std::memset(block + held, 0, size_t(128 - held));
        mix(block, true);
        return state[0];
    }
};

// What Python's str.split() takes for white space.
inline bool is_blank(uint8_t code) { return code == 32 || (code >= 9 && code <= 13) || (code >= 28 && code <= 31); }

// Where a character of a text begins, as bytes of UTF-8; -1 where there is no such place.
inline int64_t byte_of(const uint8_t* text, int64_t size, int32_t ascii, int64_t character) {
    if (ascii || character < 0) return character <= size ? character : -1;
    for (int64_t place = 0; place < size; place++)
        if ((text[place] & 0xC0) != 0x80 && character-- == 0) return place;
    return character == 0 ? size : -1;
}

const uint8_t VIEW_END[4] = {255, 255, 255, 255};

struct Row {
    const int32_t* tokens;
    const float* weights;
    const int32_t* spans;
    int64_t count;
};

struct Text {
    const uint8_t* bytes;
    int64_t size;
    bool is_ascii() const {
        for (int64_t place = 0; place < size; place++)
            if (bytes[place] >= 128) return false;
        return true;
    }
};

// Whether a row begins with BOS and has no other; any row where there is none to begin with.
inline bool begins(const int32_t* tokens, int64_t count, int64_t bos) {
    return bos < 0 || (count && tokens[0] == bos && std::find(tokens + 1, tokens + count, bos) == tokens + count);
}

int64_t sound(const Spellings& known, Row row, Text text, Set stops, int64_t bos, int32_t* turns, int64_t room) {
    auto [tokens, weights, spans, count] = row;
    if (count < 1 || weights[0] != 0 || !begins(tokens, count, bos)) return -1;
    int64_t found = 0;
    for (int64_t place = 0; place < count; place++) {
        if (!(weights[place] >= 0 && weights[place] < INFINITY)) return -1;
        if (!(weights[place] > 0)) continue;
        if (!(weights[place - 1] > 0)) {
            if (found == room) return -1;
            turns[2 * found++] = int32_t(place);
        }
        bool ends = place + 1 == count || !(weights[place + 1] > 0);
        if (stops.has(tokens[place]) != ends) return -1;
        if (ends) turns[2 * found - 1] = int32_t(place + 1);
    }
    if (!found) return -1;
    int64_t first = 0, last = count;
    while (first < last && tokens[first] == bos) first++;
    while (last > first && stops.has(tokens[last - 1]) && spans[2 * last - 2] == spans[2 * last - 1]) last--;
    if (first == last) return found;
    int64_t from = spans[2 * first], to = from;
    for (int64_t place = first; place < last; place++) to = std::max<int64_t>(to, spans[2 * place + 1]);
    bool ascii = text.is_ascii();
    int64_t at = byte_of(text.bytes, text.size, ascii, from), end = byte_of(text.bytes, text.size, ascii, to);
    if (at < 0 || end < 0) return -1;
    for (int64_t place = first; place < last; place++) {
        int64_t id = tokens[place];
        if (id < 0 || size_t(id) >= known.tokens.size() || known.tokens[size_t(id)].second < 0) return -2 - place;
        auto [begin, length] = known.tokens[size_t(id)];
        if (length > end - at || std::memcmp(known.bytes.data() + begin, text.bytes + at, size_t(length)))
            return -1;
        at += length;
    }
    return at == end ? found : -1;
}

struct Turn {
    const int32_t* prompt;
    int64_t start;  // how many tokens the prompt has
    int32_t ending, behind;
    float weight;
};

// Where the turn ends, its tokens being given its weight; -1 where that cannot be said.
int64_t weigh(Row row, float* weights, Turn turn, Set stops, Set may_end) {
    if (turn.start > row.count || !std::equal(turn.prompt, turn.prompt + turn.start, row.tokens)) return -1;
    int64_t at = -1;
    for (int64_t place = turn.start; place < row.count && at < 0; place++) {
        if (row.spans[2 * place] < turn.ending) {
            if (stops.has(row.tokens[place])) return -1;
            continue;
        }
        if (row.spans[2 * place] >= turn.behind) return -1;
        if (stops.has(row.tokens[place]))
            at = place;
        else if (may_end.has(row.tokens[place]))
            return -1;
    }
    for (int64_t place = turn.start; place <= at; place++) weights[place] = turn.weight;
    return at;
}

// How each byte of an ASCII text is written without capitals; BLANK, which is not ASCII, for white space.
constexpr uint8_t BLANK = 255;
struct Folds {
    uint8_t of[256];
    Folds() {
        for (int code = 0; code < 256; code++)
            of[code] = is_blank(uint8_t(code)) ? BLANK : code >= 'A' && code <= 'Z' ? uint8_t(code + 32) : uint8_t(code);
    }
};
const Folds folds;

// `room` is for a text as it is without capitals and white space.
void marks(Row row, Text text, bool made, std::vector<uint8_t>& room, uint64_t* found) {
    Digest all, words, learned;
    all.add(row.tokens, row.count * 4);
    all.add(VIEW_END, 4);
    int64_t at = row.spans[0], end = std::min<int64_t>(row.spans[2 * row.count - 1], text.size), size = 0;
    if (made) words.add(text.bytes, text.size);
    if (!made && at < end) {
        room.resize(size_t(end - at + 1));
        bool gap = false;
        for (; at < end; at++) {
            uint8_t code = folds.of[text.bytes[at]];
            if (code == BLANK) {
                gap = size > 0;
                continue;
            }
            if (gap) room[size_t(size++)] = ' ';
            gap = false;
            room[size_t(size++)] = code;
        }
        words.add(room.data(), size);
    }
    words.add(VIEW_END, 1);
    for (int64_t place = 0; place < row.count;) {
        int64_t from = place;
        while (place < row.count && row.weights[place] > 0) place++;
        learned.add(row.tokens + from, 4 * (place - from));
        while (place < row.count && !(row.weights[place] > 0)) place++;
    }
    learned.add(VIEW_END, 4);
    found[0] = all.end();
    found[1] = words.end();
    found[2] = learned.end();
}

int64_t answer(Row row, Set stops, Set specials) {
    int64_t trained = 0;
    bool ended = false, says = false;
    for (int64_t place = 0; place < row.count; place++) {
        if (!(row.weights[place] > 0)) continue;
        if (ended) return -1;
        trained++;
        ended = stops.has(row.tokens[place]);
        says = says || !(ended || specials.has(row.tokens[place]));
    }
    return ended && says ? trained - 1 : -1;
}

// Rows one behind the other, and their texts: those of row r.
struct Rows {
    const int32_t* tokens;
    const float* weights;
    const int32_t* spans;
    const int64_t* ends;
    int64_t before(int64_t row) const { return row ? ends[row - 1] : 0; }
    Row operator[](int64_t row) const {
        int64_t at = before(row);
        return {tokens + at, weights + at, spans + 2 * at, ends[row] - at};
    }
};

struct Texts {
    const uint8_t* bytes;
    const int64_t* ends;
    Text operator[](int64_t row) const {
        int64_t at = row ? ends[row - 1] : 0;
        return {bytes + at, ends[row] - at};
    }
};

}  // namespace

extern "C" {

// For each row its runs of tokens with weight, as [start, end) in `turns` up to its one of `turn_ends`, where the row is
// sound: weights are finite and none negative, the first is 0, some are not; each run ends in a stop token and has no
// other; the first token is BOS and no other (where that is not negative); and the tokens say the text of their spans,
// all but BOS and stop tokens without a text at the end.
// Written is how many runs there are; -1 where that cannot be said; -2 - place for a token that is not known.
void rows_sound(const void* known, const int32_t* tokens, const float* weights, const int32_t* spans,
                const int64_t* ends, int64_t rows, const uint8_t* bytes, const int64_t* byte_ends,
                const int32_t* stop_ids, int64_t stop_count, int64_t bos, int32_t* turns, const int64_t* turn_ends,
                int64_t* found) {
    Rows all{tokens, weights, spans, ends};
    Texts texts{bytes, byte_ends};
    for (int64_t row = 0; row < rows; row++) {
        int64_t from = row ? turn_ends[row - 1] : 0;
        found[row] = sound(*static_cast<const Spellings*>(known), all[row], texts[row], Set{stop_ids, stop_count}, bos,
                           turns + 2 * from, turn_ends[row] - from);
    }
}

// The role and the weight of each token. Message m's words end at the character bound_ends[m] and have the role
// bound_roles[m]; row r has the messages up to bound_stops[r] and the answers up to answer_stops[r]. Answer a begins
// behind its prompt, the tokens of `prompts` up to prompt_ends[a], the first from prompt_start on; what it says ends at
// the character endings[a], what the template writes behind that at behinds[a]. The first token there that is a stop
// token, or may be one (`end_ids`), ends the turn. Leading BOS and the first token have no weight.
// Written is for each answer where its turn ends, and `known`, whether all is as it should be: a row does not begin with
// one BOS, does not begin with a prompt, or a turn ends in no stop token or has one within, where it is 0.
void rows_weigh(const int32_t* tokens, const int32_t* spans, const int64_t* ends, int64_t rows,
                const int32_t* bound_ends, const uint8_t* bound_roles, const int64_t* bound_stops,
                const int32_t* prompts, int64_t prompt_start, const int64_t* prompt_ends, const int32_t* endings,
                const int32_t* behinds, const double* turn_weights, const int64_t* answer_stops,
                const int32_t* stop_ids, int64_t stop_count, const int32_t* end_ids, int64_t end_count, int64_t bos,
                uint8_t* roles, float* weights, int32_t* ats, uint8_t* known) {
    Set stops{stop_ids, stop_count}, may_end{end_ids, end_count};
    Rows all{tokens, weights, spans, ends};
    int64_t bound = 0, turn = 0;
    for (int64_t row = 0; row < rows; row++) {
        Row own = all[row];
        float* weight = weights + all.before(row);
        uint8_t* role = roles + all.before(row);
        int64_t bounds = bound_stops[row] - bound;
        const int32_t* first = bound_ends + bound;
        for (int64_t place = 0; place < own.count; place++) {
            int32_t begin = own.spans[2 * place];
            int64_t owner = std::upper_bound(first, first + bounds, begin) - first;
            role[place] = begin == own.spans[2 * place + 1] ? 0 : bound_roles[bound + std::min(owner, bounds - 1)];
            weight[place] = 0;
        }
        bool is_known = bos < 0 || (own.count && own.tokens[0] == bos && (own.count < 2 || own.tokens[1] != bos));
        for (; turn < answer_stops[row]; turn++) {
            int64_t from = turn ? prompt_ends[turn - 1] : prompt_start;
            Turn each{prompts + from, prompt_ends[turn] - from, endings[turn], behinds[turn],
                      float(turn_weights[turn])};
            if (bos >= 0 && !each.start) is_known = false;
            int64_t at = is_known ? weigh(own, weight, each, stops, may_end) : -1;
            is_known = at >= 0;
            ats[turn] = int32_t(at);
        }
        if (own.count) weight[0] = 0;
        known[row] = is_known;
        bound = bound_stops[row];
    }
}

// Digests of each row's tokens, of its words, and of its tokens with weight, as data/findings.py makes them. The words
// are those of an ASCII text from the first character of the first token to the last of the last one, without capitals
// and white space; or where `made` is set the text itself.
void rows_marks(const int32_t* tokens, const float* weights, const int32_t* spans, const int64_t* ends, int64_t rows,
                const uint8_t* bytes, const int64_t* byte_ends, const uint8_t* made, uint64_t* found) {
    Rows all{tokens, weights, spans, ends};
    Texts texts{bytes, byte_ends};
    std::vector<uint8_t> room;
    for (int64_t row = 0; row < rows; row++) marks(all[row], texts[row], made[row], room, found + 3 * row);
}

// For each row how many tokens with weight stand before the last of them, where that one is a stop token, no other is,
// and one of the others is not special; else -1.
void rows_answer(const int32_t* tokens, const float* weights, const int64_t* ends, int64_t rows,
                 const int32_t* stop_ids, int64_t stop_count, const int32_t* special_ids, int64_t special_count,
                 int64_t* found) {
    Rows all{tokens, weights, nullptr, ends};
    for (int64_t row = 0; row < rows; row++)
        found[row] = answer(all[row], Set{stop_ids, stop_count}, Set{special_ids, special_count});
}
}
