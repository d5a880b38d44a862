"""Optimizer state of re-allocated blocks, for whatever optimizer keeps it per element."""

import pytest
import torch
from torch import nn

from regrow import RegrowError
from regrow.optim import parameter_groups, reset_slots_

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_named_slots_are_zeroed_and_no_others(name: str) -> None:
    parameter = nn.Parameter(torch.randn(5, 4, 4))
    optimizer = OPTIMIZERS[name]([parameter])
    for _ in range(3):
        parameter.grad = torch.randn(5, 4, 4)
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor)}
    reset_slots_(optimizer, parameter, torch.tensor([1, 3]))
    per_slot = 0
    for key, tensor in optimizer.state[parameter].items():
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 1:
            continue
        per_slot += 1
        assert not tensor[[1, 3]].any(), key
        assert torch.equal(tensor[[0, 2, 4]], before[key][[0, 2, 4]]), key
    assert per_slot >= 1


def test_a_single_block_keeps_its_step_counter() -> None:
    parameter = nn.Parameter(torch.randn(1, 1, 1))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(1, 1, 1)
    optimizer.step()
    reset_slots_(optimizer, parameter, torch.tensor([0]))
    assert optimizer.state[parameter]["exp_avg"].item() == 0
    assert optimizer.state[parameter]["step"].item() == 1


@pytest.mark.parametrize("entry", [torch.zeros(7, 4), {"nested": 1}])
def test_state_that_maps_to_no_slot_is_refused(entry: object) -> None:
    parameter = nn.Parameter(torch.randn(5, 4, 4))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["preconditioner"] = entry
    with pytest.raises(RegrowError, match="SGD keeps state 'preconditioner'"):
        reset_slots_(optimizer, parameter, torch.tensor([0]))


def test_biases_and_norms_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, plain = parameter_groups(model, 0.01)
    assert [p.dim() for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.01
    assert [p.dim() for p in plain["params"]] == [1, 1, 1] and plain["weight_decay"] == 0.0
