// A weight in codes of four bits: two in a byte, the first of them in its high half, a scale for each block of numbers,
// and sixteen levels. Scales are floats, or codes of levels times a number for each group of them, plus a mean. Blocks
// run through the rows from one into the next.

#pragma once

#include <cstdint>

// As Python lays it out: see native_codes.py.
struct Pairs {
    const uint8_t* codes;
    const float* scales;
    const uint8_t* scale_codes;
    const float *scale_levels, *levels;
    int64_t group, block;  // scales with one number, numbers with one scale
    float mean;
};

// The scales of one block after another: a division for each takes longer than what is done with it.
class Walk {
  public:
    Walk(const Pairs& pairs, int64_t block)
        : own(&pairs), block(block), number(block / pairs.group), left(pairs.group - block % pairs.group) {}
    float next() {
        if (own->scale_codes == nullptr) return own->scales[block++];
        if (left-- == 0) number++, left = own->group - 1;
        return own->scale_levels[own->scale_codes[block++]] * own->scales[number] + own->mean;
    }

  private:
    const Pairs* own;
    int64_t block, number, left;  // the next block, the number its scale goes with, and how many more do
};
