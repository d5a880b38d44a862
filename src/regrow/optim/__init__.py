"""Optimization under sparsity: AdamW, learning-rate rules, parameter groups, state of re-allocated blocks."""

from regrow.optim.adamw import AdamW
from regrow.optim.group_lasso import group_lasso_
from regrow.optim.groups import parameter_groups
from regrow.optim.lr_rules import dense_learning_rate, sparse_learning_rate, supar_init_factor
from regrow.optim.state import check_optimizer, reset_slots_, resize_slots_

__all__ = [
    "AdamW",
    "check_optimizer",
    "dense_learning_rate",
    "group_lasso_",
    "parameter_groups",
    "reset_slots_",
    "resize_slots_",
    "sparse_learning_rate",
    "supar_init_factor",
]
