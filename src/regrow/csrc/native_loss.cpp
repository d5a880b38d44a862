// Softmax cross-entropy over rows of logits, and adding rows to a gradient.
#include "runtime.h"

namespace {

void cross_entropy(Address logits, Address bias, Address targets, Address losses, Address sum, int64_t rows, int64_t classes,
                   float scale, int threads) {
    const LossArgs a{at<float>(logits), at<const float>(bias), at<const int64_t>(targets), at<float>(losses), classes, scale};
    for (int64_t r = 0; r < rows; ++r) {
        if (a.targets[r] < 0 || a.targets[r] >= classes) {
            fail("targets holds " + std::to_string(a.targets[r]) + ", outside [0, " + std::to_string(classes) + ")");
        }
    }
    if (scale != 0 && classes > 0) std::memset(at<float>(sum), 0, classes * sizeof(float));
    if (rows == 0) return;
    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, rows));
    const size_t width = scale != 0 ? padded(classes) : 0;
    float* sums = t_scratch.reserve(std::max<size_t>(n * width, 1));
    if (width) fence_each(sums, n, classes, width);
    parallel(n, [&](int i) {
        float* part = sums + i * width;
        if (width) std::memset(part, 0, classes * sizeof(float));
        g_table->cross_entropy(a, cut(rows, i, n), cut(rows, i + 1, n), part);
    });
    if (scale == 0) return;
    for (int i = 0; i < n; ++i) {
        for (int64_t c = 0; c < classes; ++c) at<float>(sum)[c] += sums[i * width + c];
    }
}

// Each thread has its columns, so that a row named twice needs no care.
void add_rows(Address x, Address rows, Address values, int64_t n_rows, int64_t width, int64_t count, int threads) {
    const int64_t* row = at<const int64_t>(rows);
    for (int64_t i = 0; i < count; ++i) {
        if (row[i] < 0 || row[i] >= n_rows) {
            fail("rows holds " + std::to_string(row[i]) + ", outside [0, " + std::to_string(n_rows) + ")");
        }
    }
    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(width / 16, 1)));
    parallel(n, [&](int part) {
        const int64_t first = cut(width, part, n), last = cut(width, part + 1, n);
        for (int64_t i = 0; i < count; ++i) {
            float* __restrict to = at<float>(x) + row[i] * width;
            const float* __restrict from = at<const float>(values) + i * width;
            for (int64_t c = first; c < last; ++c) to[c] += from[c];
        }
    });
}

}  // namespace

void bind_loss(nb::module_& m) {
    m.def("cross_entropy", &cross_entropy, "logits"_a, "bias"_a, "targets"_a, "losses"_a, "sum"_a, "rows"_a, "classes"_a,
          "scale"_a, "threads"_a);
    m.def("add_rows", &add_rows, "x"_a, "rows"_a, "values"_a, "n_rows"_a, "width"_a, "count"_a, "threads"_a);
}
