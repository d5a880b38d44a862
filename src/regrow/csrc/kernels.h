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
    // Granularity of the last register tile: 16 tokens where a vector holds many.
    static constexpr int Q = G > 1 && 16 / G < M / 2 ? (16 / G > 0 ? 16 / G : 1) : M % 3 == 0 ? M / 3 : M / 2;
    static constexpr int64_t kMicroTokens = M * G;
    // Block rows whose outputs are written together. One register tile of a single vector of outputs writes one
    // line in each row of y; a neighbouring block row writes the line beside it, while its page is at hand.
    static constexpr int64_t kRows = NV == 2 ? 1 : 8;
    // Block rows whose packed g, sums or accumulators are worked on while in the caches: with single elements those
    // are as many bytes as the operands, and go through many chunks and tiles; otherwise all rows.
    static constexpr int64_t kTogether = B == 1 ? 256 : INT64_MAX;
};

// The panel of a tile of at most `tokens` tokens: at most half a megabyte, so that it stays in L2.
constexpr int64_t kPanelFloats = 1 << 17;
INLINE bool streams(const SpmmArgs& a, int64_t tokens) {
    return streams(place(a.y) | place(a.slope), tokens, a.out_blocks * a.block);
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
    if (Shape<B>::G > 1 && B > 1) return Shape<B>::kMicroTokens;
    int64_t tiles = kPanelFloats / max64(1, in_blocks * B * Shape<B>::kMicroTokens);
    return Shape<B>::kMicroTokens * max64(1, min64(4, tiles));
}
template <int B>
int64_t sddmm_tile(int64_t rows, int64_t cols) {
    // Both panels, and blocks beside them in L2.
    int64_t tokens = kPanelFloats * 5 / 4 / max64(1, (min64(rows, Shape<B>::kTogether) + cols) * B);
    return max64(64, min64(128, tokens / 32 * 32));
}

// Single elements are taken in chunks of columns whose part of a panel fits in the L1 cache: of all block sizes they
// do the least with a vector that they read. A row should have many elements in a chunk, or its ends take longer.
struct Chunks {
    int64_t count, step;
    const int32_t* cuts;
    // Row r has positions begin(c)[r] to begin(c + 1)[r] in chunk c.
    const int32_t* begin(int64_t c) const { return cuts + c * step; }
};
INLINE int64_t count_chunks(int64_t n, int64_t rows, int64_t cols) {
    return max64(1, min64(cols / 128, n / (32 * max64(1, rows))));
}
template <int B>
int64_t chunk_floats(int64_t n, int64_t rows, int64_t cols) {  // of scratch for find_chunks, at most n / 32 + rows
    const int64_t count = B == 1 ? count_chunks(n, rows, cols) : 1;
    return count == 1 ? 0 : round_up((count + 1) * rows, 16);
}
// Columns ascend within a row. Where they do not, chunks mix columns, but still hold every position once. Finding
// them costs as much as many tokens gain.
template <int B>
Chunks find_chunks(const int32_t* ptr, const int32_t* idx, int64_t rows, int64_t cols, int64_t n_tokens,
                   float* scratch) {
    const int64_t count = B == 1 ? count_chunks(ptr[rows] - ptr[0], rows, cols) : 1;
    if (count == 1 || n_tokens < 256) return {1, 1, ptr};
    int32_t* cuts = reinterpret_cast<int32_t*>(scratch);
    for (int64_t r = 0; r < rows; ++r) {
        int64_t p = ptr[r];
        for (int64_t c = 0; c < count; ++c) {
            while (c > 0 && p < ptr[r + 1] && idx[p] < cols * c / count) ++p;
            cuts[c * rows + r] = int32_t(p);
        }
        cuts[count * rows + r] = ptr[r + 1];
    }
    return {count, rows, cuts};
}

// x [n_tokens, blocks * B], rows x_width apart -> panel with `groups` token groups; tokens past the end are zero.
// With `scale`, laid out as x, each number is multiplied by its factor.
template <int B, bool Scaled>
void pack_panel(const float* x, const float* scale, int64_t x_width, int64_t blocks, int64_t n_tokens, int64_t groups,
                int64_t stride, float* panel) {
    constexpr int G = Shape<B>::G;
    const int64_t width = blocks * B;
    const auto read = [&](const float* p) LAMBDA {
        V v = load_any(p);
        if constexpr (Scaled) v *= load_any(scale + (p - x));
        return v;
    };
    const auto read_part = [&](const float* p, int64_t n) LAMBDA {
        V v = load_part(p, n);
        if constexpr (Scaled) v *= load_part(scale + (p - x), n);
        return v;
    };
    if constexpr (G == 1) {
        for (int64_t t = 0; t < groups; ++t) {
            float* to = panel + t * B;
            if (t < n_tokens) {
                const float* from = x + t * x_width;
                for (int64_t c = 0; c < blocks; ++c, to += stride, from += B) {
                    unroll<B / W>([&](auto v) LAMBDA { store(to + v * W, read(from + v * W)); });
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
                    unroll<G>([&](auto t) LAMBDA { v[t] = read(from + t * x_width); });
                } else {
                    unroll<G>([&](auto t) LAMBDA { v[t] = t < live ? read_part(from + t * x_width, width - f) : V{}; });
                }
                transpose<G>(v);
                float* to = panel + f / B * stride + group * W;
                unroll<G>([&](auto c) LAMBDA { store(to + c * stride, feature_major<G>(v[c])); });
            }
        }
    }
}

template <int B>
void pack_panel(const float* x, const float* scale, int64_t x_width, int64_t blocks, int64_t n_tokens, int64_t groups,
                int64_t stride, float* panel) {
    const auto pack = scale ? pack_panel<B, true> : pack_panel<B, false>;
    pack(x, scale, x_width, blocks, n_tokens, groups, stride, panel);
}

// The same place in an array that may be absent.
template <class T>
INLINE T* move(T* p, int64_t by) {
    return p ? p + by : nullptr;
}

// gelu and, if wanted, its slope of h [n_tokens, P], of which `width` columns exist -> rows y_width apart.
template <int P>
void put_gelu(const float* h, int64_t n_tokens, int64_t width, float* y, float* slope, int64_t y_width,
              bool streaming) {
    for (int64_t t = 0; t < n_tokens; ++t, h += P, y += y_width, slope = move(slope, y_width)) {
        for (int64_t f = 0; f < min64(P, width); f += W) {
            V s;
            const V v = gelu(load(h + f), s);
            if (streaming) {
                stream(y + f, v);
                if (slope) stream(slope + f, s);
            } else {
                store_part(y + f, v, width - f);
                if (slope) store_part(slope + f, s, width - f);
            }
        }
    }
}

constexpr int64_t kSegment = 128;  // terms

// One register tile: Mm token groups by PW outputs of one block row, over `n` of its blocks.
//   acc[m] (lanes (output, token)) = sum over blocks p and k < B of expand(w[p][k]) * bcast(x[idx[p]][m][k])
// handed to end(Int<Mm>, acc) while in the registers.
// Rounding: a long row is summed in segments, because the error of one chain of additions grows with its length.
// Few vectors of sums leave the multipliers waiting for additions, unless there are two chains of them.
// A block has B outputs and K inputs.
template <int B, int Mm, int Chains, int K, class End>
INLINE void spmm_micro(const float* panel, int64_t stride, const float* w, const int32_t* idx, int64_t n, End&& end) {
    constexpr int G = Shape<B>::G, NV = Shape<B>::NV, PW = Shape<B>::PW;
    constexpr int64_t kBlocks = kSegment / K, kAhead = K == B ? 1 : 4;
    V acc[Chains][Mm][NV];
    float before[Mm * NV * W] __attribute__((aligned(64)));  // the segments already summed
    for (bool first = true;; first = false) {
        unroll<Chains>([&](auto c) LAMBDA {
            unroll<Mm>([&](auto m) LAMBDA { unroll<NV>([&](auto v) LAMBDA { acc[c][m][v] = V{}; }); });
        });
        for (int64_t left = min64(n, kBlocks); left > 0; --left, ++idx, w += B * K) {
            const float* xp = panel + *idx * stride;
            const float* wp = w;
            const float* next = panel + idx[left > kAhead ? kAhead : 0] * stride;
#pragma GCC unroll 2
            for (int k = 0; k < K; k += Chains, xp += Chains * G, wp += Chains * PW) {
                // A block this small is over before the hardware has noticed where the next one is.
                if constexpr (NV == 1 || K < B) {
                    constexpr int kLines = K < B ? (Mm * G + 15) / 16 : (Mm * W / 16 + B - 1) / B;
                    unroll<kLines * Chains>([&](auto i) LAMBDA { __builtin_prefetch(next + (k * kLines + i) * 16); });
                }
                unroll<Chains>([&](auto c) LAMBDA {
                    V wv[NV];
                    unroll<NV>([&](auto v) LAMBDA { wv[v] = expand<G>(wp + c * PW + v * W); });
                    unroll<Mm>([&](auto m) LAMBDA {
                        const V xv = bcast<G>(xp + c * G + m * (K * G));
                        unroll<NV>([&](auto v) LAMBDA { acc[c][m][v] += wv[v] * xv; });
                    });
                });
            }
        }
        if constexpr (Chains == 2) {
            unroll<Mm>([&](auto m) LAMBDA { unroll<NV>([&](auto v) LAMBDA { acc[0][m][v] += acc[1][m][v]; }); });
        }
        n -= kBlocks;
        if (!first) {
            unroll<Mm>([&](auto m) LAMBDA {
                unroll<NV>([&](auto v) LAMBDA { acc[0][m][v] += load(before + (m * NV + v) * W); });
            });
        }
        if (n <= 0) break;
        unroll<Mm>([&](auto m) LAMBDA {
            unroll<NV>([&](auto v) LAMBDA { store(before + (m * NV + v) * W, acc[0][m][v]); });
        });
    }
    end(Int<Mm>{}, acc[0]);
}

// The last register tile of a range may be shorter: a multiple of Q groups. Two chains round otherwise than one: they are
// for `Few`, where it does not depend on the threads how short a tile is.
template <int B, bool Few = false, int K = B, int Mm = Shape<B>::M, class End>
INLINE void spmm_groups(int64_t groups, const float* panel, int64_t stride, const float* w, const int32_t* idx,
                        int64_t n, End&& end) {
    if constexpr (Mm > Shape<B>::Q) {
        if (groups < Mm) {
            return spmm_groups<B, Few, K, Mm - Shape<B>::Q>(groups, panel, stride, w, idx, n,
                                                            static_cast<End&&>(end));
        }
    }
    spmm_micro<B, Mm, Few && Mm * Shape<B>::NV < 8 ? 2 : 1, K>(panel, stride, w, idx, n, end);
}

// The sums and a bias -> rows out_stride apart. The bias comes last, because a sum that starts at a large bias rounds
// every small product to the bias's precision.
template <int B, int K = B>
INLINE void spmm_rows(int64_t groups, const float* panel, int64_t stride, const float* w, const int32_t* idx,
                      int64_t n, const float* bias, float* out, int64_t out_stride, bool streaming = false) {
    constexpr int NV = Shape<B>::NV;
    spmm_groups<B, false, K>(groups, panel, stride, w, idx, n, [&](auto mm, auto& acc) LAMBDA {
        unroll<NV>([&](auto v) LAMBDA {
            const V end = bias ? load_any(bias + v * W) : V{};
            if (streaming) {
                unroll<mm>([&](auto m) LAMBDA { stream(out + m * out_stride + v * W, acc[m][v] + end); });
            } else {
                unroll<mm>([&](auto m) LAMBDA { store_any(out + m * out_stride + v * W, acc[m][v] + end); });
            }
        });
    });
}

// ---- large blocks: vectors of outputs, straight into y ------------------------------------------

// One block row, for the m <= M tokens at `part`; `live` of them exist.
template <int B, int K = B>
INLINE void spmm_row(const SpmmArgs& a, int64_t r, const float* part, int64_t stride, int64_t m, int64_t live, float* y,
                     float* spare, bool streaming) {
    constexpr int PW = Shape<B>::PW;
    const int64_t p0 = a.ptr[r], n = a.ptr[r + 1] - p0, out = a.out_blocks * B;
    for (int piece = 0; piece < B; piece += PW) {
        const float* w = a.packed + p0 * (B * K) + piece * K;
        const float* bias = a.bias ? a.bias + r * B + piece : nullptr;
        float* to = y + r * B + piece;
        if (live >= m && !a.gelu) {
            spmm_rows<B, K>(m, part, stride, w, a.idx + p0, n, bias, to, out, streaming);
            continue;
        }
        spmm_rows<B, K>(m, part, stride, w, a.idx + p0, n, bias, spare, PW);
        if (a.gelu) {
            put_gelu<PW>(spare, min64(m, live), PW, to, move(a.slope, to - a.y), out, streaming);
        } else {
            for (int64_t t = 0; t < live; ++t) memcpy(to + t * out, spare + t * PW, PW * sizeof(float));
        }
    }
}

template <int B>
void spmm_large(const SpmmArgs& a, int64_t t0, int64_t t1, float* spare, float* panel) {
    constexpr int M = Shape<B>::M;
    const int64_t tile = spmm_tile<B>(a.in_blocks), stride = panel_stride<B>(tile);
    const int64_t in = a.in_blocks * B, out = a.out_blocks * B;
    const bool streaming = Shape<B>::PW % 16 == 0 && streams(a, t1 - t0);  // whole lines only
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), groups = round_up(n_tokens, Shape<B>::Q);
        pack_panel<B>(a.x + t0 * in, move(a.scale, t0 * in), in, a.in_blocks, n_tokens, groups, stride, panel);
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

// sums [block rows r0 to r1][groups][B * G] (lanes (output, token) within a vector), block rows `stride` apart, -> y,
// with the bias.
template <int B>
void unpack(const SpmmArgs& a, int64_t r0, int64_t r1, const float* sums, int64_t stride, int64_t n_tokens, float* y,
            bool streaming) {
    constexpr int G = Shape<B>::G;
    const int64_t out = a.out_blocks * B;
    for (int64_t group = 0; group * G < n_tokens; ++group) {
        const int64_t live = n_tokens - group * G;
        const float* from = sums + group * (B * G);
        float* to = y + group * G * out;
        for (int64_t f = r0 * B; f < r1 * B; f += W, from += G * stride) {  // G block rows make W columns
            V v[G];
            unroll<G>([&](auto c) LAMBDA { v[c] = token_major<G>(load(from + c * stride)); });
            transpose<G>(v);
            const V bias = a.bias ? load_part(a.bias + f, out - f) : V{};
            if (a.gelu) {
                float h[G * W] __attribute__((aligned(64)));
                unroll<G>([&](auto t) LAMBDA { store(h + t * W, v[t] + bias); });
                put_gelu<W>(h, min64(G, live), out - f, to + f, move(a.slope, to + f - a.y), out, streaming);
            } else if (streaming && live >= G) {
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
    const bool streaming = streams(a, t1 - t0);
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), groups = round_up((n_tokens + G - 1) / G, Shape<B>::Q);
        pack_panel<B>(a.x + t0 * in, move(a.scale, t0 * in), in, a.in_blocks, n_tokens, groups, stride, panel);
        for (int64_t r = 0; r < a.out_blocks; ++r) {
            const int64_t p0 = a.ptr[r], n = a.ptr[r + 1] - p0;
            spmm_rows<B>(groups, panel, stride, a.packed + p0 * (B * B), a.idx + p0, n, nullptr, sums + r * (M * B * G),
                         B * G);
        }
        unpack<B>(a, 0, a.out_blocks, sums, M * W, n_tokens, a.y + t0 * out, streaming);
    }
}

// ---- single elements: as small blocks, in chunks ------------------------------------------------

// sums[m] (+)= the sum of value[p] * x[idx[p]][m] over one row's n positions of a chunk.
template <int Mm>
INLINE void add_elements(const float* panel, int64_t stride, const float* w, const int32_t* idx, int64_t n, bool first,
                         float* sums) {
    constexpr int kChains = Mm < 8 ? 2 : 1;  // an addition takes longer than the loads of four vectors
    do {
        V acc[kChains][Mm] = {};
        const auto add = [&](auto chain) LAMBDA {
            const V wv = splat(w[chain]);
            const float* x = panel + idx[chain] * stride;
            unroll<Mm>([&](auto m) LAMBDA { acc[chain][m] += wv * load(x + m * W); });
        };
        int64_t left = min64(n, kSegment);
        n -= left;
        for (; left >= kChains; left -= kChains, idx += kChains, w += kChains) unroll<kChains>(add);
        if (left > 0) {
            add(Int<0>{});
            ++idx, ++w;
        }
        unroll<Mm>([&](auto m) LAMBDA {
            V sum = acc[0][m];
            if constexpr (kChains == 2) sum += acc[1][m];
            store(sums + m * W, first ? sum : load(sums + m * W) + sum);
        });
        first = false;
    } while (n > 0);
}

template <int Mm = Shape<1>::M>
void add_chunk(const SpmmArgs& a, const Chunks& chunks, int64_t c, int64_t r0, int64_t r1, int64_t groups,
               const float* panel, int64_t stride, float* sums) {
    if constexpr (Mm > Shape<1>::Q) {
        if (groups < Mm) return add_chunk<Mm - Shape<1>::Q>(a, chunks, c, r0, r1, groups, panel, stride, sums);
    }
    const int32_t *begin = chunks.begin(c), *end = chunks.begin(c + 1);
    for (int64_t r = r0; r < r1; ++r, sums += Shape<1>::M * W) {
        add_elements<Mm>(panel, stride, a.packed + begin[r], a.idx + begin[r], end[r] - begin[r], c == 0, sums);
    }
}

// A tile is several register tiles of tokens, so that the elements, 8 bytes each, are read from beyond the L2 cache
// once for all of them.
INLINE void spmm_elements(const SpmmArgs& a, int64_t t0, int64_t t1, float* sums, float* panel) {
    constexpr int64_t M = Shape<1>::M, kTogether = Shape<1>::kTogether;
    const int64_t in = a.in_blocks, out = a.out_blocks, tile = spmm_tile<1>(in), stride = panel_stride<1>(tile);
    const bool streaming = streams(a, t1 - t0);
    const Chunks chunks = find_chunks<1>(a.ptr, a.idx, out, in, t1 - t0, panel + panel_floats<1>(tile, in));
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), groups = round_up((n_tokens + W - 1) / W, Shape<1>::Q);
        pack_panel<1>(a.x + t0 * in, move(a.scale, t0 * in), in, in, n_tokens, groups, stride, panel);
        for (int64_t r0 = 0; r0 < out; r0 += kTogether) {
            const int64_t r1 = min64(r0 + kTogether, out);
            for (int64_t m0 = 0; m0 < groups; m0 += M) {
                for (int64_t c = 0; c < chunks.count; ++c) {
                    add_chunk(a, chunks, c, r0, r1, min64(M, groups - m0), panel + m0 * W, stride, sums);
                }
                const int64_t live = min64(M * W, n_tokens - m0 * W);
                unpack<1>(a, r0, r1, sums, M * W, live, a.y + (t0 + m0 * W) * out, streaming);
            }
        }
    }
}

// Floats of the outputs of a tile that wait to be written.
template <int B>
int64_t waiting_floats(int64_t out_blocks) {
    constexpr int G = Shape<B>::G;
    return (G > 1 ? round_up(min64(out_blocks, Shape<B>::kTogether), G) : 1) * Shape<B>::M * B * G;
}

template <int B>
void spmm_range(const SpmmArgs& a, int64_t t0, int64_t t1, float* scratch) {
    float* panel = scratch + round_up(waiting_floats<B>(a.out_blocks), 16);
    if constexpr (Shape<B>::G == 1) {
        spmm_large<B>(a, t0, t1, scratch, panel);
    } else if constexpr (B == 1) {
        spmm_elements(a, t0, t1, scratch, panel);
    } else {
        spmm_small<B>(a, t0, t1, scratch, panel);
    }
    finish_streams();
}

// A block as [piece][k][PW], what spmm_micro reads in order. The contraction index k runs over the inputs of the block
// for y = x W^T (Transpose) and over its outputs for dx = g W.
template <int B, bool Transpose>
INLINE void pack_block(const float* from, float* to) {
    constexpr int PW = Shape<B>::PW;
    for (int piece = 0; piece < B; piece += PW) {
        for (int k = 0; k < B; ++k, to += PW) {
            if constexpr (Transpose) {
                for (int o = 0; o < PW; ++o) to[o] = from[(piece + o) * B + k];
            } else {
                memcpy(to, from + k * B + piece, PW * sizeof(float));
            }
        }
    }
}

template <int B>
void pack_rows(const WeightArgs& a, int64_t p0, int64_t p1, float* packed) {
    for (int64_t p = p0; p < p1; ++p) {
        pack_block<B, true>(a.values + int64_t(a.slot[p]) * (B * B), packed + p * (B * B));
    }
}

template <int B>
void pack_columns(const WeightArgs& a, int64_t p0, int64_t p1, int32_t* next, int32_t* row_idx, float* packed) {
    for (int64_t r = 0; r < a.rows; ++r) {
        const int64_t end = min64(a.row_ptr[r + 1], p1);
        for (int64_t p = max64(a.row_ptr[r], p0); p < end; ++p) {
            const int64_t place = next[a.col_idx[p]]++;
            row_idx[place] = int32_t(r);
            pack_block<B, false>(a.values + int64_t(a.slot[p]) * (B * B), packed + place * (B * B));
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
    constexpr int kAtOnce = Nb < 8 ? Nb : 8;  // more addresses than that do not fit in the registers
    for (int i0 = 0; i0 < B; i0 += RI) {
        for (int j0 = 0; j0 < B; j0 += CV * W) {
            constexpr int N = Nb * RI * CV;
            V sum[(N + G - 1) / G * G] = {};
            unroll<(Nb + kAtOnce - 1) / kAtOnce>([&](auto part) LAMBDA {
                constexpr int n0 = part * kAtOnce, Nn = Nb - n0 < kAtOnce ? Nb - n0 : kAtOnce;
                const float* xs[Nn];
                unroll<Nn>([&](auto n) LAMBDA { xs[n] = x + idx[n0 + n] * x_stride; });
                const float* gp = g + i0 * G;
                for (int64_t offset = j0; offset < groups * (B * G); offset += B * G, gp += B * G) {
                    V xv[Nn][CV];
                    unroll<Nn>([&](auto n) LAMBDA {
                        unroll<CV>([&](auto c) LAMBDA { xv[n][c] = load(xs[n] + offset + c * W); });
                    });
                    unroll<RI>([&](auto i) LAMBDA {
                        const V gv = bcast<G>(gp + i * G);
                        unroll<Nn>([&](auto n) LAMBDA {
                            unroll<CV>([&](auto c) LAMBDA { sum[((n0 + n) * RI + i) * CV + c] += gv * xv[n][c]; });
                        });
                    });
                }
            });
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

// sum[f] += g[t][f], or g[t][f] * scale[t][f], over n_tokens rows: the gradient of the bias, while packing has just
// brought g to the cache.
void add_rows(const float* g, const float* scale, int64_t g_width, int64_t n_tokens, int64_t width, float* sum) {
    constexpr int64_t kAtOnce = 8;  // sums are read and written once for so many rows
    for (int64_t t0 = 0; t0 < n_tokens; t0 += kAtOnce) {
        const int64_t t1 = min64(t0 + kAtOnce, n_tokens);
        for (int64_t f = 0; f < width; f += W) {
            const int64_t n = width - f;
            const auto read = [&](const float* p) LAMBDA { return n >= W ? load_any(p) : load_part(p, n); };
            V total{};
            for (int64_t t = t0; t < t1; ++t) {
                const V v = read(g + t * g_width + f);
                total += scale ? v * read(scale + t * g_width + f) : v;
            }
            store_part(sum + f, read(sum + f) + total, n);
        }
    }
}

template <int B>
void sddmm_range(const SddmmArgs& a, int64_t t0, int64_t t1, float* scratch, float* acc, float* g_sum) {
    constexpr int G = Shape<B>::G, NB = sddmm_blocks<B>();
    const int64_t tile = sddmm_tile<B>(a.rows, a.cols), stride = panel_stride<B>(tile);
    const int64_t together = min64(Shape<B>::kTogether, a.rows);
    float* g_panel = scratch;
    float* x_panel = g_panel + panel_floats<B>(tile, together);
    const Chunks chunks = find_chunks<B>(a.ptr, a.idx, a.rows, a.cols, t1 - t0,
                                         x_panel + panel_floats<B>(tile, a.cols));
    for (; t0 < t1; t0 += tile) {
        const int64_t n_tokens = min64(tile, t1 - t0), groups = (n_tokens + G - 1) / G;
        pack_panel<B>(a.x + t0 * a.cols * B, nullptr, a.cols * B, a.cols, n_tokens, groups, stride, x_panel);
        for (int64_t r0 = 0; r0 < a.rows; r0 += together) {
            const int64_t r1 = min64(r0 + together, a.rows);
            const int64_t first = t0 * a.g_width + r0 * B;
            const float *from = a.g + first, *scale = move(a.scale, first);
            pack_panel<B>(from, scale, a.g_width, r1 - r0, n_tokens, groups, stride, g_panel);
            if (g_sum) add_rows(from, scale, a.g_width, n_tokens, (r1 - r0) * B, g_sum + r0 * B);
            for (int64_t c = 0; c < chunks.count; ++c) {
                const int32_t *begin = chunks.begin(c), *end = chunks.begin(c + 1);
                for (int64_t r = r0; r < r1; ++r) {
                    const float* g = g_panel + (r - r0) * stride;
                    for (int64_t p = begin[r]; p < end[r]; p += NB) {
                        const int64_t n = min64(NB, end[r] - p);
                        float* to = acc + (p - a.ptr[0]) * (B * B);
                        sddmm_blocks_of_row<B>(n, g, x_panel, stride, a.idx + p, groups, to);
                    }
                }
            }
        }
    }
}

template <int Numbers>
void reduce(const float* acc, size_t acc_stride, int n_acc, const int32_t* slot, int64_t n_blocks, float* dvalues) {
    for (int64_t p = 0; p < n_blocks; ++p) {
        const float* from = acc + p * Numbers;
        float* to = dvalues + int64_t(slot[p]) * Numbers;
        for (int e = 0; e < Numbers; ++e) {
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

size_t spmm_scratch_any(int block, int64_t in_blocks, int64_t out_blocks, int64_t n_blocks) {
    return with_block(block, [&](auto b) -> size_t {
        return round_up(waiting_floats<b>(out_blocks), 16) + panel_floats<b>(spmm_tile<b>(in_blocks), in_blocks) +
               chunk_floats<b>(n_blocks, out_blocks, in_blocks);
    });
}
size_t sddmm_scratch_any(int block, int64_t rows, int64_t cols, int64_t n_blocks) {
    return with_block(block, [&](auto b) -> size_t {
        const int64_t tile = sddmm_tile<b>(rows, cols);
        return panel_floats<b>(tile, min64(Shape<b>::kTogether, rows)) + panel_floats<b>(tile, cols) +
               chunk_floats<b>(n_blocks, rows, cols);
    });
}
void pack_rows_any(const WeightArgs& a, int64_t p0, int64_t p1, float* packed) {
    with_block(a.block, [&](auto b) { pack_rows<b>(a, p0, p1, packed); });
}
void pack_columns_any(const WeightArgs& a, int64_t p0, int64_t p1, int32_t* next, int32_t* row_idx, float* packed) {
    with_block(a.block, [&](auto b) { pack_columns<b>(a, p0, p1, next, row_idx, packed); });
}
void spmm_any(const SpmmArgs& a, int64_t t0, int64_t t1, float* scratch) {
    with_block(a.block, [&](auto b) { spmm_range<b>(a, t0, t1, scratch); });
}
void sddmm_any(const SddmmArgs& a, int64_t t0, int64_t t1, float* scratch, float* acc, float* g_sum) {
    with_block(a.block, [&](auto b) { sddmm_range<b>(a, t0, t1, scratch, acc, g_sum); });
}
void reduce_any(int64_t numbers, const float* acc, size_t acc_stride, int n_acc, const int32_t* slot, int64_t n_blocks,
                float* dvalues) {
    int edge = 1;  // of a square of so many; only their number matters
    while (edge * edge < numbers) edge *= 2;
    with_block(edge, [&](auto b) { reduce<b * b>(acc, acc_stride, n_acc, slot, n_blocks, dvalues); });
}

}  // namespace
