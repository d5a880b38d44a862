// Which hidden units a token activates, and what they do to it. Included once per instruction set.
#pragma once
#include "kernels.h"
#include "table.h"

namespace {

INLINE float sum_lanes(V v) {
    float total = 0;
    for (int lane = 0; lane < W; ++lane) total += v[lane];
    return total;
}

// Bit i: whether number i is not at most `limit`. What is no number is not at most anything, and so comes through.
INLINE uint32_t above(const float* p, float limit, int64_t n) {
    if (n < W) {
        uint32_t bits = 0;
        for (int i = 0; i < n; ++i) bits |= uint32_t(!(p[i] <= limit)) << i;
        return bits;
    }
#if defined(REGROW_ISA_AVX512)
    return _mm512_cmp_ps_mask(load_any(p), splat(limit), _CMP_NLE_UQ);
#elif defined(REGROW_ISA_AVX2)
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(load_any(p), splat(limit), _CMP_NLE_UQ)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= uint32_t(!(p[i] <= limit)) << i;
    return bits;
#endif
}

// f(vector, place, lanes that exist); lanes past the end hold zeros.
template <class F>
INLINE void vectors_of(int64_t begin, int64_t end, F&& f) {
    for (int64_t i = begin; i < end; i += W) f(i, min64(W, end - i));
}

// Mean and standard deviation of each row, and how many numbers are above mean + quantile * deviation.
void spark_thresholds(const SparkArgs& a, int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
        const float* z = a.z + t * a.hidden;
        V sum{};
        vectors_of(0, a.hidden, [&](int64_t i, int64_t n) LAMBDA { sum += load_part(z + i, n); });
        const float mean = sum_lanes(sum) / float(a.hidden);
        V squares{};
        const int64_t whole = a.hidden / W * W;
        for (int64_t i = 0; i < whole; i += W) {
            const V off = load_any(z + i) - mean;
            squares += off * off;
        }
        float square = sum_lanes(squares);
        for (int64_t i = whole; i < a.hidden; ++i) square += (z[i] - mean) * (z[i] - mean);
        const float deviation = __builtin_sqrtf(square / float(a.hidden)), limit = mean + a.quantile * deviation;
        int32_t count = 0;
        vectors_of(0, a.hidden, [&](int64_t i, int64_t n) LAMBDA { count += __builtin_popcount(above(z + i, limit, n)); });
        a.mean[t] = mean, a.deviation[t] = deviation, a.limit[t] = limit, a.counts[t] = count;
    }
}

// The lists: active units in order, and how far above the threshold each is.
void spark_select(const SparkArgs& a, int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
        const float *z = a.z + t * a.hidden, limit = a.limit[t];
        int64_t p = a.ptr[t];
        vectors_of(0, a.hidden, [&](int64_t i, int64_t n) LAMBDA {
            for (uint32_t bits = above(z + i, limit, n); bits && p < a.ptr[t + 1]; bits &= bits - 1, ++p) {
                const int64_t unit = i + __builtin_ctz(bits);
                a.idx[p] = int32_t(unit);
                a.over[p] = z[unit] - limit;
            }
        });
    }
}

// h = gelu(over) * up, over all lists; the gelu is the one of spark_slopes, so that both have the same bits.
void spark_hidden(const float* over, const float* up, int64_t p0, int64_t p1, float* h) {
    vectors_of(p0, p1, [&](int64_t p, int64_t n) LAMBDA {
        V slope;
        store_part(h + p, gelu(load_part(over + p, n), slope) * load_part(up + p, n), n);
    });
}

// From the gradient dh: h again, the gradients of `up` and `over`, and the sum of the latter over each row's list.
void spark_slopes(const SparkGradArgs& a, int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
        V total{};
        vectors_of(a.ptr[t], a.ptr[t + 1], [&](int64_t p, int64_t n) LAMBDA {
            V slope;
            const V gate = gelu(load_part(a.over + p, n), slope), up = load_part(a.up + p, n), dh = load_part(a.dh + p, n);
            const V dover = dh * up * slope;
            store_part(a.h + p, gate * up, n);
            store_part(a.dup + p, dh * gate, n);
            store_part(a.dover + p, dover, n);
            total += dover;
        });
        a.total[t] = sum_lanes(total);
    }
}

}  // namespace
