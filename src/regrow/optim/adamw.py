"""AdamW whose blocks count their own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from regrow.errors import RegrowError
from regrow.kernels import cpu, gpu
from regrow.shards import own

BLOCK_STEP = "block_step"


class AdamW(torch.optim.AdamW):
    r"""``torch.optim.AdamW``, with the bias correction of every re-allocated block counted from its allocation.

    Adam divides its moments by ``1 - beta^t`` because they began at zero. A block that a topology update re-allocates
    at step ``T`` begins at zero too, but with the global ``t`` nothing corrects it: its second moment is too small
    for hundreds of steps, and its first update is :math:`(1 - \beta_1)/\sqrt{1 - \beta_2} = 3.16` times the learning
    rate at the usual betas. Here such a block has its own ``t`` from 1 on, so its first update is at most the
    learning rate, and

    .. math:: w \leftarrow w - \eta\,\min(1, t/W)\,\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    damps its first ``W`` updates. Until its first re-allocation a parameter is updated by torch's fused kernel, and
    dense parameters always are; afterwards by our own, also in one pass, and a float32 per block is kept (at block
    edge 1 as much as the values themselves).

    Args:
        params, lr, betas, eps, weight_decay: as ``torch.optim.AdamW``; weight decay is decoupled and not damped.
        block_steps: False gives every block the global step: torch's behaviour, for comparisons.
        regrow_warmup: ``W``, in steps; 0 is off.
        fused: use torch's fused kernel for dense parameters.

    Raises:
        RegrowError: ``regrow_warmup`` is negative, or is used without ``block_steps``.

    Example:
        >>> layer = torch.nn.Parameter(torch.zeros(2, 1, 1))
        >>> optimizer = AdamW([layer], lr=0.1, weight_decay=0.0)
        >>> for _ in range(3):
        ...     layer.grad = torch.ones_like(layer)
        ...     optimizer.step()
        >>> from regrow.optim import reset_slots_
        >>> reset_slots_(optimizer, layer, torch.tensor([1]))  # what a topology update does to a re-allocated block
        >>> before = layer.detach().clone()
        >>> optimizer.step()
        >>> [round(x, 4) for x in (layer.detach() - before).flatten().tolist()]
        [-0.1, -0.1]

    Reference: *SMET*, 2026, arXiv 2606.00888.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_steps: bool = True,
        regrow_warmup: int = 0,
        fused: bool = True,
    ) -> None:
        if regrow_warmup < 0:
            raise RegrowError(f"regrow_warmup is a number of steps >= 0, got {regrow_warmup}")
        if regrow_warmup and not block_steps:
            raise RegrowError("regrow_warmup counts the steps of each block; it needs block_steps=True")
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused)
        self.block_steps, self.regrow_warmup = block_steps, regrow_warmup
        self._step_supports_amp_scaling = False  # ours would not see the scale; the scaler then unscales beforehand

    def start_block_steps(self, parameter: Tensor) -> None:
        """From now on ``parameter``'s blocks (its first dimension) count their own steps."""
        state = self.state.get(parameter, {})
        if self.block_steps and state and BLOCK_STEP not in state:
            first = parameter.detach().reshape(parameter.shape[0], -1)[:, 0]  # shared out as the parameter is
            # float32: what load_state_dict makes of every entry of a float32 parameter
            state[BLOCK_STEP] = torch.zeros_like(first, dtype=torch.float32)
            own(state[BLOCK_STEP]).fill_(state["step"])  # which may be on a GPU: nobody waits to read it

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimizer step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ours = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and BLOCK_STEP in self.state.get(parameter, {})
        ]
        for parameter, _, _ in ours:
            parameter.grad = None  # torch passes over it
        super().step()
        for parameter, gradient, group in ours:
            parameter.grad = gradient
            self._step_blocks(parameter, gradient, group)
        return loss

    def _step_blocks(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, lr, (beta1, beta2) = self.state[parameter], group["lr"], group["betas"]
        parameter, gradient = own(parameter), own(gradient)
        mean, square, t = (own(state[name]) for name in ("exp_avg", "exp_avg_sq", BLOCK_STEP))
        state["step"] += 1
        t += 1
        size, root, keep = lr / (1 - beta1**t), (1 - beta2**t).rsqrt_(), 1 - lr * group["weight_decay"]
        if self.regrow_warmup:
            damping = (t / self.regrow_warmup).clamp_max(1.0)
            size *= damping.masked_fill(t >= state["step"], 1.0)  # blocks of the start are as old as training
        for kernels in (gpu, cpu):
            if kernels.supports_adamw(parameter, mean, square):
                arrays = parameter, gradient, mean, square, size, root
                kernels.adamw_(*arrays, betas=group["betas"], keep=keep, eps=group["eps"])
                return
        each = (-1, *[1] * (parameter.dim() - 1))
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = square.sqrt().mul_(root.view(each)).add_(group["eps"])
        parameter.mul_(keep).addcdiv_(mean * size.view(each), denominator, value=-1.0)
