"""Tensors of which every rank holds some rows: what ``fully_shard`` (PyTorch's FSDP2) makes of parameters.

A tensor that is not shared out is its own whole and its own part, so that callers need not ask.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from regrow.ranks import rank


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are shared out."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All rows; all ranks must call this together.

    >>> import torch
    >>> whole(torch.tensor([1, 2]))
    tensor([1, 2])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This rank's rows, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Where in :func:`own` those of the given rows are that this rank holds.

    >>> import torch
    >>> own_rows(torch.zeros(4, 2), torch.tensor([3, 0]))
    tensor([3, 0])
    """
    if not isinstance(tensor, DTensor):
        return rows
    each = -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk cuts
    rows = rows - tensor.device_mesh.get_local_rank() * each
    return rows[(rows >= 0) & (rows < tensor.to_local().shape[0])]


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, which is the same on all ranks, cut as ``like`` is if that has as many rows."""
    if not isinstance(like, DTensor) or tensor.shape[:1] != like.shape[:1]:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole_on_first(tensor: Tensor) -> Tensor:
    """All rows on rank 0, none elsewhere; all ranks must call this together."""
    if not isinstance(tensor, DTensor):
        return tensor
    rows = tensor.full_tensor()
    return rows if rank() == 0 else rows.new_empty(0)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` as :func:`whole_on_first` makes each tensor; what is tied stays tied."""
    state = model.state_dict()  # first: it lets go of rows that a forward pass has collected
    named = dict(model.named_parameters(remove_duplicate=False))
    wholes = {id(parameter): whole_on_first(parameter.detach()) for parameter in model.parameters()}
    return {name: wholes[id(named[name])] if name in named else tensor for name, tensor in state.items()}
