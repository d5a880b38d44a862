"""Blocks that count their own steps: exact against torch, gentle with newcomers."""

import copy
import math

import pytest
import torch
from torch import nn

from regrow import RegrowError
from regrow.kernels import gpu
from regrow.optim import AdamW, reset_slots_


def stepped(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_without_re_allocation_it_is_torchs(fused: bool) -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 24).view(6, 2, 2)) for _ in range(2))
    a, b = AdamW([ours], lr=0.01, fused=fused), torch.optim.AdamW([theirs], lr=0.01, fused=fused)
    stepped(a, ours, 20)
    stepped(b, theirs, 20)
    assert torch.equal(ours, theirs)
    a.start_block_steps(ours)  # every block has the same age: the same update by our own formula
    stepped(a, ours, 20, seed=1)
    stepped(b, theirs, 20, seed=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_compiled_step_is_the_formula(block: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[torch.Tensor]:
        p = nn.Parameter(torch.linspace(-1, 1, 7 * block**2).view(7, block, block))
        optimizer = AdamW([p], lr=0.01, regrow_warmup=5)
        stepped(optimizer, p, 3)
        reset_slots_(optimizer, p, torch.tensor([2, 6]))
        stepped(optimizer, p, 9, seed=1)
        return [p.detach(), *optimizer.state[p].values()]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compiled = trained()
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr("regrow.kernels.cpu.supports_adamw", lambda *written: False)
    for ours, formula in zip(compiled, trained(), strict=True):
        torch.testing.assert_close(ours, formula, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 1, 1), (70, 16, 16), (3, 16, 1)])
def test_the_step_of_a_gpu_is_the_formula(shape: tuple[int, ...], device: torch.device) -> None:
    def trained(dtype: torch.dtype) -> list[torch.Tensor]:
        p = nn.Parameter(torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape).to(device))
        optimizer = AdamW([p], lr=0.01, regrow_warmup=5)
        stepped(optimizer, p, 3)
        reset_slots_(optimizer, p, torch.tensor([2], device=device))
        stepped(optimizer, p, 9, seed=1)
        return [p.detach(), *optimizer.state[p].values()]

    for ours, formula in zip(trained(torch.float32), trained(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), formula.double(), rtol=1e-5, atol=1e-6)


def test_a_gpu_refuses_an_optimizer_state_of_another_shape(device: torch.device) -> None:
    good = {name: torch.ones(3, 4, 4, device=device) for name in ("values", "grad", "mean", "square")}
    good |= {name: torch.ones(3, device=device) for name in ("size", "root")}
    options = {"betas": (0.9, 0.999), "keep": 1.0, "eps": 1e-8}
    for name in ("grad", "mean", "square", "size", "root"):
        with pytest.raises(RegrowError, match=f"{name}.* is "):
            gpu.adamw_(**{**good, name: torch.ones(2, device=device)}, **options)
    assert torch.equal(good["values"], torch.ones(3, 4, 4, device=device))


def test_a_re_allocated_block_is_updated_as_a_fresh_parameter() -> None:
    p, fresh = nn.Parameter(torch.ones(3, 2, 2)), nn.Parameter(torch.zeros(1, 2, 2))
    a, b = AdamW([p], lr=0.01), torch.optim.AdamW([fresh], lr=0.01)
    stepped(a, p, 30)
    reset_slots_(a, p, torch.tensor([1]))
    p.data[1] = 0
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        p.grad = torch.randn(3, 2, 2, generator=generator)
        fresh.grad = p.grad[1:2].clone()
        a.step()
        b.step()
        torch.testing.assert_close(p[1:2], fresh, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("block_steps", "first"), [(True, 1.0), (False, 3.1623)])
def test_the_first_update_is_at_most_the_learning_rate_and_the_global_step_overshoots(
    block_steps: bool, first: float
) -> None:
    p = nn.Parameter(torch.zeros(2, 4, 4))
    optimizer = AdamW([p], lr=1e-3, weight_decay=0.0, block_steps=block_steps)
    stepped(optimizer, p, 3000)
    reset_slots_(optimizer, p, torch.tensor([0]))
    before = p.detach().clone()
    stepped(optimizer, p, 1, seed=7)
    change = (p - before)[0].abs() / 1e-3
    torch.testing.assert_close(change, torch.full_like(change, first), rtol=0.03, atol=0)
    if block_steps:
        assert change.max() <= 1 + 1e-4


def test_warm_up_damps_newcomers_only() -> None:
    def change(warmup: int) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(2, 2, 2))
        optimizer = AdamW([p], lr=1e-3, weight_decay=0.0, regrow_warmup=warmup)
        stepped(optimizer, p, 20)
        reset_slots_(optimizer, p, torch.tensor([0]))
        for step in range(3):
            before = p.detach().clone()
            stepped(optimizer, p, 1, seed=step)
        return p.detach() - before

    plain, damped = change(0), change(10)
    torch.testing.assert_close(damped[0], plain[0] * 0.3)
    torch.testing.assert_close(damped[1], plain[1])


def test_state_resumes_exactly() -> None:
    p = nn.Parameter(torch.ones(3, 2, 2))
    optimizer = AdamW([p], lr=0.01, regrow_warmup=5)
    stepped(optimizer, p, 7)
    reset_slots_(optimizer, p, torch.tensor([2]))
    stepped(optimizer, p, 2, seed=1)
    twin = nn.Parameter(p.detach().clone())
    resumed = AdamW([twin], lr=0.01, regrow_warmup=5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    stepped(optimizer, p, 5, seed=2)
    stepped(resumed, twin, 5, seed=2)
    assert torch.equal(p, twin)


def test_a_closure_is_evaluated_once() -> None:
    p = nn.Parameter(torch.ones(2, 1, 1))
    optimizer = AdamW([p], lr=0.1)
    stepped(optimizer, p, 1)
    reset_slots_(optimizer, p, torch.tensor([0]))
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0] and len(calls) == 1


def test_bad_options_are_refused() -> None:
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(RegrowError, match="regrow_warmup is a number of steps"):
        AdamW([p], regrow_warmup=-1)
    with pytest.raises(RegrowError, match="needs block_steps=True"):
        AdamW([p], regrow_warmup=5, block_steps=False)
