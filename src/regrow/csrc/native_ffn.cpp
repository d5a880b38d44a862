// The feed-forward half of a transformer layer: both products and the GELU between them, tile by tile (ffn.h).
#include "runtime.h"
#include "weights.h"

namespace {

void ffn(Address x, Address values1, Address bias1, Address row_ptr1, Address col_idx1, Address slot1, Address values2,
         Address bias2, Address row_ptr2, Address col_idx2, Address slot2, Address y, int64_t n_tokens,
         int64_t in_blocks, int64_t hidden_blocks, int64_t out_blocks, int64_t n_blocks1, int64_t n_blocks2, int b,
         int threads) {
    const Weight first("1", values1, row_ptr1, col_idx1, slot1, hidden_blocks, in_blocks, n_blocks1, b);
    const Weight second("2", values2, row_ptr2, col_idx2, slot2, out_blocks, hidden_blocks, n_blocks2, b);
    check_order(second.args, "2");
    if (n_tokens == 0 || out_blocks == 0) return;

    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, n_tokens));
    FfnArgs a{};
    a.in_blocks = in_blocks, a.hidden_blocks = hidden_blocks, a.out_blocks = out_blocks, a.block = b;
    a.plan = g_table->ffn_plan(b, in_blocks, hidden_blocks, out_blocks, false);
    a.x = at<const float>(x), a.y = at<float>(y);
    a.bias1 = at<const float>(bias1), a.bias2 = at<const float>(bias2);
    float* own = nullptr;
    const size_t each = padded(a.plan.scratch);
    const auto prepare = [&](float* memory) {
        Layout layout(memory);
        a.first = first.by_rows(layout, n);
        a.second = second.by_rows(layout, n);
        a.second_cuts = cut_slabs(layout, second.places(), out_blocks, a.plan.slab, hidden_blocks);
        own = layout.take(n * each);
        if (own) fence_each(own, n, a.plan.scratch, each);
        return layout.size();
    };
    prepare(t_scratch.reserve(prepare(nullptr)));
    parallel(n, [&](int i) { g_table->ffn(a, cut(n_tokens, i, n), cut(n_tokens, i + 1, n), own + i * each); });
}

void ffn_backward(Address g, Address x, Address values1, Address bias1, Address row_ptr1, Address col_idx1,
                  Address slot1, Address values2, Address row_ptr2, Address col_idx2, Address slot2, Address dx,
                  Address dvalues1, Address dbias1, Address dvalues2, Address dbias2, int64_t n_tokens,
                  int64_t in_blocks, int64_t hidden_blocks, int64_t out_blocks, int64_t n_blocks1, int64_t n_blocks2,
                  int b, int threads) {
    const Weight first("1", values1, row_ptr1, col_idx1, slot1, hidden_blocks, in_blocks, n_blocks1, b);
    const Weight second("2", values2, row_ptr2, col_idx2, slot2, out_blocks, hidden_blocks, n_blocks2, b);
    check_order(second.args, "2");
    void* seen = t_scratch.reserve(padded(std::max(n_blocks1, n_blocks2)));
    check_permutation(first.args.slot, n_blocks1, seen, "1");
    check_permutation(second.args.slot, n_blocks2, seen, "2");

    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(n_tokens, 1)));
    FfnArgs a{};
    a.in_blocks = in_blocks, a.hidden_blocks = hidden_blocks, a.out_blocks = out_blocks, a.block = b;
    a.plan = g_table->ffn_plan(b, in_blocks, hidden_blocks, out_blocks, true);
    a.x = at<const float>(x), a.g = at<const float>(g), a.bias1 = at<const float>(bias1), a.dx = at<float>(dx);
    float *own = nullptr, *totals = nullptr;
    const size_t each = padded(a.plan.scratch);
    const TwoSums sums(first, second, hidden_blocks * b, out_blocks * b, {at<float>(dvalues1), at<float>(dbias1),
                       at<float>(dvalues2), at<float>(dbias2)});
    const auto prepare = [&](float* memory) {
        Layout layout(memory);
        a.first = first.by_rows(layout, n);
        a.second = second.places();
        a.second_cuts = cut_slabs(layout, a.second, out_blocks, a.plan.slab, hidden_blocks);
        a.second_t = second.by_columns(layout, n);
        if (dx) {
            a.first_t = first.by_columns(layout, n);
            a.first_t_cuts = cut_slabs(layout, a.first_t, in_blocks, a.plan.slab, hidden_blocks);
        }
        totals = layout.take(n * sums.size);
        own = layout.take(n * each);
        if (own) fence_each(own, n, a.plan.scratch, each);
        return layout.size();
    };
    prepare(t_scratch.reserve(prepare(nullptr)));
    parallel(n, [&](int i) {
        g_table->ffn_backward(a, cut(n_tokens, i, n), cut(n_tokens, i + 1, n), own + i * each,
                              sums.clear(totals + i * sums.size));
    });
    parallel(n, [&](int i) { sums.reduce(totals, i, n); });
}

}  // namespace

void bind_ffn(nb::module_& m) {
    m.def("ffn", &ffn, "x"_a, "values1"_a, "bias1"_a, "row_ptr1"_a, "col_idx1"_a, "slot1"_a, "values2"_a, "bias2"_a,
          "row_ptr2"_a, "col_idx2"_a, "slot2"_a, "y"_a, "n_tokens"_a, "in_blocks"_a, "hidden_blocks"_a, "out_blocks"_a,
          "n_blocks1"_a, "n_blocks2"_a, "block"_a, "threads"_a);
    m.def("ffn_backward", &ffn_backward, "g"_a, "x"_a, "values1"_a, "bias1"_a, "row_ptr1"_a, "col_idx1"_a, "slot1"_a,
          "values2"_a, "row_ptr2"_a, "col_idx2"_a, "slot2"_a, "dx"_a, "dvalues1"_a, "dbias1"_a, "dvalues2"_a,
          "dbias2"_a, "n_tokens"_a, "in_blocks"_a, "hidden_blocks"_a, "out_blocks"_a, "n_blocks1"_a, "n_blocks2"_a,
          "block"_a, "threads"_a);
}
