// The greatest numbers of a row. Included once per instruction set.
#pragma once
#include "kernels.h"
#include "table.h"

namespace {

INLINE V magnitude(V v) { return (V)((VBits)v & 0x7fffffffu); }

// Numbers that are not negative are in the order of their bits, so the `keep`-th is found bit by bit, without sorting: in
// 31 passes over a row that lies in the L1 cache. Of equal numbers those further left are taken; what is no number is
// greater than all others.
void top_columns(const TopArgs& a, int64_t r0, int64_t r1, float* scratch) {
    const int64_t vectors = (a.width + W - 1) / W;
    for (int64_t r = r0; r < r1; ++r) {
        const float* x = a.x + r * a.width;
        for (int64_t i = 0; i < a.width; i += W) {
            V score = magnitude(load_part(x + i, a.width - i));
            if (a.norms) score = magnitude(score * load_part(a.norms + i, a.width - i));
            store(scratch + i, score);
        }
        for (int64_t i = a.width; i < vectors * W; ++i) scratch[i] = 0.0f;
        int32_t limit = 0;  // the greatest that `keep` columns reach
        const auto reach = [&](int32_t at_least) LAMBDA {
            VInt count{};
            for (int64_t i = 0; i < vectors; ++i) count -= (VInt)load(scratch + i * W) >= at_least;
            int64_t total = 0;
            for (int lane = 0; lane < W; ++lane) total += count[lane];
            return total;
        };
        for (int32_t bit = 1 << 30; bit; bit >>= 1) {
            if (reach(limit | bit) >= a.keep) limit |= bit;
        }
        int64_t left = a.keep - (limit == INT32_MAX ? 0 : reach(limit + 1));  // places for columns that equal the limit
        int64_t p = r * a.keep, end = p + a.keep;
        for (int64_t i = 0; i < a.width && p < end; ++i) {
            int32_t bits;
            memcpy(&bits, scratch + i, sizeof(bits));
            if (bits < limit || (bits == limit && left-- <= 0)) continue;
            a.idx[p] = int32_t(i);
            a.numbers[p++] = x[i];
        }
    }
}

}  // namespace
