// Softmax cross-entropy over rows of logits.
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
    if (scale != 0) std::memset(at<float>(sum), 0, classes * sizeof(float));
    if (rows == 0) return;
    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, rows));
    const size_t width = scale != 0 ? padded(classes) : 0;
    float* sums = t_scratch.reserve(std::max<size_t>(n * width, 1));
    parallel(n, [&](int i) {
        float* part = sums + i * width;
        std::memset(part, 0, width * sizeof(float));
        g_table->cross_entropy(a, cut(rows, i, n), cut(rows, i + 1, n), part);
    });
    if (scale == 0) return;
    for (int i = 0; i < n; ++i) {
        for (int64_t c = 0; c < classes; ++c) at<float>(sum)[c] += sums[i * width + c];
    }
}

}  // namespace

void bind_loss(nb::module_& m) {
    m.def("cross_entropy", &cross_entropy, "logits"_a, "bias"_a, "targets"_a, "losses"_a, "sum"_a, "rows"_a, "classes"_a,
          "scale"_a, "threads"_a);
}
