// Rows of attention's scores: softmax, its gradient, and the dropout of probabilities. Included once per instruction
// set. Rows are aligned and padded to whole vectors; what their padding holds afterwards is not defined.
#pragma once
#include "philox.h"
#include "vec.h"

namespace {

// One number from all lanes, in every lane.
template <int S = 1, class F>
INLINE V fold(V v, F&& f) {
    if constexpr (S < W) return fold<S * 2>(f(v, shuffle<SwapMap<S>>(v, v)), f);
    return v;
}
INLINE V larger(V x, V y) { return x > y ? x : y; }
INLINE V plus(V x, V y) { return x + y; }

// exp(x) of what is not positive, or so little that it does not matter; what is no number stays none.
INLINE V exp_clamped(V x) { return exp_negative(larger(splat(-87.0f), x)); }

// f(j, factors of dropout) for the vectors of a row that begin at column j < n.
template <bool Drop, class F>
INLINE void for_columns(const Dropout& d, uint64_t row, int64_t n, F&& f) {
    if constexpr (!Drop) {
        for (int64_t j = 0; j < n; j += W) f(j, V{});
        return;
    }
    for (int64_t first = 0; first < n; first += kChunk) {
        const Draw r = draw(d, row, uint32_t(first / kChunk));
        unroll<kChunk / W>([&](auto i) LAMBDA {
            if (first + i * W < n) f(first + i * W, keep_factor(d, r, i));
        });
    }
}

// R rows of scores, `stride` apart -> exp(score - largest), times the factors of dropout for the rows from `row` on.
// Gives each row's largest score and the sum of its exponentials, dropped or not. Several rows at once hide each
// other's latency.
template <bool Drop, int R>
INLINE void exponentials(const Dropout& d, uint64_t row, float* s, int64_t stride, int64_t n, float* top, float* sum) {
    V tops[R], sums[R] = {};
    unroll<R>([&](auto r) LAMBDA {
        for (int64_t j = n; j % W; ++j) s[r * stride + j] = -__builtin_inff();
        tops[r] = load(s + r * stride);
    });
    for (int64_t j = W; j < n; j += W) {
        unroll<R>([&](auto r) LAMBDA { tops[r] = larger(load(s + r * stride + j), tops[r]); });
    }
    unroll<R>([&](auto r) LAMBDA {
        tops[r] = fold(tops[r], larger);
        top[r] = tops[r][0];
    });
    const auto power = [&](auto r, int64_t j) LAMBDA {
        const V p = exp_clamped(load(s + r * stride + j) - tops[r]);
        sums[r] += p;
        return p;
    };
    if constexpr (Drop) {
        unroll<R>([&](auto r) LAMBDA {
            const auto drop = [&](int64_t j, V f) LAMBDA { store(s + r * stride + j, power(r, j) * f); };
            for_columns<true>(d, row + r, n, drop);
        });
    } else {
        for (int64_t j = 0; j < n; j += W) {
            unroll<R>([&](auto r) LAMBDA { store(s + r * stride + j, power(r, j)); });
        }
    }
    unroll<R>([&](auto r) LAMBDA { sum[r] = fold(sums[r], plus)[0]; });
}

// A row of scores s -> probabilities p after dropout, and the gradient dp of these -> that of the scores. `mean` is the
// sum of p dp over the row.
template <bool Drop>
INLINE void softmax_gradient(const Dropout& d, uint64_t row, float* s, float* dp, int64_t n, float lse, float mean) {
    for_columns<Drop>(d, row, n, [&](int64_t j, V f) LAMBDA {
        const V p = exp_clamped(load(s + j) - lse), g = load(dp + j);
        store(s + j, Drop ? p * f : p);
        store(dp + j, p * ((Drop ? g * f : g) - mean));
    });
}

}  // namespace
