"""Weights, gradients and optimizer state shared out over the ranks: PyTorch's ``fully_shard`` (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from regrow.errors import RegrowError
from regrow.ranks import world_size
from regrow.shards import is_sharded, own


def shard(model: nn.Module, optimizer: Optimizer, units: Iterable[nn.Module]) -> None:
    """Leave every rank its rows of each parameter, and the optimizer only those to step.

    A unit's parameters are collected when it computes, and let go of afterwards; those of no unit stay for the whole
    forward and backward pass. Of a sparse layer the rows are blocks; indices stay whole on every rank. It must be done
    before the optimizer has made a step and before a :class:`~regrow.TopologyUpdater` is built; once is enough.

    Raises:
        RegrowError: there is but one process, or the optimizer has state already.

    Reference: Zhao et al. 2023, arXiv 2304.11277.
    """
    if is_sharded(model):
        return
    if world_size() == 1:
        raise RegrowError("one process alone has nobody to share parameters with; start several with torchrun")
    if optimizer.state:
        raise RegrowError("the optimizer has state already; shard a model before its first step")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for module in [*units, model]:
        fully_shard(module, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]
    model._is_accelerate_prepared = True  # type: ignore[assignment]  # accelerate would wrap it in DDP


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of parameters that this rank holds between steps.

    >>> parameter_bytes(nn.Linear(3, 2))
    32
    """
    return sum(own(p).numel() * p.element_size() for p in module.parameters())
