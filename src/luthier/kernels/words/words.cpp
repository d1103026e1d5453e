// Words: a table from words to their tokens, and texts cut into words and put together from it. See ../words.py.
//
// Idea: cutting and looking up is nearly all there is to do for a text whose words are known, and takes some twenty
// nanoseconds a word here. A word that is not known is told, once a call; the tokenizer is asked for it elsewhere.
// A text comes in parts: some are ASCII, which is cut here, others are one word each, whatever they hold.
//
// The cuts are those of data/words.py for ASCII, where the patterns stand as regular expressions; written out, each is
// one pass over the signs. Records are as there: three int32 a token, its id, how far it begins behind the end of the
// one before (-1 in the middle of a character), and how many characters it has.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "spellings.h"

namespace {

enum Sign : uint8_t { OTHER, UPPER, LOWER, DIGIT, SPACE, WHITE, BREAK };  // WHITE and BREAK: other white space

struct Signs {
    Sign of[256];
    Signs() {
        for (int code = 0; code < 256; code++) {
            of[code] = code >= 'A' && code <= 'Z'     ? UPPER
                       : code >= 'a' && code <= 'z'   ? LOWER
                       : code >= '0' && code <= '9'   ? DIGIT
                       : code == ' '                  ? SPACE
                       : code == '\n' || code == '\r' ? BREAK
                       : code == '\t' || code == '\v' || code == '\f' ? WHITE
                                                      : OTHER;
        }
    }
};
const Signs signs;

inline Sign sign(uint8_t code) { return signs.of[code]; }
inline bool is_letter(uint8_t code) { return sign(code) == UPPER || sign(code) == LOWER; }
inline bool is_white(uint8_t code) { return sign(code) >= SPACE; }

using At = const uint8_t*;

template <bool (*belongs)(uint8_t)>
inline At run(At at, At end) {
    while (at < end && belongs(*at)) at++;
    return at;
}
inline bool is_digit(uint8_t code) { return sign(code) == DIGIT; }
inline bool is_other(uint8_t code) { return sign(code) == OTHER; }
inline bool is_break(uint8_t code) { return sign(code) == BREAK; }

// 's 't 'm 'd 're 've 'll at an apostrophe; where it ends, or nullptr.
template <bool any_case>
inline At contraction(At at, At end) {
    auto small = [](uint8_t code) { return any_case && sign(code) == UPPER ? uint8_t(code + 32) : code; };
    if (at + 1 < end) {
        uint8_t first = small(at[1]);
        if (first == 's' || first == 't' || first == 'm' || first == 'd') return at + 2;
        if (at + 2 < end) {
            uint8_t second = small(at[2]);
            if ((first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l'))
                return at + 3;
        }
    }
    return nullptr;
}

// \s+(?!\S)|\s+ : white space up to the last of it, which belongs to what follows; alone when there is one.
inline At white(At at, At end) {
    At stop = run<is_white>(at, end);
    return stop == end || stop - at == 1 ? stop : stop - 1;
}

// Where the word that begins at `at` ends: 's|...| ?L+| ?N+| ?[^\sLN]+|\s+(?!\S)|\s+
inline At next_gpt2(At at, At end) {
    if (*at == '\'')
        if (At stop = contraction<false>(at, end)) return stop;
    At first = at + (*at == ' ');
    if (first < end && !is_white(*first)) {
        if (is_letter(*first)) return run<is_letter>(first, end);
        if (is_digit(*first)) return run<is_digit>(first, end);
        return run<is_other>(first, end);
    }
    return white(at, end);
}

// (?i:'s|...)|[^\r\nLN]?L+|N{1,n}| ?[^\sLN]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
template <int digits>
inline At next_llama3(At at, At end) {
    if (*at == '\'')
        if (At stop = contraction<true>(at, end)) return stop;
    Sign what = sign(*at);
    if (what == UPPER || what == LOWER) return run<is_letter>(at, end);
    if (what == DIGIT) {
        At stop = at;
        while (stop < end && stop - at < digits && is_digit(*stop)) stop++;
        return stop;
    }
    if (what != BREAK && at + 1 < end && is_letter(at[1])) return run<is_letter>(at + 1, end);
    At first = at + (*at == ' ');
    if (first < end && is_other(*first)) return run<is_break>(run<is_other>(first, end), end);
    At stop = run<is_white>(at, end);
    for (At last = stop; last > at; last--)
        if (is_break(last[-1])) return last;
    return white(at, end);
}

// '(?:[sdmt]|ll|ve|re)|Lu L*| ?(?!Lu)L+|N| ?[^\sLN]+|\s+(?!\S)|\s+
inline At next_seedling(At at, At end) {
    if (*at == '\'')
        if (At stop = contraction<false>(at, end)) return stop;
    if (sign(*at) == UPPER) return run<is_letter>(at, end);
    if (is_digit(*at)) return at + 1;
    At first = at + (*at == ' ');
    if (first < end) {
        if (sign(*first) == LOWER) return run<is_letter>(first, end);
        if (is_other(*first)) return run<is_other>(first, end);
    }
    return white(at, end);
}

struct Token {
    int32_t id, gap, size;
};

struct Entry {
    uint64_t hash;
    int64_t key, tokens;  // where they begin
    int32_t size, count;  // bytes; tokens, -1 for a word that is asked for
    int64_t call;         // in which call it was asked for; 0 for a place that is free
};

inline uint64_t hashed(At word, int64_t size) {
    uint64_t total = 0x9E3779B97F4A7C15ull ^ uint64_t(size);
    while (size >= 8) {
        uint64_t piece;
        std::memcpy(&piece, word, 8);
        total = (total ^ piece) * 0xD6E8FEB86659FD93ull;
        total ^= total >> 32;
        word += 8;
        size -= 8;
    }
    uint64_t piece = 0;
    std::memcpy(&piece, word, size_t(size));
    total = (total ^ piece) * 0xD6E8FEB86659FD93ull;
    return total ^ (total >> 29);
}

struct Words {
    int32_t pattern = 0;
    std::vector<Entry> table;
    std::vector<uint8_t> keys;
    std::vector<Token> tokens;
    int64_t used = 0, call = 1;

    void clear() {
        table.assign(1 << 12, Entry{});
        keys = {};
        tokens = {};
        used = 0;
    }

    // The place of a word, or the free one where it would be.
    Entry* find(At word, int64_t size, uint64_t hash) {
        uint64_t mask = table.size() - 1;
        for (uint64_t place = hash & mask;; place = (place + 1) & mask) {
            Entry* entry = &table[place];
            if (!entry->call) return entry;
            if (entry->hash == hash && entry->size == size &&
                !std::memcmp(keys.data() + entry->key, word, size_t(size)))
                return entry;
        }
    }

    Entry* add(Entry* free, At word, int64_t size, uint64_t hash) {
        if (size_t(used) * 2 >= table.size()) {
            std::vector<Entry> old(table.size() * 2);
            old.swap(table);
            for (const Entry& entry : old)
                if (entry.call) *find(keys.data() + entry.key, entry.size, entry.hash) = entry;
            free = find(word, size, hash);
        }
        *free = Entry{hash, int64_t(keys.size()), 0, int32_t(size), -1, call};
        keys.insert(keys.end(), word, word + size);
        used++;
        return free;
    }

    At next(At at, At end) const {
        switch (pattern) {
            case 0: return next_gpt2(at, end);
            case 1: return next_llama3<3>(at, end);
            case 2: return next_llama3<1>(at, end);
            default: return next_seedling(at, end);
        }
    }
};

}  // namespace

extern "C" {

void* words_new(int32_t pattern) {
    Words* words = new Words;
    words->pattern = pattern;
    words->clear();
    return words;
}

void words_free(void* words) { delete static_cast<Words*>(words); }

void words_clear(void* words) { static_cast<Words*>(words)->clear(); }

// The words that are remembered, and their tokens.
void words_sizes(void* given, int64_t* sizes) {
    const Words& words = *static_cast<Words*>(given);
    sizes[0] = words.used;
    sizes[1] = int64_t(words.tokens.size());
}

// Remember `count` words, the bytes up to each of `ends`, each with the tokens up to its one of `token_ends`.
void words_put(void* given, const uint8_t* bytes, const int64_t* ends, const int32_t* records,
               const int64_t* token_ends, int64_t count) {
    Words& words = *static_cast<Words*>(given);
    int64_t begin = 0, token = 0;
    for (int64_t index = 0; index < count; index++) {
        At word = bytes + begin;
        int64_t size = ends[index] - begin;
        uint64_t hash = hashed(word, size);
        Entry* entry = words.find(word, size, hash);
        if (!entry->call) entry = words.add(entry, word, size, hash);
        entry->tokens = int64_t(words.tokens.size());
        entry->count = int32_t(token_ends[index] - token);
        for (; token < token_ends[index]; token++)
            words.tokens.push_back({records[token * 3], records[token * 3 + 1], records[token * 3 + 2]});
        begin = ends[index];
    }
}

// The tokens of texts. Part p is the bytes up to ends[p], one word where whole[p] is set; text t is the parts up to
// last[t], behind the tokens of the earlier text like[t] that end up to its character stop[t], where like[t] is not
// negative. Written are ids, spans (start, end) in characters of their text, for each text where its tokens end and how
// many characters they make up, whether no token begins behind the end of all before it in its text, and the
// [start, end) bytes of words that are not known, as many as there is room for.
// Returns the number of unknown words, to be put before this is called again, or -1 where there is no room for tokens.
int64_t words_encode(void* given, const uint8_t* bytes, const int64_t* ends, const uint8_t* whole, const int64_t* last,
                     const int64_t* like, const int64_t* stop, int64_t texts, int32_t* ids, int32_t* spans, int64_t room, int64_t* token_ends,
                     int64_t* characters, int32_t* covered, int64_t* unknown, int64_t unknown_room) {
    Words& words = *static_cast<Words*>(given);
    words.call++;
    *covered = 1;
    int64_t missing = 0, token = 0, part = 0, begin = 0;
    for (int64_t text = 0; text < texts; text++) {
        int64_t character = 0;
        int32_t covers = 0;
        if (like[text] >= 0 && !missing) {
            int64_t other = like[text] ? token_ends[like[text] - 1] : 0, other_end = token_ends[like[text]];
            for (; other < other_end && spans[other * 2 + 1] <= stop[text]; other++, token++) {
                if (token == room) return -1;
                if (spans[other * 2] > covers) *covered = 0;
                covers = std::max(covers, spans[other * 2 + 1]);
                ids[token] = ids[other];
                spans[token * 2] = spans[other * 2];
                spans[token * 2 + 1] = spans[other * 2 + 1];
            }
            character = stop[text];
        }
        for (; part < last[text]; part++) {
            At at = bytes + begin, end = bytes + ends[part];
            begin = ends[part];
            while (at < end) {
                At after = whole[part] ? end : words.next(at, end);
                int64_t size = after - at;
                uint64_t hash = hashed(at, size);
                Entry* entry = words.find(at, size, hash);
                if (!entry->call || (entry->count < 0 && entry->call != words.call)) {
                    if (missing == unknown_room) return missing;
                    if (!entry->call) entry = words.add(entry, at, size, hash);
                    entry->call = words.call;
                    unknown[missing * 2] = at - bytes;
                    unknown[missing * 2 + 1] = after - bytes;
                    missing++;
                }
                at = after;
                if (missing) continue;
                if (token + entry->count > room) return -1;
                const Token* each = words.tokens.data() + entry->tokens;
                for (int32_t index = 0; index < entry->count; index++, each++, token++) {
                    ids[token] = each->id;
                    int32_t start = int32_t(character += each->gap), after = int32_t(character += each->size);
                    if (start > covers) *covered = 0;
                    covers = std::max(covers, after);
                    spans[token * 2] = start;
                    spans[token * 2 + 1] = after;
                }
            }
        }
        token_ends[text] = token;
        characters[text] = character;
    }
    return missing;
}

// The bytes of tokens, by id.

void* spellings_new() { return new Spellings; }

void spellings_free(void* spellings) { delete static_cast<Spellings*>(spellings); }

// Remember what `count` tokens stand for: the bytes up to each of `ends`.
void spellings_put(void* given, const int64_t* ids, const uint8_t* bytes, const int64_t* ends, int64_t count) {
    Spellings& known = *static_cast<Spellings*>(given);
    int64_t begin = int64_t(known.bytes.size()), done = 0;
    if (count) known.bytes.insert(known.bytes.end(), bytes, bytes + ends[count - 1]);
    for (int64_t place = 0; place < count; place++) {
        if (size_t(ids[place]) >= known.tokens.size()) known.tokens.resize(size_t(ids[place]) + 1, {0, -1});
        known.tokens[size_t(ids[place])] = {begin + done, ends[place] - done};
        done = ends[place];
    }
}

// The bytes of `count` tokens one behind the other, and how many there are; -1 - place for a token that is not known or
// has no room any more.
int64_t spellings_text(void* given, const int32_t* ids, int64_t count, uint8_t* out, int64_t room) {
    const Spellings& known = *static_cast<Spellings*>(given);
    int64_t done = 0;
    for (int64_t place = 0; place < count; place++) {
        int64_t id = ids[place];
        if (id < 0 || size_t(id) >= known.tokens.size()) return -1 - place;
        auto [start, size] = known.tokens[size_t(id)];
        if (size < 0 || size > room - done) return -1 - place;
        std::memcpy(out + done, known.bytes.data() + start, size_t(size));
        done += size;
    }
    return done;
}
}
