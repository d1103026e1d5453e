// Where words end: the patterns of data/word_patterns.py for ASCII, each written out as one pass over the signs.
#pragma once

#include <cstdint>

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

// The last place from `start` to `end` where words are always cut, a letter before a space or a line break; else `start`.
inline At cut_before(At start, At end) {
    for (At at = end - 1; at > start; at--)
        if ((*at == ' ' || *at == '\n') && is_letter(at[-1])) return at;
    return start;
}

// The first such place behind `at`; else `end`.
inline At cut_after(At at, At end) {
    for (; at + 1 < end; at++)
        if (is_letter(*at) && (at[1] == ' ' || at[1] == '\n')) return at + 1;
    return end;
}

// Where the word ends that begins at `at`, by the pattern of this number in ../words.py.
inline At next_word(int32_t pattern, At at, At end) {
    switch (pattern) {
        case 0: return next_gpt2(at, end);
        case 1: return next_llama3<3>(at, end);
        case 2: return next_llama3<1>(at, end);
        default: return next_seedling(at, end);
    }
}

}  // namespace
