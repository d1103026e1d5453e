// Words: a table from words to their tokens, and texts cut into words and put together from it. See ../words.py.
//
// Idea: cutting and looking up is nearly all there is to do for a text whose words are known, and takes some twenty
// nanoseconds a word here. Many texts are cut in one call, which remembers the place of each word in the table and tells
// those that are new; the tokenizer is asked for these elsewhere, and a second call writes the tokens of all texts.
//
// A control token is one word, and so is what is not ASCII with its surroundings, as in data/words.py. Records are as
// there: three int32 a token, its id, how far it begins behind the end of the one before (-1 in the middle of a
// character), and how many characters it has.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cuts.h"
#include "spellings.h"

namespace {

struct Token {
    int32_t id, gap, size;
};

// A word: where its bytes and its tokens begin, and how many there are; -1 tokens for a word that is asked for, since
// this call. Numbers are small where they can be, as look-ups wait for memory.
struct Entry {
    int64_t key;
    int32_t tokens, count, call;
};

// A place in the table, with the first bytes of its word: of most words there are no more, and nothing else is read.
struct Slot {
    uint64_t head;
    uint32_t hash;
    int32_t size, entry;  // -1 for a place that is free
};
constexpr Slot FREE{0, 0, 0, -1};

// A word of a text that was cut: its entry, and the byte of the text where it ends.
struct Piece {
    int32_t entry, end;
};

inline uint64_t eight(At at) {
    uint64_t piece;
    std::memcpy(&piece, at, 8);
    return piece;
}

// A word, its first eight bytes, with zeros where it has fewer, and its hash.
struct Word {
    At at, end;
    uint64_t head;
    uint32_t hash;

    // Nothing is read from `limit` on.
    Word(At at, At end, At limit) : at(at), end(end), head(0) {
        int64_t size = end - at;
        if (limit - at >= 8)
            head = size < 8 ? eight(at) & ((uint64_t(1) << (8 * size)) - 1) : eight(at);
        else
            std::memcpy(&head, at, size_t(size));
        uint64_t total = (0x9E3779B97F4A7C15ull ^ uint64_t(size) ^ head) * 0xD6E8FEB86659FD93ull;
        for (At each = at + 8; each < end; each += 8) {
            total ^= total >> 32;
            total = (total ^ eight(std::min(each, end - 8))) * 0xD6E8FEB86659FD93ull;
        }
        hash = uint32_t(total >> 32);
    }

    int64_t size() const { return end - at; }
};

struct Words {
    int32_t pattern = 0;
    std::vector<Slot> table;
    std::vector<Entry> entries;
    std::vector<uint8_t> keys;
    std::vector<Token> tokens;
    std::vector<std::pair<int64_t, int64_t>> controls;  // texts of control tokens in `control_bytes`, the longest first
    std::vector<uint8_t> control_bytes;
    bool may_begin[256] = {};  // whether a control token begins with this byte
    int32_t call = 1;
    size_t sure = 0;      // of so many entries the tokens are known
    At limit = nullptr;  // where the bytes end that are cut
    // What was cut last: the words of all texts, where each text's end, and the bytes of words that are not known.
    std::vector<Piece> cut;
    std::vector<int64_t> ends;
    std::vector<std::pair<int64_t, int64_t>> missing;

    void clear() {
        table.assign(1 << 12, FREE);
        entries = {};
        keys = {};
        tokens = {};
        sure = 0;
        forget_cut();
    }

    void forget_cut() {
        cut.clear();
        ends.clear();
        missing.clear();
    }

    // The slot of a word, or the free one where it would be.
    Slot* find(const Word& word) {
        uint64_t mask = table.size() - 1;
        for (uint64_t place = word.hash & mask;; place = (place + 1) & mask) {
            Slot* slot = &table[place];
            if (slot->entry < 0) return slot;
            if (slot->head != word.head || slot->hash != word.hash || slot->size != word.size()) continue;
            if (slot->size <= 8) return slot;
            const Entry& entry = entries[size_t(slot->entry)];
            if (!std::memcmp(keys.data() + entry.key, word.at, size_t(slot->size))) return slot;
        }
    }

    int32_t add(Slot* free, const Word& word) {
        if (entries.size() * 2 >= table.size()) {
            std::vector<Slot> old(table.size() * 2, FREE);
            old.swap(table);
            uint64_t mask = table.size() - 1;
            for (const Slot& slot : old) {
                if (slot.entry < 0) continue;
                uint64_t place = slot.hash & mask;
                while (table[place].entry >= 0) place = (place + 1) & mask;
                table[place] = slot;
            }
            free = find(word);
        }
        *free = Slot{word.head, word.hash, int32_t(word.size()), int32_t(entries.size())};
        entries.push_back({int64_t(keys.size()), 0, -1, 0});
        keys.insert(keys.end(), word.at, word.end);
        return free->entry;
    }

    // A word of the text that begins at `text`, all texts being in `bytes`.
    void take(At bytes, At text, const Word& word) {
        Slot* slot = find(word);
        int32_t found = slot->entry < 0 ? add(slot, word) : slot->entry;
        if (size_t(found) >= sure) {
            Entry& entry = entries[size_t(found)];
            if (entry.count < 0 && entry.call != call) {
                entry.call = call;
                missing.push_back({word.at - bytes, word.end - bytes});
            }
        }
        cut.push_back({found, int32_t(word.end - text)});
    }

    void take_ascii(At bytes, At text, At at, At end) {
        while (at < end) {
            At after = next_word(pattern, at, end);
            take(bytes, text, Word(at, after, limit));
            at = after;
        }
    }

    // What stands between two control tokens.
    void take_plain(At bytes, At text, At at, At end) {
        At other = at;
        while (true) {
            while (other < end && *other < 128) other++;
            if (other == end) break;
            At start = cut_before(at, other);
            while (other < end && *other >= 128) other++;
            take_ascii(bytes, text, at, start);
            at = other = cut_after(other, end);
            take(bytes, text, Word(start, at, limit));
        }
        take_ascii(bytes, text, at, end);
    }

    // How many bytes the control token has that begins here; 0 for none.
    int64_t control(At at, At end) const {
        for (auto [start, size] : controls)
            if (size <= end - at && !std::memcmp(control_bytes.data() + start, at, size_t(size))) return size;
        return 0;
    }

    // The words of the bytes from `at` to `end` in the text that begins at `text`.
    void take_text(At bytes, At text, At at, At end) {
        At done = at;
        while (at < end) {
            int64_t size = may_begin[*at] ? control(at, end) : 0;
            if (!size) {
                at++;
                continue;
            }
            take_plain(bytes, text, done, at);
            take(bytes, text, Word(at, at + size, limit));
            done = at += size;
        }
        take_plain(bytes, text, done, end);
        ends.push_back(int64_t(cut.size()));
    }
};

}  // namespace

extern "C" {

// Words that are cut by a pattern, but for control tokens: the bytes up to each of `ends`, the longest first.
void* words_new(int32_t pattern, const uint8_t* bytes, const int64_t* ends, int64_t count) {
    Words* words = new Words;
    words->pattern = pattern;
    int64_t begin = 0;
    for (int64_t place = 0; place < count; place++) {
        words->controls.push_back({begin, ends[place] - begin});
        words->may_begin[bytes[begin]] = true;
        begin = ends[place];
    }
    words->control_bytes.assign(bytes, bytes + begin);
    words->clear();
    return words;
}

void words_free(void* words) { delete static_cast<Words*>(words); }

void words_clear(void* words) { static_cast<Words*>(words)->clear(); }

// The words that are remembered, and their tokens.
void words_sizes(void* given, int64_t* sizes) {
    const Words& words = *static_cast<Words*>(given);
    sizes[0] = int64_t(words.entries.size());
    sizes[1] = int64_t(words.tokens.size());
}

// Remember `count` words, the bytes up to each of `ends`, each with the tokens up to its one of `token_ends`.
void words_put(void* given, const uint8_t* bytes, const int64_t* ends, const int32_t* records,
               const int64_t* token_ends, int64_t count) {
    Words& words = *static_cast<Words*>(given);
    int64_t begin = 0, token = 0;
    for (int64_t index = 0; index < count; index++) {
        Word word(bytes + begin, bytes + ends[index], bytes + ends[count - 1]);
        Slot* slot = words.find(word);
        Entry& entry = words.entries[size_t(slot->entry < 0 ? words.add(slot, word) : slot->entry)];
        entry.tokens = int32_t(words.tokens.size());
        entry.count = int32_t(token_ends[index] - token);
        for (; token < token_ends[index]; token++)
            words.tokens.push_back({records[token * 3], records[token * 3 + 1], records[token * 3 + 2]});
        begin = ends[index];
    }
}

// Cut texts, the bytes up to each of `ends`, and beginnings of them: that of text like[b] up to its character stop[b].
// Returns how many words are not known, which are to be put before their tokens are written.
int64_t words_cut(void* given, const uint8_t* bytes, const int64_t* ends, int64_t texts, const int64_t* like,
                  const int64_t* stop, int64_t begun) {
    Words& words = *static_cast<Words*>(given);
    words.call++;
    words.forget_cut();
    words.limit = texts ? bytes + ends[texts - 1] : bytes;
    while (words.sure < words.entries.size() && words.entries[words.sure].count >= 0) words.sure++;
    for (int64_t text = 0; text < texts; text++) {
        At start = bytes + (text ? ends[text - 1] : 0);
        words.take_text(bytes, start, start, bytes + ends[text]);
    }
    for (int64_t each = 0; each < begun; each++) {
        int64_t text = like[each];
        At start = bytes + (text ? ends[text - 1] : 0), end = start, last = bytes + ends[text];
        for (int64_t left = stop[each]; end < last; end++)
            if ((*end & 0xC0) != 0x80 && left-- == 0) break;
        // As the text itself is cut up to the last place where any text is, and from there on by itself.
        At edge = cut_before(start, end);
        int64_t piece = text ? words.ends[size_t(text - 1)] : 0, own = words.ends[size_t(text)];
        size_t before = words.cut.size();
        for (; piece < own && words.cut[size_t(piece)].end <= edge - start; piece++)
            words.cut.push_back(Piece(words.cut[size_t(piece)]));
        if (words.cut.size() == before ? edge > start : words.cut.back().end != edge - start) {
            words.cut.resize(before);
            edge = start;
        }
        words.take_text(bytes, start, edge, end);
    }
    return int64_t(words.missing.size());
}

// The [start, end) bytes of `count` words that were not known when texts were cut, from the one at `first` on.
void words_missing(void* given, int64_t first, int64_t count, int64_t* found) {
    const Words& words = *static_cast<Words*>(given);
    for (int64_t place = 0; place < count; place++) {
        found[2 * place] = words.missing[size_t(first + place)].first;
        found[2 * place + 1] = words.missing[size_t(first + place)].second;
    }
}

// How many tokens the texts have that were cut last; -1 where a word is not known.
int64_t words_count(void* given) {
    const Words& words = *static_cast<Words*>(given);
    int64_t total = 0;
    for (const Piece& piece : words.cut) {
        if (words.entries[size_t(piece.entry)].count < 0) return -1;
        total += words.entries[size_t(piece.entry)].count;
    }
    return total;
}

// The tokens of what was cut last, texts and then beginnings. Written are ids, spans (start, end) in characters of their
// text, for each text where its tokens end and how many characters they make up, and whether no token begins behind the
// end of all before it in its text.
void words_write(void* given, int32_t* ids, int32_t* spans, int64_t* token_ends, int64_t* characters,
                 int32_t* covered) {
    const Words& words = *static_cast<Words*>(given);
    *covered = 1;
    int64_t token = 0, piece = 0;
    for (size_t text = 0; text < words.ends.size(); text++) {
        int64_t character = 0;
        int32_t covers = 0;
        for (; piece < words.ends[text]; piece++) {
            const Entry& entry = words.entries[size_t(words.cut[size_t(piece)].entry)];
            const Token* each = words.tokens.data() + entry.tokens;
            for (int32_t index = 0; index < entry.count; index++, each++, token++) {
                ids[token] = each->id;
                int32_t start = int32_t(character += each->gap), after = int32_t(character += each->size);
                if (start > covers) *covered = 0;
                covers = std::max(covers, after);
                spans[token * 2] = start;
                spans[token * 2 + 1] = after;
            }
        }
        token_ends[text] = token;
        characters[text] = character;
    }
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
