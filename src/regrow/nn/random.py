"""Where the seeds of dropout come from."""

import torch

from regrow.kernels.dropout import dropout_threshold


def draw_seed() -> int:
    """A seed of 63 bits, by one draw from torch's default CPU generator.

    Whatever restores the state of that generator (a resumed run, gradient checkpointing) gets the same seeds again.

    >>> _ = torch.manual_seed(0)
    >>> first = draw_seed()
    >>> _ = torch.manual_seed(0)
    >>> first == draw_seed() != draw_seed()
    True
    """
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


def draw_dropout(p: float, training: bool) -> tuple[float, int]:
    """The share to drop and the seed of the mask; nothing is drawn where nothing is dropped.

    Raises:
        RegrowError: ``p`` is out of range.

    >>> draw_dropout(0.1, training=False)
    (0.0, 0)
    """
    dropout_threshold(p)
    return (p, draw_seed()) if training and p > 0 else (0.0, 0)
