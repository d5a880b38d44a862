// Bindings of the choice of hidden units (spark.h): they split the tokens over threads.
#include "weights.h"

namespace {

// mean, deviation, limit [n_tokens] of z [n_tokens, hidden]; ptr [n_tokens + 1] of the lists of what is above.
void spark_thresholds(Address z, Address mean, Address deviation, Address limit, Address ptr, int64_t n_tokens,
                      int64_t hidden, float quantile, int threads) {
    nb::gil_scoped_release release;
    SparkArgs a{};
    int32_t* starts = at<int32_t>(ptr);
    a.z = at<const float>(z), a.hidden = hidden, a.quantile = quantile;
    a.mean = at<float>(mean), a.deviation = at<float>(deviation), a.limit = at<float>(limit), a.counts = starts + 1;
    const int n = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(n_tokens, 1)));
    parallel(n, [&](int i) { g_table->spark_thresholds(a, cut(n_tokens, i, n), cut(n_tokens, i + 1, n)); });
    int64_t total = 0;
    starts[0] = 0;
    for (int64_t t = 1; t <= n_tokens; ++t) {
        total += starts[t];
        if (total > INT32_MAX) break;
        starts[t] = int32_t(total);
    }
    if (total > INT32_MAX) {
        nb::gil_scoped_acquire acquire;
        fail("more than 2^31 hidden units are active; pass fewer tokens at a time");
    }
}

// Lists of `n` positions, as long as spark_thresholds found them for the same z and limit.
void spark_select(Address z, Address limit, Address ptr, Address idx, Address over, int64_t n_tokens, int64_t hidden,
                  int64_t n, int threads) {
    SparkArgs a{};
    a.z = at<const float>(z), a.hidden = hidden, a.limit = at<float>(limit);
    a.ptr = at<const int32_t>(ptr), a.idx = at<int32_t>(idx), a.over = at<float>(over);
    check_ptr(a.ptr, n_tokens, n);
    nb::gil_scoped_release release;
    const int parts = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(n_tokens, 1)));
    parallel(parts, [&](int i) { g_table->spark_select(a, cut(n_tokens, i, parts), cut(n_tokens, i + 1, parts)); });
}

void spark_hidden(Address over, Address up, Address h, int64_t n, int threads) {
    nb::gil_scoped_release release;
    const int parts = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(n, 1)));
    parallel(parts, [&](int i) {
        g_table->spark_hidden(at<const float>(over), at<const float>(up), cut(n, i, parts), cut(n, i + 1, parts),
                              at<float>(h));
    });
}

void spark_slopes(Address ptr, Address over, Address up, Address dh, Address h, Address dup, Address dover,
                  Address total, int64_t n_tokens, int64_t n, int threads) {
    check_ptr(at<const int32_t>(ptr), n_tokens, n);
    nb::gil_scoped_release release;
    const SparkGradArgs a{at<const int32_t>(ptr), at<const float>(over), at<const float>(up), at<const float>(dh),
                          at<float>(h), at<float>(dup), at<float>(dover), at<float>(total)};
    const int parts = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(n_tokens, 1)));
    parallel(parts, [&](int i) { g_table->spark_slopes(a, cut(n_tokens, i, parts), cut(n_tokens, i + 1, parts)); });
}

}  // namespace

void bind_spark(nb::module_& m) {
    m.def("spark_thresholds", &spark_thresholds, "z"_a, "mean"_a, "deviation"_a, "limit"_a, "ptr"_a, "n_tokens"_a,
          "hidden"_a, "quantile"_a, "threads"_a);
    m.def("spark_select", &spark_select, "z"_a, "limit"_a, "ptr"_a, "idx"_a, "over"_a, "n_tokens"_a, "hidden"_a, "n"_a,
          "threads"_a);
    m.def("spark_hidden", &spark_hidden, "over"_a, "up"_a, "h"_a, "n"_a, "threads"_a);
    m.def("spark_slopes", &spark_slopes, "ptr"_a, "over"_a, "up"_a, "dh"_a, "h"_a, "dup"_a, "dover"_a, "total"_a,
          "n_tokens"_a, "n"_a, "threads"_a);
}
