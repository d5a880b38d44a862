// The Python module regrow.kernels._native: checks every index, splits the work over threads, and calls the
// kernels of the best instruction set this CPU has. It knows nothing of torch: arrays come through DLPack.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "table.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <int Dims>
using In = nb::ndarray<const float, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <int Dims>
using Out = nb::ndarray<float, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using Index = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

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

const KernelTable* g_table = &kGenericTable;

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

// ---- checks -----------------------------------------------------------------------------------

struct Names {
    const char *ptr, *idx, *slot;
};
constexpr Names kCsr{"row_ptr", "col_idx", "slot"}, kCsc{"col_ptr", "row_idx_t", "slot_t"};

// One bad index would read or write outside the arrays, so every call checks all of them: O(n_blocks).
void check_range(const Index& array, const char* name, int64_t size, int64_t limit) {
    if (int64_t(array.shape(0)) != size) {
        fail(std::string(name) + " has " + std::to_string(array.shape(0)) + " entries; expected " +
             std::to_string(size) + ", the number of blocks");
    }
    const int32_t* v = array.data();
    uint32_t top = 0;  // a negative index is a large unsigned number
    for (int64_t i = 0; i < size; ++i) top = std::max(top, uint32_t(v[i]));
    if (size && top >= uint64_t(limit)) {
        fail(std::string(name) + " holds " + std::to_string(int32_t(top)) + ", outside [0, " +
             std::to_string(limit) + ")");
    }
}

void check_ptr(const Index& array, const char* name, int64_t n_blocks) {
    const int64_t n = array.shape(0);
    if (n < 1) fail(std::string(name) + " is empty");
    const int32_t* v = array.data();
    if (v[0] != 0) fail(std::string(name) + " starts at " + std::to_string(v[0]) + ", not 0");
    for (int64_t i = 1; i < n; ++i) {
        if (v[i] < v[i - 1]) fail(std::string(name) + " decreases at position " + std::to_string(i));
    }
    if (v[n - 1] != n_blocks) {
        fail(std::string(name) + " ends at " + std::to_string(v[n - 1]) + ", not at the number of blocks, " +
             std::to_string(n_blocks));
    }
}

void check_block(int64_t b) {
    for (int known : kBlocks) {
        if (b == known) return;
    }
    fail("block size " + std::to_string(b) + " has no compiled kernel");
}

int64_t check_width(int64_t width, const char* name, int64_t b) {
    if (width % b) {
        fail(std::string(name) + " has " + std::to_string(width) + " columns, not a multiple of the block size " +
             std::to_string(b));
    }
    return width / b;
}

// ---- scratch and threads ----------------------------------------------------------------------

// Memory kept by a calling thread between calls. It only grows, up to what its largest call needed: a copy
// of the weight's blocks (spmm) or two (sddmm), and the panels of one tile per thread, rounded up to 2 MB.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    float* reserve(size_t floats) {
        if (floats > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            const size_t bytes = (floats * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage;
            data_ = static_cast<float*>(std::aligned_alloc(kHugePage, bytes));
            if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
            // A tile is read block by block, in no order: with small pages it outgrows the first-level TLB.
            madvise(data_, bytes, MADV_HUGEPAGE);
#endif
            size_ = bytes / sizeof(float);
        }
        return data_;
    }

  private:
    static constexpr size_t kHugePage = 2 << 20;
    float* data_ = nullptr;
    size_t size_ = 0;
};
thread_local Scratch t_scratch;

size_t padded(size_t floats) { return (floats + 1023) / 1024 * 1024; }  // whole pages: no false sharing

// f(part) for part in [0, n). The split depends on n alone, so results do not depend on how many threads
// come. With n == 1 OpenMP is never entered, which keeps a forked child of a threaded parent safe.
template <class F>
void parallel(int n, F&& f) {
#ifdef _OPENMP
    if (n > 1) {
#pragma omp parallel num_threads(n)
        for (int part = omp_get_thread_num(); part < n; part += omp_get_num_threads()) f(part);
        return;
    }
#endif
    for (int part = 0; part < n; ++part) f(part);
}

int64_t cut(int64_t total, int part, int parts) { return total * part / parts; }

// ---- the two operations -----------------------------------------------------------------------

void spmm(In<2> x, In<3> values, std::optional<In<1>> bias, Out<2> y, Index ptr, Index idx, Index slot,
          bool transposed, int threads) {
    const Names& names = transposed ? kCsc : kCsr;
    const int64_t n_blocks = values.shape(0), b = values.shape(1), n_tokens = x.shape(0);
    check_block(b);
    if (int64_t(values.shape(2)) != b) fail("values must have square blocks");
    SpmmArgs a{};
    a.block = int(b);
    a.in_blocks = check_width(x.shape(1), transposed ? "g" : "x", b);
    a.out_blocks = int64_t(ptr.shape(0)) - 1;
    check_ptr(ptr, names.ptr, n_blocks);
    check_range(idx, names.idx, n_blocks, a.in_blocks);
    check_range(slot, names.slot, n_blocks, n_blocks);
    if (int64_t(y.shape(0)) != n_tokens || int64_t(y.shape(1)) != a.out_blocks * b) fail("output has a wrong shape");
    if (bias && int64_t(bias->shape(0)) != a.out_blocks * b) {
        fail("bias has " + std::to_string(bias->shape(0)) + " entries; expected " + std::to_string(a.out_blocks * b));
    }
    if (n_tokens == 0 || a.out_blocks == 0) return;
    a.x = x.data();
    a.bias = bias ? bias->data() : nullptr;
    a.y = y.data();
    a.ptr = ptr.data();
    a.idx = idx.data();

    nb::gil_scoped_release release;
    const KernelTable& table = *g_table;
    const int n = int(std::clamp<int64_t>(threads, 1, n_tokens));
    const size_t packed = padded(n_blocks * b * b), each = padded(table.spmm_scratch(a.block, a.in_blocks, a.out_blocks));
    float* scratch = t_scratch.reserve(packed + n * each);
    a.packed = scratch;
    parallel(n, [&](int i) {
        table.pack_values(a.block, !transposed, values.data(), slot.data(), cut(n_blocks, i, n),
                          cut(n_blocks, i + 1, n), scratch);
    });
    parallel(n, [&](int i) {
        table.spmm(a, cut(n_tokens, i, n), cut(n_tokens, i + 1, n), scratch + packed + i * each);
    });
}

void sddmm(In<2> g, In<2> x, Out<3> dvalues, std::optional<Out<1>> g_sum, Index ptr, Index idx, Index slot,
           int threads) {
    const int64_t n_blocks = dvalues.shape(0), b = dvalues.shape(1), n_tokens = g.shape(0);
    check_block(b);
    if (int64_t(dvalues.shape(2)) != b) fail("dvalues must have square blocks");
    SddmmArgs a{};
    a.block = int(b);
    a.rows = check_width(g.shape(1), "g", b);
    a.cols = check_width(x.shape(1), "x", b);
    if (int64_t(x.shape(0)) != n_tokens) fail("g and x have different numbers of rows");
    if (int64_t(ptr.shape(0)) != a.rows + 1) {
        fail("row_ptr has " + std::to_string(ptr.shape(0)) + " entries; expected " + std::to_string(a.rows + 1));
    }
    if (g_sum && int64_t(g_sum->shape(0)) != a.rows * b) fail("g_sum has a wrong shape");
    check_ptr(ptr, kCsr.ptr, n_blocks);
    check_range(idx, kCsr.idx, n_blocks, a.cols);
    check_range(slot, kCsr.slot, n_blocks, n_blocks);
    a.g = g.data();
    a.x = x.data();
    a.ptr = ptr.data();
    a.idx = idx.data();

    a.g_width = a.rows * b;

    // The work is a grid: the tokens are cut in two at most, because every cut of them costs a copy of the sums, and
    // the block rows, into ranges of about equally many blocks, by as many as there are threads left.
    const KernelTable& table = *g_table;
    const int by_tokens = threads > 1 && n_tokens > 1 ? 2 : 1;
    const int by_rows = int(std::clamp<int64_t>(threads / by_tokens, 1, a.rows)), n = by_tokens * by_rows;
    std::vector<int64_t> row(by_rows + 1, 0);  // range k is [row[k], row[k + 1])
    int64_t most_blocks = 0, most_rows = 0;
    size_t each = 0;  // of any range: one of fewer rows may work in longer tiles
    for (int k = 1; k <= by_rows; ++k) {
        const int32_t upto = int32_t(cut(n_blocks, k, by_rows));
        row[k] = k == by_rows ? a.rows : std::lower_bound(a.ptr + row[k - 1], a.ptr + a.rows, upto) - a.ptr;
        most_blocks = std::max<int64_t>(most_blocks, a.ptr[row[k]] - a.ptr[row[k - 1]]);
        most_rows = std::max(most_rows, row[k] - row[k - 1]);
        each = std::max(each, padded(table.sddmm_scratch(a.block, row[k] - row[k - 1], a.cols)));
    }
    // Sums of a part: dvalues in CSR order, then g_sum. Parts of one range lie side by side.
    const size_t sum_at = padded(most_blocks * b * b + 64), size = sum_at + padded(g_sum ? most_rows * b : 0);
    float* scratch = t_scratch.reserve(std::max<size_t>(n * (size + each), padded(n_blocks)));
    // A slot named twice leaves another one unwritten.
    unsigned char* seen = reinterpret_cast<unsigned char*>(scratch);
    std::memset(seen, 0, n_blocks);
    for (int64_t p = 0; p < n_blocks; ++p) seen[slot.data()[p]] = 1;
    if (std::memchr(seen, 0, n_blocks)) fail("slot is not a permutation: some slots are named twice");

    nb::gil_scoped_release release;
    parallel(n, [&](int i) {
        const int k = i / by_tokens, t = i % by_tokens;
        SddmmArgs part = a;
        part.g += row[k] * b;
        part.ptr += row[k];
        part.rows = row[k + 1] - row[k];
        float* acc = scratch + i * size;
        std::memset(acc, 0, size * sizeof(float));
        table.sddmm(part, cut(n_tokens, t, by_tokens), cut(n_tokens, t + 1, by_tokens), scratch + n * size + i * each,
                    acc, g_sum ? acc + sum_at : nullptr);
    });
    parallel(n, [&](int i) {  // again a part each: its share of the range's blocks and columns
        const int k = i / by_tokens, t = i % by_tokens;
        const float* acc = scratch + k * by_tokens * size;
        const int64_t first = a.ptr[row[k]], blocks = a.ptr[row[k + 1]] - first, columns = (row[k + 1] - row[k]) * b;
        const int64_t p = cut(blocks, t, by_tokens);
        table.reduce(a.block, acc + p * b * b, size, by_tokens, slot.data() + first + p,
                     cut(blocks, t + 1, by_tokens) - p, dvalues.data());
        if (!g_sum) return;
        for (int64_t f = cut(columns, t, by_tokens); f < cut(columns, t + 1, by_tokens); ++f) {
            float sum = acc[sum_at + f];
            for (int other = 1; other < by_tokens; ++other) sum += acc[other * size + sum_at + f];
            g_sum->data()[row[k] * b + f] = sum;
        }
    });
}

}  // namespace

NB_MODULE(_native, m) {
    g_table = available_tables().back();
    if (const char* wanted = std::getenv("REGROW_ISA"); wanted && *wanted) set_isa(wanted);
    m.attr("BLOCK_SIZES") = nb::make_tuple(1, 2, 4, 8, 16, 32, 64);
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
    m.def("spmm", &spmm, "x"_a, "values"_a, "bias"_a.none(), "y"_a, "ptr"_a, "idx"_a, "slot"_a, "transposed"_a,
          "threads"_a);
    m.def("sddmm", &sddmm, "g"_a, "x"_a, "dvalues"_a, "g_sum"_a.none(), "ptr"_a, "idx"_a, "slot"_a, "threads"_a);
}
