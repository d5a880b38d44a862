// The attention half of a transformer layer: both block-sparse products and self-attention between them, a sequence at
// a time. Included once per instruction set.
//
// What a product reads are panels (kernels.h) of a whole sequence, what attention reads are rows of one head. So of
// queries, keys and values there are three short arrays at a time, made from the panel of x, and a head's output
// goes to its place in the panel that the second product reads. The backward pass makes them again.
#pragma once
#include "attention.h"
#include "ffn.h"

namespace {

// What a thread needs of scratch memory.
template <int B>
struct SequenceBuffers : ScratchPieces {
    static constexpr int G = Shape<B>::G;
    int64_t stride;                        // between the blocks of a panel
    float *x, *a, *g, *d, *y;              // panels: x; attention's output; gradients of y and qkv; the result
    float *q, *k, *v, *da, *dk, *sums;     // rows of a head; its panels
    float *keys_t, *values_t, *s, *dp, *o; // see attention.h

    SequenceBuffers(const SparseAttentionArgs& args, bool backward, float* memory) : ScratchPieces(memory) {
        const AttentionShape shape(args.longest, args.dim);
        const int64_t tokens = groups(args.longest) * G, hidden_blocks = args.heads * args.dim / B;
        stride = panel_stride<B>(tokens);
        const auto panel = [&](int64_t blocks) { return take(round_up(blocks, G) * stride); };
        const int64_t rows = tokens * args.dim;
        q = take(rows), k = take(rows), v = take(rows);
        sums = panel(G > 1 ? args.dim / B : 0);
        keys_t = take(shape.panels());
        s = take(shape.scores());
        o = take(shape.queries());
        x = panel(args.in_blocks);
        a = panel(hidden_blocks);
        y = panel(backward ? args.in_blocks : args.out_blocks);
        if (!backward) return;
        da = take(rows), dk = take(rows);
        values_t = take(shape.panels());
        dp = take(shape.scores());
        g = panel(args.out_blocks);
        d = panel(3 * hidden_blocks);
    }
    static int64_t live_groups(int64_t n) { return (n + G - 1) / G; }
    static int64_t groups(int64_t n) { return round_up(live_groups(n), Shape<B>::Q); }
};

// Block rows r0 to r0 + blocks of a product, for all groups of a panel -> rows, side by side.
template <int B, bool Few = false>
INLINE void head_rows(const PackedWeight& w, int64_t r0, int64_t blocks, const float* panel, int64_t stride,
                      int64_t groups, int64_t n_tokens, const float* bias, float* sums, float* rows) {
    if constexpr (Shape<B>::G > 1) {
        for (int64_t r = 0; r < blocks; ++r) {
            panel_row<B, Few>(w, w.ptr[r0 + r], w.ptr[r0 + r + 1], panel, stride, groups, false, sums + r * stride);
        }
        put_tokens<B>(sums, stride, bias, blocks, n_tokens, rows, false);
    } else {
        constexpr int PW = Shape<B>::PW, M = Shape<B>::M;
        for (int64_t m0 = 0; m0 < groups; m0 += M) {
            for (int64_t r = 0; r < blocks; ++r) {
                const int64_t p0 = w.ptr[r0 + r], n = w.ptr[r0 + r + 1] - p0;
                for (int piece = 0; piece < B; piece += PW) {
                    spmm_rows<B>(min64(M, groups - m0), panel + m0 * B, stride, w.packed + p0 * (B * B) + piece * B,
                                 w.idx + p0, n, move(bias, r * B + piece),
                                 rows + (m0 * blocks + r) * B + piece, blocks * B);
                }
            }
        }
    }
}

// The rows r0 to r0 + rows of a head, times a factor, -> its blocks of a panel, and their sums to `sum` [dim] unless
// that is null. The last of `length` rows are followed by zeros, up to `groups`. `from` may be changed.
template <int B>
INLINE void rows_to_panel(float* from, int64_t dim, float factor, int64_t r0, int64_t rows, int64_t length,
                          int64_t groups, int64_t stride, float* panel, float* sum) {
    constexpr int G = Shape<B>::G;
    const int64_t end = r0 + rows == length ? groups : (r0 + rows) / G;
    panel += r0 * B;
    for (int64_t j = 0; j < dim; j += W) {
        V total{};
        if constexpr (G == 1) {
            float* to = panel + j / B * stride + j % B;
            for (int64_t i = 0; i < rows; ++i) {
                const V v = load(from + i * dim + j) * factor;
                store(to + i * B, v);
                total += v;
            }
            for (int64_t i = rows; i < end - r0; ++i) store(to + i * B, V{});
        } else {
            for (int64_t i = 0; i < rows; ++i) {
                const V v = load(from + i * dim + j) * factor;
                store(from + i * dim + j, v);
                total += v;
            }
        }
        if (sum) store_any(sum + j, load_any(sum + j) + total);
    }
    if constexpr (G > 1) pack_panel<B>(from, nullptr, dim, dim / B, rows, end - r0 / G, stride, panel);
}

template <int B, bool Drop>
void sparse_attention_range(const SparseAttentionArgs& a, int64_t s0, int64_t s1, float* scratch) {
    const AttentionShape shape(a.longest, a.dim);
    const Dropout drop = make_dropout(a.seed, a.threshold);
    const SequenceBuffers<B> at(a, false, scratch);
    const int64_t in = a.in_blocks * B, out = a.out_blocks * B, hidden = a.heads * a.dim, blocks = a.dim / B;
    const int64_t tokens = a.offsets[s1] - a.offsets[s0];
    const bool streaming = streams(place(a.y), tokens, out);
    const bool stream_attended = streams(place(a.attended), tokens, hidden);
    Soon nothing{};  // what comes next is contiguous
    for (int64_t s = s0; s < s1; ++s) {
        const int64_t t0 = a.offsets[s], n = a.offsets[s + 1] - t0, groups = at.groups(n);
        if (n == 0) continue;
        pack_panel<B>(a.x + t0 * in, nullptr, in, a.in_blocks, n, groups, at.stride, at.x);
        for (int64_t h = 0; h < a.heads; ++h) {
            float* const rows_of[] = {at.q, at.k, at.v};
            for (int part = 0; part < 3; ++part) {
                const int64_t column = part * hidden + h * a.dim;
                head_rows<B>(a.first, column / B, blocks, at.x, at.stride, groups, n, move(a.bias1, column), at.sums,
                             rows_of[part]);
            }
            copy_transposed(shape, at.k, a.dim, n, a.scale, at.keys_t);
            for (int64_t r0 = 0; r0 < n; r0 += kQueries) {
                const int64_t rows = min64(kQueries, n - r0), row = h * a.n_tokens + t0 + r0;
                float sum[kQueries];
                attend_block<Drop>(shape, drop, uint64_t(row), rows, n, at.q + r0 * a.dim, at.keys_t, at.v, at.s, at.o,
                                   a.lse + row, sum, nothing);
                float* to = a.attended + (t0 + r0) * hidden + h * a.dim;
                for (int64_t r = 0; r < rows; ++r, to += hidden) {
                    const float factor = 1 / sum[r];
                    for (int64_t j = 0; j < a.dim; j += W) {
                        const V v = load(at.o + r * a.dim + j) * factor;
                        store(at.o + r * a.dim + j, v);
                        if (stream_attended) {
                            stream(to + j, v);
                        } else {
                            store_any(to + j, v);
                        }
                    }
                }
                rows_to_panel<B>(at.o, a.dim, 1, r0, rows, n, groups, at.stride, at.a + h * blocks * at.stride,
                                 nullptr);
            }
        }
        for (int64_t r = 0; r < a.out_blocks; ++r) {
            panel_row<B>(a.second, a.second.ptr[r], a.second.ptr[r + 1], at.a, at.stride, groups, false,
                         at.y + r * at.stride);
        }
        put_tokens<B>(at.y, at.stride, a.bias2, a.out_blocks, n, a.y + t0 * out, streaming);
    }
    finish_streams();
}

// One head of the sequence of n tokens from t0 on: its blocks of the panel d, from those of x and g.
template <int B, bool Drop>
void sparse_attention_head(const SparseAttentionArgs& a, const SequenceBuffers<B>& at, const Dropout& drop, int64_t h,
                           int64_t t0, int64_t n, const LayerSums& sums) {
    const AttentionShape shape(a.longest, a.dim);
    const int64_t hidden = a.heads * a.dim, blocks = a.dim / B, groups = at.groups(n);
    float* const rows_of[] = {at.q, at.k, at.v};
    for (int part = 0; part < 3; ++part) {
        const int64_t column = part * hidden + h * a.dim;
        head_rows<B>(a.first, column / B, blocks, at.x, at.stride, groups, n, move(a.bias1, column), at.sums,
                     rows_of[part]);
    }
    head_rows<B>(a.second_t, h * blocks, blocks, at.g, at.stride, groups, n, nullptr, at.sums, at.da);
    copy_transposed(shape, at.k, a.dim, n, a.scale, at.keys_t);
    copy_transposed(shape, at.v, a.dim, n, 1, at.values_t);
    float* const dv = at.v;  // from now on
    float* const panel[] = {at.d + h * blocks * at.stride, at.d + (hidden + h * a.dim) / B * at.stride,
                            at.d + (2 * hidden + h * a.dim) / B * at.stride};
    const auto bias_sum = [&](int part) { return move(sums.dbias1, part * hidden + h * a.dim); };
    Soon nothing{};  // what comes next is contiguous
    for (int64_t r0 = 0; r0 < n; r0 += kQueries) {
        const int64_t rows = min64(kQueries, n - r0), row = h * a.n_tokens + t0 + r0;
        const float *da = at.da + r0 * a.dim, *attended = a.attended + (t0 + r0) * hidden + h * a.dim;
        float mean[kQueries];
        for (int64_t r = 0; r < rows; ++r) mean[r] = dot(da + r * a.dim, attended + r * hidden, a.dim);
        gradient_block<Drop>(shape, drop, uint64_t(row), rows, n, {at.q + r0 * a.dim, da, at.keys_t, at.values_t, at.k},
                             a.lse + row, mean, at.s, at.dp, r0 > 0, {at.o, at.dk, dv}, nothing);
        rows_to_panel<B>(at.o, a.dim, a.scale, r0, rows, n, groups, at.stride, panel[0], bias_sum(0));
    }
    rows_to_panel<B>(at.dk, a.dim, a.scale, 0, n, n, groups, at.stride, panel[1], bias_sum(1));
    rows_to_panel<B>(dv, a.dim, 1, 0, n, n, groups, at.stride, panel[2], bias_sum(2));
    if (!sums.dvalues1) return;
    for (int part = 0; part < 3; ++part) {
        const int32_t* ptr = a.first.ptr + (part * hidden + h * a.dim) / B;
        for (int64_t r = 0; r < blocks; ++r) {
            add_gradient<B>(a.first.idx, ptr[r], ptr[r + 1], panel[part] + r * at.stride, at.x, at.stride,
                            at.live_groups(n), sums.dvalues1);
        }
    }
}

template <int B, bool Drop>
void sparse_attention_gradient(const SparseAttentionArgs& a, int64_t s0, int64_t s1, float* scratch,
                               const LayerSums& sums) {
    const Dropout drop = make_dropout(a.seed, a.threshold);
    const SequenceBuffers<B> at(a, true, scratch);
    const int64_t in = a.in_blocks * B, out = a.out_blocks * B, hidden = a.heads * a.dim;
    const bool streaming = streams(place(a.dx), a.offsets[s1] - a.offsets[s0], in);
    for (int64_t s = s0; s < s1; ++s) {
        const int64_t t0 = a.offsets[s], n = a.offsets[s + 1] - t0, groups = at.groups(n);
        if (n == 0) continue;
        pack_panel<B>(a.g + t0 * out, nullptr, out, a.out_blocks, n, groups, at.stride, at.g);
        if (sums.dbias2) add_rows(a.g + t0 * out, nullptr, out, n, out, sums.dbias2);
        if (sums.dvalues2) {
            pack_panel<B>(a.attended + t0 * hidden, nullptr, hidden, hidden / B, n, groups, at.stride, at.a);
            for (int64_t r = 0; r < a.out_blocks; ++r) {
                add_gradient<B>(a.second.idx, a.second.ptr[r], a.second.ptr[r + 1], at.g + r * at.stride, at.a,
                                at.stride, at.live_groups(n), sums.dvalues2);
            }
        }
        if (!a.dx && !sums.dvalues1 && !sums.dbias1) continue;
        pack_panel<B>(a.x + t0 * in, nullptr, in, a.in_blocks, n, groups, at.stride, at.x);
        for (int64_t h = 0; h < a.heads; ++h) sparse_attention_head<B, Drop>(a, at, drop, h, t0, n, sums);
        if (!a.dx) continue;
        for (int64_t r = 0; r < a.in_blocks; ++r) {
            panel_row<B>(a.first_t, a.first_t.ptr[r], a.first_t.ptr[r + 1], at.d, at.stride, groups, false,
                         at.y + r * at.stride);
        }
        put_tokens<B>(at.y, at.stride, nullptr, a.in_blocks, n, a.dx + t0 * in, streaming);
    }
    finish_streams();
}

size_t sparse_attention_scratch(const SparseAttentionArgs& a, bool backward) {
    return with_block(a.block, [&](auto b) -> size_t { return SequenceBuffers<b>(a, backward, nullptr).floats; });
}
void sparse_attention_any(const SparseAttentionArgs& a, int64_t s0, int64_t s1, float* scratch) {
    with_block(a.block, [&](auto b) {
        (a.threshold ? sparse_attention_range<b, true> : sparse_attention_range<b, false>)(a, s0, s1, scratch);
    });
}
void sparse_attention_backward_any(const SparseAttentionArgs& a, int64_t s0, int64_t s1, float* scratch,
                                   const LayerSums& sums) {
    with_block(a.block, [&](auto b) {
        (a.threshold ? sparse_attention_gradient<b, true> : sparse_attention_gradient<b, false>)(a, s0, s1, scratch,
                                                                                                 sums);
    });
}

}  // namespace
