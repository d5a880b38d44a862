// Self-attention over packed sequences, a head of a sequence at a time. Included once per instruction set.
//
// Queries come in blocks of a few rows whose scores against all keys of the sequence are kept, in the L2 cache up to
// some thousand keys; nothing else of the size of the scores exists. A head's rows lie a whole row of qkv apart, each
// on another page, so they are copied first, keys and values transposed where a product needs that.
#pragma once
#include "fence.h"
#include "gemm.h"
#include "kernels.h"
#include "softmax.h"
#include "table.h"

namespace {

constexpr int64_t kQueries = 64;  // rows of a block of scores

// Sizes that follow from the longest sequence and the head's width, and the pieces of a thread's scratch memory.
struct AttentionShape {
    int64_t dim, width;  // of a head; in whole vectors
    int64_t keys;        // in whole panels
    int64_t score_row;   // one line more: no power-of-two strides
    AttentionShape(int64_t longest, int64_t d)
        : dim(d), width(round_up(d, W)), keys(round_up(longest, kGemmColumns)), score_row(keys + 16) {}
    int64_t scores() const { return kQueries * score_row; }
    int64_t queries() const { return round_up(kQueries * width, 16); }
    int64_t rows() const { return round_up(keys * width, 16); }
    int64_t panels() const { return round_up(keys * dim, 16); }
};
size_t attention_scratch(int64_t longest, int64_t dim, bool backward) {
    const AttentionShape a(longest, dim);
    return backward ? 2 * a.panels() + 3 * a.rows() + 3 * a.queries() + 2 * a.scores() + 10 * kGap
                    : a.panels() + a.rows() + 2 * a.queries() + a.scores() + 5 * kGap;
}
struct Pieces {
    float* next;
    float* take(int64_t floats) {
        float* piece = next;
        fence(piece, floats, floats + kGap);
        next += floats + kGap;
        return piece;
    }
};

// Rows -> rows of whole vectors, filled up with zeros.
void copy_rows(const AttentionShape& a, const float* from, int64_t stride, int64_t rows, float* to) {
    for (int64_t i = 0; i < rows; ++i, from += stride, to += a.width) {
        for (int64_t j = 0; j < a.dim; j += W) {
            store(to + j, a.dim - j >= W ? load_any(from + j) : load_part(from + j, a.dim - j));
        }
    }
}

// Rows -> a matrix of them as columns, in panels, times a factor; the last panel is filled up with zeros.
void copy_transposed(const AttentionShape& a, const float* from, int64_t stride, int64_t rows, float factor,
                     float* to) {
    for (int64_t r = 0; r < rows; r += W) {
        float* place = to + r / kGemmColumns * (kGemmColumns * a.dim) + r % kGemmColumns;
        for (int64_t j = 0; j < a.dim; j += W) {
            const int64_t n = min64(W, a.dim - j);
            V v[W];
            unroll<W>([&](auto i) LAMBDA {
                const float* p = from + (r + i) * stride + j;
                v[i] = r + i >= rows ? V{} : n == W ? load_any(p) : load_part(p, n);
            });
            transpose<W>(v);
            for (int64_t i = 0; i < n; ++i) store(place + (j + i) * kGemmColumns, v[i] * factor);
        }
    }
}
INLINE Panels transposed(const AttentionShape& a, const float* data) {
    return {data, kGemmColumns * a.dim, kGemmColumns};
}

// Rows of whole vectors, times a factor -> rows `stride` apart, around the caches where they are aligned: they are not
// read again before much else is written.
INLINE void write_rows(const AttentionShape& a, const float* from, int64_t rows, float factor, float* to,
                       int64_t stride) {
    const bool streaming = a.dim % 16 == 0 && stride % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
    for (int64_t i = 0; i < rows; ++i, from += a.width, to += stride) {
        for (int64_t j = 0; j < a.dim; j += W) {
            const V v = load(from + j) * factor;
            if (streaming) {
                stream(to + j, v);
            } else {
                store_part(to + j, v, a.dim - j);
            }
        }
    }
}

INLINE float dot(const float* x, const float* y, int64_t n) {
    V sum{};
    for (int64_t j = 0; j < n; j += W) {
        sum += n - j >= W ? load_any(x + j) * load_any(y + j) : load_part(x + j, n - j) * load_part(y + j, n - j);
    }
    return fold(sum, plus)[0];
}

// What a block of at most kQueries rows needs of its head: rows are shape.width apart, the transposed ones in panels.
struct HeadOperands {
    const float *q, *g;                // of the block
    const float *keys_t, *values_t, *keys;  // of the whole sequence; keys_t has the factor of the scores
};
struct HeadGradients {
    float *dq, *dk, *dv;  // dq of the block, the others of the whole sequence; of dq and dk the factor is missing
};

// The block's log-sum-exp, its output before the division by `sum`, and that.
template <bool Drop>
INLINE void attend_block(const AttentionShape& a, const Dropout& d, uint64_t mask_row, int64_t rows, int64_t n,
                         const float* q, const float* keys_t, const float* values, float* s, float* o, float* lse,
                         float* sum, Soon& next) {
    const int64_t width = a.width, score_row = a.score_row;
    gemm({q, width, 1}, transposed(a, keys_t), rows, round_up(n, W), a.dim, false, s, score_row, next);
    float top[kQueries];
    constexpr int kTogether = Drop ? 1 : 4;
    const auto softmax = [&](auto together, int64_t r) LAMBDA {
        constexpr int R = together;
        exponentials<Drop, R>(d, mask_row + r, s + r * score_row, score_row, n, top + r, sum + r);
    };
    int64_t r = 0;
    for (; r + kTogether <= rows; r += kTogether) softmax(Int<kTogether>{}, r);
    for (; r < rows; ++r) softmax(Int<1>{}, r);
    gemm({s, score_row, 1}, by_rows(values, width), rows, width, n, false, o, width, next);
    for (r = 0; r < rows; ++r) lse[r] = top[r] + __builtin_logf(sum[r]);
}

// The block's share of the gradient. `mean` are the rows' sums of g times the output; dk and dv are added to or not.
template <bool Drop>
INLINE void gradient_block(const AttentionShape& a, const Dropout& d, uint64_t mask_row, int64_t rows, int64_t n,
                           const HeadOperands& in, const float* lse, const float* mean, float* s, float* dp, bool add,
                           const HeadGradients& out, Soon& next) {
    const int64_t width = a.width, score_row = a.score_row, keys = round_up(n, W);
    gemm({in.q, width, 1}, transposed(a, in.keys_t), rows, keys, a.dim, false, s, score_row, next);
    gemm({in.g, width, 1}, transposed(a, in.values_t), rows, keys, a.dim, false, dp, score_row, next);
    for (int64_t r = 0; r < rows; ++r) {
        softmax_gradient<Drop>(d, mask_row + r, s + r * score_row, dp + r * score_row, n, lse[r], mean[r]);
    }
    gemm({s, 1, score_row}, by_rows(in.g, width), n, width, rows, add, out.dv, width, next);
    gemm({dp, 1, score_row}, by_rows(in.q, width), n, width, rows, add, out.dk, width, next);
    gemm({dp, score_row, 1}, by_rows(in.keys, width), rows, width, n, false, out.dq, width, next);
}

// One head of one sequence: where its numbers are.
struct AttentionPair {
    int64_t first, length;  // its tokens
    int64_t hidden, row;    // floats between tokens: of out, of qkv
    int64_t in, out;        // its first token's queries in qkv, and its place in out
    uint64_t mask_row;      // of its first token
    int64_t lse;

    AttentionPair(const AttentionArgs& a, int64_t i) {
        const int64_t sequence = i / a.heads, head = i % a.heads;
        first = a.offsets[sequence];
        length = a.offsets[sequence + 1] - first;
        hidden = a.heads * a.dim;
        row = 3 * hidden;
        in = first * row + head * a.dim;
        out = first * hidden + head * a.dim;
        lse = head * a.n_tokens + first;
        mask_row = uint64_t(lse);
    }
    // All that is read of its tokens. The gradient has more products, so fewer at a time are early enough.
    Soon soon(const AttentionArgs& a, bool backward) const {
        const float* q = a.qkv + in;
        return {{q, q + hidden, q + 2 * hidden, a.g + out, a.out + out},
                {row, row, row, hidden, hidden}, backward ? 5 : 3, a.dim, length, backward ? 1 : 2};
    }
};

template <bool Drop>
void attention_forward(const AttentionArgs& a, int64_t i0, int64_t i1, float* scratch) {
    const AttentionShape shape(a.longest, a.dim);
    const Dropout d = make_dropout(a.seed, a.threshold);
    Pieces pieces{scratch};
    float *keys = pieces.take(shape.panels()), *values = pieces.take(shape.rows());
    float *q = pieces.take(shape.queries()), *o = pieces.take(shape.queries()), *s = pieces.take(shape.scores());
    for (int64_t i = i0; i < i1; ++i) {
        const AttentionPair pair(a, i);
        Soon next = AttentionPair(a, min64(i + 1, i1 - 1)).soon(a, false);
        const int64_t n = pair.length, hidden = pair.hidden;
        const float* in = a.qkv + pair.in;
        copy_transposed(shape, in + hidden, pair.row, n, a.scale, keys);
        copy_rows(shape, in + 2 * hidden, pair.row, n, values);
        for (int64_t r0 = 0; r0 < n; r0 += kQueries) {
            const int64_t rows = min64(kQueries, n - r0);
            copy_rows(shape, in + r0 * pair.row, pair.row, rows, q);
            float sum[kQueries];
            attend_block<Drop>(shape, d, pair.mask_row + r0, rows, n, q, keys, values, s, o, a.lse + pair.lse + r0, sum,
                               next);
            float* to = a.out + pair.out + r0 * hidden;
            for (int64_t r = 0; r < rows; ++r) {
                write_rows(shape, o + r * shape.width, 1, 1 / sum[r], to + r * hidden, hidden);
            }
        }
    }
    finish_streams();
}

template <bool Drop>
void attention_gradient(const AttentionArgs& a, int64_t i0, int64_t i1, float* scratch) {
    const AttentionShape shape(a.longest, a.dim);
    const Dropout d = make_dropout(a.seed, a.threshold);
    Pieces pieces{scratch};
    float *keys_t = pieces.take(shape.panels()), *values_t = pieces.take(shape.panels());
    float *keys = pieces.take(shape.rows()), *dk = pieces.take(shape.rows()), *dv = pieces.take(shape.rows());
    float *q = pieces.take(shape.queries()), *g = pieces.take(shape.queries()), *dq = pieces.take(shape.queries());
    float *s = pieces.take(shape.scores()), *dp = pieces.take(shape.scores());
    for (int64_t i = i0; i < i1; ++i) {
        const AttentionPair pair(a, i);
        Soon next = AttentionPair(a, min64(i + 1, i1 - 1)).soon(a, true);
        const int64_t n = pair.length, hidden = pair.hidden;
        const float* in = a.qkv + pair.in;
        float* to = a.dqkv + pair.in;
        copy_transposed(shape, in + hidden, pair.row, n, a.scale, keys_t);
        copy_transposed(shape, in + 2 * hidden, pair.row, n, 1, values_t);
        copy_rows(shape, in + hidden, pair.row, n, keys);
        for (int64_t r0 = 0; r0 < n; r0 += kQueries) {
            const int64_t rows = min64(kQueries, n - r0), out = pair.out + r0 * hidden;
            copy_rows(shape, in + r0 * pair.row, pair.row, rows, q);
            copy_rows(shape, a.g + out, hidden, rows, g);
            float mean[kQueries];
            for (int64_t r = 0; r < rows; ++r) {
                mean[r] = dot(a.g + out + r * hidden, a.out + out + r * hidden, a.dim);
            }
            gradient_block<Drop>(shape, d, pair.mask_row + r0, rows, n, {q, g, keys_t, values_t, keys},
                                 a.lse + pair.lse + r0, mean, s, dp, r0 > 0, {dq, dk, dv}, next);
            write_rows(shape, dq, rows, a.scale, to + r0 * pair.row, pair.row);
        }
        write_rows(shape, dk, n, a.scale, to + hidden, pair.row);
        write_rows(shape, dv, n, 1, to + 2 * hidden, pair.row);
    }
    finish_streams();
}

void attention(const AttentionArgs& a, int64_t i0, int64_t i1, float* scratch) {
    (a.threshold ? attention_forward<true> : attention_forward<false>)(a, i0, i1, scratch);
}
void attention_backward(const AttentionArgs& a, int64_t i0, int64_t i1, float* scratch) {
    (a.threshold ? attention_gradient<true> : attention_gradient<false>)(a, i0, i1, scratch);
}

}  // namespace
