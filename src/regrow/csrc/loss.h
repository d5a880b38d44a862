// Softmax cross-entropy and its gradient, a row at a time: a row of any vocabulary fits in the L2 cache, so the logits
// pass through memory once. Included once per instruction set.
#pragma once
#include "table.h"
#include "vec.h"

namespace {

// f(vector, lanes that exist, place) over n floats; lanes past the end hold `fill`.
template <class F>
INLINE void each_vector(const float* p, int64_t n, float fill, F&& f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(load_any(p + i), int64_t(W), i);
    if (i == n) return;
    float line[W] __attribute__((aligned(64)));
    for (int lane = 0; lane < W; ++lane) line[lane] = i + lane < n ? p[i + lane] : fill;
    f(load(line), n - i, i);
}

INLINE void store_first(float* p, V v, int64_t n) {
    if (n == W) return store_any(p, v);
    float line[W] __attribute__((aligned(64)));
    store(line, v);
    memcpy(p, line, n * sizeof(float));
}

INLINE void add_first(float* p, V v, int64_t n) {
    if (n == W) return store_any(p, load_any(p) + v);
    for (int64_t lane = 0; lane < n; ++lane) p[lane] += v[lane];
}

// Rows [first, last). With a scale, the gradient takes the place of the logits, and its sum over rows is added to
// `sum` [classes].
void cross_entropy(const LossArgs& a, int64_t first, int64_t last, float* sum) {
    constexpr float kLowest = -87.0f;  // of the exponential: e^-87 is nothing beside the largest term, 1
    const int64_t n = a.classes;
    for (int64_t r = first; r < last; ++r) {
        float* x = a.logits + r * n;
        if (a.bias) {
            each_vector(a.bias, n, 0, [&](V v, int64_t live, int64_t i) LAMBDA { add_first(x + i, v, live); });
        }
        V top = splat(-__builtin_inff());
        each_vector(x, n, -__builtin_inff(), [&](V v, int64_t, int64_t) LAMBDA { top = v > top ? v : top; });
        float most = top[0];
        for (int lane = 1; lane < W; ++lane) most = top[lane] > most ? top[lane] : most;
        const float at_target = x[a.targets[r]];

        // Sums of a few hundred terms at a time, because a long chain of additions loses digits.
        double total = 0;
        for (int64_t from = 0; from < n; from += 256 * W) {
            V part{};
            each_vector(x + from, from + 256 * W < n ? 256 * W : n - from, -__builtin_inff(),
                        [&](V v, int64_t live, int64_t i) LAMBDA {
                            V d = v - most;
                            // What is no number passes both, and makes the loss none.
                            const V e = d < kLowest ? V{} : exp_negative(d < kLowest ? splat(kLowest) : d);
                            part += e;
                            if (a.scale != 0) store_first(x + from + i, e, live);
                        });
            for (int lane = 0; lane < W; ++lane) total += part[lane];
        }
        a.losses[r] = float(__builtin_log(total)) + most - at_target;
        if (a.scale == 0) continue;

        const float factor = float(a.scale / total);
        each_vector(x, n, 0, [&](V v, int64_t live, int64_t i) LAMBDA { store_first(x + i, v * factor, live); });
        x[a.targets[r]] -= a.scale;
        each_vector(x, n, 0, [&](V v, int64_t live, int64_t i) LAMBDA { add_first(sum + i, v, live); });
    }
}

}  // namespace
