// Bindings of dropout and of LayerNorm with dropout: they split the rows over threads.
#include "runtime.h"

namespace {

size_t row_floats(int64_t width) { return size_t(width + 127) / 128 * 128; }

void dropout(Address x, Address y, int64_t rows, int64_t width, uint64_t seed, uint32_t threshold, int threads) {
    if (threshold > 65535) fail("threshold is " + std::to_string(threshold) + ", above 65535");
    const DropArgs a{at<const float>(x), at<float>(y), width, seed, threshold};
    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(rows, 1)));
    parallel(n, [&](int i) { g_table->dropout(a, cut(rows, i, n), cut(rows, i + 1, n)); });
}

void norm(Address x, Address residual, Address weight, Address bias, Address y, Address mean, Address rstd,
          int64_t rows, int64_t width, float eps, uint64_t seed, uint32_t threshold, int threads) {
    if (threshold > 65535) fail("threshold is " + std::to_string(threshold) + ", above 65535");
    const NormArgs a{at<const float>(x), at<const float>(residual), at<const float>(weight), at<const float>(bias),
                     at<float>(y), at<float>(mean), at<float>(rstd), width, eps, seed, threshold};
    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(rows, 1)));
    const size_t each = padded(2 * row_floats(width));
    float* scratch = t_scratch.reserve(n * each);
    fence_each(scratch, n, 2 * row_floats(width), each);
    parallel(n, [&](int i) { g_table->norm(a, cut(rows, i, n), cut(rows, i + 1, n), scratch + i * each); });
}

void norm_backward(Address g, Address x, Address residual, Address weight, Address mean, Address rstd, Address dx,
                   Address dh, Address dweight, Address dbias, int64_t rows, int64_t width, uint64_t seed,
                   uint32_t threshold, int threads) {
    if (threshold > 65535) fail("threshold is " + std::to_string(threshold) + ", above 65535");
    nb::gil_scoped_release release;
    // Sums over rows: the ranges depend on the number of rows alone, and are added in order, so the result does not
    // depend on the threads.
    const int ranges = int(std::clamp<int64_t>(rows / 32, 1, 32));
    const int n = std::clamp(threads, 1, ranges);
    const NormGradArgs a{at<const float>(g), at<const float>(x), at<const float>(residual), at<const float>(weight),
                         at<const float>(mean), at<const float>(rstd), at<float>(dx), at<float>(dh), width, rows / n,
                         seed, threshold};
    const size_t row = row_floats(width), sum = padded(2 * row), each = padded(2 * row);
    float *sums = t_scratch.reserve(ranges * sum + n * each), *scratch = sums + ranges * sum;
    fence_each(sums, ranges, 2 * row, sum);
    fence_each(scratch, n, 2 * row, each);
    parallel(n, [&](int i) {
        for (int64_t k = cut(ranges, i, n); k < cut(ranges, i + 1, n); ++k) {
            float* part = sums + k * sum;
            std::memset(part, 0, 2 * row * sizeof(float));
            g_table->norm_backward(a, cut(rows, k, ranges), cut(rows, k + 1, ranges), scratch + i * each, part,
                                   part + row);
        }
    });
    const auto reduce = [=](const float* part, float* total) {
        std::memcpy(total, part, width * sizeof(float));
        for (int k = 1; k < ranges; ++k) {
            for (int64_t c = 0; c < width; ++c) total[c] += part[k * sum + c];
        }
    };
    reduce(sums, at<float>(dweight));
    reduce(sums + row, at<float>(dbias));
}

}  // namespace

void bind_norm(nb::module_& m) {
    m.def("dropout", &dropout, "x"_a, "y"_a, "rows"_a, "width"_a, "seed"_a, "threshold"_a, "threads"_a);
    m.def("norm", &norm, "x"_a, "residual"_a, "weight"_a, "bias"_a, "y"_a, "mean"_a, "rstd"_a, "rows"_a, "width"_a,
          "eps"_a, "seed"_a, "threshold"_a, "threads"_a);
    m.def("norm_backward", &norm_backward, "g"_a, "x"_a, "residual"_a, "weight"_a, "mean"_a, "rstd"_a, "dx"_a, "dh"_a,
          "dweight"_a, "dbias"_a, "rows"_a, "width"_a, "seed"_a, "threshold"_a, "threads"_a);
}
