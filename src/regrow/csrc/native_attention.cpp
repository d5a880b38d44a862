// Self-attention: checks the sequences' bounds and shares pairs of a sequence and a head out to the threads.
#include "runtime.h"
#include "sequences.h"

namespace {

constexpr int64_t kCopying = 32;  // copying a token takes about as long as its scores with so many keys

void run(AttentionArgs a, int64_t n_sequences, int threads, bool backward) {
    const Sequences sequences = check_offsets(a.offsets, n_sequences, a.n_tokens, kCopying);
    if (a.n_tokens == 0 || a.heads == 0 || a.dim == 0) return;
    a.longest = sequences.longest;

    nb::gil_scoped_release release;
    const KernelTable& table = *g_table;
    const int n = int(std::clamp<int64_t>(threads, 1, n_sequences * a.heads));
    const size_t own = table.attention_scratch(a.longest, a.dim, backward), each = padded(own);
    float* scratch = t_scratch.reserve(n * each);
    fence_each(scratch, n, own, each);
    parallel(n, [&](int i) {
        const auto kernel = backward ? table.attention_backward : table.attention;
        kernel(a, first_item(sequences, a.heads, i, n), first_item(sequences, a.heads, i + 1, n), scratch + i * each);
    });
}

void attention(Address qkv, Address offsets, Address out, Address lse, int64_t n_tokens, int64_t n_sequences,
               int64_t heads, int64_t dim, float scale, uint64_t seed, uint32_t threshold, int threads) {
    const AttentionArgs a{at<const float>(qkv), at<const int32_t>(offsets), n_tokens, heads, dim, 0, scale,
                          at<float>(out), at<float>(lse), nullptr, nullptr, seed, threshold};
    run(a, n_sequences, threads, false);
}

void attention_backward(Address g, Address qkv, Address out, Address lse, Address offsets, Address dqkv,
                        int64_t n_tokens, int64_t n_sequences, int64_t heads, int64_t dim, float scale, uint64_t seed,
                        uint32_t threshold, int threads) {
    const AttentionArgs a{at<const float>(qkv), at<const int32_t>(offsets), n_tokens, heads, dim, 0, scale,
                          at<float>(out), at<float>(lse), at<const float>(g), at<float>(dqkv), seed, threshold};
    run(a, n_sequences, threads, true);
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attention", &attention, "qkv"_a, "offsets"_a, "out"_a, "lse"_a, "n_tokens"_a, "n_sequences"_a, "heads"_a,
          "dim"_a, "scale"_a, "seed"_a, "threshold"_a, "threads"_a);
    m.def("attention_backward", &attention_backward, "g"_a, "qkv"_a, "out"_a, "lse"_a, "offsets"_a, "dqkv"_a,
          "n_tokens"_a, "n_sequences"_a, "heads"_a, "dim"_a, "scale"_a, "seed"_a, "threshold"_a, "threads"_a);
}
