// Small dense products for operands that lie in the caches: C = A B or C += A B, with C kept in registers a tile at a
// time. Included once per instruction set.
//
// B and C are padded: their rows hold whole vectors. A is read number by number and needs no padding; it may be stored
// by rows or by columns, so that a product with a transposed matrix needs no copy.
#pragma once
#include "vec.h"

namespace {

constexpr int kGemmVectors = 2, kGemmRows = kAccumulators / kGemmVectors, kGemmColumns = kGemmVectors * W;

struct Matrix {  // element (i, j) is at data + i * row + j * column
    const float* data;
    int64_t row, column;
};

// A matrix as panels of kGemmColumns columns: row k of panel p is at data + p * panel + k * row.
struct Panels {
    const float* data;
    int64_t panel, row;
};
INLINE Panels by_rows(const float* data, int64_t row) { return {data, kGemmColumns, row}; }

// Rows that will be read soon, asked for a few at a time between the tiles of a product: they lie on a page each, where
// no hardware prefetcher follows.
struct Soon {
    static constexpr int kMost = 5;
    const float* from[kMost];
    int64_t stride[kMost];
    int parts;
    int64_t floats, left, together;  // of a row; rows; rows between two tiles

    INLINE void ask() {
        for (int64_t last = left > together ? left - together : 0; left > last; --left) {
            for (int part = 0; part < parts; ++part) {
                for (int64_t j = 0; j < floats; j += 16) __builtin_prefetch(from[part] + j, 0, 2);
                from[part] += stride[part];
            }
        }
    }
};

// Mm rows and Nv vectors of C. `stride` is between the rows of A where A is stored by rows, between its columns where
// it is stored by columns. Addresses of rows are made of one pointer for three of them, as the addressing modes of x86
// reach the other two: a pointer for each would not fit in the registers.
template <int Mm, int Nv, bool ByRows>
INLINE void gemm_tile(const float* a, int64_t stride, const float* b, int64_t b_row, int64_t depth, bool add, float* c,
                      int64_t c_row) {
    V sum[Mm][Nv] = {};
    constexpr int kPointers = ByRows ? (Mm + 2) / 3 : 1;
    const float* from[kPointers];
    unroll<kPointers>([&](auto i) LAMBDA { from[i] = a + i * 3 * stride; });
    for (int64_t k = 0; k < depth; ++k, b += b_row) {
        V bs[Nv];
        unroll<Nv>([&](auto n) LAMBDA { bs[n] = load(b + n * W); });
        unroll<Mm>([&](auto m) LAMBDA {
            const V as = splat(ByRows ? from[ByRows ? m / 3 : 0][(m % 3) * stride] : from[0][m]);
            unroll<Nv>([&](auto n) LAMBDA { sum[m][n] += as * bs[n]; });
        });
        unroll<kPointers>([&](auto i) LAMBDA { from[i] += ByRows ? 1 : stride; });
    }
    unroll<Mm>([&](auto m) LAMBDA {
        unroll<Nv>([&](auto n) LAMBDA {
            float* to = c + m * c_row + n * W;
            store(to, add ? load(to) + sum[m][n] : sum[m][n]);
        });
    });
}

// One panel: as many tiles of Mm rows as fit, then smaller ones.
template <int Mm, int Nv, bool ByRows>
INLINE void gemm_panel(const float* a, int64_t stride, const float* b, int64_t b_row, int64_t rows, int64_t depth,
                       bool add, float* c, int64_t c_row, Soon& soon) {
    for (; rows >= Mm; rows -= Mm, a += Mm * (ByRows ? stride : 1), c += Mm * c_row) {
        gemm_tile<Mm, Nv, ByRows>(a, stride, b, b_row, depth, add, c, c_row);
        soon.ask();
    }
    if constexpr (Mm > 1) {
        constexpr int kNext = Mm > 8 ? 8 : Mm > 4 ? 4 : Mm / 2;
        if (rows) gemm_panel<kNext, Nv, ByRows>(a, stride, b, b_row, rows, depth, add, c, c_row, soon);
    }
}

template <bool ByRows>
void gemm_any(const float* a, int64_t stride, Panels b, int64_t rows, int64_t width, int64_t depth, bool add, float* c,
              int64_t c_row, Soon& soon) {
    // So many rows of a panel stay in the L1 cache; and a sum of such sums is more exact than one long sum.
    constexpr int64_t kDepth = 64;
    for (int64_t k = 0; k < depth; k += kDepth, add = true) {
        const float *a_part = a + k * (ByRows ? 1 : stride), *b_part = b.data + k * b.row;
        const int64_t part = depth - k < kDepth ? depth - k : kDepth;
        for (int64_t n = 0; n < width; n += kGemmColumns, b_part += b.panel) {
            if (width - n >= kGemmColumns) {
                gemm_panel<kGemmRows, kGemmVectors, ByRows>(a_part, stride, b_part, b.row, rows, part, add, c + n,
                                                            c_row, soon);
            } else {
                gemm_panel<kGemmRows, 1, ByRows>(a_part, stride, b_part, b.row, rows, part, add, c + n, c_row, soon);
            }
        }
    }
}

// C [rows, width] = A [rows, depth] B [depth, width], or added to C. `width` is a multiple of W, C and the rows of B
// are aligned to vectors; depth is at least 1. One of A's strides is 1. Between tiles, rows of `soon` are asked for.
INLINE void gemm(Matrix a, Panels b, int64_t rows, int64_t width, int64_t depth, bool add, float* c, int64_t c_row,
                 Soon& soon) {
    if (a.column == 1) {
        gemm_any<true>(a.data, a.row, b, rows, width, depth, add, c, c_row, soon);
    } else {
        gemm_any<false>(a.data, a.column, b, rows, width, depth, add, c, c_row, soon);
    }
}

}  // namespace
