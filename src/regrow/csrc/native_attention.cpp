// Self-attention: checks the sequences' bounds and shares pairs of a sequence and a head out to the threads.
#include <cmath>

#include "runtime.h"

namespace {

struct Sequences {
    int64_t longest = 0;
    std::vector<int64_t> cost{0};  // of all sequences before each
};

Sequences check_offsets(const int32_t* offsets, int64_t n_sequences, int64_t n_tokens) {
    if (offsets[0] != 0) fail("offsets starts at " + std::to_string(offsets[0]) + ", not 0");
    Sequences sequences;
    for (int64_t s = 0; s < n_sequences; ++s) {
        const int64_t length = int64_t(offsets[s + 1]) - offsets[s];
        if (length < 0) fail("offsets decreases at position " + std::to_string(s + 1));
        constexpr int64_t kCopying = 32;  // copying a token takes about as long as its scores with so many keys
        sequences.longest = std::max(sequences.longest, length);
        sequences.cost.push_back(sequences.cost.back() + length * (length + kCopying));
    }
    if (offsets[n_sequences] != n_tokens) {
        fail("offsets ends at " + std::to_string(offsets[n_sequences]) + ", not at the number of tokens, " +
             std::to_string(n_tokens));
    }
    return sequences;
}

// The first pair of part `part`: pairs are computed independently of each other, so parts of about equal cost, whatever
// their number, give the same bits.
int64_t first_pair(const Sequences& sequences, int64_t heads, int part, int parts) {
    const std::vector<int64_t>& cost = sequences.cost;
    const int64_t n_sequences = int64_t(cost.size()) - 1;
    if (part == parts) return n_sequences * heads;
    const double target = double(cost.back()) * part / parts;
    const int64_t s = std::upper_bound(cost.begin(), cost.end(), target) - cost.begin() - 1;
    if (s == n_sequences) return n_sequences * heads;
    const double share = (target - cost[s]) / (cost[s + 1] - cost[s]);
    return s * heads + std::clamp<int64_t>(std::llround(share * heads), 0, heads);
}

void run(AttentionArgs a, int64_t n_sequences, int threads, bool backward) {
    const Sequences sequences = check_offsets(a.offsets, n_sequences, a.n_tokens);
    if (a.n_tokens == 0 || a.heads == 0 || a.dim == 0) return;
    a.longest = sequences.longest;

    nb::gil_scoped_release release;
    const KernelTable& table = *g_table;
    const int n = int(std::clamp<int64_t>(threads, 1, n_sequences * a.heads));
    const size_t each = padded(table.attention_scratch(a.longest, a.dim, backward));
    float* scratch = t_scratch.reserve(n * each);
    parallel(n, [&](int i) {
        const auto kernel = backward ? table.attention_backward : table.attention;
        kernel(a, first_pair(sequences, a.heads, i, n), first_pair(sequences, a.heads, i + 1, n), scratch + i * each);
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
