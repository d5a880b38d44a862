"""FLOPs of any model: what torch counts while it runs, and the formulas by hand."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from regrow import BlockSparseLinear, FlopsReport, RegrowError, UpdateSchedule, count_flops, sparsify
from regrow.methods import LayerSize, available, create
from regrow.nn.flops import ADAMW_FLOPS
from regrow.nn.flops_report import Flops, NotCounted

BATCH, LENGTH = 3, 5
TOKENS = BATCH * LENGTH


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32, bias=False), nn.Linear(32, 8)
    )


def count(model: nn.Module, **options: object) -> FlopsReport:
    return count_flops(model, batch_size=BATCH, seq_length=LENGTH, **options)


def torchs_count(model: nn.Module) -> tuple[int, int]:
    """Forward, and all."""
    with FlopCounterMode(display=False) as counter:
        loss = model(torch.randn(BATCH, LENGTH, 32)).sum()
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("frozen", ["", "0", "3", "0,2", "0,2,3,4", "3,4"])
def test_is_what_torch_counts(frozen: str) -> None:
    model = net()
    for index in frozen.split(",") if frozen else ():
        model[int(index)].requires_grad_(False)
    report = count(model)
    assert (report.products.forward, report.products.total) == torchs_count(model)
    assert report.per_step == report.products.total and report.recomputed == 0 and not report.not_counted


def test_sparse_layers_by_their_blocks() -> None:
    model = sparsify(net(), density=0.25, block_size=8, include=["0", "3"])
    report = count(model)
    weights = [model[0].values.numel(), model[3].values.numel(), 32 * 8]
    assert weights[:2] == [512, 512]
    assert report.products == Flops(2 * TOKENS * sum(weights), 2 * TOKENS * sum(weights[1:]), 2 * TOKENS * sum(weights))
    assert report.density("layers") == sum(weights) / (2 * 32 * 64 + 32 * 8)
    assert [layer.name for layer in report.layers] == ["0", "3", "4"]
    assert report.per_sequence == report.per_step / BATCH


def test_on_the_meta_device_and_a_layer_alone() -> None:
    layer = BlockSparseLinear(64, 32, block_size=16, density=0.5, device="meta")
    assert count(layer).products == Flops(2 * TOKENS * 1024, 0, 2 * TOKENS * 1024)


def test_a_layer_under_two_names_is_one() -> None:
    layer = nn.Linear(32, 32)
    assert len(count(nn.Sequential(layer, nn.Sequential(layer))).layers) == 1


def test_rows_by_glob() -> None:
    report = count(net(), rows={"4": 1, "[34]": 2})
    assert [layer.rows for layer in report.layers] == [TOKENS, 2 * BATCH, BATCH]
    with pytest.raises(RegrowError, match=r"rows\['head'\] matches no layer"):
        count(net(), rows={"head": 1})


def test_embeddings_are_look_ups_and_the_unknown_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.attention = nn.Embedding(7, 32), nn.MultiheadAttention(32, 2)
            self.scale = nn.Parameter(torch.ones(3))

    report = count(Odd())
    assert report.parts["embeddings (look-ups)"] == Flops()
    assert report.not_counted == (
        NotCounted("", "Odd", 3),
        NotCounted("attention", "MultiheadAttention", 3 * 32 * 32 + 3 * 32),
    )
    assert "not counted: the model (Odd, 3)" in str(report)


@pytest.mark.parametrize("name", available())
def test_updates_cost_what_the_method_says(name: str) -> None:
    model = sparsify(net(), density=0.25, block_size=4, include=["0", "3"])
    method, schedule = create(name), UpdateSchedule(100, 10, stop=0.75)
    report = count(model, method=method, schedule=schedule)
    sizes = [LayerSize(32, 64, 4, 32), LayerSize(64, 32, 4, 32)]
    assert report.updates is not None and report.updates.n_updates == 7
    assert report.updates.per_update == sum(method.update_flops(size, TOKENS) for size in sizes)
    assert report.per_step == report.products.total + report.updates.per_update * 7 / 100
    assert report.as_dict()["updates"]["per_step"] == report.updates.per_step


def test_full_layers_are_not_updated_and_an_activation_is_undone_for_the_gradient() -> None:
    full = BlockSparseLinear(32, 32, block_size=8, density=1.0)
    active = BlockSparseLinear(32, 32, block_size=8, density=0.5, activation="gelu")
    model, schedule = nn.Sequential(full, active), UpdateSchedule(10, 2)
    updates = count(model, method=create("rigl"), schedule=schedule).updates
    assert updates is not None and updates.rule == 2 * TOKENS * 32 * 32 and updates.capture == 2 * TOKENS * 512
    updates = count(model, method=create("set"), schedule=schedule).updates
    assert updates is not None and updates.per_update == 0


def test_the_optimizer_is_for_what_is_trained() -> None:
    model = net()
    model[0].requires_grad_(False)
    assert count(model).optimizer == 0
    report = count(model, optimizer=True)
    assert report.optimizer == ADAMW_FLOPS * (2 * 64 + 64 * 32 + 33 * 8)
    assert report.per_step == report.products.total + report.optimizer


def test_report_as_text_and_data() -> None:
    model = sparsify(net(), density=0.25, block_size=8, include=["0", "3"])
    report = count(model, method=create("rigl"), schedule=UpdateSchedule(100, 5), optimizer=True)
    text = str(report)
    for line in (
        "3 x 5 tokens, convention exact",
        "layers, density 0.2",
        "topology updates (rigl)",
        "4 updates in 100",
    ):
        assert line in text
    data = json.loads(json.dumps(report.as_dict()))
    assert data["per_step"] == report.per_step and data["products"]["total"] == report.products.total
    assert sum(layer["flops"]["total"] for layer in data["layers"]) == data["parts"]["layers"]["total"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seq_length": 0}, "seq_length must be at least 1"),
        ({"predicted": 6}, "predicted must be 'all' or lie between 0 and seq_length=5"),
        ({"predicted": "some"}, "predicted must be"),
        ({"convention": "mine"}, "convention must be"),
        ({"convention": "paper"}, "none is known in this model"),
        ({"convention": "paper", "optimizer": True}, "neither updates nor the optimizer"),
        ({"method": create("set")}, "method and schedule belong together"),
        ({"schedule": UpdateSchedule(10, 2)}, "method and schedule belong together"),
        ({"method": "set", "schedule": UpdateSchedule(10, 2)}, r"pass regrow.methods.create\('set'\)"),
    ],
)
def test_mistakes_are_named(options: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        count_flops(net(), **({"batch_size": BATCH, "seq_length": LENGTH} | options))
