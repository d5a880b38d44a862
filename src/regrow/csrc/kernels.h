// The block-sparse kernels, for any vector width W and block size B. Included once per instruction set.
//
// Operands are copied, a tile of tokens at a time, into *panels*: panel[feature block][token group][k < B][G],
// where G = max(1, W / B) tokens are interleaved. So a vector is always W useful numbers (B features of G
// tokens when B < W, features of one token otherwise), the numbers of one block and tile are contiguous, and
// the tile stays in the L2 cache while every block of the weight passes over it. docs/kernels.md has the
// whole picture.
#pragma once
#include "table.h"
#include "vec.h"

namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Every size that follows from the block size.
template <int B>
struct Shape {
    static constexpr int G = B < W ? W / B : 1;            // tokens in a vector
    static constexpr int NV = B >= 2 * W ? 2 : 1;          // output vectors of the register tile
    static constexpr int PW = B < W ? B : NV * W;          // outputs of the register tile (a piece)
    // Token groups of the register tile. Where a vector holds many tokens, 64 tokens in all: a smaller panel is
    // read faster than more accumulators gain.
    static constexpr int M = G > 1 && 64 / G < kAccumulators ? 64 / G : kAccumulators / NV;
    static constexpr int Q = M % 3 == 0 ? M / 3 : M / 2;   // granularity of the last register tile
    static constexpr int64_t kMicroTokens = M * G;
    // Block rows whose outputs are written together. One register tile of a single vector of outputs writes one
    // line in each row of y; a neighbouring block row writes the line beside it, while its page is at hand.
    static constexpr int64_t kRows = NV == 2 ? 1 : 8;
};

// The panel of a tile of at most `tokens` tokens: at most half a megabyte, so that it stays in L2.
constexpr int64_t kPanelFloats = 1 << 17;
// Whether the outputs of a thread are stored around the caches: they are more than a private cache holds, and every
// vector of them is aligned.
constexpr int64_t kStreamFloats = 1 << 19;
INLINE bool streams(const float* y, int64_t tokens, int64_t width) {
    return tokens * width > kStreamFloats && width % 16 == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
}

template <int B>
int64_t panel_stride(int64_t tokens) {
    return round_up(tokens * B, 16) + 16;  // one line more: no power-of-two strides between feature blocks
}
template <int B>
int64_t panel_floats(int64_t tokens, int64_t feature_blocks) {
    return round_up(feature_blocks, Shape<B>::G) * panel_stride<B>(tokens);
}
template <int B>
int64_t spmm_tile(int64_t in_blocks) {
    if (Shape<B>::G > 1) return Shape<B>::kMicroTokens;
    int64_t tiles = kPanelFloats / max64(1, in_blocks * B * Shape<B>::kMicroTokens);
    return Shape<B>::kMicroTokens * max64(1, min64(4, tiles));
}
template <int B>
int64_t sddmm_tile(int64_t rows, int64_t cols) {
    int64_t tokens = kPanelFloats * 5 / 4 / max64(1, (rows + cols) * B);  // both panels, and blocks beside them in L2
    return max64(64, min64(128, tokens / 32 * 32));
}

// Copies up to n floats, the rest zero.
INLINE V load_part(const float* p, int64_t n) {
    float line[W] __attribute__((aligned(64))) = {};
    memcpy(line, p, sizeof(float) * (n < W ? n : W));
    return load(line);
}
INLINE void store_part(float* p, V v, int64_t n) {
    if (n >= W) return store_any(p, v);
    float line[W] __attribute__((aligned(64)));
    store(line, v);
    memcpy(p, line, sizeof(float) * n);
}

// x [n_tokens, blocks * B], rows x_width apart -> panel with `groups` token groups; tokens past the end are zero.
template <int B>
void pack_panel(const float* x, int64_t x_width, int64_t blocks, int64_t n_tokens, int64_t groups, int64_t stride,
                float* panel) {
    constexpr int G = Shape<B>::G;
    const int64_t width = blocks * B;
    if constexpr (G == 1) {
        for (int64_t t = 0; t < groups; ++t) {
            float* to = panel + t * B;
            if (t < n_tokens) {
                const float* from = x + t * x_width;
                for (int64_t c = 0; c < blocks; ++c, to += stride, from += B) {
                    unroll<B / W>([&](auto v) LAMBDA { store(to + v * W, load_any(from + v * W)); });
                }
            } else {
                for (int64_t c = 0; c < blocks; ++c, to += stride) memset(to, 0, B * sizeof(float));
            }
        }
    } else {
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t t0 = group * G, live = n_tokens - t0;
            for (int64_t f = 0; f < width; f += W) {  // G feature blocks at a time
                V v[G];
                const float* from = x + t0 * x_width + f;
                if (live >= G && f + W <= width) {
                    unroll<G>([&](auto t) LAMBDA { v[t] = load_any(from + t * x_width); });
                } else {
                    unroll<G>([&](auto t) LAMBDA { v[t] = t < live ? load_part(from + t * x_width, width - f) : V{}; });
                }
                transpose<G>(v);
                float* to = panel + f / B * stride + group * W;
                unroll<G>([&](auto c) LAMBDA { store(to + c * stride, feature_major<G>(v[c])); });
            }
        }
    }
}

// One register tile: Mm token groups by PW outputs of one block row, over `n` of its blocks.
//   out[m] (lanes (output, token)) = bias + sum over blocks p and k < B of expand(w[p][k]) * bcast(x[idx[p]][m][k])
// Rounding: a long row is summed in segments, because the error of one chain of additions grows with its length, and
// the bias comes last, because a sum that starts at a large bias rounds every small product to the bias's precision.
template <int B, int Mm>
INLINE void spmm_micro(const float* panel, int64_t stride, const float* w, const int32_t* idx, int64_t n,
                       const float* bias, float* out, int64_t out_stride, bool streaming) {
    constexpr int G = Shape<B>::G, NV = Shape<B>::NV, PW = Shape<B>::PW;
    constexpr int64_t kSegment = 128 / B;  // blocks
    V acc[Mm][NV];
    float before[Mm * NV * W] __attribute__((aligned(64)));  // the segments already summed
    for (bool first = true;; first = false) {
        unroll<Mm>([&](auto m) LAMBDA { unroll<NV>([&](auto v) LAMBDA { acc[m][v] = V{}; }); });
        for (int64_t left = min64(n, kSegment); left > 0; --left, ++idx, w += B * B) {
            const float* xp = panel + *idx * stride;
            const float* wp = w;
#pragma GCC unroll 2
            for (int k = 0; k < B; ++k, xp += G, wp += PW) {
                V wv[NV];
                unroll<NV>([&](auto v) LAMBDA { wv[v] = expand<G>(wp + v * W); });
                unroll<Mm>([&](auto m) LAMBDA {
                    const V xv = bcast<G>(xp + m * (B * G));
                    unroll<NV>([&](auto v) LAMBDA { acc[m][v] += wv[v] * xv; });
                });
            }
        }
        n -= kSegment;
        if (!first) {
            unroll<Mm>([&](auto m) LAMBDA {
                unroll<NV>([&](auto v) LAMBDA { acc[m][v] += load(before + (m * NV + v) * W); });
            });
        }
        if (n <= 0) break;
        unroll<Mm>([&](auto m) LAMBDA {
            unroll<NV>([&](auto v) LAMBDA { store(before + (m * NV + v) * W, acc[m][v]); });
        });
    }
    unroll<NV>([&](auto v) LAMBDA {
        const V end = bias ? load_any(bias + v * W) : V{};
        if (streaming) {
            unroll<Mm>([&](auto m) LAMBDA { stream(out + m * out_stride + v * W, acc[m][v] + end); });
        } else {
            unroll<Mm>([&](auto m) LAMBDA { store_any(out + m * out_stride + v * W, acc[m][v] + end); });
        }
    });
}

// The last register tile of a range may be shorter: a multiple of Q groups.
template <int B, int Mm = Shape<B>::M>
INLINE void spmm_groups(int64_t groups, const float* panel, int64_t stride, const float* w, const int32_t* idx,
                        int64_t n, const float* bias, float* out, int64_t out_stride, bool streaming = false) {
    if constexpr (Mm > Shape<B>::Q) {
        if (groups < Mm) {
            return spmm_groups<B, Mm - Shape<B>::Q>(groups, panel, stride, w, idx, n, bias, out, out_stride,
                                                    streaming);
        }
    }
    spmm_micro<B, Mm>(panel, stride, w, idx, n, bias, out, out_stride, streaming);
}

// ---- large blocks: vectors of outputs, straight into y ------------------------------------------

// One block row, for the m <= M tokens at `part`; `live` of them exist.
template <int B>
INLINE void spmm_row(const SpmmArgs& a, int64_t r, const float* part, int64_t stride, int64_t m, int64_t live, float* y,
                     float* spare, bool streaming) {
    constexpr int PW = Shape<B>::PW;
    const int64_t p0 = a.ptr[r], n = a.ptr[r + 1] - p0, out = a.out_blocks * B;
    for (int piece = 0; piece < B; piece += PW) {
        const float* w = a.packed + p0 * (B * B) + piece * B;
        const float* bias = a.bias ? a.bias + r * B + piece : nullptr;
        float* to = y + r * B + piece;
        if (live >= m) {
            spmm_groups<B>(m, part, stride, w, a.idx + p0, n, bias, to, out, streaming);
        } else {
            spmm_groups<B>(m, part, stride, w, a.idx + p0, n, bias, spare, PW);
            for (int64_t t = 0; t < live; ++t) memcpy(to + t * out, spare + t * PW, PW * sizeof(float));
        }
    }
}

template <int B>
void spmm_large(const SpmmArgs& a, int64_t t0, int64_t t1, float* spare, float* panel) {
    constexpr int M = Shape<B>::M;
    const int64_t tile = spmm_tile<B>(a.in_blocks), stride = panel_stride<B>(tile);
    const int64_t in = a.in_blocks * B, out = a.out_blocks * B;
    const bool streaming = Shape<B>::PW % 16 == 0 && streams(a.y, t1 - t0, out);  // whole lines only
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), groups = round_up(n_tokens, Shape<B>::Q);
        pack_panel<B>(a.x + t0 * in, in, a.in_blocks, n_tokens, groups, stride, panel);
        for (int64_t r0 = 0; r0 < a.out_blocks; r0 += Shape<B>::kRows) {
            const int64_t r1 = min64(r0 + Shape<B>::kRows, a.out_blocks);
            for (int64_t m0 = 0; m0 < groups; m0 += M) {
                for (int64_t r = r0; r < r1; ++r) {
                    spmm_row<B>(a, r, panel + m0 * B, stride, min64(M, groups - m0), n_tokens - m0,
                                a.y + (t0 + m0) * out, spare, streaming);
                }
            }
        }
    }
}

// ---- small blocks: vectors of several tokens, collected and put in order at the end of a tile ----

// sums [block rows][M groups][B * G] (lanes (output, token) within a vector) -> y, with the bias.
template <int B>
void unpack(const SpmmArgs& a, const float* sums, int64_t n_tokens, float* y, bool streaming) {
    constexpr int G = Shape<B>::G, M = Shape<B>::M;
    const int64_t out = a.out_blocks * B;
    for (int64_t group = 0; group * G < n_tokens; ++group) {
        const int64_t live = n_tokens - group * G;
        const float* from = sums + group * (B * G);
        float* to = y + group * G * out;
        for (int64_t f = 0; f < out; f += W, from += G * M * W) {  // G block rows make W columns
            V v[G];
            unroll<G>([&](auto c) LAMBDA { v[c] = token_major<G>(load(from + c * (M * W))); });
            transpose<G>(v);
            const V bias = a.bias ? load_part(a.bias + f, out - f) : V{};
            if (streaming && live >= G) {
                unroll<G>([&](auto t) LAMBDA { stream(to + t * out + f, v[t] + bias); });
            } else if (live >= G && f + W <= out) {
                unroll<G>([&](auto t) LAMBDA { store_any(to + t * out + f, v[t] + bias); });
            } else {
                unroll<G>([&](auto t) LAMBDA {
                    if (t < live) store_part(to + t * out + f, v[t] + bias, out - f);
                });
            }
        }
    }
}

template <int B>
void spmm_small(const SpmmArgs& a, int64_t t0, int64_t t1, float* sums, float* panel) {
    constexpr int G = Shape<B>::G, M = Shape<B>::M;
    constexpr int64_t tile = Shape<B>::kMicroTokens;
    const int64_t stride = panel_stride<B>(tile), in = a.in_blocks * B, out = a.out_blocks * B;
    const bool streaming = streams(a.y, t1 - t0, out);
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), groups = round_up((n_tokens + G - 1) / G, Shape<B>::Q);
        pack_panel<B>(a.x + t0 * in, in, a.in_blocks, n_tokens, groups, stride, panel);
        for (int64_t r = 0; r < a.out_blocks; ++r) {
            const int64_t p0 = a.ptr[r], n = a.ptr[r + 1] - p0;
            spmm_groups<B>(groups, panel, stride, a.packed + p0 * (B * B), a.idx + p0, n, nullptr,
                           sums + r * (M * B * G), B * G);
        }
        unpack<B>(a, sums, n_tokens, a.y + t0 * out, streaming);
    }
}

// Floats of the outputs of a tile that wait to be written.
template <int B>
int64_t waiting_floats(int64_t out_blocks) {
    constexpr int G = Shape<B>::G;
    return (G > 1 ? round_up(out_blocks, G) : 1) * Shape<B>::M * B * G;
}

template <int B>
void spmm_range(const SpmmArgs& a, int64_t t0, int64_t t1, float* scratch) {
    float* panel = scratch + round_up(waiting_floats<B>(a.out_blocks), 16);
    if constexpr (Shape<B>::G == 1) {
        spmm_large<B>(a, t0, t1, scratch, panel);
    } else {
        spmm_small<B>(a, t0, t1, scratch, panel);
    }
    finish_streams();
}

// packed[p][piece][k][PW]: what spmm_micro reads in order. The contraction index k runs over the inputs of
// the block for y = x W^T (transpose) and over its outputs for dx = g W.
template <int B>
void pack_values(bool transpose, const float* values, const int32_t* slot, int64_t p0, int64_t p1, float* packed) {
    constexpr int PW = Shape<B>::PW;
    for (int64_t p = p0; p < p1; ++p) {
        const float* from = values + int64_t(slot[p]) * (B * B);
        float* to = packed + p * (B * B);
        for (int piece = 0; piece < B; piece += PW) {
            for (int k = 0; k < B; ++k) {
                for (int o = 0; o < PW; ++o, ++to) {
                    *to = transpose ? from[(piece + o) * B + k] : from[k * B + piece + o];
                }
            }
        }
    }
}

// How sddmm's register tile is cut: RI rows of up to NB blocks of one block row (they share the broadcasts
// of g), CV vectors of each block's columns.
template <int B, int Nb>
struct SddmmShape {
    static constexpr int CV = B >= 2 * W ? 2 : 1;
    static constexpr int kRowsThatFit = (W == 16 ? 24 : 12) / (Nb * CV);
    static constexpr int RI = B <= kRowsThatFit ? B : kRowsThatFit >= 16 ? 16 : kRowsThatFit >= 8 ? 8 : 4;
};
template <int B>
constexpr int sddmm_blocks() {
    constexpr int registers = W == 16 ? 24 : 12;
    if (B == 1) return W;
    if (B >= 2 * W) return 1;
    return max64(1, registers / min64(B, W == 16 ? 8 : 4));
}

// acc[block][i][j] += sum over tokens of g[token][i] * x[token][j], for Nb blocks of one block row.
template <int B, int Nb>
INLINE void sddmm_micro(const float* g, const float* x, int64_t x_stride, const int32_t* idx, int64_t groups,
                        float* acc) {
    constexpr int G = Shape<B>::G, RI = SddmmShape<B, Nb>::RI, CV = SddmmShape<B, Nb>::CV;
    const float* xs[Nb];
    unroll<Nb>([&](auto n) LAMBDA { xs[n] = x + idx[n] * x_stride; });
    for (int i0 = 0; i0 < B; i0 += RI) {
        for (int j0 = 0; j0 < B; j0 += CV * W) {
            constexpr int N = Nb * RI * CV;
            V sum[(N + G - 1) / G * G] = {};
            const float* gp = g + i0 * G;
            for (int64_t offset = j0; offset < groups * (B * G); offset += B * G, gp += B * G) {
                V xv[Nb][CV];
                unroll<Nb>([&](auto n) LAMBDA {
                    unroll<CV>([&](auto c) LAMBDA { xv[n][c] = load(xs[n] + offset + c * W); });
                });
                unroll<RI>([&](auto i) LAMBDA {
                    const V gv = bcast<G>(gp + i * G);
                    unroll<Nb>([&](auto n) LAMBDA {
                        unroll<CV>([&](auto c) LAMBDA { sum[(n * RI + i) * CV + c] += gv * xv[n][c]; });
                    });
                });
            }
            if constexpr (G == 1) {
                unroll<Nb>([&](auto n) LAMBDA {
                    unroll<RI>([&](auto i) LAMBDA {
                        unroll<CV>([&](auto c) LAMBDA {
                            float* to = acc + n * (B * B) + (i0 + i) * B + j0 + c * W;
                            store(to, load(to) + sum[(n * RI + i) * CV + c]);
                        });
                    });
                });
            } else {
                // Lanes (column, token) of G rows -> (column, row) -> (row, column): W numbers in acc's order.
                // Past the last block these are zeros, added to numbers of the next (or to acc's spare room).
                unroll<(N + G - 1) / G>([&](auto q) LAMBDA {
                    float* to = acc + q * W;
                    if constexpr (RI < B) {
                        constexpr int per = RI / G;
                        to = acc + (q / per) * (B * B) + i0 * B + (q % per) * W;
                    }
                    store_any(to, load_any(to) + token_major<G>(sum_tokens<G>(sum + q * G)));
                });
            }
        }
    }
}

template <int B, int Nb = sddmm_blocks<B>()>
INLINE void sddmm_blocks_of_row(int64_t n, const float* g, const float* x, int64_t x_stride, const int32_t* idx,
                                int64_t groups, float* acc) {
    if constexpr (Nb > 1) {
        if (n < Nb) return sddmm_blocks_of_row<B, Nb - 1>(n, g, x, x_stride, idx, groups, acc);
    }
    sddmm_micro<B, Nb>(g, x, x_stride, idx, groups, acc);
}

// sum[f] += g[t][f] over n_tokens rows: the gradient of the bias, while packing has just brought g to the cache.
INLINE void add_rows(const float* g, int64_t g_width, int64_t n_tokens, int64_t width, float* sum) {
    constexpr int kAtOnce = 8;
    int64_t t = 0;
    for (; t + kAtOnce <= n_tokens; t += kAtOnce, g += kAtOnce * g_width) {
        for (int64_t f = 0; f < width; ++f) {
            float total = 0;
            for (int i = 0; i < kAtOnce; ++i) total += g[i * g_width + f];
            sum[f] += total;
        }
    }
    for (; t < n_tokens; ++t, g += g_width) {
        for (int64_t f = 0; f < width; ++f) sum[f] += g[f];
    }
}

template <int B>
void sddmm_range(const SddmmArgs& a, int64_t t0, int64_t t1, float* scratch, float* acc, float* g_sum) {
    constexpr int G = Shape<B>::G, NB = sddmm_blocks<B>();
    const int64_t tile = sddmm_tile<B>(a.rows, a.cols), stride = panel_stride<B>(tile);
    float* g_panel = scratch;
    float* x_panel = scratch + panel_floats<B>(tile, a.rows);
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), groups = (n_tokens + G - 1) / G;
        pack_panel<B>(a.g + t0 * a.g_width, a.g_width, a.rows, n_tokens, groups, stride, g_panel);
        if (g_sum) add_rows(a.g + t0 * a.g_width, a.g_width, n_tokens, a.rows * B, g_sum);
        pack_panel<B>(a.x + t0 * a.cols * B, a.cols * B, a.cols, n_tokens, groups, stride, x_panel);
        for (int64_t r = 0; r < a.rows; ++r) {
            const float* g = g_panel + r * stride;
            for (int64_t p = a.ptr[r]; p < a.ptr[r + 1]; p += NB) {
                const int64_t n = min64(NB, a.ptr[r + 1] - p);
                sddmm_blocks_of_row<B>(n, g, x_panel, stride, a.idx + p, groups, acc + (p - a.ptr[0]) * (B * B));
            }
        }
    }
}

template <int B>
void reduce(const float* acc, size_t acc_stride, int n_acc, const int32_t* slot, int64_t n_blocks, float* dvalues) {
    for (int64_t p = 0; p < n_blocks; ++p) {
        const float* from = acc + p * (B * B);
        float* to = dvalues + int64_t(slot[p]) * (B * B);
        for (int e = 0; e < B * B; ++e) {
            float sum = from[e];
            for (int i = 1; i < n_acc; ++i) sum += from[i * acc_stride + e];
            to[e] = sum;
        }
    }
}

template <class F>
INLINE auto with_block(int block, F&& f) {
    switch (block) {
        case 1: return f(Int<1>{});
        case 2: return f(Int<2>{});
        case 4: return f(Int<4>{});
        case 8: return f(Int<8>{});
        case 16: return f(Int<16>{});
        case 32: return f(Int<32>{});
        default: return f(Int<64>{});
    }
}

size_t spmm_scratch_any(int block, int64_t in_blocks, int64_t out_blocks) {
    return with_block(block, [&](auto b) -> size_t {
        return round_up(waiting_floats<b>(out_blocks), 16) + panel_floats<b>(spmm_tile<b>(in_blocks), in_blocks);
    });
}
size_t sddmm_scratch_any(int block, int64_t rows, int64_t cols) {
    return with_block(block, [&](auto b) -> size_t {
        const int64_t tile = sddmm_tile<b>(rows, cols);
        return panel_floats<b>(tile, rows) + panel_floats<b>(tile, cols);
    });
}
void pack_values_any(int block, bool transpose, const float* values, const int32_t* slot, int64_t p0, int64_t p1,
                     float* packed) {
    with_block(block, [&](auto b) { pack_values<b>(transpose, values, slot, p0, p1, packed); });
}
void spmm_any(const SpmmArgs& a, int64_t t0, int64_t t1, float* scratch) {
    with_block(a.block, [&](auto b) { spmm_range<b>(a, t0, t1, scratch); });
}
void sddmm_any(const SddmmArgs& a, int64_t t0, int64_t t1, float* scratch, float* acc, float* g_sum) {
    with_block(a.block, [&](auto b) { sddmm_range<b>(a, t0, t1, scratch, acc, g_sum); });
}
void reduce_any(int block, const float* acc, size_t acc_stride, int n_acc, const int32_t* slot, int64_t n_blocks,
                float* dvalues) {
    with_block(block, [&](auto b) { reduce<b>(acc, acc_stride, n_acc, slot, n_blocks, dvalues); });
}

}  // namespace

#define REGROW_TABLE(identifier, name)                                                          \
    extern const KernelTable identifier;                                                        \
    const KernelTable identifier = {name,     spmm_scratch_any, sddmm_scratch_any, pack_values_any, \
                                    spmm_any, sddmm_any,        reduce_any}
