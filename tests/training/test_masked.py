"""Dense layers of which some blocks do not train: what is held stays bitwise, phases come when they should."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from regrow.errors import RegrowError
from regrow.methods import create
from regrow.methods.acdc import ACDC
from regrow.nn import BlockSparseLinear, MaskedLinear, mask_linears
from regrow.optim import AdamW
from regrow.training import TopologyUpdater, UpdateSchedule
from regrow.training.masked import MaskedTraining

STEPS, B = 12, 4
SCHEDULE = UpdateSchedule(STEPS, 4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    return mask_linears(layers, density=0.25, block_size=B)


def train(
    model: nn.Sequential, method: ACDC, steps: int = STEPS, schedule: UpdateSchedule = SCHEDULE
) -> list[dict[str, torch.Tensor]]:
    """Weights and masks after every step, with momentum and decay that would move what is held."""
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    training = MaskedTraining(model, method, schedule=schedule, seed=1)
    training.start()
    generator = torch.Generator().manual_seed(2)
    history = [{name: tensor.clone() for name, tensor in model.state_dict().items()}]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 16, generator=generator)).square().sum().backward()
        optimizer.step()
        training.step()
        history.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return history


def outside(state: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """Element-wise: not in the mask."""
    return ~state[f"{layer}.mask"].repeat_interleave(B, 0).repeat_interleave(B, 1)


@pytest.mark.parametrize("selection", ["magnitude", "random", "fixed"])
@pytest.mark.parametrize("unused", ["zero", "freeze"])
def test_what_a_sparse_phase_does_not_train_stays_bitwise(unused: str, selection: str) -> None:
    history = train(net(), create("acdc", unused=unused, selection=selection))
    for layer in ("0", "2"):
        sparse_seen = 0
        for before, after in pairwise(history):
            off = outside(before, layer)
            a, b = before[f"{layer}.weight"], after[f"{layer}.weight"]
            assert torch.equal(a[off], b[off]) or not torch.equal(before[f"{layer}.mask"], after[f"{layer}.mask"])
            assert not torch.equal(a[~off], b[~off])
            if off.any():
                sparse_seen += 1
                assert off.float().mean() == 0.75  # the budget, exactly
                assert bool((a[off] == 0).all()) == (unused == "zero")
        assert sparse_seen == STEPS // 2


def test_the_last_phase_is_sparse_and_phases_take_turns() -> None:
    sparse = [bool(outside(state, "0").any()) for state in train(net(), create("acdc"))]
    assert sparse == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 4  # after step 12 nothing changes any more
    assert [create("acdc").phase(UpdateSchedule(9, 3), step) for step in (0, 3, 6)] == [0, None, 2]


def test_dense_until_switches_once() -> None:
    history = train(net(), create("acdc", dense_until=0.5, selection="random"))
    assert [bool(outside(state, "2").any()) for state in history] == [False] * 6 + [True] * 7
    masks = [state["2.mask"] for state in history[6:]]
    assert all(torch.equal(masks[0], mask) for mask in masks)


def test_selection() -> None:
    masks = {}
    for selection in ("magnitude", "random", "fixed"):
        history = train(net(), create("acdc", selection=selection))
        masks[selection] = [history[3]["0.mask"], history[9]["0.mask"]]
    assert torch.equal(*masks["fixed"]) and not torch.equal(*masks["random"])
    weight = train(net(), create("acdc", unused="freeze"), steps=3)[3]["0.weight"]
    sums = weight.view(8, B, 4, B).abs().sum((1, 3))
    chosen = masks["magnitude"][0]
    assert chosen.sum() == 8 and sums[chosen].min() >= sums[~chosen].max()


def test_zeroed_from_the_start_is_static_sparse_training() -> None:
    """The same pattern and values in a BlockSparseLinear learn the same function."""
    masked = mask_linears(nn.Sequential(nn.Linear(16, 32)), density=0.25, block_size=B)
    training = MaskedTraining(masked, create("acdc", dense_until=0.0, selection="random"), schedule=SCHEDULE, seed=1)
    training.start()
    sparse = BlockSparseLinear(16, 32, block_size=B, density=0.25)
    rows, cols = masked[0].mask.nonzero(as_tuple=True)
    sparse.topology.set_coordinates(rows, cols)
    sparse.load_dense_(masked[0].weight)
    sparse.bias.data.copy_(masked[0].bias)
    optimizers = [AdamW(model.parameters(), lr=0.01, weight_decay=0.1, block_steps=False) for model in (masked, sparse)]
    for _ in range(5):
        x = torch.randn(7, 16)
        for model, optimizer in zip((masked, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        training.step()
    torch.testing.assert_close(masked[0].weight, sparse.to_dense(), rtol=1e-5, atol=1e-6)


def test_a_resumed_training_is_the_uninterrupted_one() -> None:
    method = create("acdc", unused="freeze", selection="random")
    whole = train(net(), method)
    model, at = net(), 5  # within a sparse phase
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    training, generator = MaskedTraining(model, method, schedule=SCHEDULE, seed=1), torch.Generator().manual_seed(2)
    training.start()
    for step in range(STEPS):
        if step == at:
            weights, state, moments = model.state_dict(), training.state_dict(), optimizer.state_dict()
            model = net()
            optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
            model.load_state_dict(weights)  # before the training exists, as the Trainer does
            optimizer.load_state_dict(moments)
            training = MaskedTraining(model, method, schedule=SCHEDULE, seed=1)
            training.load_state_dict(state)
        optimizer.zero_grad()
        model(torch.randn(5, 16, generator=generator)).square().sum().backward()
        optimizer.step()
        training.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[-1][name])


def test_a_masked_layer_starts_as_the_one_it_replaces() -> None:
    dense = nn.Linear(16, 32, bias=False)
    masked = mask_linears(nn.Sequential(dense), density=0.5, block_size=8)[0]
    x = torch.randn(3, 16)
    assert torch.equal(masked(x), dense(x)) and masked.mask.all() and masked.bias is None


def test_refusals() -> None:
    with pytest.raises(RegrowError, match=r"call regrow.nn.mask_linears first"):
        MaskedTraining(nn.Linear(4, 4), create("acdc"), schedule=SCHEDULE)
    with pytest.raises(RegrowError, match="nothing to mask"):
        mask_linears(nn.Sequential(nn.GELU()), density=0.5, block_size=4)
    with pytest.raises(RegrowError, match="density"):
        MaskedLinear(8, 8, block_size=4, density=0.0)
    with pytest.raises(RegrowError, match="block_size 16 does not divide"):
        MaskedLinear(8, 8, block_size=16, density=0.5)
    for options, name in (({"unused": "keep"}, "unused"), ({"selection": "best"}, "selection")):
        with pytest.raises(RegrowError, match=name):
            create("acdc", **options)
    with pytest.raises(RegrowError, match=r"dense_until must lie in \[0, 1\]"):
        create("acdc", dense_until=1.5)
    sparse = BlockSparseLinear(16, 16, block_size=4, density=0.5)
    updater = TopologyUpdater(sparse, torch.optim.AdamW(sparse.parameters()), "acdc", schedule=UpdateSchedule(2, 2))
    with pytest.raises(RegrowError, match="trains dense layers"):
        updater.step()
    training = MaskedTraining(net(), create("acdc"), schedule=SCHEDULE)
    with pytest.raises(RegrowError, match="does not belong"):
        training.load_state_dict({"counters": torch.tensor([1, 2])})
