// The bytes that each token stands for. See ../words.py.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

struct Spellings {
    std::vector<std::pair<int64_t, int64_t>> tokens;  // where its bytes begin, and how many: -1 where nothing is known
    std::vector<uint8_t> bytes;
};
