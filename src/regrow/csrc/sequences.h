// The bounds of packed sequences, checked, and how they are shared out to threads.
#pragma once
#include <cmath>

#include "runtime.h"

struct Sequences {
    int64_t longest = 0;
    std::vector<int64_t> cost{0};  // of all sequences before each
};

// A token costs so many keys' scores, beside the scores of its own sequence.
inline Sequences check_offsets(const int32_t* offsets, int64_t n_sequences, int64_t n_tokens, int64_t keys_a_token) {
    if (offsets[0] != 0) fail("offsets starts at " + std::to_string(offsets[0]) + ", not 0");
    Sequences sequences;
    for (int64_t s = 0; s < n_sequences; ++s) {
        const int64_t length = int64_t(offsets[s + 1]) - offsets[s];
        if (length < 0) fail("offsets decreases at position " + std::to_string(s + 1));
        sequences.longest = std::max(sequences.longest, length);
        sequences.cost.push_back(sequences.cost.back() + length * (length + keys_a_token));
    }
    if (offsets[n_sequences] != n_tokens) {
        fail("offsets ends at " + std::to_string(offsets[n_sequences]) + ", not at the number of tokens, " +
             std::to_string(n_tokens));
    }
    return sequences;
}

// The first item of part `part`, a sequence being `items` of them: they are computed independently of each other, so
// parts of about equal cost, whatever their number, give the same bits.
inline int64_t first_item(const Sequences& sequences, int64_t items, int part, int parts) {
    const std::vector<int64_t>& cost = sequences.cost;
    const int64_t n_sequences = int64_t(cost.size()) - 1;
    if (part == parts) return n_sequences * items;
    const double target = double(cost.back()) * part / parts;
    const int64_t s = std::upper_bound(cost.begin(), cost.end(), target) - cost.begin() - 1;
    if (s == n_sequences) return n_sequences * items;
    const double share = (target - cost[s]) / (cost[s + 1] - cost[s]);
    return s * items + std::clamp<int64_t>(std::llround(share * items), 0, items);
}
