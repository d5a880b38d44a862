"""What is wrong with an update, raised at once on a CPU and without waiting for any other device.

To ask a GPU whether an update is valid is to wait for it. So there a fault is noted on the device and sent to the host
in the background, which raises it at the next update, or whenever it waits for the device anyway. Until then nothing is
out of bounds: indices are cut to their range before they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.errors import RegrowError


class Faults:
    """Conditions that must not hold, checked where they are computed.

    Example:
        >>> Faults().check(torch.tensor(True), "rows must lie in [0, 2)", torch.tensor([0, 7]))
        Traceback (most recent call last):
        regrow.errors.RegrowError: rows must lie in [0, 2), found 0 to 7
    """

    def __init__(self) -> None:
        self._noted: dict[str, Tensor] = {}
        """By message, whether it ever held: bool [] on the device."""
        self._host: Tensor | None = None
        """The same in the same order as far as the host knows; pinned."""

    def check(self, wrong: Tensor, message: str, found: Tensor | None = None, *, wait: bool = False) -> None:
        """Raise :class:`RegrowError` if ``wrong``, bool []; without ``wait`` only note it if that is not on a CPU.

        Args:
            found: the message ends with their range, where it is raised at once.
        """
        if not wait and not costs_nothing(wrong.device):
            self._noted[message] = self._noted[message] | wrong if message in self._noted else wrong
        elif wrong:
            raise RegrowError(message + ("" if found is None else f", found {int(found.min())} to {int(found.max())}"))

    def send(self) -> None:
        """Begin to copy what is noted to the host, which does not wait."""
        if not self._noted:
            return
        noted = torch.stack(list(self._noted.values()))
        if self._host is None or self._host.shape != noted.shape:
            self._host = torch.zeros(noted.shape, dtype=torch.bool, pin_memory=noted.is_cuda)
        self._host.copy_(noted, non_blocking=True)  # read too early it says nothing, and the fault is raised later

    def tell(self, *, wait: bool, where: str = "") -> None:
        """Raise :class:`RegrowError` if a fault was noted; without ``wait``, if the host knows of it by now.

        Args:
            where: the layer, for the message.
        """
        known = torch.stack(list(self._noted.values())).cpu() if wait and self._noted else self._host
        for message, wrong in zip(self._noted, [] if known is None else known.tolist(), strict=False):
            if wrong:
                raise RegrowError(f"{where and where + ': '}{message}; so it was in an earlier topology update")


def costs_nothing(device: torch.device) -> bool:
    """Whether to read a tensor there is not to wait for anything."""
    return device.type == "cpu"
