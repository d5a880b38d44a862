"""Which parameters decay, and how fast each learns."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from regrow.errors import RegrowError
from regrow.nn import density_of, named_sparse_layers
from regrow.optim.lr_rules import LrRule, sparse_learning_rate

LrScope = Literal["sparse", "all"]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float | None = None,
    lr_rule: LrRule = "eq3",
    lr_scope: LrScope = "sparse",
    width_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """AdamW groups: matrices and blocks decay, biases and LayerNorm weights (vectors) do not.

    Args:
        model: with or without sparse layers.
        weight_decay: of matrices and blocks.
        lr: the dense optimum; without it the groups carry no learning rate and the optimizer's own is used.
        lr_rule, width_ratio: how a density raises it, see :func:`sparse_learning_rate`.
        lr_scope: ``"sparse"`` raises it for blocks only, layer by layer, which measured better (see
            docs/methods-compared.md); ``"all"`` for every parameter, by the density of all sparse layers together, as
            in the paper.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 3), 0.01)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.01), (1, 0.0)]
        >>> from regrow import BlockSparseLinear
        >>> layer = BlockSparseLinear(64, 64, block_size=16, density=0.25)
        >>> [(len(g["params"]), round(g["lr"], 4)) for g in parameter_groups(layer, 0.0, lr=1e-3, lr_scope="sparse")]
        [(1, 0.001), (1, 0.0038)]
    """
    if lr_scope not in ("sparse", "all"):
        raise RegrowError(f"lr_scope must be 'sparse' or 'all', got {lr_scope!r}")
    layers = [layer for _, layer in named_sparse_layers(model) if layer.values.requires_grad]
    blocks = {id(layer.values) for layer in layers}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() > 1 and id(p) not in blocks], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    by_density: dict[float, list[nn.Parameter]] = {}
    for layer in layers:
        by_density.setdefault(layer.density if lr_scope == "sparse" else density_of(layers), []).append(layer.values)
    for density, values in by_density.items():
        groups.append({"params": values, "weight_decay": weight_decay, "density": density})
    if lr is not None:
        for group in groups:
            density = group.get("density", 1.0 if lr_scope == "sparse" or not layers else density_of(layers))
            group["lr"] = sparse_learning_rate(lr, density, lr_rule if density < 1 else "none", width_ratio=width_ratio)
    return [group for group in groups if group["params"]]
