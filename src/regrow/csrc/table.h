// What an instruction set offers to the rest of the module: a table of plain function pointers.
// Only plain data crosses this line, so no inline function can be merged between files built with
// different -m flags.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct WeightArgs {
    const float* values;    // [n_blocks, b, b], row slot[p] is the block at position p
    const int32_t* row_ptr; // [rows + 1]
    const int32_t* col_idx; // [n_blocks]
    const int32_t* slot;    // [n_blocks]
    int64_t rows;
    int block;
};

struct SpmmArgs {
    const float* x;         // [n_tokens, in]
    const float* scale;     // multiplies x, element by element; or null
    const float* packed;    // weights, packed by pack_rows or pack_columns
    const float* bias;      // [out] or null
    float* y;               // [n_tokens, out]
    float* slope;           // [n_tokens, out] the derivative of the activation; or null
    const int32_t* ptr;     // [out_blocks + 1]
    const int32_t* idx;     // [n_blocks] input block of each block
    int64_t in_blocks, out_blocks;
    int block;
    bool gelu;              // the activation, or none
};

struct GatheredArgs {       // dx = g W, of blocks of 16 outputs and one input
    const float* g;         // [n_tokens, rows*16]
    const float* scale;     // multiplies g, element by element; or null
    const float* packed;    // [n_blocks, 16] in the order of positions
    float* dx;              // [n_tokens, cols]
    const int32_t* ptr;     // [rows + 1]
    const int32_t* idx;     // [n_blocks] column of each block
    const int32_t* parts;   // [n_parts + 1] ranges of block rows; sums are put aside between them
    int64_t rows, cols, n_parts;
};

struct SddmmArgs {          // a range of R block rows of a weight
    const float* g;         // [n_tokens, R*b], rows g_width apart
    const float* scale;     // multiplies g, element by element; or null
    const float* x;         // [n_tokens, C*b]
    const int32_t* ptr;     // [R + 1], from the range's first position on
    const int32_t* idx;     // [n_blocks] of the whole weight
    int64_t rows, cols;     // R, C
    int64_t g_width;
    int block;
};

struct PackedWeight {       // rows of blocks: of W, packed by pack_rows, or of its transpose, by pack_columns
    const float* packed;    // or null, where only the places of the blocks matter
    const int32_t* ptr;     // [rows + 1]
    const int32_t* idx;     // [n_blocks], ascending in a row
};

// A tile of tokens goes through both weights slab by slab, a slab being so many of the hidden blocks.
struct FfnPlan {
    int64_t tile, slab;     // tokens; hidden blocks
    size_t scratch;         // floats of 64-byte aligned scratch that one thread needs
};

struct FfnArgs {            // y = gelu(x W1^T + bias1) W2^T + bias2
    int64_t in_blocks, hidden_blocks, out_blocks;
    int block;
    FfnPlan plan;
    const float* x;         // [n_tokens, in]
    PackedWeight first;     // W1
    const float* bias1;     // [hidden] or null
    PackedWeight second;    // W2
    const int32_t* second_cuts;  // [slabs + 1, out_blocks]: where the blocks of a row of W2 enter each slab
    // Forward only.
    const float* bias2;     // [out] or null
    float* y;               // [n_tokens, out]
    // Backward only. What is null is not wanted.
    const float* g;         // [n_tokens, out]
    PackedWeight first_t, second_t;  // by columns: dx = dh W1, df = g W2
    const int32_t* first_t_cuts;     // [slabs + 1, in_blocks]
    float* dx;              // [n_tokens, in]
};

struct LayerSums {          // of two weights, of one thread, zero at first, blocks in CSR order with room for 64 floats after the end
    float *dvalues1, *dbias1, *dvalues2, *dbias2;  // what is null is not wanted
};

struct AdamwArgs {
    float *values, *mean, *square;  // [n_blocks, elements]
    const float* grad;              // [n_blocks, elements]
    const float *size, *root;       // [n_blocks] step size; 1 / sqrt(1 - beta2^t)
    int64_t elements;
    float beta1, beta2, keep, eps;  // keep = 1 - lr * weight_decay
};

struct LossArgs {
    float* logits;           // [rows, classes]
    const float* bias;       // [classes] added to them first, or null
    const int64_t* targets;  // [rows]
    float* losses;           // [rows]
    int64_t classes;
    float scale;             // of the gradient; 0 for none
};

struct DropArgs {
    const float* x;         // [rows, width]
    float* y;               // [rows, width]
    int64_t width;
    uint64_t seed;
    uint32_t threshold;     // out of 65536, how many elements are dropped
};

struct NormArgs {           // y = LayerNorm(h), h = residual + dropout(x)
    const float* x;         // [rows, width]
    const float* residual;  // [rows, width] or null
    const float *weight, *bias; // [width]
    float* y;               // [rows, width]
    float *mean, *rstd;     // [rows] of h: mean; 1 / standard deviation
    int64_t width;
    float eps;
    uint64_t seed;
    uint32_t threshold;
};

struct NormGradArgs {
    const float *g, *x;     // [rows, width] gradient of y; see NormArgs for the rest
    const float *residual, *weight, *mean, *rstd;
    float *dx, *dh;         // [rows, width] or null
    int64_t width;
    int64_t thread_rows;    // how many a thread works on, in several calls
    uint64_t seed;
    uint32_t threshold;
};

struct AttentionArgs {       // tokens [offsets[s], offsets[s + 1]) are sequence s
    const float* qkv;        // [n_tokens, 3 * heads * dim]: a token's queries, keys and values, each by heads
    const int32_t* offsets;  // [sequences + 1]
    int64_t n_tokens, heads, dim;
    int64_t longest;         // the length of the longest sequence
    float scale;             // of the scores
    float* out;              // [n_tokens, heads * dim]; the gradient reads it
    float* lse;              // [heads, n_tokens] log-sum-exp of a query's scores; the gradient reads it
    const float* g;          // of the gradient: that of out
    float* dqkv;             // of the gradient: that of qkv
    uint64_t seed;           // of dropout: the mask's rows are those of lse, its columns keys
    uint32_t threshold;      // out of 65536, how many probabilities are dropped
};

struct SparseAttentionArgs {  // y = attention(x W1^T + bias1) W2^T + bias2; AttentionArgs has the words
    const int32_t* offsets;
    int64_t n_tokens, heads, dim, longest;  // block divides dim, and 16 does
    int64_t in_blocks, out_blocks;
    int block;
    float scale;
    uint64_t seed;
    uint32_t threshold;
    const float* x;           // [n_tokens, in]
    PackedWeight first;       // W1 [3 * heads * dim, in]
    const float* bias1;       // [3 * heads * dim] or null
    PackedWeight second;      // W2 [out, heads * dim]
    float* lse;               // [heads, n_tokens]; the gradient reads it
    float* attended;          // [n_tokens, heads * dim], what goes into W2; the gradient reads it
    // Forward only.
    const float* bias2;       // [out] or null
    float* y;                 // [n_tokens, out]
    // Backward only. What is null is not wanted.
    const float* g;           // [n_tokens, out]
    PackedWeight first_t, second_t;  // by columns
    float* dx;                // [n_tokens, in]
};

struct EncoderNorm {
    const float *weight, *bias;  // [width]
    float eps;
};

struct EmbedArgs {          // y = LayerNorm(word[ids] + (place[positions] + kind[types]))
    const int64_t *ids, *positions, *types;  // [n_tokens]; no positions: t % length; no types: 0
    const float *word, *place, *kind;        // rows of `width`
    EncoderNorm norm;
    float* y;               // [n_tokens, width]
    int64_t width, length;
};

struct EncoderLayer {       // all widths but the hidden one are heads * dim
    int block;
    int64_t hidden_blocks;
    FfnPlan plan;
    PackedWeight qkv, out, first, second;  // qkv [3 * width, width]: queries, keys and values, each by heads
    const float *qkv_bias, *out_bias, *first_bias, *second_bias;  // or null
    const int32_t* second_cuts;            // see FfnArgs
    EncoderNorm norm1, norm2;
};

struct EncoderArgs {        // y = LayerNorm1(x + attention half), x = LayerNorm2(y + feed-forward half)
    const int32_t* offsets; // tokens [offsets[s], offsets[s + 1]) are sequence s
    int64_t n_tokens, longest, heads, dim;  // block divides dim, and 16 does
    float scale;            // of the scores
    const EncoderLayer* layer;
    float* x;               // [n_tokens, width], in place
    float* attended;        // [n_tokens, width]
    float *sums, *hidden;   // panels of all tokens, where they are few
};

struct GatherArgs {         // lists of rows of a table: positions [ptr[r], ptr[r + 1]) are those of row r
    const float* table;     // rows `stride` apart
    const float* copied;    // the table as gather_copy leaves it; or null
    int64_t table_rows, stride, width;  // width: columns that take part
    const int32_t* idx;     // which row of the table
    int64_t rows;           // lists
    const int32_t* cuts;    // [slabs + 1, rows]: where a list enters each slab of the table's rows
    int64_t slabs;
    // Sums: out[r] = start + sum of weights[p] * table[idx[p]].
    const float* weights;
    const float* start;     // [width] or null
    float* out;             // [rows, width], rows out_stride apart
    int64_t out_stride;
    // Products: dots[p] = lead[r] . table[idx[p]].
    const float* lead;      // rows lead_stride apart
    int64_t lead_stride;
    float* dots;
};

struct TopArgs {            // the `keep` columns of a row with the greatest |x| * norm
    const float* x;         // [rows, width]
    const float* norms;     // [width] or null
    int64_t width, keep;
    int32_t* idx;           // [rows, keep] ascending in a row
    float* numbers;         // [rows, keep] x there
};

struct SparkArgs {          // units above a threshold of their token: mean + quantile * deviation
    const float* z;         // [n_tokens, hidden]
    int64_t hidden;
    float quantile;
    float *mean, *deviation;  // [n_tokens] of z
    float* limit;           // [n_tokens] the threshold
    int32_t* counts;        // [n_tokens]
    const int32_t* ptr;     // [n_tokens + 1] of the lists
    int32_t* idx;           // units
    float* over;            // z less the threshold
};

struct SparkGradArgs {      // of h = gelu(over) * up
    const int32_t* ptr;
    const float *over, *up, *dh;
    float *h, *dup, *dover;
    float* total;           // [n_tokens] sum of dover
};

constexpr int64_t kFewTokens = 64;
// What the threads do between waiting for each other: a layer is kAttend and kTiles, or of few tokens all the others.
// Items are pairs of a sequence and a head (kAttend), units of tokens (kTiles), block rows of the weight (k...Rows), groups of
// tokens (k...Norm).
enum EncoderPhase { kAttend, kTiles, kOutRows, kOutNorm, kHiddenRows, kSecondRows, kSecondNorm };
struct EncoderSizes {
    bool few;
    int64_t units, groups;      // items of kTiles and of k...Norm
    size_t own, sums, hidden;   // floats: scratch of a thread; shared panels
};

struct KernelTable {
    const char* name;
    // Floats of 64-byte aligned scratch that one thread needs.
    size_t (*spmm_scratch)(int block, int64_t in_blocks, int64_t out_blocks, int64_t n_blocks);
    size_t (*sddmm_scratch)(int block, int64_t rows, int64_t cols, int64_t n_blocks);
    // The blocks at positions [p0, p1), packed for y = x W^T: each in its place.
    void (*pack_rows)(const WeightArgs&, int64_t p0, int64_t p1, float* packed);
    // The same for dx = g W: a block of column c goes to place next[c]++, and its row to row_idx there.
    void (*pack_columns)(const WeightArgs&, int64_t p0, int64_t p1, int32_t* next, int32_t* row_idx, float* packed);
    // Tokens [t0, t1).
    void (*spmm)(const SpmmArgs&, int64_t t0, int64_t t1, float* scratch);
    // Adds the tokens [t0, t1) to acc [blocks of the range, b, b] (CSR order, room for 64 floats after the end), and
    // their g to g_sum [R*b] unless that is null.
    void (*sddmm)(const SddmmArgs&, int64_t t0, int64_t t1, float* scratch, float* acc, float* g_sum);
    // Gathered blocks, of 16 outputs and one input. Forward takes blocks in the order of positions and as wide as they are.
    size_t (*gathered_scratch)(int64_t cols);
    size_t (*gathered_t_scratch)(int64_t cols);
    size_t (*gathered_sddmm_scratch)(int block, int64_t rows, int64_t cols, int64_t n_blocks);
    void (*gathered)(const SpmmArgs&, int64_t t0, int64_t t1, float* scratch);
    void (*gathered_t)(const GatheredArgs&, int64_t t0, int64_t t1, float* scratch);
    void (*gathered_sddmm)(const SddmmArgs&, int64_t t0, int64_t t1, float* scratch, float* acc, float* g_sum);
    // dvalues[slot[p]] = sum over the accumulators in order, p < n_blocks, of blocks of `numbers`.
    void (*reduce)(int64_t numbers, const float* acc, size_t acc_stride, int n_acc, const int32_t* slot, int64_t n_blocks,
                   float* dvalues);
    FfnPlan (*ffn_plan)(int block, int64_t in_blocks, int64_t hidden_blocks, int64_t out_blocks, bool backward);
    // Tokens [t0, t1).
    void (*ffn)(const FfnArgs&, int64_t t0, int64_t t1, float* scratch);
    void (*ffn_backward)(const FfnArgs&, int64_t t0, int64_t t1, float* scratch, const LayerSums&);
    // Rows [r0, r1), of the table or of lists.
    void (*gather_copy)(const GatherArgs&, int64_t r0, int64_t r1, float* to);
    void (*gather_sum)(const GatherArgs&, int64_t r0, int64_t r1);
    void (*gather_dot)(const GatherArgs&, int64_t r0, int64_t r1);
    // `scratch` holds a row, rounded up to 16 floats.
    void (*top_columns)(const TopArgs&, int64_t r0, int64_t r1, float* scratch);
    // Tokens [t0, t1); positions [p0, p1) of all lists.
    void (*spark_thresholds)(const SparkArgs&, int64_t t0, int64_t t1);
    void (*spark_select)(const SparkArgs&, int64_t t0, int64_t t1);
    void (*spark_hidden)(const float* over, const float* up, int64_t p0, int64_t p1, float* h);
    void (*spark_slopes)(const SparkGradArgs&, int64_t t0, int64_t t1);
    // Blocks [b0, b1).
    void (*adamw)(const AdamwArgs&, int64_t b0, int64_t b1);
    // Rows [r0, r1); the gradient's sum is added to `sum` [classes].
    void (*cross_entropy)(const LossArgs&, int64_t r0, int64_t r1, float* sum);
    // Rows [r0, r1); scratch holds two rows, each rounded up to 128 floats.
    void (*dropout)(const DropArgs&, int64_t r0, int64_t r1);
    void (*norm)(const NormArgs&, int64_t r0, int64_t r1, float* scratch);
    // Adds the rows' gradients of weight and bias to dweight and dbias, also rounded up to 128 floats.
    void (*norm_backward)(const NormGradArgs&, int64_t r0, int64_t r1, float* scratch, float* dweight, float* dbias);
    size_t (*attention_scratch)(int64_t longest, int64_t dim, bool backward);
    // Pairs [i0, i1) of a sequence and a head, the heads of a sequence one after the other.
    void (*attention)(const AttentionArgs&, int64_t i0, int64_t i1, float* scratch);
    void (*attention_backward)(const AttentionArgs&, int64_t i0, int64_t i1, float* scratch);
    size_t (*sparse_attention_scratch)(const SparseAttentionArgs&, bool backward);
    // Sequences [s0, s1).
    void (*sparse_attention)(const SparseAttentionArgs&, int64_t s0, int64_t s1, float* scratch);
    void (*sparse_attention_backward)(const SparseAttentionArgs&, int64_t s0, int64_t s1, float* scratch,
                                      const LayerSums&);
    // Tokens [t0, t1); scratch holds one row, rounded up to 128 floats.
    void (*embed)(const EmbedArgs&, int64_t t0, int64_t t1, float* scratch);
    EncoderSizes (*encoder_sizes)(const EncoderArgs&);
    void (*encoder_phase)(const EncoderArgs&, EncoderPhase, int64_t begin, int64_t end, float* scratch);
};

extern const KernelTable kGenericTable;
#ifdef REGROW_X86
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
#endif
