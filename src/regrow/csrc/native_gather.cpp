// Bindings of products with listed rows of a table (gather.h): they check the lists and split them over threads.
#include "weights.h"

namespace {

void check_lists(const int32_t* ptr, const int32_t* idx, int64_t rows, int64_t n, int64_t limit) {
    check_ptr(ptr, rows, n);
    check_range(idx, "idx", n, limit);
}

// A slab of a piece is half a megabyte in a table that was copied, for the widest vectors, and a megabyte in one that
// was not.
constexpr int64_t kSlab = 1024;
constexpr int64_t kUses = 8;  // of a row of the table, on average, from which on a copy of it pays off

// Prepares the table and the cuts of all `n` positions, and then does `work` on ranges of the lists.
template <class F>
void run(GatherArgs& a, const int32_t* ptr, int64_t n, int threads, F&& work) {
    const int64_t rows = a.rows;
    a.slabs = std::max<int64_t>(1, (a.table_rows + kSlab - 1) / kSlab);
    const size_t size = (a.slabs + 1) * rows, numbers = a.table_rows * a.width;
    const bool copy = !a.copied && n > kUses * a.table_rows;
    float* scratch = t_scratch.reserve(padded(size) + (copy ? padded(numbers) : 0));
    fence(scratch, size, padded(size));
    int32_t* cuts = reinterpret_cast<int32_t*>(scratch);
    a.cuts = cuts;
    const int parts = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(rows, 1)));
    if (copy) {
        float* copied = scratch + padded(size);
        fence(copied, numbers, padded(numbers));
        a.copied = copied;
        parallel(parts, [&](int i) {
            g_table->gather_copy(a, cut(a.table_rows, i, parts), cut(a.table_rows, i + 1, parts), copied);
        });
    }
    parallel(parts, [&](int i) {
        const int64_t r0 = cut(rows, i, parts), r1 = cut(rows, i + 1, parts);
        for (int64_t r = r0; r < r1; ++r) {
            const int32_t *end = a.idx + ptr[r + 1], *at = a.idx + ptr[r];
            for (int64_t s = 0; s < a.slabs; ++s) {
                cuts[s * rows + r] = int32_t(at - a.idx);
                at = std::lower_bound(at, end, (s + 1) * kSlab);
            }
            cuts[a.slabs * rows + r] = ptr[r + 1];  // whatever the order: each position is in one slab
        }
        work(r0, r1);
    });
}

// What gather_sum takes as `copied`: room for as many numbers as the table has.
void gather_copy(Address table, Address copied, int64_t table_rows, int64_t width, int threads) {
    nb::gil_scoped_release release;
    GatherArgs a{};
    a.table = at<const float>(table), a.table_rows = table_rows, a.stride = width, a.width = width;
    const int parts = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(table_rows, 1)));
    parallel(parts, [&](int i) {
        g_table->gather_copy(a, cut(table_rows, i, parts), cut(table_rows, i + 1, parts), at<float>(copied));
    });
}

void gather_sum(Address table, Address copied, Address ptr, Address idx, Address weights, Address start, Address out, int64_t table_at,
                int64_t table_rows, int64_t stride, int64_t width, int64_t rows, int64_t n, int64_t out_at,
                int64_t out_stride, int threads) {
    check_lists(at<const int32_t>(ptr), at<const int32_t>(idx), rows, n, table_rows);
    nb::gil_scoped_release release;
    GatherArgs a{};
    a.copied = at<const float>(copied);
    a.table = at<const float>(table) + table_at, a.table_rows = table_rows, a.stride = stride, a.width = width;
    a.idx = at<const int32_t>(idx), a.rows = rows;
    a.weights = at<const float>(weights), a.start = at<const float>(start);
    a.out = at<float>(out) + out_at, a.out_stride = out_stride;
    run(a, at<const int32_t>(ptr), n, threads, [&](int64_t r0, int64_t r1) { g_table->gather_sum(a, r0, r1); });
}

void gather_dot(Address table, Address ptr, Address idx, Address lead, Address dots, int64_t table_rows, int64_t stride,
                int64_t width, int64_t rows, int64_t n, int64_t lead_at, int64_t lead_stride, int threads) {
    check_lists(at<const int32_t>(ptr), at<const int32_t>(idx), rows, n, table_rows);
    nb::gil_scoped_release release;
    GatherArgs a{};
    a.table = at<const float>(table), a.table_rows = table_rows, a.stride = stride, a.width = width;
    a.idx = at<const int32_t>(idx), a.rows = rows;
    a.lead = at<const float>(lead) + lead_at, a.lead_stride = lead_stride, a.dots = at<float>(dots);
    run(a, at<const int32_t>(ptr), n, threads, [&](int64_t r0, int64_t r1) { g_table->gather_dot(a, r0, r1); });
}

// Lists of columns for rows -> lists of rows for columns, rows ascending, with three numbers that go with a position.
// sums[c]: of the third over the list of c. Every thread looks through all lists for columns of its own.
void transpose_lists(Address ptr, Address idx, Address first, Address second, Address third, Address to_ptr,
                     Address to_idx, Address to_first, Address to_second, Address to_third, Address sums, int64_t rows,
                     int64_t cols, int64_t n, int threads) {
    const int32_t *p_of = at<const int32_t>(ptr), *col = at<const int32_t>(idx);
    check_lists(p_of, col, rows, n, cols);
    nb::gil_scoped_release release;
    const int parts = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(cols, 1)));
    int32_t *out_ptr = at<int32_t>(to_ptr), *out_idx = at<int32_t>(to_idx);
    const float* from[] = {at<const float>(first), at<const float>(second), at<const float>(third)};
    float* to[] = {at<float>(to_first), at<float>(to_second), at<float>(to_third)};
    std::memset(out_ptr, 0, (cols + 1) * sizeof(int32_t));
    for (int64_t p = 0; p < n; ++p) ++out_ptr[col[p] + 1];
    for (int64_t c = 0; c < cols; ++c) out_ptr[c + 1] += out_ptr[c];
    float* scratch = t_scratch.reserve(padded(cols));
    fence(scratch, cols, padded(cols));
    int32_t* next = reinterpret_cast<int32_t*>(scratch);
    std::memcpy(next, out_ptr, cols * sizeof(int32_t));
    parallel(parts, [&](int i) {
        const int32_t c0 = int32_t(cut(cols, i, parts)), c1 = int32_t(cut(cols, i + 1, parts));
        float* total = at<float>(sums);
        std::memset(total + c0, 0, (c1 - c0) * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t p = p_of[r]; p < p_of[r + 1]; ++p) {
                const int32_t c = col[p];
                if (c < c0 || c >= c1) continue;
                const int32_t place = next[c]++;
                out_idx[place] = int32_t(r);
                for (int k = 0; k < 3; ++k) to[k][place] = from[k][p];
                total[c] += from[2][p];
            }
        }
    });
}

// The `keep` columns of each row with the greatest |x| * norm, ascending, and the numbers there.
void top_columns(Address x, Address norms, Address idx, Address numbers, int64_t rows, int64_t width, int64_t keep,
                 int threads) {
    if (keep < 0 || keep > width) fail("keep is " + std::to_string(keep) + ", outside [0, " + std::to_string(width) + "]");
    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(rows, 1)));
    const size_t own = size_t(width + 15) / 16 * 16, each = padded(own);
    float* scratch = t_scratch.reserve(n * each);
    fence_each(scratch, n, own, each);
    const TopArgs a{at<const float>(x), at<const float>(norms), width, keep, at<int32_t>(idx), at<float>(numbers)};
    parallel(n, [&](int i) { g_table->top_columns(a, cut(rows, i, n), cut(rows, i + 1, n), scratch + i * each); });
}

}  // namespace

void bind_gather(nb::module_& m) {
    m.def("gather_copy", &gather_copy, "table"_a, "copied"_a, "table_rows"_a, "width"_a, "threads"_a);
    m.def("gather_sum", &gather_sum, "table"_a, "copied"_a, "ptr"_a, "idx"_a, "weights"_a, "start"_a, "out"_a, "table_at"_a,
          "table_rows"_a, "stride"_a, "width"_a, "rows"_a, "n"_a, "out_at"_a, "out_stride"_a, "threads"_a);
    m.def("gather_dot", &gather_dot, "table"_a, "ptr"_a, "idx"_a, "lead"_a, "dots"_a, "table_rows"_a, "stride"_a,
          "width"_a, "rows"_a, "n"_a, "lead_at"_a, "lead_stride"_a, "threads"_a);
    m.def("top_columns", &top_columns, "x"_a, "norms"_a, "idx"_a, "numbers"_a, "rows"_a, "width"_a, "keep"_a,
          "threads"_a);
    m.def("transpose_lists", &transpose_lists, "ptr"_a, "idx"_a, "first"_a, "second"_a, "third"_a, "to_ptr"_a,
          "to_idx"_a, "to_first"_a, "to_second"_a, "to_third"_a, "sums"_a, "rows"_a, "cols"_a, "n"_a, "threads"_a);
}
