"""Plain blocks: a linear layer becomes a :class:`~regrow.BlockSparseLinear`. Always sparse.

A. Dietrich, F. Gressmann, D. Orr, I. Chelombiev, D. Justus, C. Luschi, *Towards Structured Dynamic Sparse Pre-Training
of BERT*, 2021, https://arxiv.org/abs/2108.06277, section 2.

.. math:: y = S x + b

    >>> from torch import nn
    >>> from regrow import sparsify
    >>> type(sparsify(nn.Linear(32, 32), density=0.5, block_size=16, layer="blocks")).__name__
    'BlockSparseLinear'
"""

from __future__ import annotations

from dataclasses import dataclass

from regrow.nn.options.base import LayerOption, register_layer


@register_layer("blocks")
@dataclass(frozen=True)
class Blocks(LayerOption):
    """The non-zero blocks and nothing else."""

    paper = "Dietrich et al., Towards Structured Dynamic Sparse Pre-Training of BERT"
    year = 2021
    link = "https://arxiv.org/abs/2108.06277"
