"""An update step reads nothing from its device, compiles nothing anew, and decides on a CPU what it always did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regrow import BlockSparseLinear, RegrowError, TopologyUpdate, TopologyUpdater, UpdateSchedule
from regrow.methods import Method, create, rules
from regrow.methods.dynsparse import DynSparse
from regrow.methods.signals import Signals
from regrow.optim import AdamW
from regrow.training.agreement import digest
from regrow.training.updater import apply_update

aten = torch.ops.aten
FREE = ["dynsparse", "set", "rigl", "static"]
"""The methods whose updates do not wait."""


class Unreadable(TorchDispatchMode):
    """Takes the meta device for a GPU: whatever would make the host wait for it fails.

    Meta tensors hold no data, so what depends on it fails by itself: ``item``, ``nonzero``, boolean masks as indices,
    ``unique``, ``bincount``. What they let pass, and a GPU would wait for, is refused here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_sent, self.n_read = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [t for t in tensors if t.is_meta]
        here = [t for t in tensors if not t.is_meta and t.dim()]
        if func is aten.copy_.default and there and here:
            assert len(args) > 2 and args[2], "a copy that waits"
            self.n_read += there[0] is args[1]
            self.n_sent += there[0] is args[0]
            return args[0]
        if func is aten._to_copy.default:
            to = kwargs.get("device") or args[0].device
            assert kwargs.get("non_blocking") or (to.type == "meta") == args[0].is_meta, "a copy that waits"
            self.n_sent += to.type == "meta" and not args[0].is_meta
        else:
            assert not (there and here), f"{func} of tensors here and there"
        if there:
            assert func not in (aten.isin.Tensor_Tensor, aten.isin.Tensor_Scalar), "isin may count on the device"
            if func is aten.where.self:
                assert len(there) == len(tensors), "a number to choose is copied, and waited for"
            if func in (aten.index_put_.default, aten.index_put.default):
                assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as an index"
        return func(*args, **kwargs)


def on_meta(method: str | Method) -> tuple[nn.Sequential, AdamW, TopologyUpdater]:
    """A training in its middle, with a step counter on the device as the fused optimizer of a GPU has it."""
    shapes = ((48, 96, 1), (96, 32, 16), (32, 64, 4))
    model = nn.Sequential(
        *(BlockSparseLinear(i, o, block_size=b, density=0.4, bias=False, device="meta") for i, o, b in shapes)
    )
    model[0].activation = "gelu"
    optimizer = AdamW(model.parameters(), regrow_warmup=3, fused=False)
    for parameter in model.parameters():
        moments = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device="meta"), **moments}
        optimizer.start_block_steps(parameter)  # torch's own step reads its counter on any device but a GPU
    return model, optimizer, TopologyUpdater(model, optimizer, method, schedule=UpdateSchedule(4, 4, 0.5, "constant"))


def train(model: nn.Sequential, optimizer: AdamW, updater: TopologyUpdater, n_steps: int) -> list[int]:
    n_records = []
    for _ in range(n_steps):
        model(torch.empty(5, 48, device="meta")).sum().backward()
        optimizer.step()
        n_records.append(len(updater.step()))
    return n_records


@pytest.mark.parametrize("method", FREE)
def test_nothing_of_an_update_step_waits_for_the_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know the meta device
    parts = on_meta(method)
    buffers = [array for layer in parts[0] for array in layer.topology.indices()]
    with Unreadable() as mode:
        assert train(*parts, n_steps=4) == ([0] * 4 if method == "static" else [3, 3, 3, 0])
    assert all(
        a is b for a, b in zip(buffers, (x for layer in parts[0] for x in layer.topology.indices()), strict=True)
    )
    # Of every update: what was drawn goes there, and whether the update was valid comes back.
    drawn = 9 if method in ("dynsparse", "set") else 0
    assert (mode.n_sent, mode.n_read) == (drawn, 0 if method == "static" else 9)


def test_the_switch_to_steps_of_blocks_does_not_read_the_counter() -> None:
    model, optimizer, updater = on_meta("dynsparse")
    for parameter in model.parameters():
        del optimizer.state[parameter]["block_step"]
    with Unreadable():
        updater.step()
    assert all(optimizer.state[parameter]["block_step"].is_meta for parameter in model.parameters())


PEEKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: int(x[0]),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "masked write": lambda x: x.clone().index_put_((x > 0,), x[0]),
    "unique": lambda x: torch.unique(x),
    "bincount": lambda x: torch.bincount(x),
    "repeats": lambda x: x.repeat_interleave(x),
    "isin": lambda x: torch.isin(x, x),
    "where of a number on the host": lambda x: torch.where(x > 0, x, torch.tensor(1)),
    "blocking copy": lambda x: torch.arange(3).to(x.device),
    "index on the host": lambda x: x[torch.arange(2)],
}


@dataclass(frozen=True)
class Peeking(DynSparse):
    peek: str = "item"

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        PEEKS[self.peek](signals.topology.keys())
        return super().propose(signals)


@pytest.mark.parametrize("peek", PEEKS)
def test_an_operation_that_waits_is_noticed(peek: str) -> None:
    _, _, updater = on_meta(Peeking(peek=peek))
    with Unreadable(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        updater.step()


def test_what_is_decided_in_the_backward_pass_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr("regrow.methods.scores.is_among", torch.isin)
    parts = on_meta("rigl")
    with Unreadable(), pytest.raises(AssertionError, match="isin may count"):
        train(*parts, n_steps=1)


def test_options_that_wait_are_those_the_documentation_names() -> None:
    for options in ({"growth": "unexplored"}, {"quota_rows": 2}):
        _, _, updater = on_meta(create("dynsparse", **options))
        with Unreadable(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            updater.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", FREE)
def test_cuda_itself_sees_no_wait(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BlockSparseLinear(64, 128, block_size=16, density=0.4)).cuda()
    optimizer = AdamW(model.parameters(), regrow_warmup=3)
    updater = TopologyUpdater(model, optimizer, method, schedule=UpdateSchedule(8, 8, 0.5))
    x, coverage = torch.randn(32, 64, device="cuda"), []

    def step() -> Any:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return updater.step()

    step()  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        records = [step() for _ in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    model[0].topology.validate()
    coverage = [record.coverage for update in records for record in update]
    assert len(coverage) == (0 if method == "static" else 6) and coverage == sorted(coverage)


# ---- the same as ever on a CPU --------------------------------------------------------------------

# What `decided` gave with the code before updates had fixed sizes (boolean masks, nonzero, unique, isin).
DIGESTS = [
    ("dynsparse", {}, 4377900344176322606),
    ("dynsparse", {"regrow_pruned": False}, 8428365378716364411),
    ("dynsparse", {"growth": "unexplored"}, 7503863301052072949),
    ("dynsparse", {"quota_rows": 2}, 6771819424574816785),
    ("set", {}, 790921264034196261),
    ("rigl", {}, 6664773094183779884),
    ("rigl", {"regrow_pruned": False}, 2686123644912019123),
    ("static", {}, 6314526231983353820),
    ("gse", {}, 8781376767171837427),
    ("snfs", {}, 2706778436581100722),
]


def decided(method: str, **options: Any) -> int:
    """A digest of all that three updates decide. Values are whole numbers, so that every machine ranks them alike."""
    generator = torch.Generator().manual_seed(11)

    def whole(*shape: int, scale: int = 100) -> Tensor:
        return torch.randint(-scale, scale, shape, generator=generator).float()

    model = nn.Sequential(
        BlockSparseLinear(48, 96, block_size=1, density=0.1, generator=generator),
        BlockSparseLinear(96, 32, block_size=16, density=0.5, generator=generator),
        BlockSparseLinear(32, 64, block_size=4, density=0.5, generator=generator),
    )
    optimizer = AdamW(model.parameters())
    schedule = UpdateSchedule(4, 4, 0.6, "linear")
    updater = TopologyUpdater(model, optimizer, create(method, **options), schedule=schedule, seed=3)
    found: list[Tensor] = []
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(whole(*parameter.shape, scale=8))
        x = whole(5, 48, scale=3)
        optimizer.zero_grad()
        for layer in model:
            y = layer(x)
            (y * whole(*y.shape, scale=3)).sum().backward()
            x = whole(*y.shape, scale=3)
        optimizer.step()
        with torch.no_grad():  # rigl has decided by now; the others rank these
            for parameter in model.parameters():
                parameter.copy_(whole(*parameter.shape))
                if optimizer.state[parameter]["exp_avg"].dim() == 3:
                    optimizer.state[parameter]["exp_avg"].fill_(1)
        for record in updater.step():
            layer = model.get_submodule(record.layer)
            numbers = [record.step, record.n_blocks, record.n_moved]
            shares = [record.fraction, record.coverage, record.fresh_removed, record.churn]
            zeros = [t.flatten(1).eq(0).all(1) for t in (layer.values, optimizer.state[layer.values]["exp_avg"])]
            found += [torch.tensor(numbers), torch.tensor(shares, dtype=torch.float64), *zeros]
            found += [array.clone() for array in layer.topology.indices()]
        found += [tensor.clone() for tensor in updater.state_dict().values()]
    return digest(found)


@pytest.mark.parametrize(("method", "options", "expected"), DIGESTS)
def test_updates_are_what_they_were_before_sizes_were_fixed(method: str, options: dict, expected: int) -> None:
    assert decided(method, **options) == expected


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_updates_that_name_what_stays_come_to_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on a CPU."""
    n_staying = []

    def keeping(topology: Any, dropped: Tensor, positions: Tensor) -> TopologyUpdate | None:
        update = rules.exchange_all(topology, dropped, positions)
        n_staying.append(0 if update is None else int((~update.anew).sum()))
        return update

    monkeypatch.setattr(f"regrow.methods.{method}.exchange_keeping", keeping)
    assert decided(method) == next(expected for name, options, expected in DIGESTS if name == method and not options)
    assert any(n_staying)


# ---- what was wrong -------------------------------------------------------------------------------


def wrong(method_slots: list[int], rows: list[int], cols: list[int]) -> Method:
    @dataclass(frozen=True)
    class Wrong(DynSparse):
        def propose(self, signals: Signals) -> TopologyUpdate | None:
            if signals.progress > 0.3:
                return super().propose(signals)
            return TopologyUpdate(*map(torch.tensor, (method_slots, rows, cols)))

    return Wrong()


WRONG = [
    ([0, 0], [0, 1], [2, 2], "one slot twice"),
    ([0], [5], [0], r"rows must lie in \[0, 2\)"),
    ([0], [0], [-1], r"cols must lie in \[0, 3\)"),
    ([7], [0], [2], r"slots must lie in \[0, 4\)"),
    ([-1], [0], [2], r"slots must lie in \[0, 4\)"),
    ([0], [1], [2], "share one block position"),
]


def small(method: Method) -> tuple[nn.Sequential, AdamW, TopologyUpdater]:
    model = nn.Sequential(BlockSparseLinear(12, 8, block_size=4, density=4 / 6))
    model[0].topology.set_coordinates(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 2]))
    optimizer = AdamW(model.parameters())
    model(torch.ones(1, 12)).sum().backward()
    optimizer.step()
    return model, optimizer, TopologyUpdater(model, optimizer, method, schedule=UpdateSchedule(8, 4, 0.5))


@pytest.mark.parametrize(("slots", "rows", "cols", "message"), WRONG)
def test_on_a_cpu_a_wrong_update_is_refused_at_once(slots: list, rows: list, cols: list, message: str) -> None:
    model, optimizer, _ = small(create("dynsparse"))
    optimizer_state = optimizer.state[model[0].values]
    tensors = [*model.state_dict().values(), optimizer_state["exp_avg"], optimizer_state["exp_avg_sq"]]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(RegrowError, match=message):
        apply_update(model[0], TopologyUpdate(*map(torch.tensor, (slots, rows, cols))), optimizer)
    assert all(torch.equal(old, now) for old, now in zip(before, tensors, strict=True))


@pytest.mark.parametrize(("slots", "rows", "cols", "message"), WRONG)
def test_elsewhere_it_is_raised_when_the_host_knows(
    slots: list, rows: list, cols: list, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, on a CPU."""
    monkeypatch.setattr("regrow.topology.faults.costs_nothing", lambda device: False)
    model, _, updater = small(wrong(slots, rows, cols))
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    updater.step()
    assert len(updater.step()) == 1
    for array, size in zip(model[0].topology.indices(), (5, 3, 4), strict=True):
        assert int(array.min()) >= 0 and int(array.max()) < size  # nothing reads out of bounds
    with pytest.raises(RegrowError, match=f"{message}.* earlier"):
        model[0].topology.validate()
    with pytest.raises(RegrowError, match=f"^0.topology: .*{message}.* earlier"):
        model.state_dict()
    updater.step()
    with pytest.raises(RegrowError, match=f"^0: .*{message}.* earlier"):
        updater.step()
    model.load_state_dict(saved)
    assert model.state_dict().keys() == saved.keys()


def test_a_right_update_is_not_complained_of_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.topology.faults.costs_nothing", lambda device: False)
    model, _, updater = small(create("dynsparse"))
    assert [len(updater.step()) for _ in range(8)] == [0, 1, 0, 1, 0, 0, 0, 0]
    model.state_dict()
    model[0].topology.validate()


# ---- compiled models ------------------------------------------------------------------------------


def test_updates_do_not_compile_the_model_anew() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(
        BlockSparseLinear(32, 64, block_size=8, density=0.4),
        nn.GELU(),
        BlockSparseLinear(64, 32, block_size=4, density=0.4),
    )
    optimizer = AdamW(model.parameters(), lr=0.01, regrow_warmup=3)
    updater = TopologyUpdater(model, optimizer, schedule=UpdateSchedule(12, 6, 0.5))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x, n_updates = torch.randn(7, 32), 0
    for _ in range(12):
        optimizer.zero_grad()
        y = compiled(x)
        torch.testing.assert_close(y, model(x))  # of the blocks as they are now
        y.square().mean().backward()
        optimizer.step()
        n_updates += bool(updater.step())
    assert n_updates == 5 and "block_step" in optimizer.state[model[0].values]
    assert counter.frame_count == 1
    free = model[0].topology.free_positions(2)
    apply_update(model[0], TopologyUpdate(free.new_empty(0), free // 4, free % 4), optimizer)
    compiled(x)
    assert counter.frame_count == 2  # so the count can rise: a layer that grows is another program
