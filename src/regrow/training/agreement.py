"""Every rank draws the same topology by itself; that they do is checked, not enforced."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.ranks import highest, world_size


def check_agreement(patterns: Mapping[str, Sequence[Tensor]], when: str) -> None:
    """Compare a digest of each layer's indices over all ranks: eight bytes a layer are exchanged.

    All ranks must call this together. A process alone agrees with itself.

    Args:
        patterns: the tensors that say where a layer's blocks are, by the layer's name, in the same order everywhere.
        when: for the message.

    Raises:
        RegrowError: on every rank, naming the first layer that is not the same on all of them.
    """
    if world_size() == 1:
        return
    digests = torch.tensor([digest(tensors) for tensors in patterns.values()], dtype=torch.int64)
    most, least = highest(torch.stack([digests, -digests]))
    for name, high, low in zip(patterns, most.tolist(), (-least).tolist(), strict=True):
        if high != low:
            raise RegrowError(
                f"{name}: the ranks do not have the same blocks {when}; build the model from one seed on all of them, "
                "average gradients before optimizer.step(), and let a method read only what is the same everywhere"
            )


def digest(tensors: Sequence[Tensor]) -> int:
    """63 bits that depend on every element.

    >>> digest([torch.tensor([1, 2])]) == digest([torch.tensor([1, 2])]) != digest([torch.tensor([2, 1])])
    True
    """
    state = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(state.digest(), "little") >> 1
