"""Another random pattern for the same weights: what a comparison of patterns varies, and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from regrow.nn import BlockSparseLinear, named_sparse_layers
from regrow.nn.init import initialise_
from regrow.topology import BlockTopology
from regrow.training.seeds import mix


@torch.no_grad()
def repattern_(model: nn.Module, *, pattern_seed: int, weight_seed: int) -> None:
    """Draw the pattern of every sparse layer anew, in place; each layer keeps its number of blocks.

    A position's block gets the values that ``weight_seed`` gives to that position, whatever the pattern: where two
    patterns overlap, the weights are equal. Only a block row is drawn at a time, so no dense weight exists.

    Example:
        >>> layers = [BlockSparseLinear(64, 64, block_size=16, density=0.5) for _ in range(2)]
        >>> for seed, layer in enumerate(layers):
        ...     repattern_(layer, pattern_seed=seed, weight_seed=7)
        >>> one, other = (layer.to_dense() for layer in layers)
        >>> both = (one != 0) & (other != 0)
        >>> bool(both.any()), torch.equal(one[both], other[both]), torch.equal(one, other)
        (True, True, False)
    """
    for name, layer in named_sparse_layers(model):
        old, device = layer.topology, layer.values.device
        generator = torch.Generator().manual_seed(mix(pattern_seed, 0, name))
        new = BlockTopology.random(old.n_block_rows, old.n_block_cols, old.n_blocks, generator)
        layer.topology = new.to(device)
        rows, cols = new.coordinates()
        for row in rows.unique().tolist():
            here = (rows == row).nonzero().flatten()
            layer.values.data[here.to(device)] = _row(layer, mix(weight_seed, row, name))[cols[here]].to(layer.values)


def _row(layer: BlockSparseLinear, seed: int) -> torch.Tensor:
    """``[C, b, b]``, all blocks that a block row could have."""
    blocks = torch.empty(layer.topology.n_block_cols, layer.block_size, layer.block_size)
    return initialise_(blocks, torch.Generator().manual_seed(seed))
