"""What ``DistributedDataParallel`` has to be told of layers whose pattern moves."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from regrow.nn import MaskedLinear
from regrow.nn.replace import dense_elements
from regrow.ranks import world_size
from regrow.topology import BlockTopology


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside; names of layers, from which updates draw, must not depend on a wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def keep_indices_local(model: nn.Module) -> None:
    """Have DDP leave indices and masks alone, which it would send from rank 0 before every forward pass.

    Every rank computes them itself. It must be called before the model is wrapped.
    """
    names = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, (BlockTopology, MaskedLinear))
        for buffer, _ in module.named_buffers(recurse=False)
    }
    names |= set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def gradient_bytes(module: nn.Module) -> tuple[int, int]:
    """Bytes of gradients that a rank exchanges in a step, and how many it would be if every sparse layer were dense.

    >>> from regrow import BlockSparseLinear
    >>> gradient_bytes(BlockSparseLinear(64, 64, block_size=16, density=0.25, bias=False))
    (4096, 16384)
    """
    sent = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    parameters = list(module.parameters())
    size = parameters[0].element_size() if parameters else 0
    return sent, sent + (dense_elements(module) - sum(p.numel() for p in parameters)) * size


class Wrapper:
    """The DDP wrapper around a model, if there is one; transformers hides it from callbacks.

    So it is looked for when it calls the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ddp: Any = model if isinstance(model, DistributedDataParallel) else None
        self._handle: RemovableHandle | None = None
        if self._ddp is None and world_size() > 1:
            self._handle = model.register_forward_pre_hook(self._look)

    def renew(self) -> None:
        """After parameters were replaced: exchange the gradients of the new ones.

        DDP makes its plan of who is exchanged with whom when it is built, and once more when it is unpickled; so it is
        taken through the latter, without the pickle.
        """
        ddp = self._ddp
        if ddp is None:  # whoever averages gradients without DDP sees the new parameters anyway
            return
        ddp._remove_autograd_hooks()
        hooks, ddp._comm_hooks = ddp._comm_hooks, []
        ignored = ddp.parameters_to_ignore
        ddp._module_parameters = [p for name, p in ddp.module.named_parameters() if name not in ignored]
        ddp.__setstate__(ddp.__getstate__())
        for hook, state in hooks:
            ddp.register_comm_hook(state, hook)

    def _look(self, *_: Any) -> None:
        self._ddp = DistributedDataParallel._get_active_ddp_module()
        if self._ddp is not None and self._handle is not None:
            self._handle.remove()
