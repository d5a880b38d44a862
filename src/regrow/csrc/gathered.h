// Gathered blocks: blocks of 16 outputs and one input, so every 16 rows of the weight have a list of single columns.
// The register tiles are those of square blocks of 16. A single column has no neighbours to share a line with, so x has
// the panel of single elements, [feature][token]; and so have g and the sums in the transposed product, which goes
// through the same rows of blocks and needs no order of columns.
#pragma once
#include "kernels.h"
#include "table.h"

namespace {

constexpr int kTall = 16;                    // outputs of a block
constexpr int64_t kTallRows = 16;            // block rows whose g is packed together

// ---- y = x W^T + bias ---------------------------------------------------------------------------

INLINE int64_t gathered_tile(int64_t cols) {
    constexpr int64_t M = Shape<kTall>::M;
    return M * max64(1, min64(96 / M, kPanelFloats / max64(1, cols * M)));
}
size_t gathered_scratch(int64_t cols) {
    return Shape<kTall>::M * kTall + panel_floats<1>(gathered_tile(cols), cols);
}

void gathered(const SpmmArgs& a, int64_t t0, int64_t t1, float* scratch) {
    using S = Shape<kTall>;
    constexpr int64_t M = S::M;
    float *spare = scratch, *panel = scratch + M * kTall;
    const int64_t in = a.in_blocks, out = a.out_blocks * kTall, tile = gathered_tile(in);
    const int64_t stride = panel_stride<1>(tile);
    const bool streaming = streams(a, t1 - t0);
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), padded = round_up(n_tokens, S::Q);
        pack_panel<1>(a.x + t0 * in, move(a.scale, t0 * in), in, in, n_tokens, round_up(padded, W) / W, stride, panel);
        for (int64_t r0 = 0; r0 < a.out_blocks; r0 += 8) {  // neighbours write neighbouring lines of y
            const int64_t r1 = min64(r0 + 8, a.out_blocks);
            for (int64_t m0 = 0; m0 < padded; m0 += M) {
                for (int64_t r = r0; r < r1; ++r) {
                    spmm_row<kTall, 1>(a, r, panel + m0, stride, min64(M, padded - m0), n_tokens - m0,
                                       a.y + (t0 + m0) * out, spare, streaming && S::PW == kTall);
                }
            }
        }
    }
    finish_streams();
}

// ---- dx = g W -----------------------------------------------------------------------------------

struct GatheredTile {
    int64_t tokens, stride;
    explicit GatheredTile(int64_t cols)
        : tokens(16 * max64(1, min64(4, kPanelFloats / max64(1, cols * 16)))), stride(panel_stride<1>(tokens)) {}
    int64_t g_floats() const { return kTallRows * kTall * stride; }
    int64_t sums_floats(int64_t cols) const { return round_up(cols, W) * stride; }
};
size_t gathered_t_scratch(int64_t cols) {
    const GatheredTile tile(cols);
    return tile.g_floats() + 2 * tile.sums_floats(cols);
}

// sums[idx[n]] += the sum over i < I of w[n][i] * g[i], for N blocks and a vector of tokens.
template <int I, int N>
INLINE void add_blocks(const V* g, const float* w, const int32_t* idx, float* sums, int64_t stride) {
    V acc[N];
    unroll<N>([&](auto n) LAMBDA { acc[n] = splat(w[n * kTall]) * g[0]; });
    unroll<I - 1>([&](auto i) LAMBDA {
        unroll<N>([&](auto n) LAMBDA { acc[n] += splat(w[n * kTall + i + 1]) * g[i + 1]; });
    });
    // One after the other: a damaged weight may name a column twice.
    unroll<N>([&](auto n) LAMBDA {
        float* to = sums + idx[n] * stride;
        store(to, load(to) + acc[n]);
    });
}

// The g of a block row stays in registers, half of it where they are few, while the columns of the row go by.
INLINE void add_row(const float* g, int64_t stride, int64_t groups, const float* w, const int32_t* idx, int64_t n,
                    float* sums) {
    constexpr int I = W == 16 ? kTall : 8, N = W == 16 ? 6 : 4;
    constexpr int64_t kWeights = 128;  // blocks that stay in the L1 cache from one vector of tokens to the next
    for (; n > 0; n -= kWeights, w += kWeights * kTall, idx += kWeights) {
        const int64_t some = min64(n, kWeights);
        for (int64_t group = 0; group < groups; ++group) {
            for (int i0 = 0; i0 < kTall; i0 += I) {
                V gv[I];
                unroll<I>([&](auto i) LAMBDA { gv[i] = load(g + (i0 + i) * stride + group * W); });
                float* to = sums + group * W;
                int64_t p = 0;
                for (; p + N <= some; p += N) add_blocks<I, N>(gv, w + p * kTall + i0, idx + p, to, stride);
                for (; p < some; ++p) add_blocks<I, 1>(gv, w + p * kTall + i0, idx + p, to, stride);
            }
        }
    }
}

// Rounding: sums that have taken in many blocks are put aside between the parts, see gathered_parts.
INLINE void put_aside(float* sums, float* before, int64_t n, bool first) {
    for (int64_t i = 0; i < n; i += W) {
        store(before + i, first ? load(sums + i) : load(before + i) + load(sums + i));
        store(sums + i, V{});
    }
}

void gathered_t(const GatheredArgs& a, int64_t t0, int64_t t1, float* scratch) {
    const GatheredTile tile(a.cols);
    const int64_t out = a.rows * kTall, stride = tile.stride;
    float *g = scratch, *sums = g + tile.g_floats(), *before = sums + tile.sums_floats(a.cols);
    const bool streaming = streams(place(a.dx), t1 - t0, a.cols);
    SpmmArgs to{};  // no bias, no activation
    to.out_blocks = a.cols;
    to.block = 1;
    for (; t0 < t1; t0 += tile.tokens) {
        const int64_t n_tokens = min64(tile.tokens, t1 - t0), groups = round_up(n_tokens, W) / W;
        memset(sums, 0, tile.sums_floats(a.cols) * sizeof(float));
        for (int64_t part = 0; part < a.n_parts; ++part) {
            if (part > 0) put_aside(sums, before, tile.sums_floats(a.cols), part == 1);
            for (int64_t r0 = a.parts[part]; r0 < a.parts[part + 1]; r0 += kTallRows) {
                const int64_t r1 = min64(r0 + kTallRows, a.parts[part + 1]), first = t0 * out + r0 * kTall;
                pack_panel<1>(a.g + first, move(a.scale, first), out, (r1 - r0) * kTall, n_tokens, groups, stride, g);
                for (int64_t r = r0; r < r1; ++r) {
                    const int64_t p = a.ptr[r];
                    add_row(g + (r - r0) * kTall * stride, stride, groups, a.packed + p * kTall, a.idx + p,
                            a.ptr[r + 1] - p, sums);
                }
            }
        }
        if (a.n_parts > 1) {
            for (int64_t i = 0; i < tile.sums_floats(a.cols); i += W) store(sums + i, load(before + i) + load(sums + i));
        }
        unpack<1>(to, 0, a.cols, sums, stride, n_tokens, a.dx + t0 * a.cols, streaming);
    }
    finish_streams();
}

// ---- dvalues = g^T x ----------------------------------------------------------------------------

INLINE int64_t gathered_sddmm_tile(int64_t cols) {
    const int64_t tokens = kPanelFloats * 5 / 4 / max64(1, cols + kTallRows * kTall);
    return max64(64, min64(128, tokens / 32 * 32));
}
size_t gathered_sddmm_scratch(int, int64_t, int64_t cols, int64_t) {
    const int64_t tile = gathered_sddmm_tile(cols);
    return panel_floats<kTall>(tile, kTallRows) + panel_floats<1>(tile, cols);
}

// acc[n] += sum over tokens of g[token][16 outputs] * x[idx[n]][token], for N blocks of one block row.
template <int N>
INLINE void sddmm_columns(const float* g, const float* x, int64_t stride, const int32_t* idx, int64_t n_tokens,
                          float* acc) {
    constexpr int NV = kTall / W;
    V sum[N][NV] = {};
    const float* xs[N];
    unroll<N>([&](auto n) LAMBDA { xs[n] = x + idx[n] * stride; });
#pragma GCC unroll 4
    for (int64_t t = 0; t < n_tokens; ++t) {
        V gv[NV];
        unroll<NV>([&](auto v) LAMBDA { gv[v] = load(g + t * kTall + v * W); });
        unroll<N>([&](auto n) LAMBDA {
            const V xv = splat(xs[n][t]);
            unroll<NV>([&](auto v) LAMBDA { sum[n][v] += gv[v] * xv; });
        });
    }
    unroll<N>([&](auto n) LAMBDA {
        unroll<NV>([&](auto v) LAMBDA {
            float* to = acc + n * kTall + v * W;
            store(to, load(to) + sum[n][v]);
        });
    });
}
constexpr int kColumns = W == 16 ? 8 : W == 8 ? 5 : 2;  // more addresses than that do not fit in the registers
template <int N = kColumns>
INLINE void sddmm_few(int64_t n, const float* g, const float* x, int64_t stride, const int32_t* idx, int64_t n_tokens,
                      float* acc) {
    if constexpr (N > 1) {
        if (n < N) return sddmm_few<N - 1>(n, g, x, stride, idx, n_tokens, acc);
    }
    sddmm_columns<N>(g, x, stride, idx, n_tokens, acc);
}

void gathered_sddmm(const SddmmArgs& a, int64_t t0, int64_t t1, float* scratch, float* acc, float* g_sum) {
    const int64_t tile = gathered_sddmm_tile(a.cols);
    const int64_t g_stride = panel_stride<kTall>(tile), stride = panel_stride<1>(tile);
    float *g_panel = scratch, *x_panel = scratch + panel_floats<kTall>(tile, kTallRows);
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0);
        pack_panel<1>(a.x + t0 * a.cols, nullptr, a.cols, a.cols, n_tokens, round_up(n_tokens, W) / W, stride, x_panel);
        for (int64_t r0 = 0; r0 < a.rows; r0 += kTallRows) {
            const int64_t r1 = min64(r0 + kTallRows, a.rows), first = t0 * a.g_width + r0 * kTall;
            const float *from = a.g + first, *scale = move(a.scale, first);
            pack_panel<kTall>(from, scale, a.g_width, r1 - r0, n_tokens, n_tokens, g_stride, g_panel);
            if (g_sum) add_rows(from, scale, a.g_width, n_tokens, (r1 - r0) * kTall, g_sum + r0 * kTall);
            for (int64_t r = r0; r < r1; ++r) {
                for (int64_t p = a.ptr[r]; p < a.ptr[r + 1]; p += kColumns) {
                    sddmm_few(min64(kColumns, a.ptr[r + 1] - p), g_panel + (r - r0) * g_stride, x_panel, stride,
                              a.idx + p, n_tokens, acc + (p - a.ptr[0]) * kTall);
                }
            }
        }
    }
}

}  // namespace
