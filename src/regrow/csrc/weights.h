// A weight's index arrays, checked, and its blocks in the order of columns.
#pragma once
#include "runtime.h"

// One bad index would read or write outside the arrays, so every call checks all of them: O(n_blocks).
inline void check_range(const int32_t* v, const std::string& name, int64_t size, int64_t limit) {
    uint32_t top = 0;  // a negative index is a large unsigned number
    for (int64_t i = 0; i < size; ++i) top = std::max(top, uint32_t(v[i]));
    if (size && top >= uint64_t(limit)) {
        fail(name + " holds " + std::to_string(int32_t(top)) + ", outside [0, " +
             std::to_string(limit) + ")");
    }
}

// `which` ends the names of the arrays, where there are several weights.
inline void check_indices(const int32_t* row_ptr, const int32_t* col_idx, const int32_t* slot, int64_t rows,
                          int64_t cols, int64_t n_blocks, const std::string& which = "") {
    if (row_ptr[0] != 0) fail("row_ptr" + which + " starts at " + std::to_string(row_ptr[0]) + ", not 0");
    for (int64_t i = 1; i <= rows; ++i) {
        if (row_ptr[i] < row_ptr[i - 1]) fail("row_ptr" + which + " decreases at position " + std::to_string(i));
    }
    if (row_ptr[rows] != n_blocks) {
        fail("row_ptr" + which + " ends at " + std::to_string(row_ptr[rows]) + ", not at the number of blocks, " +
             std::to_string(n_blocks));
    }
    check_range(col_idx, "col_idx" + which, n_blocks, cols);
    check_range(slot, "slot" + which, n_blocks, n_blocks);
}

// A slot named twice leaves another one unwritten. `scratch` has room for a byte for every block.
inline void check_permutation(const int32_t* slot, int64_t n_blocks, void* scratch, const std::string& which = "") {
    unsigned char* seen = static_cast<unsigned char*>(scratch);
    std::memset(seen, 0, n_blocks);
    for (int64_t p = 0; p < n_blocks; ++p) seen[slot[p]] = 1;
    if (std::memchr(seen, 0, n_blocks)) fail("slot" + which + " is not a permutation: some slots are named twice");
}

// The weight in the order of columns: ptr [cols + 1], row_idx and packed. A counting sort in n parts, each a range of
// positions; in every column a part's blocks follow those of the parts before it, so rows ascend, whatever n is.
// `ptr` has room for `width` indices, and behind them for as many again for every part.
inline void pack_by_columns(const KernelTable& table, const WeightArgs& w, int64_t cols, int64_t n_blocks, int n,
                            int32_t* ptr, size_t width, int32_t* row_idx, float* packed) {
    parallel(n, [&](int i) {
        int32_t* counts = ptr + (i + 1) * width;
        std::memset(counts, 0, cols * sizeof(int32_t));
        const int64_t end = cut(n_blocks, i + 1, n);
        for (int64_t p = cut(n_blocks, i, n); p < end; ++p) ++counts[w.col_idx[p]];
    });
    std::memset(ptr, 0, (cols + 1) * sizeof(int32_t));
    int32_t* totals = ptr + 1;
    for (int i = 0; i < n; ++i) {
        int32_t* counts = ptr + (i + 1) * width;  // from now on: of the parts before
        for (int64_t c = 0; c < cols; ++c) {
            const int32_t count = counts[c];
            counts[c] = totals[c];
            totals[c] += count;
        }
    }
    for (int64_t c = 0; c < cols; ++c) ptr[c + 1] += ptr[c];
    parallel(n, [&](int i) {
        int32_t* next = ptr + (i + 1) * width;
        for (int64_t c = 0; c < cols; ++c) next[c] += ptr[c];
        table.pack_columns(w, cut(n_blocks, i, n), cut(n_blocks, i + 1, n), next, row_idx, packed);
    });
}
