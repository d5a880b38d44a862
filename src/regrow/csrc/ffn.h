// Two block-sparse products with a GELU between them, for tiles of tokens that stay in the L2 cache. Included once per
// instruction set.
//
// The register tile's sums have the layout of a panel (kernels.h), so what one product writes the next one reads: the
// hidden activations and their gradients exist as panels of one tile only, and nothing of them is packed. The hidden
// width is taken slab by slab, so that long tiles fit, which pass over the weights and their gradients less often.
#pragma once
#include "kernels.h"
#include "table.h"

namespace {

// A long tile passes over the weights and the sums of their gradients less often; its slabs keep the panels of the
// hidden blocks, one or two, within a megabyte. Forward there are no such sums. Single elements lose more by short runs
// in many slabs than by panels that leave the L2 cache.
template <int B>
constexpr int64_t kSlabFloats = B == 1 ? 1 << 19 : 1 << 18;

template <int B>
FfnPlan ffn_plan(int64_t in_blocks, int64_t hidden_blocks, int64_t out_blocks, bool backward) {
    constexpr int64_t G = Shape<B>::G, micro = Shape<B>::kMicroTokens;
    FfnPlan plan;
    plan.tile = max64(1, (backward ? 192 : 96) / micro) * micro;
    const int64_t hidden_panels = backward ? 2 : 1;
    const int64_t floats = hidden_panels * hidden_blocks * B * plan.tile;
    const int64_t slabs = max64(1, (floats + kSlabFloats<B> - 1) / kSlabFloats<B>);
    plan.slab = max64(1, (hidden_blocks + slabs - 1) / slabs);
    const int64_t panels = (backward ? 2 : 1) * round_up(in_blocks, G) + round_up(out_blocks, G) +
                           hidden_panels * plan.slab;
    plan.scratch = panel_stride<B>(plan.tile) * panels;
    return plan;
}

// The groups of one block row in single elements.
template <int Mm = Shape<1>::M>
INLINE void element_groups(int64_t groups, const float* panel, int64_t stride, const float* w, const int32_t* idx,
                           int64_t n, bool add, float* out) {
    if constexpr (Mm > Shape<1>::Q) {
        if (groups < Mm) return element_groups<Mm - Shape<1>::Q>(groups, panel, stride, w, idx, n, add, out);
    }
    add_elements<Mm>(panel, stride, w, idx, n, !add, out);
}

// One block row of a product, for all groups of a tile: panel -> panel. With `add` to what is there. See spmm_groups for
// `Few`.
template <int B, bool Few = false>
INLINE void panel_row(const PackedWeight& w, int64_t begin, int64_t end, const float* panel, int64_t stride,
                      int64_t groups, bool add, float* out) {
    constexpr int G = Shape<B>::G, NV = Shape<B>::NV, PW = Shape<B>::PW, M = Shape<B>::M;
    const int64_t n = end - begin;
    if (add && n == 0) return;
    for (int64_t m0 = 0; m0 < groups; m0 += M) {
        const int64_t some = min64(M, groups - m0);
        const float* from = panel + m0 * (B * G);
        if constexpr (B == 1) {
            element_groups(some, from, stride, w.packed + begin, w.idx + begin, n, add, out + m0 * W);
        } else {
            for (int piece = 0; piece < B; piece += PW) {
                float* to = out + m0 * (B * G) + piece;
                const auto end = [&](auto mm, auto& acc) LAMBDA {
                    unroll<mm>([&](auto m) LAMBDA {
                        unroll<NV>([&](auto v) LAMBDA {
                            float* at = to + m * (B * G) + v * W;
                            store(at, add ? load(at) + acc[m][v] : acc[m][v]);
                        });
                    });
                };
                const float* values = w.packed + begin * (B * B) + piece * B;
                spmm_groups<B, Few>(some, from, stride, values, w.idx + begin, n, end);
            }
        }
    }
}

// h (without its bias) -> gelu(h), for one block row. With df also df -> df times the slope, whose sums over tokens are
// added to dbias [B] unless that is null.
template <int B, bool Backward>
INLINE void gelu_row(const float* bias, int64_t groups, float* h, float* df, float* dbias) {
    constexpr int G = Shape<B>::G;
    for (int piece = 0; piece < B * G; piece += W) {
        const V b = bias ? expand<G>(bias + piece / G) : V{};
        V total{};
        for (int64_t at = piece; at < piece + groups * (B * G); at += B * G) {
            if constexpr (!Backward) {
                store(h + at, gelu(load(h + at) + b));
            } else {
                V slope;
                store(h + at, gelu(load(h + at) + b, slope));
                const V dh = load(df + at) * slope;
                store(df + at, dh);
                total += dh;
            }
        }
        if (Backward && dbias) {
            for (int lane = 0; lane < W; ++lane) dbias[(piece + lane) / G] += total[lane];
        }
    }
}

// sums [blocks][groups][B * G] -> y [n_tokens, blocks * B], with the bias.
template <int B>
void put_tokens(const float* sums, int64_t stride, const float* bias, int64_t blocks, int64_t n_tokens, float* y,
                bool streaming) {
    if constexpr (Shape<B>::G > 1) {
        SpmmArgs a{};
        a.bias = bias;
        a.out_blocks = blocks;
        unpack<B>(a, 0, blocks, sums, stride, n_tokens, y, streaming);
    } else {
        constexpr int64_t kAtOnce = 8;
        for (int64_t t0 = 0; t0 < n_tokens; t0 += kAtOnce) {
            const int64_t t1 = min64(t0 + kAtOnce, n_tokens);
            for (int64_t r = 0; r < blocks; ++r) {
                for (int64_t t = t0; t < t1; ++t) {
                    const float* from = sums + r * stride + t * B;
                    float* to = y + (t * blocks + r) * B;
                    unroll<B / W>([&](auto v) LAMBDA {
                        const V sum = load(from + v * W) + (bias ? load_any(bias + r * B + v * W) : V{});
                        if (streaming) {
                            stream(to + v * W, sum);
                        } else {
                            store_any(to + v * W, sum);
                        }
                    });
                }
            }
        }
    }
}

template <int B>
void ffn_range(const FfnArgs& a, int64_t t0, int64_t t1, float* scratch) {
    constexpr int G = Shape<B>::G;
    const int64_t tile = a.plan.tile, slab = a.plan.slab, stride = panel_stride<B>(tile);
    const int64_t in = a.in_blocks * B, out = a.out_blocks * B;
    const bool streaming = streams(place(a.y), t1 - t0, out);
    float *x = scratch, *f = x + round_up(a.in_blocks, G) * stride, *sums = f + slab * stride;
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), groups = round_up((n_tokens + G - 1) / G, Shape<B>::Q);
        pack_panel<B>(a.x + t0 * in, nullptr, in, a.in_blocks, n_tokens, groups, stride, x);
        const int32_t* cuts = a.second_cuts;
        for (int64_t h0 = 0; h0 < a.hidden_blocks; h0 += slab, cuts += a.out_blocks) {
            const int64_t h1 = min64(h0 + slab, a.hidden_blocks);
            for (int64_t r = h0; r < h1; ++r) {
                float* h = f + (r - h0) * stride;
                panel_row<B>(a.first, a.first.ptr[r], a.first.ptr[r + 1], x, stride, groups, false, h);
                gelu_row<B, false>(move(a.bias1, r * B), groups, h, nullptr, nullptr);
            }
            for (int64_t r = 0; r < a.out_blocks; ++r) {
                panel_row<B>(a.second, cuts[r], cuts[a.out_blocks + r], f - h0 * stride, stride, groups, h0 > 0,
                             sums + r * stride);
            }
        }
        put_tokens<B>(sums, stride, a.bias2, a.out_blocks, n_tokens, a.y + t0 * out, streaming);
    }
    finish_streams();
}

// The weight gradient's blocks of one block row, from panels.
template <int B>
INLINE void add_gradient(const int32_t* idx, int64_t begin, int64_t end, const float* g, const float* x, int64_t stride,
                         int64_t groups, float* dvalues) {
    constexpr int NB = sddmm_blocks<B>();
    for (int64_t p = begin; p < end; p += NB) {
        sddmm_blocks_of_row<B>(min64(NB, end - p), g, x, stride, idx + p, groups, dvalues + p * (B * B));
    }
}

template <int B>
void ffn_backward_range(const FfnArgs& a, int64_t t0, int64_t t1, float* scratch, const LayerSums& sums) {
    constexpr int G = Shape<B>::G;
    const int64_t tile = a.plan.tile, slab = a.plan.slab, stride = panel_stride<B>(tile);
    const int64_t in = a.in_blocks * B, out = a.out_blocks * B;
    const bool streaming = streams(place(a.dx), t1 - t0, in);
    float *x = scratch, *g = x + round_up(a.in_blocks, G) * stride, *f = g + round_up(a.out_blocks, G) * stride;
    float *dh = f + slab * stride, *dx = dh + slab * stride;
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), live = (n_tokens + G - 1) / G;
        const int64_t groups = round_up(live, Shape<B>::Q);
        pack_panel<B>(a.x + t0 * in, nullptr, in, a.in_blocks, n_tokens, groups, stride, x);
        pack_panel<B>(a.g + t0 * out, nullptr, out, a.out_blocks, n_tokens, groups, stride, g);
        if (sums.dbias2) add_rows(a.g + t0 * out, nullptr, out, n_tokens, out, sums.dbias2);
        const int32_t *cuts = a.second_cuts, *cuts_t = a.first_t_cuts;
        for (int64_t h0 = 0; h0 < a.hidden_blocks; h0 += slab, cuts += a.out_blocks, cuts_t += a.in_blocks) {
            const int64_t h1 = min64(h0 + slab, a.hidden_blocks);
            for (int64_t r = h0; r < h1; ++r) {
                float *hr = f + (r - h0) * stride, *dr = dh + (r - h0) * stride;
                panel_row<B>(a.first, a.first.ptr[r], a.first.ptr[r + 1], x, stride, groups, false, hr);
                panel_row<B>(a.second_t, a.second_t.ptr[r], a.second_t.ptr[r + 1], g, stride, groups, false, dr);
                gelu_row<B, true>(move(a.bias1, r * B), groups, hr, dr, move(sums.dbias1, r * B));
            }
            if (sums.dvalues2) {
                for (int64_t r = 0; r < a.out_blocks; ++r) {
                    add_gradient<B>(a.second.idx, cuts[r], cuts[a.out_blocks + r], g + r * stride, f - h0 * stride,
                                    stride, live, sums.dvalues2);
                }
            }
            if (sums.dvalues1) {
                for (int64_t r = h0; r < h1; ++r) {
                    add_gradient<B>(a.first.idx, a.first.ptr[r], a.first.ptr[r + 1], dh + (r - h0) * stride, x, stride,
                                    live, sums.dvalues1);
                }
            }
            if (a.dx) {
                for (int64_t r = 0; r < a.in_blocks; ++r) {
                    panel_row<B>(a.first_t, cuts_t[r], cuts_t[a.in_blocks + r], dh - h0 * stride, stride, groups,
                                 h0 > 0, dx + r * stride);
                }
            }
        }
        if (a.dx) put_tokens<B>(dx, stride, nullptr, a.in_blocks, n_tokens, a.dx + t0 * in, streaming);
    }
    finish_streams();
}

FfnPlan ffn_plan_any(int block, int64_t in_blocks, int64_t hidden_blocks, int64_t out_blocks, bool backward) {
    return with_block(block, [&](auto b) { return ffn_plan<b>(in_blocks, hidden_blocks, out_blocks, backward); });
}
void ffn_any(const FfnArgs& a, int64_t t0, int64_t t1, float* scratch) {
    with_block(a.block, [&](auto b) { ffn_range<b>(a, t0, t1, scratch); });
}
void ffn_backward_any(const FfnArgs& a, int64_t t0, int64_t t1, float* scratch, const LayerSums& sums) {
    with_block(a.block, [&](auto b) { ffn_backward_range<b>(a, t0, t1, scratch, sums); });
}

}  // namespace
