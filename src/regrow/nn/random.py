"""Where the seeds of dropout come from."""

import torch


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
