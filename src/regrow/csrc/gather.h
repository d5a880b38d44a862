// Products with rows of a table that lists name: for each row of the result its own list. Included once per
// instruction set.
//
// A weighted sum of listed rows does one multiplication with every number it reads, so it runs at the speed of the cache
// that the table is read from. Therefore the table is taken in pieces of columns, and these in slabs of rows, that lie in
// the L2 cache while the rows of the result pass by; and a piece of a result row, or of the row that listed rows are
// multiplied with, stays in registers while its list is worked through. Where many lists name a row, pieces are copied
// first so that each is contiguous, in large pages: twice as fast as reading the table where it lies.
#pragma once
#include "kernels.h"
#include "table.h"

namespace {

constexpr int kPieceVectors = 8;            // of a copied table
constexpr int kWideVectors = W == 16 ? 16 : 8;  // of one that is read where it lies: longer runs
constexpr int kAtATime = W == 16 ? 8 : 4;   // listed rows in one product with the row in registers

// f(Int<vectors>, first column, columns) for pieces of the columns; the last columns that fill no vector are a piece of 0
// vectors.
template <int Nv, class F>
INLINE void each_piece(int64_t begin, int64_t width, F&& f) {
    for (; width - begin >= Nv * W; begin += Nv * W) f(Int<Nv>{}, begin, int64_t(Nv * W));
    if constexpr (Nv > 1) {
        each_piece<Nv / 2>(begin, width, f);
    } else if (begin < width) {
        f(Int<0>{}, begin, width - begin);
    }
}

// A piece of n columns from column c on. In a copied table it is all of its rows side by side, behind the pieces before.
struct Piece {
    const float* data;
    int64_t stride;
};
INLINE Piece piece_of(const GatherArgs& a, int64_t c, int64_t n) {
    return a.copied ? Piece{a.copied + c * a.table_rows, n} : Piece{a.table + c, a.stride};
}

void gather_copy(const GatherArgs& a, int64_t r0, int64_t r1, float* to) {
    each_piece<kPieceVectors>(0, a.width, [&](auto, int64_t c, int64_t n) {
        for (int64_t r = r0; r < r1; ++r) {
            memcpy(to + c * a.table_rows + r * n, a.table + r * a.stride + c, n * sizeof(float));
        }
    });
}

template <int Nv>
INLINE V read_piece(const float* p, int v, int64_t n) {
    return Nv == 0 ? load_part(p, n) : load_any(p + v * W);
}

template <int Nv>
void sum_piece(const GatherArgs& a, int64_t r0, int64_t r1, int64_t c, int64_t n) {
    constexpr int Many = Nv == 0 ? 1 : Nv;
    const Piece table = piece_of(a, c, n);
    for (int64_t slab = 0; slab < a.slabs; ++slab) {
        const int32_t *from = a.cuts + slab * a.rows, *to = from + a.rows;
        for (int64_t r = r0; r < r1; ++r) {
            if (slab > 0 && from[r] == to[r]) continue;
            float* out = a.out + r * a.out_stride + c;
            V sum[Many] = {};
            const float* start = slab > 0 ? out : a.start ? a.start + c : nullptr;
            if (start) unroll<Many>([&](auto v) LAMBDA { sum[v] = read_piece<Nv>(start, v, n); });
            for (int64_t p = from[r]; p < to[r]; ++p) {
                const float* row = table.data + a.idx[p] * table.stride;
                const V w = splat(a.weights[p]);
                unroll<Many>([&](auto v) LAMBDA { sum[v] += w * read_piece<Nv>(row, v, n); });
            }
            unroll<Many>([&](auto v) LAMBDA {
                if constexpr (Nv == 0) {
                    store_part(out, sum[v], n);
                } else {
                    store_any(out + v * W, sum[v]);
                }
            });
        }
    }
}

// Products of the row in registers with Many listed rows: the lists of one row from position p on, up to `end`.
template <int Nv, int Many = kAtATime>
INLINE void dot_rows(const GatherArgs& a, Piece table, const V* lead, int64_t p, int64_t end, int64_t c, int64_t n) {
    for (; p + Many <= end; p += Many) {
        V sum[Many] = {};
        const float* row[Many];
        unroll<Many>([&](auto m) LAMBDA { row[m] = table.data + a.idx[p + m] * table.stride; });
        unroll<(Nv == 0 ? 1 : Nv)>([&](auto v) LAMBDA {
            unroll<Many>([&](auto m) LAMBDA { sum[m] += lead[v] * read_piece<Nv>(row[m], v, n); });
        });
        float line[W] __attribute__((aligned(64)));
        store(line, sum_tokens<Many>(sum));
        for (int m = 0; m < Many; ++m) {
            float total = c == 0 ? 0.0f : a.dots[p + m];
            for (int j = 0; j < W / Many; ++j) total += line[j * Many + m];
            a.dots[p + m] = total;
        }
    }
    if constexpr (Many > 1) {
        if (p < end) dot_rows<Nv, Many / 2>(a, table, lead, p, end, c, n);
    }
}

template <int Nv>
void dot_piece(const GatherArgs& a, int64_t r0, int64_t r1, int64_t c, int64_t n) {
    constexpr int Many = Nv == 0 ? 1 : Nv;
    const Piece table = piece_of(a, c, n);
    for (int64_t slab = 0; slab < a.slabs; ++slab) {
        const int32_t *from = a.cuts + slab * a.rows, *to = from + a.rows;
        for (int64_t r = r0; r < r1; ++r) {
            if (from[r] == to[r]) continue;
            const float* row = a.lead + r * a.lead_stride + c;
            V lead[Many];
            unroll<Many>([&](auto v) LAMBDA { lead[v] = read_piece<Nv>(row, v, n); });
            dot_rows<Nv>(a, table, lead, from[r], to[r], c, n);
        }
    }
}

template <class F>
INLINE void each_piece_of(const GatherArgs& a, F&& f) {
    if (a.copied) {
        each_piece<kPieceVectors>(0, a.width, f);
    } else {
        each_piece<kWideVectors>(0, a.width, f);
    }
}
void gather_sum(const GatherArgs& a, int64_t r0, int64_t r1) {
    each_piece_of(a, [&](auto vectors, int64_t c, int64_t n) { sum_piece<vectors>(a, r0, r1, c, n); });
}
void gather_dot(const GatherArgs& a, int64_t r0, int64_t r1) {
    each_piece_of(a, [&](auto vectors, int64_t c, int64_t n) { dot_piece<vectors>(a, r0, r1, c, n); });
}

}  // namespace
