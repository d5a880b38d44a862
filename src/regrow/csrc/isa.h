// Every kernel, and the table of them. Included once per instruction set, by isa_*.cpp, which says which one it is.
#pragma once
#include "adamw.h"
#include "encoder.h"
#include "ffn.h"
#include "gathered.h"
#include "attention.h"
#include "gather.h"
#include "kernels.h"
#include "loss.h"
#include "norm.h"
#include "spark.h"
#include "sparse_attention.h"
#include "table.h"
#include "top.h"

// clang-format off
#define REGROW_TABLE(identifier, isa)      \
    extern const KernelTable identifier;   \
    const KernelTable identifier = {       \
        .name = isa,                       \
        .spmm_scratch = spmm_scratch_any,  \
        .sddmm_scratch = sddmm_scratch_any,\
        .pack_rows = pack_rows_any,        \
        .pack_columns = pack_columns_any,  \
        .spmm = spmm_any,                  \
        .sddmm = sddmm_any,                \
        .gathered_scratch = gathered_scratch,                   \
        .gathered_t_scratch = gathered_t_scratch,               \
        .gathered_sddmm_scratch = gathered_sddmm_scratch,       \
        .gathered = gathered,              \
        .gathered_t = gathered_t,          \
        .gathered_sddmm = gathered_sddmm,  \
        .reduce = reduce_any,              \
        .ffn_plan = ffn_plan_any,          \
        .ffn = ffn_any,                    \
        .ffn_backward = ffn_backward_any,  \
        .gather_copy = gather_copy,        \
        .gather_sum = gather_sum,          \
        .gather_dot = gather_dot,          \
        .top_columns = top_columns,        \
        .spark_thresholds = spark_thresholds,     \
        .spark_select = spark_select,      \
        .spark_hidden = spark_hidden,      \
        .spark_slopes = spark_slopes,      \
        .adamw = adamw,                    \
        .cross_entropy = cross_entropy,    \
        .dropout = dropout_any,            \
        .norm = norm_any,                  \
        .norm_backward = norm_backward_any,\
        .attention_scratch = attention_scratch,   \
        .attention = attention,            \
        .attention_backward = attention_backward, \
        .sparse_attention_scratch = sparse_attention_scratch,   \
        .sparse_attention = sparse_attention_any,               \
        .sparse_attention_backward = sparse_attention_backward_any, \
        .embed = embed_rows,                                    \
        .encoder_sizes = encoder_sizes_any,                     \
        .encoder_phase = encoder_phase_any,                     \
    }
// clang-format on
