// The attention half of a transformer layer: both products and attention between them, a sequence at a time
// (sparse_attention.h).
#include "sequences.h"
#include "weights.h"

namespace {

// A token's products take about as long as its scores with so many keys.
constexpr int64_t kProducts = 128;

void sparse_attention(Address x, Address offsets, Address values1, Address bias1, Address row_ptr1, Address col_idx1,
                      Address slot1, Address values2, Address bias2, Address row_ptr2, Address col_idx2, Address slot2,
                      Address y, Address lse, Address attended, int64_t n_tokens, int64_t n_sequences, int64_t heads,
                      int64_t dim, int64_t in_blocks, int64_t out_blocks, int64_t n_blocks1, int64_t n_blocks2, int b,
                      float scale, uint64_t seed, uint32_t threshold, int threads) {
    const int64_t hidden_blocks = heads * dim / b;
    const Weight first("1", values1, row_ptr1, col_idx1, slot1, 3 * hidden_blocks, in_blocks, n_blocks1, b);
    const Weight second("2", values2, row_ptr2, col_idx2, slot2, out_blocks, hidden_blocks, n_blocks2, b);
    const Sequences sequences = check_offsets(at<const int32_t>(offsets), n_sequences, n_tokens, kProducts);
    if (n_tokens == 0) return;

    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, n_sequences));
    SparseAttentionArgs a{};
    a.offsets = at<const int32_t>(offsets), a.n_tokens = n_tokens, a.heads = heads, a.dim = dim;
    a.longest = sequences.longest, a.in_blocks = in_blocks, a.out_blocks = out_blocks, a.block = b;
    a.scale = scale, a.seed = seed, a.threshold = threshold;
    a.x = at<const float>(x), a.bias1 = at<const float>(bias1), a.bias2 = at<const float>(bias2);
    a.lse = at<float>(lse), a.attended = at<float>(attended), a.y = at<float>(y);
    float* own = nullptr;
    const size_t size = g_table->sparse_attention_scratch(a, false), each = padded(size);
    const auto prepare = [&](float* memory) {
        Layout layout(memory);
        a.first = first.by_rows(layout, n);
        a.second = second.by_rows(layout, n);
        own = layout.take(n * each);
        if (own) fence_each(own, n, size, each);
        return layout.size();
    };
    prepare(t_scratch.reserve(prepare(nullptr)));
    parallel(n, [&](int i) {
        g_table->sparse_attention(a, first_item(sequences, 1, i, n), first_item(sequences, 1, i + 1, n),
                                  own + i * each);
    });
}

void sparse_attention_backward(Address g, Address x, Address lse, Address attended, Address offsets, Address values1,
                               Address bias1, Address row_ptr1, Address col_idx1, Address slot1, Address values2,
                               Address row_ptr2, Address col_idx2, Address slot2, Address dx, Address dvalues1,
                               Address dbias1, Address dvalues2, Address dbias2, int64_t n_tokens,
                               int64_t n_sequences, int64_t heads, int64_t dim, int64_t in_blocks, int64_t out_blocks,
                               int64_t n_blocks1, int64_t n_blocks2, int b, float scale, uint64_t seed,
                               uint32_t threshold, int threads) {
    const int64_t hidden_blocks = heads * dim / b;
    const Weight first("1", values1, row_ptr1, col_idx1, slot1, 3 * hidden_blocks, in_blocks, n_blocks1, b);
    const Weight second("2", values2, row_ptr2, col_idx2, slot2, out_blocks, hidden_blocks, n_blocks2, b);
    const Sequences sequences = check_offsets(at<const int32_t>(offsets), n_sequences, n_tokens, kProducts);
    void* seen = t_scratch.reserve(padded(std::max(n_blocks1, n_blocks2)));
    check_permutation(first.args.slot, n_blocks1, seen, "1");
    check_permutation(second.args.slot, n_blocks2, seen, "2");

    nb::gil_scoped_release release;
    const int n = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(n_sequences, 1)));
    SparseAttentionArgs a{};
    a.offsets = at<const int32_t>(offsets), a.n_tokens = n_tokens, a.heads = heads, a.dim = dim;
    a.longest = sequences.longest, a.in_blocks = in_blocks, a.out_blocks = out_blocks, a.block = b;
    a.scale = scale, a.seed = seed, a.threshold = threshold;
    a.x = at<const float>(x), a.bias1 = at<const float>(bias1);
    a.lse = at<float>(lse), a.attended = at<float>(attended);
    a.g = at<const float>(g), a.dx = at<float>(dx);
    float *own = nullptr, *totals = nullptr;
    const size_t size = g_table->sparse_attention_scratch(a, true), each = padded(size);
    const TwoSums sums(first, second, 3 * hidden_blocks * b, out_blocks * b,
                       {at<float>(dvalues1), at<float>(dbias1), at<float>(dvalues2), at<float>(dbias2)});
    const auto prepare = [&](float* memory) {
        Layout layout(memory);
        a.first = first.by_rows(layout, n);
        a.second = second.places();
        a.second_t = second.by_columns(layout, n);
        if (dx) a.first_t = first.by_columns(layout, n);
        totals = layout.take(n * sums.size);
        own = layout.take(n * each);
        if (own) fence_each(own, n, size, each);
        return layout.size();
    };
    prepare(t_scratch.reserve(prepare(nullptr)));
    parallel(n, [&](int i) {
        g_table->sparse_attention_backward(a, first_item(sequences, 1, i, n), first_item(sequences, 1, i + 1, n),
                                           own + i * each, sums.clear(totals + i * sums.size));
    });
    parallel(n, [&](int i) { sums.reduce(totals, i, n); });
}

}  // namespace

void bind_sparse_attention(nb::module_& m) {
    m.def("sparse_attention", &sparse_attention, "x"_a, "offsets"_a, "values1"_a, "bias1"_a, "row_ptr1"_a,
          "col_idx1"_a, "slot1"_a, "values2"_a, "bias2"_a, "row_ptr2"_a, "col_idx2"_a, "slot2"_a, "y"_a, "lse"_a,
          "attended"_a, "n_tokens"_a, "n_sequences"_a, "heads"_a, "dim"_a, "in_blocks"_a, "out_blocks"_a,
          "n_blocks1"_a, "n_blocks2"_a, "block"_a, "scale"_a, "seed"_a, "threshold"_a, "threads"_a);
    m.def("sparse_attention_backward", &sparse_attention_backward, "g"_a, "x"_a, "lse"_a, "attended"_a, "offsets"_a,
          "values1"_a, "bias1"_a, "row_ptr1"_a, "col_idx1"_a, "slot1"_a, "values2"_a, "row_ptr2"_a, "col_idx2"_a,
          "slot2"_a, "dx"_a, "dvalues1"_a, "dbias1"_a, "dvalues2"_a, "dbias2"_a, "n_tokens"_a, "n_sequences"_a,
          "heads"_a, "dim"_a, "in_blocks"_a, "out_blocks"_a, "n_blocks1"_a, "n_blocks2"_a, "block"_a, "scale"_a,
          "seed"_a, "threshold"_a, "threads"_a);
}
