// The greatest numbers of a row. Included once per instruction set.
#pragma once
#include "kernels.h"
#include "table.h"

namespace {

INLINE V magnitude(V v) { return (V)((VBits)v & 0x7fffffffu); }

// Bit i: whether lane i is true, of the first n.
INLINE uint32_t lanes(VInt truth, int64_t n) {
    const uint32_t first = n < 32 ? (1u << n) - 1 : ~0u;
#if defined(REGROW_ISA_AVX512)
    return _mm512_movepi32_mask((__m512i)truth) & first;
#elif defined(REGROW_ISA_AVX2)
    return uint32_t(_mm256_movemask_ps((__m256)truth)) & first;
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= uint32_t(truth[i] & 1) << i;
    return bits & first;
#endif
}

// Writes the columns at + i and the numbers x[i] of every bit i that is set, n of them at most; gives how many.
INLINE int64_t take(uint32_t bits, int64_t at, const float* x, int64_t n, int32_t* idx, float* numbers) {
    const int64_t count = __builtin_popcount(bits);
#if defined(REGROW_ISA_AVX512) && !defined(REGROW_SANITIZE)
    const __m512i columns = _mm512_add_epi32(_mm512_set1_epi32(int32_t(at)), _mm512_set_epi32(
        15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    _mm512_mask_compressstoreu_epi32(idx, __mmask16(bits), columns);
    _mm512_mask_compressstoreu_ps(numbers, __mmask16(bits), load_part(x, n));
#else
    (void)n;
    for (; bits; bits &= bits - 1, ++idx, ++numbers) {
        const int i = __builtin_ctz(bits);
        *idx = int32_t(at + i);
        *numbers = x[i];
    }
#endif
    return count;
}

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
        int64_t p = r * a.keep;
        for (int64_t i = 0; i < a.width && p < (r + 1) * a.keep; i += W) {
            const VInt score = (VInt)load(scratch + i);
            const int64_t n = min64(W, a.width - i);
            uint32_t bits = lanes(score > limit, n), equal = lanes(score == limit, n);
            for (; equal && left > 0; equal &= equal - 1, --left) bits |= equal & -equal;
            p += take(bits, i, x + i, n, a.idx + p, a.numbers + p);
        }
    }
}

}  // namespace
