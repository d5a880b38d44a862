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

// Lists, of which row r owns the positions [ptr[r], ptr[r + 1]) of n.
inline void check_ptr(const int32_t* ptr, int64_t rows, int64_t n) {
    if (ptr[0] != 0) fail("ptr starts at " + std::to_string(ptr[0]) + ", not 0");
    for (int64_t r = 0; r < rows; ++r) {
        if (ptr[r + 1] < ptr[r]) fail("ptr decreases at position " + std::to_string(r + 1));
    }
    if (ptr[rows] != n) fail("ptr ends at " + std::to_string(ptr[rows]) + ", not at " + std::to_string(n));
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
    if (n_blocks == 0) return;
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

// Scratch is handed out from front to back; without memory it only counts.
class Layout {
  public:
    explicit Layout(float* memory) : memory_(memory) {}
    template <class T = float>
    T* take(size_t numbers) {
        static_assert(sizeof(T) == sizeof(float));
        T* place = memory_ ? reinterpret_cast<T*>(memory_ + size_) : nullptr;
        if (place) fence(memory_ + size_, numbers, padded(numbers));
        size_ += padded(numbers);
        return place;
    }
    size_t size() const { return size_; }

  private:
    float* memory_;
    size_t size_ = 0;
};

// Slabs follow one another in a row of a weight only if its columns ascend.
inline void check_order(const WeightArgs& w, const std::string& which) {
    for (int64_t r = 0; r < w.rows; ++r) {
        for (int64_t p = w.row_ptr[r] + 1; p < w.row_ptr[r + 1]; ++p) {
            if (w.col_idx[p] < w.col_idx[p - 1]) {
                fail("col_idx" + which + " decreases within block row " + std::to_string(r));
            }
        }
    }
}

// cuts[s][r]: the first position of row r that is in slab s or beyond. Gives how many they are; writes them unless
// `cuts` is null.
inline size_t slab_cuts(const PackedWeight& w, int64_t rows, int64_t slab, int64_t hidden_blocks, int32_t* cuts) {
    const int64_t slabs = (hidden_blocks + slab - 1) / slab;
    if (!cuts) return (slabs + 1) * rows;
    for (int64_t r = 0; r < rows; ++r) cuts[r] = w.ptr[r];
    for (int64_t s = 1; s <= slabs; ++s) {
        for (int64_t r = 0; r < rows; ++r) {
            const int32_t *from = w.idx + cuts[(s - 1) * rows + r], *to = w.idx + w.ptr[r + 1];
            cuts[s * rows + r] = int32_t(std::lower_bound(from, to, s * slab) - w.idx);
        }
    }
    return (slabs + 1) * rows;
}
inline const int32_t* cut_slabs(Layout& layout, const PackedWeight& w, int64_t rows, int64_t slab,
                                int64_t hidden_blocks) {
    int32_t* cuts = layout.take<int32_t>(slab_cuts(w, rows, slab, hidden_blocks, nullptr));
    if (cuts) slab_cuts(w, rows, slab, hidden_blocks, cuts);
    return cuts;
}

struct Weight {
    WeightArgs args;
    int64_t cols, n_blocks;

    Weight(const char* which, Address values, Address row_ptr, Address col_idx, Address slot, int64_t rows,
           int64_t cols, int64_t n_blocks, int b)
        : args{at<const float>(values), at<const int32_t>(row_ptr), at<const int32_t>(col_idx), at<const int32_t>(slot),
               rows, b},
          cols(cols),
          n_blocks(n_blocks) {
        check_indices(args.row_ptr, args.col_idx, args.slot, rows, cols, n_blocks, which);
    }
    size_t numbers() const { return n_blocks * args.block * args.block; }
    PackedWeight places() const { return {nullptr, args.row_ptr, args.col_idx}; }

    PackedWeight by_rows(Layout& layout, int n) const {
        float* packed = layout.take(numbers());
        if (packed) {
            parallel(n, [&](int i) {
                g_table->pack_rows(args, cut(n_blocks, i, n), cut(n_blocks, i + 1, n), packed);
            });
        }
        return {packed, args.row_ptr, args.col_idx};
    }
    PackedWeight by_columns(Layout& layout, int n) const {
        const size_t width = padded(cols + 1);
        float* packed = layout.take(numbers());
        int32_t *row_idx = layout.take<int32_t>(n_blocks), *ptr = layout.take<int32_t>((n + 1) * width);
        if (packed) pack_by_columns(*g_table, args, cols, n_blocks, n, ptr, width, row_idx, packed);
        return {packed, ptr, row_idx};
    }
};

// The gradients of two weights and their biases: every thread adds up its own, which are then added in order.
struct TwoSums {
    const Weight &first, &second;
    int64_t width1, width2;  // of the biases
    LayerSums to;            // what is null is not wanted
    size_t bias1_at, values2_at, bias2_at, size;

    TwoSums(const Weight& first, const Weight& second, int64_t width1, int64_t width2, LayerSums to)
        : first(first), second(second), width1(width1), width2(width2), to(to) {
        bias1_at = padded(first.numbers() + 64);
        values2_at = bias1_at + padded(width1);
        bias2_at = values2_at + padded(second.numbers() + 64);
        size = bias2_at + padded(width2);
    }
    LayerSums clear(float* mine) const {
        std::memset(mine, 0, size * sizeof(float));
        fence(mine, first.numbers() + 64, bias1_at);
        fence(mine + bias1_at, width1, values2_at - bias1_at);
        fence(mine + values2_at, second.numbers() + 64, bias2_at - values2_at);
        fence(mine + bias2_at, width2, size - bias2_at);
        return {to.dvalues1 ? mine : nullptr, to.dbias1 ? mine + bias1_at : nullptr,
                to.dvalues2 ? mine + values2_at : nullptr, to.dbias2 ? mine + bias2_at : nullptr};
    }
    // Part i of n of the work, from the sums of n threads.
    void reduce(const float* totals, int i, int n) const {
        add_blocks(totals, first, to.dvalues1, i, n);
        add_blocks(totals + values2_at, second, to.dvalues2, i, n);
        add_numbers(totals + bias1_at, width1, to.dbias1, i, n);
        add_numbers(totals + bias2_at, width2, to.dbias2, i, n);
    }

  private:
    void add_blocks(const float* from, const Weight& w, float* sum, int i, int n) const {
        const int64_t begin = cut(w.n_blocks, i, n), count = cut(w.n_blocks, i + 1, n) - begin;
        const int b = w.args.block;
        if (sum) g_table->reduce(b * b, from + begin * b * b, size, n, w.args.slot + begin, count, sum);
    }
    void add_numbers(const float* from, int64_t width, float* sum, int i, int n) const {
        if (!sum) return;
        for (int64_t f = cut(width, i, n); f < cut(width, i + 1, n); ++f) {
            sum[f] = from[f];
            for (int other = 1; other < n; ++other) sum[f] += from[other * size + f];
        }
    }
};
