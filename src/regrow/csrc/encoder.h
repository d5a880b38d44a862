// A layer of an encoder without a gradient, in phases between which threads wait for each other. Included once per
// instruction set.
//
// Attention goes head by head of each sequence. After it, many tokens go tile by tile through all that follows, inside a
// thread's caches. Of few tokens (kFewTokens) there is no tile for every thread, and every thread would read all weights:
// so threads share out the block rows of each product, which leave their sums in panels for the next one to read.
#pragma once
#include "attention.h"
#include "ffn.h"
#include "norm.h"
#include "sparse_attention.h"

namespace {

// Of a product over all the tokens of a few; or of a tile.
template <int B>
struct Tokens {
    static constexpr int G = Shape<B>::G;
    int64_t n, groups, stride;
    Tokens(int64_t n, int64_t room)
        : n(n), groups(round_up((n + G - 1) / G, Shape<B>::Q)), stride(panel_stride<B>(room)) {}
    static int64_t room(int64_t n) { return round_up((n + G - 1) / G, Shape<B>::Q) * G; }
};

INLINE int64_t norm_floats(int64_t width) { return round_up(width, 128); }

// y = LayerNorm(x + residual), y may be either of them; `scratch` has room for a row and two numbers for each.
INLINE void add_norm(const EncoderNorm& norm, const float* x, const float* residual, int64_t rows, int64_t width,
                     float* y, float* scratch) {
    NormArgs a{};
    a.x = x, a.y = y, a.residual = residual, a.weight = norm.weight, a.bias = norm.bias;
    a.mean = scratch + norm_floats(width), a.rstd = a.mean + rows;
    a.width = width, a.eps = norm.eps;
    norm_rows<false, true>(a, 0, rows, scratch);
}
INLINE int64_t add_norm_floats(int64_t rows, int64_t width) { return norm_floats(width) + round_up(2 * rows, 16); }

void embed_rows(const EmbedArgs& a, int64_t t0, int64_t t1, float* scratch) {
    for (int64_t t = t0; t < t1; ++t) {
        const float* place = a.place + (a.positions ? a.positions[t] : t % a.length) * a.width;
        const float* kind = a.kind + (a.types ? a.types[t] : 0) * a.width;
        float *y = a.y + t * a.width, mean, rstd;
        for (int64_t j = 0; j < a.width; j += W) {
            const int64_t n = a.width - j;
            store_part(y + j, load_part(place + j, n) + load_part(kind + j, n), n);
        }
        NormArgs norm{};
        norm.x = a.word + a.ids[t] * a.width, norm.residual = y, norm.y = y;
        norm.weight = a.norm.weight, norm.bias = a.norm.bias, norm.eps = a.norm.eps;
        norm.mean = &mean, norm.rstd = &rstd, norm.width = a.width;
        norm_rows<false, true>(norm, 0, 1, scratch);
    }
}

// ---- attention: pairs of a sequence and a head --------------------------------------------------

template <int B>
struct HeadBuffers : ScratchPieces {
    static constexpr int G = Shape<B>::G;
    int64_t stride;
    float *x, *sums;                  // panels: of a sequence; of a head
    float *q, *k, *v, *keys_t, *s, *o;

    HeadBuffers(const EncoderArgs& a, float* memory) : ScratchPieces(memory) {
        const AttentionShape shape(a.longest, a.dim);
        const int64_t tokens = Tokens<B>::room(a.longest), rows = tokens * a.dim;
        stride = panel_stride<B>(tokens);
        x = take(round_up(a.heads * a.dim / B, G) * stride);
        sums = take(G > 1 ? round_up(a.dim / B, G) * stride : 0);
        q = take(rows), k = take(rows), v = take(rows);
        keys_t = take(shape.panels()), s = take(shape.scores()), o = take(shape.queries());
    }
};

template <int B>
void encoder_attend(const EncoderArgs& a, int64_t i0, int64_t i1, float* scratch) {
    const AttentionShape shape(a.longest, a.dim);
    const Dropout none = make_dropout(0, 0);
    const HeadBuffers<B> at(a, scratch);
    const EncoderLayer& layer = *a.layer;
    const int64_t width = a.heads * a.dim, blocks = a.dim / B;
    Soon nothing{};  // what comes next is contiguous
    for (int64_t i = i0, packed = -1; i < i1; ++i) {
        const int64_t sequence = i / a.heads, head = i % a.heads;
        const int64_t t0 = a.offsets[sequence], n = a.offsets[sequence + 1] - t0;
        const Tokens<B> tokens(n, a.longest);
        if (n == 0) continue;
        if (sequence != packed) {
            pack_panel<B>(a.x + t0 * width, nullptr, width, width / B, n, tokens.groups, at.stride, at.x);
            packed = sequence;
        }
        float* const rows_of[] = {at.q, at.k, at.v};
        for (int part = 0; part < 3; ++part) {
            const int64_t column = part * width + head * a.dim;
            head_rows<B, true>(layer.qkv, column / B, blocks, at.x, at.stride, tokens.groups, n,
                         move(layer.qkv_bias, column), at.sums, rows_of[part]);
        }
        copy_transposed(shape, at.k, a.dim, n, a.scale, at.keys_t);
        for (int64_t r0 = 0; r0 < n; r0 += kQueries) {
            const int64_t rows = min64(kQueries, n - r0);
            float sum[kQueries], lse[kQueries];
            attend_block<false>(shape, none, 0, rows, n, at.q + r0 * a.dim, at.keys_t, at.v, at.s, at.o, lse, sum,
                                nothing);
            float* to = a.attended + (t0 + r0) * width + head * a.dim;
            for (int64_t r = 0; r < rows; ++r, to += width) {
                const float factor = 1 / sum[r];
                for (int64_t j = 0; j < a.dim; j += W) store_any(to + j, load(at.o + r * a.dim + j) * factor);
            }
        }
    }
}

// ---- many tokens: tiles of them through the rest of a layer -------------------------------------

template <int B>
struct TileBuffers : ScratchPieces {
    int64_t stride;
    float *in, *hidden, *sums, *rows, *norm;
    TileBuffers(const EncoderArgs& a, float* memory) : ScratchPieces(memory) {
        const int64_t width = a.heads * a.dim, tile = a.layer->plan.tile;
        const int64_t panel = round_up(width / B, Shape<B>::G) * panel_stride<B>(tile);
        stride = panel_stride<B>(tile);
        in = take(panel), sums = take(panel), hidden = take(a.layer->plan.slab * stride);
        rows = take(tile * width), norm = take(add_norm_floats(tile, width));
    }
};

// So many tokens that threads may be cut there, and no sum depends on it: single elements are added up in one chain or
// in two, depending on how many vectors of tokens a register tile has (add_elements).
template <int B>
constexpr int64_t kUnit = B == 1 && Shape<B>::M >= 8 ? Shape<B>::kMicroTokens : 1;

template <int B>
void encoder_tiles(const EncoderArgs& a, int64_t u0, int64_t u1, float* scratch) {
    int64_t t0 = u0 * kUnit<B>;
    const int64_t t1 = min64(u1 * kUnit<B>, a.n_tokens);
    const EncoderLayer& layer = *a.layer;
    const TileBuffers<B> at(a, scratch);
    const int64_t tile = layer.plan.tile, slab = layer.plan.slab, stride = at.stride;
    const int64_t width = a.heads * a.dim, blocks = width / B;
    for (; t0 < t1; t0 += tile) {
        const Tokens<B> tokens(min64(tile, t1 - t0), tile);
        const int64_t n = tokens.n, groups = tokens.groups;
        float* x = a.x + t0 * width;
        pack_panel<B>(a.attended + t0 * width, nullptr, width, blocks, n, groups, stride, at.in);
        for (int64_t r = 0; r < blocks; ++r) {
            panel_row<B>(layer.out, layer.out.ptr[r], layer.out.ptr[r + 1], at.in, stride, groups, false,
                         at.sums + r * stride);
        }
        put_tokens<B>(at.sums, stride, layer.out_bias, blocks, n, at.rows, false);
        add_norm(layer.norm1, at.rows, x, n, width, at.rows, at.norm);
        pack_panel<B>(at.rows, nullptr, width, blocks, n, groups, stride, at.in);
        const int32_t* cuts = layer.second_cuts;
        for (int64_t h0 = 0; h0 < layer.hidden_blocks; h0 += slab, cuts += blocks) {
            const int64_t h1 = min64(h0 + slab, layer.hidden_blocks);
            for (int64_t r = h0; r < h1; ++r) {
                float* h = at.hidden + (r - h0) * stride;
                panel_row<B>(layer.first, layer.first.ptr[r], layer.first.ptr[r + 1], at.in, stride, groups, false, h);
                gelu_row<B, false>(move(layer.first_bias, r * B), groups, h, nullptr, nullptr);
            }
            for (int64_t r = 0; r < blocks; ++r) {
                panel_row<B>(layer.second, cuts[r], cuts[blocks + r], at.hidden - h0 * stride, stride, groups, h0 > 0,
                             at.sums + r * stride);
            }
        }
        put_tokens<B>(at.sums, stride, layer.second_bias, blocks, n, x, false);
        add_norm(layer.norm2, x, at.rows, n, width, x, at.norm);
    }
}

// ---- few tokens: ranges of block rows ------------------------------------------------------------

template <int B>
void encoder_rows(const EncoderArgs& a, EncoderPhase phase, int64_t r0, int64_t r1, float* scratch) {
    const EncoderLayer& layer = *a.layer;
    const Tokens<B> tokens(a.n_tokens, Tokens<B>::room(a.n_tokens));
    const int64_t width = a.heads * a.dim, stride = tokens.stride;
    const PackedWeight& w = phase == kOutRows ? layer.out : phase == kHiddenRows ? layer.first : layer.second;
    const float* in = a.hidden;
    float* out = phase == kHiddenRows ? a.hidden : a.sums;
    if (phase != kSecondRows && r0 < r1) {
        const float* rows = phase == kOutRows ? a.attended : a.x;
        const int64_t panel = round_up(width / B, Shape<B>::G) * stride;
        fence(scratch, panel, panel + kGap);  // attention had other pieces here
        pack_panel<B>(rows, nullptr, width, width / B, a.n_tokens, tokens.groups, stride, scratch);
        in = scratch;
    }
    for (int64_t r = r0; r < r1; ++r) {
        panel_row<B, true>(w, w.ptr[r], w.ptr[r + 1], in, stride, tokens.groups, false, out + r * stride);
        if (phase == kHiddenRows) {
            gelu_row<B, false>(move(layer.first_bias, r * B), tokens.groups, out + r * stride, nullptr, nullptr);
        }
    }
}

// Items are groups of tokens.
template <int B>
void encoder_norm(const EncoderArgs& a, EncoderPhase phase, int64_t g0, int64_t g1, float* scratch) {
    constexpr int G = Shape<B>::G;
    const EncoderLayer& layer = *a.layer;
    const int64_t width = a.heads * a.dim, t0 = g0 * G, n = min64(g1 * G, a.n_tokens) - t0;
    if (n <= 0) return;
    const bool first = phase == kOutNorm;
    const Tokens<B> tokens(a.n_tokens, Tokens<B>::room(a.n_tokens));
    const int64_t of_rows = round_up(n * width, 16), of_norm = add_norm_floats(n, width);
    float *rows = scratch, *norm = rows + of_rows;
    fence(rows, of_rows, of_rows), fence(norm, of_norm, of_norm + kGap);  // others had other pieces here
    put_tokens<B>(a.sums + g0 * (B * G), tokens.stride, first ? layer.out_bias : layer.second_bias, width / B, n, rows,
                  false);
    float* x = a.x + t0 * width;
    add_norm(first ? layer.norm1 : layer.norm2, rows, x, n, width, x, norm);
}

// ---- sizes ---------------------------------------------------------------------------------------

template <int B>
EncoderSizes encoder_sizes(const EncoderArgs& a) {
    constexpr int G = Shape<B>::G;
    const int64_t width = a.heads * a.dim, n = a.n_tokens, stride = panel_stride<B>(Tokens<B>::room(n));
    const int64_t panel = round_up(width / B, G) * stride;
    EncoderSizes sizes{};
    sizes.few = n <= kFewTokens;
    sizes.groups = (n + G - 1) / G;
    sizes.units = (n + kUnit<B> - 1) / kUnit<B>;
    sizes.own = HeadBuffers<B>(a, nullptr).floats;
    if (sizes.few) {
        sizes.own = max64(sizes.own, max64(panel, round_up(n * width, 16) + add_norm_floats(n, width)));
        sizes.sums = panel;
        sizes.hidden = round_up(a.layer->hidden_blocks, G) * stride;
    } else {
        sizes.own = max64(sizes.own, TileBuffers<B>(a, nullptr).floats);
    }
    return sizes;
}

EncoderSizes encoder_sizes_any(const EncoderArgs& a) {
    return with_block(a.layer->block, [&](auto b) { return encoder_sizes<b>(a); });
}
void encoder_phase_any(const EncoderArgs& a, EncoderPhase phase, int64_t begin, int64_t end, float* scratch) {
    with_block(a.layer->block, [&](auto b) {
        switch (phase) {
            case kAttend: return encoder_attend<b>(a, begin, end, scratch);
            case kTiles: return encoder_tiles<b>(a, begin, end, scratch);
            case kOutNorm:
            case kSecondNorm: return encoder_norm<b>(a, phase, begin, end, scratch);
            default: return encoder_rows<b>(a, phase, begin, end, scratch);
        }
    });
}

}  // namespace
