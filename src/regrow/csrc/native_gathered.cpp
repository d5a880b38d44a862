// The product with a weight of gathered blocks, 16 outputs and one input each, and the transposed product. Their weight
// gradient shares native.cpp's `sddmm`.
#include "runtime.h"
#include "weights.h"

namespace {

constexpr int64_t kTall = 16;

// The blocks in the order of positions, as they are.
void in_order(const float* values, const int32_t* slot, int64_t n_blocks, int n, float* packed) {
    parallel(n, [&](int i) {
        for (int64_t p = cut(n_blocks, i, n); p < cut(n_blocks, i + 1, n); ++p) {
            std::memcpy(packed + p * kTall, values + slot[p] * kTall, kTall * sizeof(float));
        }
    });
}

// Ranges of block rows in which no column has more than 16 blocks: the error of one chain of additions grows with its
// length. Where each begins -> parts, whose room is for rows + 1; returns how many they are.
int64_t gathered_parts(const int32_t* ptr, const int32_t* idx, int64_t rows, int64_t cols, int32_t* counts,
                       int32_t* parts) {
    constexpr int32_t kMost = 16;
    int64_t n = 0;
    std::memset(counts, 0, cols * sizeof(int32_t));
    parts[n++] = 0;
    for (int64_t r = 0; r < rows; ++r) {
        bool full = false;
        for (int32_t p = ptr[r]; p < ptr[r + 1]; ++p) full |= ++counts[idx[p]] > kMost;
        if (!full || r == parts[n - 1]) continue;
        std::memset(counts, 0, cols * sizeof(int32_t));
        for (int32_t p = ptr[r]; p < ptr[r + 1]; ++p) ++counts[idx[p]];
        parts[n++] = int32_t(r);
    }
    if (rows > 0) parts[n++] = int32_t(rows);
    return n - 1;
}

void spmm(Address x, Address values, Address bias, Address y, Address slope, Address row_ptr, Address col_idx,
          Address slot, int64_t n_tokens, int64_t cols, int64_t rows, int64_t n_blocks, bool gelu, int threads) {
    SpmmArgs a{at<const float>(x), nullptr, nullptr, at<const float>(bias), at<float>(y), at<float>(slope),
               at<const int32_t>(row_ptr), at<const int32_t>(col_idx), cols, rows, kTall, gelu};
    check_indices(a.ptr, a.idx, at<const int32_t>(slot), rows, cols, n_blocks);
    if (n_tokens == 0 || rows == 0) return;

    nb::gil_scoped_release release;
    const KernelTable& table = *g_table;
    const int n = int(std::clamp<int64_t>(threads, 1, n_tokens));
    const size_t packed = padded(n_blocks * kTall), own = table.gathered_scratch(cols), each = padded(own);
    float* scratch = t_scratch.reserve(packed + n * each);
    fence(scratch, n_blocks * kTall, packed);
    fence_each(scratch + packed, n, own, each);
    in_order(at<const float>(values), at<const int32_t>(slot), n_blocks, n, scratch);
    a.packed = scratch;
    parallel(n, [&](int i) {
        table.gathered(a, cut(n_tokens, i, n), cut(n_tokens, i + 1, n), scratch + packed + i * each);
    });
}

void spmm_t(Address g, Address scale, Address values, Address dx, Address row_ptr, Address col_idx, Address slot,
            int64_t n_tokens, int64_t cols, int64_t rows, int64_t n_blocks, int threads) {
    GatheredArgs a{at<const float>(g), at<const float>(scale), nullptr, at<float>(dx), at<const int32_t>(row_ptr),
                   at<const int32_t>(col_idx), nullptr, rows, cols, 0};
    check_indices(a.ptr, a.idx, at<const int32_t>(slot), rows, cols, n_blocks);
    if (n_tokens == 0 || cols == 0) return;

    nb::gil_scoped_release release;
    const KernelTable& table = *g_table;
    const int n = int(std::clamp<int64_t>(threads, 1, n_tokens));
    const size_t packed = padded(n_blocks * kTall), starts = padded(rows + 1), counts = padded(cols);
    // How many parts there are is known only when they have been found: room for the sums of several, in any case.
    const size_t own = table.gathered_t_scratch(cols), each = padded(own), rest = packed + starts + counts;
    float* scratch = t_scratch.reserve(rest + n * each);
    fence(scratch, n_blocks * kTall, packed);
    fence(scratch + packed, rows + 1, starts);
    fence(scratch + packed + starts, cols, counts);
    fence_each(scratch + rest, n, own, each);
    int32_t* parts = reinterpret_cast<int32_t*>(scratch + packed);
    a.n_parts = gathered_parts(a.ptr, a.idx, rows, cols, parts + starts, parts);
    a.parts = parts;
    in_order(at<const float>(values), at<const int32_t>(slot), n_blocks, n, scratch);
    a.packed = scratch;
    parallel(n, [&](int i) {
        table.gathered_t(a, cut(n_tokens, i, n), cut(n_tokens, i + 1, n), scratch + rest + i * each);
    });
}

}  // namespace

void bind_gathered(nb::module_& m) {
    m.def("gathered", &spmm, "x"_a, "values"_a, "bias"_a, "y"_a, "slope"_a, "row_ptr"_a, "col_idx"_a, "slot"_a,
          "n_tokens"_a, "cols"_a, "rows"_a, "n_blocks"_a, "gelu"_a, "threads"_a);
    m.def("gathered_t", &spmm_t, "g"_a, "scale"_a, "values"_a, "dx"_a, "row_ptr"_a, "col_idx"_a, "slot"_a, "n_tokens"_a,
          "cols"_a, "rows"_a, "n_blocks"_a, "threads"_a);
}
