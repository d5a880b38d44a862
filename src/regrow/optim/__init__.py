"""Optimization under sparsity: learning-rate rules, parameter groups, state of re-allocated blocks."""

from regrow.optim.group_lasso import group_lasso_
from regrow.optim.groups import parameter_groups
from regrow.optim.lr_rules import dense_learning_rate, sparse_learning_rate
from regrow.optim.state import reset_slots_

__all__ = ["dense_learning_rate", "group_lasso_", "parameter_groups", "reset_slots_", "sparse_learning_rate"]
