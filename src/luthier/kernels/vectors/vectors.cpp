// Inner products and weighted sums of long vectors as they lie in memory: float, or bfloat16 and float16 as their bits.
//
// Vectors are taken in tiles that the first cache holds: widened once, and all that is asked of them is done there. So
// memory is read once whatever is computed. Sums of a tile are in float, over lanes; those of tiles in double.

#include <cmath>
#include <cstring>

#include "../native/numbers.h"

namespace {

constexpr int64_t TILE = 1024, LANES = 32, MOST = 16, BUCKETS = 64;
enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

void widen_tile(const void* from, int64_t kind, int64_t first, int64_t count, float* to) {
    if (kind == FLOAT32) {
        std::memcpy(to, static_cast<const float*>(from) + first, size_t(count) * sizeof(float));
    } else if (kind == BFLOAT16) {
        const bf16* own = static_cast<const bf16*>(from) + first;
        for (int64_t i = 0; i < count; i++) to[i] = widen(own[i]);
    } else {
        const _Float16* own = static_cast<const _Float16*>(from) + first;
        for (int64_t i = 0; i < count; i++) to[i] = float(own[i]);
    }
}

void narrow_tile(const float* from, int64_t kind, int64_t first, int64_t count, void* to) {
    if (kind == FLOAT32) {
        std::memcpy(static_cast<float*>(to) + first, from, size_t(count) * sizeof(float));
    } else if (kind == BFLOAT16) {
        bf16* own = static_cast<bf16*>(to) + first;
        for (int64_t i = 0; i < count; i++) own[i] = narrow<bf16>(from[i]);
    } else {
        _Float16* own = static_cast<_Float16*>(to) + first;
        for (int64_t i = 0; i < count; i++) own[i] = _Float16(from[i]);
    }
}

// What lies behind `count` in a tile is zero, so that whole lanes can be added up.
double dot(const float* one, const float* other) {
    float lanes[LANES] = {};
    for (int64_t i = 0; i < TILE; i += LANES)
        for (int64_t lane = 0; lane < LANES; lane++) lanes[lane] += one[i + lane] * other[i + lane];
    double sum = 0;
    for (float lane : lanes) sum += double(lane);
    return sum;
}

struct Tiles {
    alignas(64) float rows[MOST][TILE];
    alignas(64) float sum[TILE];
};

void load(Tiles& tiles, const void* const* vectors, const int64_t* kinds, int64_t many, int64_t first, int64_t count) {
    for (int64_t each = 0; each < many; each++) {
        widen_tile(vectors[each], kinds[each], first, count, tiles.rows[each]);
        for (int64_t i = count; i < TILE; i++) tiles.rows[each][i] = 0;
    }
}

int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

}  // namespace

// The inner products of `many` vectors, MOST at most here and below, or with `based` those of all but the last after it was subtracted: a matrix.
extern "C" void vector_products(const void* const* vectors, const int64_t* kinds, int64_t many, int64_t length,
                                int64_t based, double* products) {
    Tiles tiles;
    const int64_t own = many - (based ? 1 : 0);
    std::memset(products, 0, size_t(own * own) * sizeof(double));
    for (int64_t first = 0; first < length; first += TILE) {
        load(tiles, vectors, kinds, many, first, least(TILE, length - first));
        for (int64_t row = 0; row < own; row++) {
            if (based)
                for (int64_t i = 0; i < TILE; i++) tiles.rows[row][i] -= tiles.rows[own][i];
            for (int64_t column = 0; column <= row; column++)
                products[row * own + column] += dot(tiles.rows[row], tiles.rows[column]);
        }
    }
    for (int64_t row = 0; row < own; row++)
        for (int64_t column = 0; column < row; column++) products[column * own + row] = products[row * own + column];
}

// sum_i weights[i] vectors[i], rounded once; a vector of weight 0 is not looked at, one of weight 1 alone stays as it is.
// Told: |sum - reference|^2, |reference|^2 before rounding, and where there is a base (the last vector) how many numbers
// two of the others move in opposite directions.
extern "C" void weighted_sum(const void* const* vectors, const int64_t* kinds, int64_t many, int64_t length,
                             const float* weights, int64_t based, void* found, int64_t found_kind, double* told) {
    Tiles tiles;
    const int64_t own = many - (based ? 1 : 0), reference = based ? own : 0;
    double moved = 0, whole = 0;
    int64_t conflicts = 0;
    for (int64_t first = 0; first < length; first += TILE) {
        const int64_t count = least(TILE, length - first);
        load(tiles, vectors, kinds, many, first, count);
        bool begun = false;
        for (int64_t each = 0; each < many; each++) {
            const float weight = weights[each];
            const float* row = tiles.rows[each];
            if (weight == 0) continue;
            if (!begun && weight == 1) std::memcpy(tiles.sum, row, sizeof(tiles.sum));
            else if (!begun)
                for (int64_t i = 0; i < TILE; i++) tiles.sum[i] = weight * row[i];
            else
                for (int64_t i = 0; i < TILE; i++) tiles.sum[i] = __builtin_fmaf(weight, row[i], tiles.sum[i]);
            begun = true;
        }
        if (!begun) std::memset(tiles.sum, 0, sizeof(tiles.sum));
        narrow_tile(tiles.sum, found_kind, first, count, found);
        const float* origin = tiles.rows[reference];
        if (based && own > 1)
            for (int64_t i = 0; i < count; i++) {
                bool more = false, less = false;
                for (int64_t each = 0; each < own; each++) {
                    const float change = tiles.rows[each][i] - origin[i];
                    more |= change > 0;
                    less |= change < 0;
                }
                conflicts += more && less;
            }
        for (int64_t i = 0; i < TILE; i++) tiles.sum[i] -= origin[i];
        moved += dot(tiles.sum, tiles.sum);
        whole += dot(origin, origin);
    }
    told[0] = moved;
    told[1] = whole;
    told[2] = double(conflicts);
}

// To each of 64 buckets the numbers of its places, with the signs of theirs; the sum of all squares. The first number has
// the place `at`; signs begin again after `period`, which is a multiple of 64.
extern "C" double signed_sums(const void* numbers, int64_t kind, int64_t count, int64_t at, const int8_t* signs,
                              int64_t period, double* sums) {
    alignas(64) float row[TILE];
    alignas(64) double buckets[BUCKETS] = {}, squares[LANES] = {};
    for (int64_t first = 0; first < count;) {
        // Up to the next row of buckets, to the end of the signs, or a tile: what lies beside it in a row is zero.
        const int64_t place = (at + first) % period, front = place % BUCKETS;
        const int64_t taken = least(least(TILE - front, period - place), count - first);
        const int64_t end = front + taken, rows = (end + BUCKETS - 1) / BUCKETS;
        widen_tile(numbers, kind, first, taken, row + front);
        for (int64_t i = 0; i < front; i++) row[i] = 0;
        for (int64_t i = end; i < rows * BUCKETS; i++) row[i] = 0;
        const int8_t* own = signs + (place - front);
        for (int64_t each = 0; each < rows; each++)
            for (int64_t i = 0; i < BUCKETS; i++)
                buckets[i] += double(row[each * BUCKETS + i] * float(own[each * BUCKETS + i]));
        for (int64_t i = 0; i < rows * BUCKETS; i += LANES)
            for (int64_t lane = 0; lane < LANES; lane++) squares[lane] += double(row[i + lane]) * double(row[i + lane]);
        first += taken;
    }
    double square = 0;
    for (double lane : squares) square += lane;
    for (int64_t i = 0; i < BUCKETS; i++) sums[i] += buckets[i];
    return square;
}
