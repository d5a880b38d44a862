"""For authors of methods and layer options: conformance suites that every one passes, ours and yours.

>>> from regrow.testing import check_method
>>> check_method("set", examples=5, ranks=1).name
'set'

It needs Hypothesis (``pip install hypothesis``). Layer options are checked by :func:`check_layer`.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regrow.errors import RegrowError
from regrow.methods import Gradient, Method, Signals, create
from regrow.nn import BlockSparseLinear, sparsify
from regrow.optim import AdamW
from regrow.testing_layers import LayerReport, check_declaration, check_layer
from regrow.topology import BlockTopology, ExploredPositions, TopologyUpdate
from regrow.training import TopologyUpdater, UpdateSchedule
from regrow.training.updater import apply_update

__all__ = ["LayerReport", "MethodReport", "check_layer", "check_method"]

STEPS, TOKENS = 24, 16
_MEMORY_LAYER = (512, 512)


@dataclass(frozen=True)
class MethodReport:
    """What :func:`check_method` measured.

    Args:
        name: of the method. extra_bytes: most memory that deciding one update of a 512 x 512 layer took, beyond the
        layer and its activations, by
            block size.
        dense_bytes: bytes of that layer's dense weight.
    """

    name: str
    extra_bytes: dict[int, int]
    dense_bytes: int


def check_method(method: str | Method, *, examples: int = 30, ranks: int = 2) -> MethodReport:
    """Run the conformance suite over a method.

    1. It is declared completely: paper, year, link, help of every option, a worked example in its module.
    2. For any shape, block, density, progress and share: slots are distinct and in range, no two blocks share a
       position, the number of blocks is what was asked for, survivors keep their values and moments bitwise, newcomers
       start at zero; the same seed gives the same update; nothing that it looks at changes, the global random state
       included.
    3. A small training ends with a finite, lower loss, and a resumed one is bitwise the uninterrupted one.
    4. Two ranks with different data end with the same topology and values.
    5. Deciding an update never forms a tensor of the dense weight's size; its extra memory is measured.

    Args:
        method: a registered name, or an instance with options.
        examples: how many cases Hypothesis tries.
        ranks: 1 skips the two processes.

    Raises:
        AssertionError: saying which rule the method breaks.
        RegrowError: the method trains dense layers; only its declaration was checked.
        ImportError: Hypothesis is not installed.
    """
    method = create(method) if isinstance(method, str) else method
    check_declaration(method)
    if method.dense_layout:
        raise RegrowError(f"{method.name} moves no blocks; the suite's other rules are about those that do")
    _check_updates(method, examples)
    _check_training(method)
    if ranks > 1:
        _check_ranks(method)
    weight = 4 * _MEMORY_LAYER[0] * _MEMORY_LAYER[1]
    return MethodReport(method.name, {b: _check_memory(method, b) for b in (1, 16)}, weight)


# ---- 2: single updates ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """One layer in the middle of its training."""

    layer: BlockSparseLinear
    optimizer: AdamW
    x: Tensor
    g: Tensor
    fraction: float
    progress: float
    seed: int

    def signals(self, method: Method) -> Signals:
        explored = ExploredPositions(self.layer.topology.n_positions)
        explored.add(self.layer.topology.keys())
        signals = Signals(
            self.layer.values.data,
            self.layer.topology,
            self.fraction,
            torch.Generator().manual_seed(self.seed),
            progress=self.progress,
            explored=explored,
            momentum=self.optimizer.state[self.layer.values]["exp_avg"],
        )
        gradient = Gradient(self.x, self.g, self.layer.block_size) if method.needs_gradient else None
        return replace(signals, target=method.allocate({"layer": signals})["layer"], gradient=gradient)


def _case(
    rows: int, cols: int, block: int, density: float, fraction: float, progress: float, seed: int, tokens: int = TOKENS
) -> _Case:
    generator = torch.Generator().manual_seed(seed)
    layer = BlockSparseLinear(cols * block, rows * block, block_size=block, density=density, generator=generator)
    optimizer = AdamW(layer.parameters(), lr=0.01)
    layer.values.grad = torch.randn(layer.values.shape, generator=generator)
    optimizer.step()
    x, g = (torch.randn(tokens, n * block, generator=generator) for n in (cols, rows))
    return _Case(layer, optimizer, x, g, fraction, progress, seed)


def _check_updates(method: Method, examples: int) -> None:
    try:
        from hypothesis import HealthCheck, assume, given, settings
        from hypothesis import strategies as st
    except ImportError as error:
        raise ImportError("regrow.testing needs Hypothesis; pip install hypothesis") from error

    share = st.floats(0.0, 1.0)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        rows=st.integers(1, 8),
        cols=st.integers(1, 8),
        block=st.sampled_from((1, 4, 8)),
        density=st.floats(0.05, 1.0),
        fraction=share,
        progress=share,
        seed=st.integers(0, 2**31),
    )
    def check(rows: int, cols: int, block: int, density: float, fraction: float, progress: float, seed: int) -> None:
        case = _case(rows, cols, block, density, fraction, progress, seed)
        assume(_accepts(method, case.layer.topology) and case.layer.density < 1.0)
        _check_update(method, case)

    check()


def _accepts(method: Method, topology: BlockTopology) -> bool:
    try:
        method.check_layer("layer", topology)
    except RegrowError:
        return False
    return True


def _check_update(method: Method, case: _Case) -> None:
    name, layer, topology = method.name, case.layer, case.layer.topology
    signals = case.signals(method)
    seen = [*layer.state_dict().values(), case.x, case.g, *case.optimizer.state[layer.values].values()]
    before, random_state = copy.deepcopy(seen), torch.get_rng_state()
    update = method.propose(signals)
    unchanged = all(torch.equal(old, new) for old, new in zip(before, seen, strict=True))
    assert unchanged, f"{name}.propose changed what it looked at; it must only return an update"
    assert torch.equal(torch.get_rng_state(), random_state), (
        f"{name} used the global random state; draw from signals.generator"
    )
    assert _same(update, method.propose(case.signals(method))), f"{name}: the same seed gave two different updates"
    after = topology.n_blocks + (0 if update is None else update.growth)
    lost = signals.n_after - after
    assert lost == 0 or (not method.exact_budget and 0 <= lost < topology.n_block_rows), (
        f"{name} was asked for {signals.n_after} blocks and leaves {after}"
    )
    if update is None:
        return
    old_keys, old_values = topology.keys(), layer.values.detach().clone()
    old_moments = {k: v.clone() for k, v in case.optimizer.state[layer.values].items() if v.dim() == 3}
    try:
        kept = apply_update(layer, update, case.optimizer)
        topology.validate()
    except RegrowError as error:
        raise AssertionError(f"{name} proposed an update that cannot be applied: {error}") from error
    stays = ~torch.isin(kept, update.slots)
    assert torch.equal(topology.keys()[: len(kept)][stays], old_keys[kept][stays]), f"{name} moved a survivor"
    new = torch.ones(topology.n_blocks, dtype=torch.bool)
    new[: len(kept)][stays] = False
    tensors = {"values": (old_values, layer.values.detach())}
    tensors |= {k: (old, case.optimizer.state[layer.values][k]) for k, old in old_moments.items()}
    for key, (old, now) in tensors.items():
        assert torch.equal(now[~new], old[kept][stays]), f"{name}: {key} of a survivor changed"
        assert not now[new].any(), f"{name}: {key} of a new block is not zero"


def _same(a: TopologyUpdate | None, b: TopologyUpdate | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("slots", "rows", "cols"))


# ---- 3: training and resume -----------------------------------------------------------------------


class _Run:
    """A two-layer network that learns a fixed random map."""

    def __init__(self, method: Method, rank: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        sparsify(self.model, density=0.3, block_size=4, seed=1)
        self.optimizer = AdamW(self.model.parameters(), lr=0.02, **method.optimizer_options())
        schedule = UpdateSchedule(STEPS, 6, 0.3)
        self.updater = TopologyUpdater(self.model, self.optimizer, method, schedule=schedule, seed=2)
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(8, TOKENS, 32, generator=generator)
        self.y = self.x @ torch.randn(32, 32, generator=generator) / 32**0.5
        self.rank = rank

    def steps(self, count: int) -> float:
        loss = torch.zeros(())
        for _ in range(count):
            index = (self.updater.n_steps * 2 + self.rank) % len(self.x)
            self.optimizer.zero_grad()
            loss = (self.model(self.x[index]) - self.y[index]).square().mean()
            loss.backward()
            _average_gradients(self.model)
            self.optimizer.step()
            self.updater.step()
        return loss.item()

    def state(self) -> Any:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.updater.state_dict()))

    def load(self, state: Any) -> None:
        model, optimizer, updater = state
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.updater.load_state_dict(updater)


def _check_training(method: Method) -> None:
    whole = _Run(method)
    first = whole.steps(1)
    last = whole.steps(STEPS - 1)
    assert 0 <= last < first, f"{method.name}: the loss went from {first:.4f} to {last:.4f} in {STEPS} steps"
    half, resumed = _Run(method), _Run(method)
    half.steps(STEPS // 2 + 1)
    resumed.load(half.state())
    resumed.steps(STEPS - STEPS // 2 - 1)
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{method.name}: after a resume {key} is not what an uninterrupted training has"


# ---- 4: ranks -------------------------------------------------------------------------------------


def _check_ranks(method: Method) -> None:
    context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(["regrow.testing"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_train_rank, args=(method, rank, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert all(p.exitcode == 0 for p in processes), f"{method.name}: training on two ranks failed; see above"
        states = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), f"{method.name}: two ranks disagree on {key}"


def _train_rank(method: Method, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    run = _Run(method, rank)
    run.steps(STEPS // 2)
    torch.save(run.model.state_dict(), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _average_gradients(model: nn.Module) -> None:
    if dist.is_available() and dist.is_initialized():
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())


# ---- 5: memory ------------------------------------------------------------------------------------


def _check_memory(method: Method, block: int) -> int:
    """Peak bytes of deciding one update of a 512 x 512 layer at density 0.1."""
    rows, cols = (n // block for n in _MEMORY_LAYER)
    case = _case(rows, cols, block, 0.1, 0.3, 0.5, seed=0, tokens=64)
    signals = case.signals(method)
    method.propose(case.signals(method))  # whatever is loaded once
    with _Memory(case.x, case.g, *case.layer.state_dict().values()) as memory:
        method.propose(signals)
    limit = 4 * _MEMORY_LAYER[0] * _MEMORY_LAYER[1]
    assert memory.largest < limit, (
        f"{method.name} formed a tensor of {memory.largest} bytes, as large as the dense weight ({limit})"
    )
    return memory.peak


class _Memory(TorchDispatchMode):
    """Counts the bytes of every storage that torch operations make inside the block."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known = WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._known:
                self._known.add(storage)
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.now += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
        return output

    def _freed(self, n_bytes: int) -> None:
        self.now -= n_bytes
