"""How an operation becomes a torch operator with a gradient."""

from typing import Any

import torch
from torch import Tensor

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
"""Inside an operator nothing is cast: a kernel is handed addresses, and its result has the dtype that was promised."""


def register_operator(name: str, forward: Any, fake: Any, gradient: Any, setup: Any) -> None:
    """Implement the operator ``regrow::name``, whose schema is defined already.

    Args:
        forward: computes it, on tensors that need no gradient.
        fake: the empty tensors it would return.
        gradient, setup: ``backward`` and ``setup_context`` of a :class:`torch.autograd.Function`.
    """
    op = getattr(torch.ops.regrow, name).default

    def without_gradient(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*args)

    # What torch.library.register_autograd makes too, but that reads the schema anew at every call, which takes longer
    # than all the checks above.
    class Function(torch.autograd.Function):
        backward = staticmethod(gradient)

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = without_gradient(*args)
            setup(ctx, args, output)
            return output

    def with_gradient(*args: Any) -> Any:
        needed = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        return Function.apply(*args) if needed else without_gradient(*args)

    torch.library.impl(f"regrow::{name}", "CompositeExplicitAutograd")(forward)
    torch.library.impl(f"regrow::{name}", "Autograd")(with_gradient)
    torch.library.register_fake(f"regrow::{name}")(fake)
