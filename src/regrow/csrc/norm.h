// Dropout, and LayerNorm of a sum with dropout in it. Included once per instruction set.
//
// Memory sets the pace: every array is read or written once, and what a row needs twice waits in L1.
#pragma once
#include "philox.h"
#include "table.h"

namespace {

constexpr int kSums = 4;  // independent accumulators, of W lanes each

// f(col, live, factor, slot) for the vectors of a row: `live` of W columns from col on exist, factor is what dropout
// multiplies them by, and slot < kSums is known at compile time.
template <bool Drop, class F>
INLINE void for_row(const Dropout& d, int64_t row, int64_t width, F&& f) {
    int64_t col = 0;
    for (; col + kChunk <= width; col += kChunk) {
        Draw r;
        if constexpr (Drop) r = draw(d, uint64_t(row), uint32_t(col / kChunk));
        unroll<kChunk / W>([&](auto i) LAMBDA {
            V factor{};
            if constexpr (Drop) factor = keep_factor(d, r, i);
            f(col + i * W, int64_t(W), factor, Int<i % kSums>{});
        });
    }
    if (col == width) return;
    float factors[kChunk] __attribute__((aligned(64)));
    if constexpr (Drop) keep_factors(d, uint64_t(row), uint32_t(col / kChunk), factors);
    for (int64_t c = col; c < width; c += W) {
        V factor{};
        if constexpr (Drop) factor = load(factors + (c - col));
        f(c, width - c, factor, Int<0>{});
    }
}

INLINE void put(float* p, V v, int64_t live, bool streaming) {
    if (streaming) return stream(p, v);  // then there are only whole vectors
    store_part(p, v, live);
}

// The row after the one being read: a row is too short for the hardware to run far enough ahead by itself. With this
// and with stores around the caches the forward pass takes two thirds of the time, and the layer that reads y no longer.
INLINE void prefetch(const float* p) { __builtin_prefetch(p); }

INLINE float total(const V* sums) {
    V v{};
    unroll<kSums>([&](auto i) LAMBDA { v += sums[i]; });
    float sum = 0;
    unroll<W>([&](auto i) LAMBDA { sum += v[int(i)]; });
    return sum;
}

// Calls f with a bool known at compile time for each of the flags.
template <class F>
INLINE void with_flags(bool first, bool second, F&& f) {
    using std::true_type, std::false_type;
    if (first) return second ? f(true_type{}, true_type{}) : f(true_type{}, false_type{});
    second ? f(false_type{}, true_type{}) : f(false_type{}, false_type{});
}

void dropout_any(const DropArgs& a, int64_t r0, int64_t r1) {
    const Dropout d = make_dropout(a.seed, a.threshold);
    const bool streaming = streams(place(a.y), r1 - r0, a.width);
    for (int64_t row = r0; row < r1; ++row) {
        const float* x = a.x + row * a.width;
        float* y = a.y + row * a.width;
        for_row<true>(d, row, a.width, [&](int64_t c, int64_t live, V factor, auto) LAMBDA {
            put(y + c, load_part(x + c, live) * factor, live, streaming);
        });
    }
    finish_streams();
}

// The sum that is normalised; numbers past the end are zero.
template <bool Drop, bool Residual>
INLINE V sum_of(const float* x, const float* residual, int64_t live, V factor) {
    V h = load_part(x, live);
    if constexpr (Drop) h *= factor;
    if constexpr (Residual) h += load_part(residual, live);
    return h;
}

template <bool Drop, bool Residual>
void norm_rows(const NormArgs& a, int64_t r0, int64_t r1, float* h) {
    const Dropout d = make_dropout(a.seed, a.threshold);
    const int64_t width = a.width;
    const bool streaming = streams(place(a.y), r1 - r0, width);
    for (int64_t row = r0; row < r1; ++row) {
        const float *x = a.x + row * width, *residual = Residual ? a.residual + row * width : nullptr;
        float* y = a.y + row * width;
        V sum[kSums] = {}, square[kSums] = {};
        for_row<Drop>(d, row, width, [&](int64_t c, int64_t live, V factor, auto slot) LAMBDA {
            const V v = sum_of<Drop, Residual>(x + c, residual + c, live, factor);
            prefetch(x + c + width);
            if constexpr (Residual) prefetch(residual + c + width);
            store(h + c, v);
            sum[slot] += v;
        });
        const float mean = total(sum) / float(width);
        for (int64_t c = width; c % (kSums * W); ++c) h[c] = mean;  // adds nothing to the squares
        for (int64_t c = 0; c < width; c += kSums * W) {
            unroll<kSums>([&](auto i) LAMBDA {
                const V v = load(h + c + i * W) - mean;
                square[i] += v * v;
            });
        }
        const float rstd = 1.0f / __builtin_sqrtf(total(square) / float(width) + a.eps);
        for_row<false>(d, row, width, [&](int64_t c, int64_t live, V, auto) LAMBDA {
            const V scale = load_part(a.weight + c, live) * rstd;
            put(y + c, (load(h + c) - mean) * scale + load_part(a.bias + c, live), live, streaming);
        });
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
    finish_streams();
}

void norm_any(const NormArgs& a, int64_t r0, int64_t r1, float* scratch) {
    with_flags(a.threshold > 0, a.residual, [&](auto drop, auto residual) LAMBDA {
        norm_rows<drop.value, residual.value>(a, r0, r1, scratch);
    });
}

// With n = (h - mean) rstd and q = g weight:  dh = rstd (q - mean(q) - n mean(q n)),  dx = dh factor,
// dweight = sum over rows of g n,  dbias = sum over rows of g.
template <bool Drop, bool Residual>
void norm_backward_rows(const NormGradArgs& a, int64_t r0, int64_t r1, float* normed, float* factors, float* dweight,
                        float* dbias) {
    const Dropout d = make_dropout(a.seed, a.threshold);
    const int64_t width = a.width;
    // Of two gradients, that of the residual waits until the layer before has used that of x.
    const bool streaming = a.dx && streams(place(a.dh), a.thread_rows, width);
    for (int64_t row = r0; row < r1; ++row) {
        const int64_t at = row * width;
        const float *x = a.x + at, *residual = Residual ? a.residual + at : nullptr, *g = a.g + at;
        const float mean = a.mean[row], rstd = a.rstd[row];
        V sum[kSums] = {}, product[kSums] = {};
        for_row<Drop>(d, row, width, [&](int64_t c, int64_t live, V factor, auto slot) LAMBDA {
            const V n = (sum_of<Drop, Residual>(x + c, residual + c, live, factor) - mean) * rstd;
            prefetch(g + c + width);
            prefetch(x + c + width);
            if constexpr (Residual) prefetch(residual + c + width);
            const V gradient = load_part(g + c, live), q = gradient * load_part(a.weight + c, live);
            store(normed + c, n);
            if constexpr (Drop) store(factors + c, factor);
            sum[slot] += q;
            product[slot] += q * n;
            store(dweight + c, load(dweight + c) + gradient * n);
            store(dbias + c, load(dbias + c) + gradient);
        });
        if (!a.dx && !a.dh) continue;
        const float m1 = total(sum) / float(width), m2 = total(product) / float(width);
        for_row<false>(d, row, width, [&](int64_t c, int64_t live, V, auto) LAMBDA {
            const V q = load_part(g + c, live) * load_part(a.weight + c, live);
            const V dh = (q - m1 - load(normed + c) * m2) * rstd;
            if (a.dh) put(a.dh + at + c, dh, live, streaming);
            if (a.dx) store_part(a.dx + at + c, Drop ? dh * load(factors + c) : dh, live);
        });
    }
    finish_streams();
}

void norm_backward_any(const NormGradArgs& a, int64_t r0, int64_t r1, float* scratch, float* dweight, float* dbias) {
    float* factors = scratch + (a.width + kChunk - 1) / kChunk * kChunk;
    with_flags(a.threshold > 0, a.residual, [&](auto drop, auto residual) LAMBDA {
        norm_backward_rows<drop.value, residual.value>(a, r0, r1, scratch, factors, dweight, dbias);
    });
}

}  // namespace
