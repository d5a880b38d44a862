// The Python module regrow.kernels._native: checks every index, splits the work over threads, and calls the
// kernels of the best instruction set this CPU has. It knows nothing of torch: arrays come as addresses, because
// converting ten array objects a call took longer than the arithmetic of a few tokens. Whoever calls vouches for
// their sizes (cpu.py, after the checks of ops.py); what they hold is checked here.
#include "runtime.h"
#include "weights.h"

void bind_attention(nb::module_& m);

namespace {

// ---- the instruction set ----------------------------------------------------------------------

std::vector<const KernelTable*> available_tables() {  // best last
    std::vector<const KernelTable*> tables{&kGenericTable};
#ifdef REGROW_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) tables.push_back(&kAvx2Table);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        tables.push_back(&kAvx512Table);
    }
#endif
    return tables;
}

void set_isa(const std::string& name) {
    std::string known;
    for (const KernelTable* table : available_tables()) {
        if (name == table->name) {
            g_table = table;
            return;
        }
        known += std::string(known.empty() ? "" : ", ") + table->name;
    }
    fail("instruction set '" + name + "' is not available here; choose one of: " + known);
}

// ---- the two operations -----------------------------------------------------------------------

void spmm(Address x, Address scale, Address values, Address bias, Address y, Address slope, Address row_ptr,
          Address col_idx, Address slot, int64_t n_tokens, int64_t in_blocks, int64_t out_blocks, int64_t n_blocks,
          int b, bool transposed, bool gelu, int threads) {
    const int64_t rows = transposed ? in_blocks : out_blocks, cols = transposed ? out_blocks : in_blocks;
    const WeightArgs w{at<const float>(values), at<const int32_t>(row_ptr), at<const int32_t>(col_idx),
                       at<const int32_t>(slot), rows, b};
    SpmmArgs a{at<const float>(x), at<const float>(scale), nullptr, at<const float>(bias), at<float>(y),
               at<float>(slope), w.row_ptr, w.col_idx, in_blocks, out_blocks, b, gelu};
    check_indices(w.row_ptr, w.col_idx, w.slot, rows, cols, n_blocks);
    if (n_tokens == 0 || out_blocks == 0) return;

    nb::gil_scoped_release release;
    const KernelTable& table = *g_table;
    const int n = int(std::clamp<int64_t>(threads, 1, n_tokens));
    const size_t packed = padded(n_blocks * b * b), width = padded(cols + 1);
    const size_t order = transposed ? padded(n_blocks) + (n + 1) * width : 0;
    const size_t own = table.spmm_scratch(b, in_blocks, out_blocks, n_blocks), each = padded(own);
    float* scratch = t_scratch.reserve(packed + order + n * each);
    fence(scratch, n_blocks * b * b, packed);
    fence_each(scratch + packed + order, n, own, each);
    a.packed = scratch;
    if (transposed) {
        int32_t* row_idx = reinterpret_cast<int32_t*>(scratch + packed);
        int32_t* col_ptr = row_idx + padded(n_blocks);
        fence(scratch + packed, n_blocks, padded(n_blocks));
        fence_each(scratch + packed + padded(n_blocks), n + 1, cols + 1, width);
        pack_by_columns(table, w, cols, n_blocks, n, col_ptr, width, row_idx, scratch);
        a.ptr = col_ptr;
        a.idx = row_idx;
    } else {
        parallel(n, [&](int i) { table.pack_rows(w, cut(n_blocks, i, n), cut(n_blocks, i + 1, n), scratch); });
    }
    parallel(n, [&](int i) {
        table.spmm(a, cut(n_tokens, i, n), cut(n_tokens, i + 1, n), scratch + packed + order + i * each);
    });
}

void sddmm(Address g, Address scale, Address x, Address dvalues, Address g_sum, Address row_ptr, Address col_idx,
           Address slot, int64_t n_tokens, int64_t rows, int64_t cols, int64_t n_blocks, int b, int width,
           int threads) {
    SddmmArgs a{at<const float>(g), at<const float>(scale), at<const float>(x), at<const int32_t>(row_ptr),
                at<const int32_t>(col_idx), rows, cols, rows * b, b};
    const int32_t* slots = at<const int32_t>(slot);
    check_indices(a.ptr, a.idx, slots, rows, cols, n_blocks);

    // The work is a grid: the tokens are cut in two at most, because every cut of them costs a copy of the sums, and
    // the block rows, into ranges of about equally many blocks, by as many as there are threads left.
    const KernelTable& table = *g_table;
    const bool gathered = width != b;
    const auto sums = gathered ? table.gathered_sddmm : table.sddmm;
    const auto scratch_of = gathered ? table.gathered_sddmm_scratch : table.sddmm_scratch;
    const int64_t numbers = int64_t(b) * width;  // of a block
    const int by_tokens = threads > 1 && n_tokens > 1 ? 2 : 1;
    const int by_rows = int(std::clamp<int64_t>(threads / by_tokens, 1, std::max<int64_t>(rows, 1)));
    const int n = by_tokens * by_rows;
    std::vector<int64_t> row(by_rows + 1, 0);  // range k is [row[k], row[k + 1])
    int64_t most_blocks = 0, most_rows = 0;
    size_t own = 0;  // of any range: one of fewer rows may work in longer tiles
    for (int k = 1; k <= by_rows; ++k) {
        const int32_t upto = int32_t(cut(n_blocks, k, by_rows));
        row[k] = k == by_rows ? rows : std::lower_bound(a.ptr + row[k - 1], a.ptr + rows, upto) - a.ptr;
        const int64_t blocks = a.ptr[row[k]] - a.ptr[row[k - 1]];
        most_blocks = std::max(most_blocks, blocks);
        most_rows = std::max(most_rows, row[k] - row[k - 1]);
        own = std::max(own, scratch_of(b, row[k] - row[k - 1], cols, blocks));
    }
    const size_t each = padded(own);
    // Sums of a part: dvalues in CSR order, then g_sum. Parts of one range lie side by side.
    const size_t sum_at = padded(most_blocks * numbers + 64), size = sum_at + padded(g_sum ? most_rows * b : 0);
    float* scratch = t_scratch.reserve(std::max<size_t>(n * (size + each), padded(n_blocks)));
    check_permutation(slots, n_blocks, scratch);
    fence_each(scratch + n * size, n, own, each);

    nb::gil_scoped_release release;
    parallel(n, [&](int i) {
        const int k = i / by_tokens, t = i % by_tokens;
        SddmmArgs part = a;
        part.g += row[k] * b;
        if (part.scale) part.scale += row[k] * b;
        part.ptr += row[k];
        part.rows = row[k + 1] - row[k];
        float* acc = scratch + i * size;
        std::memset(acc, 0, size * sizeof(float));
        fence(acc, most_blocks * numbers + 64, sum_at);
        fence(acc + sum_at, g_sum ? most_rows * b : 0, size - sum_at);
        sums(part, cut(n_tokens, t, by_tokens), cut(n_tokens, t + 1, by_tokens), scratch + n * size + i * each, acc,
             g_sum ? acc + sum_at : nullptr);
    });
    parallel(n, [&](int i) {  // again a part each: its share of the range's blocks and columns
        const int k = i / by_tokens, t = i % by_tokens;
        const float* acc = scratch + k * by_tokens * size;
        const int64_t first = a.ptr[row[k]], blocks = a.ptr[row[k + 1]] - first, columns = (row[k + 1] - row[k]) * b;
        const int64_t p = cut(blocks, t, by_tokens);
        table.reduce(numbers, acc + p * numbers, size, by_tokens, slots + first + p, cut(blocks, t + 1, by_tokens) - p,
                     at<float>(dvalues));
        if (!g_sum) return;
        for (int64_t f = cut(columns, t, by_tokens); f < cut(columns, t + 1, by_tokens); ++f) {
            float sum = acc[sum_at + f];
            for (int other = 1; other < by_tokens; ++other) sum += acc[other * size + sum_at + f];
            at<float>(g_sum)[row[k] * b + f] = sum;
        }
    });
}

void adamw_step(Address values, Address grad, Address mean, Address square, Address size, Address root,
                int64_t n_blocks, int64_t elements, float beta1, float beta2, float keep, float eps, int threads) {
    const AdamwArgs a{at<float>(values), at<float>(mean), at<float>(square), at<const float>(grad), at<const float>(size),
                      at<const float>(root), elements, beta1, beta2, keep, eps};
    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(n_blocks, 1)));
    parallel(n, [&](int i) { g_table->adamw(a, cut(n_blocks, i, n), cut(n_blocks, i + 1, n)); });
}

}  // namespace

void bind_encoder(nb::module_& m);  // native_encoder.cpp
void bind_loss(nb::module_& m);
void bind_norm(nb::module_& m);
void bind_ffn(nb::module_& m);  // native_ffn.cpp
void bind_gather(nb::module_& m);  // native_gather.cpp
void bind_spark(nb::module_& m);
void bind_gathered(nb::module_& m);
void bind_sparse_attention(nb::module_& m);

NB_MODULE(_native, m) {
    g_table = available_tables().back();
    if (const char* wanted = std::getenv("REGROW_ISA"); wanted && *wanted) set_isa(wanted);
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def("isa", [] { return std::string(g_table->name); });
    m.def("set_isa", &set_isa, "name"_a);
    m.def("available_isas", [] {
        std::vector<std::string> names;
        for (const KernelTable* table : available_tables()) names.emplace_back(table->name);
        return names;
    });
    m.def("spmm", &spmm, "x"_a, "scale"_a, "values"_a, "bias"_a, "y"_a, "slope"_a, "row_ptr"_a, "col_idx"_a, "slot"_a,
          "n_tokens"_a, "in_blocks"_a, "out_blocks"_a, "n_blocks"_a, "block"_a, "transposed"_a, "gelu"_a, "threads"_a);
    m.def("sddmm", &sddmm, "g"_a, "scale"_a, "x"_a, "dvalues"_a, "g_sum"_a, "row_ptr"_a, "col_idx"_a, "slot"_a,
          "n_tokens"_a, "rows"_a, "cols"_a, "n_blocks"_a, "block"_a, "width"_a, "threads"_a);
    m.def("adamw", &adamw_step, "values"_a, "grad"_a, "mean"_a, "square"_a, "size"_a, "root"_a, "n_blocks"_a,
          "elements"_a, "beta1"_a, "beta2"_a, "keep"_a, "eps"_a, "threads"_a);
    bind_loss(m);
    bind_norm(m);
    bind_ffn(m);
    bind_gather(m);
    bind_spark(m);
    bind_gathered(m);
    bind_attention(m);
    bind_sparse_attention(m);
    bind_encoder(m);
}
