// An encoder whose weights are checked and packed once, and then only used (encoder.h). It owns what it packed, so
// nothing that changes later, not even the tensors it was made of, can send a kernel out of bounds.
#include <cmath>
#include <memory>

#include "sequences.h"
#include "weights.h"

namespace {

constexpr int64_t kProducts = 128;  // a token's products take about as long as its scores with so many keys

// A packed weight, or several over each other: blocks in the order of rows.
class OwnWeight {
  public:
    void add(const Weight& w, const KernelTable& table) {
        const size_t block = size_t(w.args.block) * w.args.block, before = idx_.size();
        if ((before + w.n_blocks) * block > size_) grow((before + w.n_blocks) * block, before * block);
        table.pack_rows(w.args, 0, w.n_blocks, packed_.get() + before * block);
        idx_.insert(idx_.end(), w.args.col_idx, w.args.col_idx + w.n_blocks);
        if (ptr_.empty()) ptr_.push_back(0);
        for (int64_t r = 1; r <= w.args.rows; ++r) ptr_.push_back(int32_t(before + w.args.row_ptr[r]));
    }
    PackedWeight places() const { return {packed_.get(), ptr_.data(), idx_.data()}; }
    size_t bytes() const { return size_ * sizeof(float) + (ptr_.size() + idx_.size()) * sizeof(int32_t); }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    void grow(size_t floats, size_t used) {
        const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
        std::unique_ptr<float[], Free> larger(static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
        if (!larger) throw std::bad_alloc();
        if (used) std::memcpy(larger.get(), packed_.get(), used * sizeof(float));
        packed_ = std::move(larger);
        size_ = floats;
    }
    std::unique_ptr<float[], Free> packed_;
    size_t size_ = 0;
    std::vector<int32_t> ptr_, idx_;
};

struct OwnLayer {
    OwnWeight qkv, out, first, second;
    std::vector<float> qkv_bias, out_bias, first_bias, second_bias, norms;  // both norms' weight and bias
    std::vector<int32_t> cuts;
    EncoderLayer view{};
};

class Encoder {
  public:
    Encoder(int64_t heads, int64_t dim) : table_(g_table), heads_(heads), dim_(dim) {}
    Encoder(const Encoder&) = delete;

    // The arrays are query's, key's, value's, output's and both feed-forward weights', five each; then norms [4, width].
    void add_layer(const std::vector<Address>& arrays, const std::vector<int64_t>& n_blocks, Address norms, float eps1,
                   float eps2, int64_t hidden, int b) {
        const int64_t width = heads_ * dim_, blocks = width / b, hidden_blocks = hidden / b;
        auto layer = std::make_unique<OwnLayer>();
        const auto weight = [&](int i, const char* which, int64_t rows, int64_t cols) {
            return Weight(which, arrays[5 * i], arrays[5 * i + 2], arrays[5 * i + 3], arrays[5 * i + 4], rows, cols,
                          n_blocks[i], b);
        };
        const auto bias = [&](int i, int64_t size, std::vector<float>& to) {
            const float* from = at<const float>(arrays[5 * i + 1]);
            if (from) to.insert(to.end(), from, from + size);
            else to.insert(to.end(), size, 0.0f);
        };
        const char* names[] = {" of query", " of key", " of value"};
        for (int i = 0; i < 3; ++i) {
            layer->qkv.add(weight(i, names[i], blocks, blocks), *table_);
            bias(i, width, layer->qkv_bias);
        }
        layer->out.add(weight(3, " of the output", blocks, blocks), *table_);
        layer->first.add(weight(4, " of the first feed-forward layer", hidden_blocks, blocks), *table_);
        const Weight second = weight(5, " of the second feed-forward layer", blocks, hidden_blocks);
        check_order(second.args, " of the second feed-forward layer");
        layer->second.add(second, *table_);
        bias(3, width, layer->out_bias);
        bias(4, hidden, layer->first_bias);
        bias(5, width, layer->second_bias);
        layer->norms.assign(at<const float>(norms), at<const float>(norms) + 4 * width);

        EncoderLayer& v = layer->view;
        v.block = b, v.hidden_blocks = hidden_blocks;
        v.plan = table_->ffn_plan(b, blocks, hidden_blocks, blocks, false);
        v.qkv = layer->qkv.places(), v.out = layer->out.places();
        v.first = layer->first.places(), v.second = layer->second.places();
        v.qkv_bias = layer->qkv_bias.data(), v.out_bias = layer->out_bias.data();
        v.first_bias = layer->first_bias.data(), v.second_bias = layer->second_bias.data();
        layer->cuts.resize(slab_cuts(v.second, blocks, v.plan.slab, hidden_blocks, nullptr));
        slab_cuts(v.second, blocks, v.plan.slab, hidden_blocks, layer->cuts.data());
        v.second_cuts = layer->cuts.data();
        const float* n = layer->norms.data();
        v.norm1 = {n, n + width, eps1}, v.norm2 = {n + 2 * width, n + 3 * width, eps2};
        layers_.push_back(std::move(layer));
    }

    size_t bytes() const {
        size_t sum = 0;
        for (const auto& l : layers_) sum += l->qkv.bytes() + l->out.bytes() + l->first.bytes() + l->second.bytes();
        return sum;
    }

    // All layers, on x [n_tokens, width] in place.
    void run(Address x, Address offsets, int64_t n_tokens, int64_t n_sequences, int threads) const {
        const Sequences sequences = check_offsets(at<const int32_t>(offsets), n_sequences, n_tokens, kProducts);
        if (n_tokens == 0 || layers_.empty()) return;
        nb::gil_scoped_release release;
        EncoderArgs a{};
        a.offsets = at<const int32_t>(offsets), a.n_tokens = n_tokens, a.longest = sequences.longest;
        a.heads = heads_, a.dim = dim_, a.scale = float(1 / std::sqrt(double(dim_)));
        a.x = at<float>(x);
        EncoderSizes most{};
        for (const auto& layer : layers_) {
            a.layer = &layer->view;
            const EncoderSizes sizes = table_->encoder_sizes(a);
            most.few = sizes.few;
            most.own = std::max(most.own, sizes.own), most.sums = std::max(most.sums, sizes.sums);
            most.hidden = std::max(most.hidden, sizes.hidden);
        }
        const int n = int(std::clamp<int64_t>(threads, 1, n_tokens * heads_));
        const size_t each = padded(most.own);
        float* own = nullptr;
        const auto prepare = [&](float* memory) {
            Layout layout(memory);
            a.attended = layout.take(n_tokens * heads_ * dim_);
            a.sums = layout.take(most.sums), a.hidden = layout.take(most.hidden);
            own = layout.take(n * each);
            if (own) fence_each(own, n, most.own, each);
            return layout.size();
        };
        prepare(t_scratch.reserve(prepare(nullptr)));
        for (const auto& layer : layers_) {
            a.layer = &layer->view;
            const int64_t blocks = heads_ * dim_ / layer->view.block;
            const EncoderSizes sizes = table_->encoder_sizes(a);
            parallel(n, [&](int i) {
                table_->encoder_phase(a, kAttend, first_item(sequences, heads_, i, n),
                                      first_item(sequences, heads_, i + 1, n), own + i * each);
            });
            const auto phase = [&](EncoderPhase which, int64_t items) {
                parallel(n, [&](int i) {
                    table_->encoder_phase(a, which, cut(items, i, n), cut(items, i + 1, n), own + i * each);
                });
            };
            if (!most.few) {
                phase(kTiles, sizes.units);
                continue;
            }
            phase(kOutRows, blocks);
            phase(kOutNorm, sizes.groups);
            phase(kHiddenRows, layer->view.hidden_blocks);
            phase(kSecondRows, blocks);
            phase(kSecondNorm, sizes.groups);
        }
    }

  private:
    const KernelTable* table_;  // it packed the weights, each in its own way
    int64_t heads_, dim_;
    std::vector<std::unique_ptr<OwnLayer>> layers_;
};

void check_rows(const int64_t* rows, const char* name, int64_t n, int64_t limit) {
    for (int64_t i = 0; rows && i < n; ++i) {
        if (rows[i] < 0 || rows[i] >= limit) {
            fail(std::string(name) + " holds " + std::to_string(rows[i]) + ", outside [0, " + std::to_string(limit) +
                 ")");
        }
    }
}

void embed(Address ids, Address positions, Address types, Address word, Address place, Address kind, Address weight,
           Address bias, Address y, int64_t n_tokens, int64_t length, int64_t n_words, int64_t n_places,
           int64_t n_kinds, int64_t width, float eps, int threads) {
    const EmbedArgs a{at<const int64_t>(ids), at<const int64_t>(positions), at<const int64_t>(types),
                      at<const float>(word), at<const float>(place), at<const float>(kind),
                      {at<const float>(weight), at<const float>(bias), eps}, at<float>(y), width, length};
    check_rows(a.ids, "input_ids", n_tokens, n_words);
    check_rows(a.positions, "positions", n_tokens, n_places);
    check_rows(a.types, "token_type_ids", n_tokens, n_kinds);
    if (!positions && n_tokens && length > n_places) {
        fail("a sequence has " + std::to_string(length) + " tokens; the model has " + std::to_string(n_places) +
             " positions");
    }
    nb::gil_scoped_release release;
    constexpr int64_t kAlone = 1 << 15;  // so many numbers take less time than threads to start
    const int n = n_tokens * width < kAlone ? 1 : int(std::clamp<int64_t>(threads, 1, n_tokens));
    const size_t own = size_t(width + 127) / 128 * 128, each = padded(own);
    float* scratch = t_scratch.reserve(n * each);
    fence_each(scratch, n, own, each);
    parallel(n, [&](int i) { g_table->embed(a, cut(n_tokens, i, n), cut(n_tokens, i + 1, n), scratch + i * each); });
}

}  // namespace

void bind_encoder(nb::module_& m) {
    m.def("embed", &embed, "ids"_a, "positions"_a, "types"_a, "word"_a, "place"_a, "kind"_a, "weight"_a, "bias"_a, "y"_a,
          "n_tokens"_a, "length"_a, "n_words"_a, "n_places"_a, "n_kinds"_a, "width"_a, "eps"_a, "threads"_a);
    nb::class_<Encoder>(m, "Encoder")
        .def(nb::init<int64_t, int64_t>(), "heads"_a, "dim"_a)
        .def("add_layer", &Encoder::add_layer, "arrays"_a, "n_blocks"_a, "norms"_a, "eps1"_a, "eps2"_a, "hidden"_a,
             "block"_a)
        .def("bytes", &Encoder::bytes)
        .def("run", &Encoder::run, "x"_a, "offsets"_a, "n_tokens"_a, "n_sequences"_a, "threads"_a);
}
