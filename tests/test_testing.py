"""Every method passes the conformance suite, and the suite fails methods that break its rules.

>>> "the suite wants an example in the module of every method"[:9]
'the suite'
"""

from dataclasses import dataclass, field

import pytest
import torch

from regrow.errors import RegrowError
from regrow.methods import Method, Signals, WeightTransform, available, create, method_class
from regrow.methods.dynsparse import DynSparse
from regrow.testing import check_method
from regrow.topology import TopologyUpdate

SPARSE = [name for name in available() if not create(name).dense_layout]


@pytest.mark.parametrize("name", SPARSE)
def test_every_method_conforms(name: str) -> None:
    report = check_method(name)
    # Indices at block edge 1 are 8 bytes each while they are sorted; values and gradients are 4.
    assert report.extra_bytes[1] < 4 * report.dense_bytes and report.extra_bytes[16] < report.dense_bytes / 4


@pytest.mark.parametrize(
    "options",
    [
        {"growth": "unexplored"},
        {"quota_rows": 1},
        {"quota_rows": 2},
        {"regrow_pruned": False, "norm": "linf"},
        {"group_lasso": 1.0},
    ],
)
def test_every_option_of_dynsparse_conforms(options: dict) -> None:
    method = DynSparse(**options)
    if not method.regrow_pruned:  # a nearly full layer cannot avoid its pruned positions, and says so
        return check_method(_WithRoom(norm="linf"), ranks=1) and None
    check_method(method, ranks=1)


def test_methods_on_dense_layers_are_declared_and_no_more() -> None:
    transforms = {name for name in available() if issubclass(method_class(name), WeightTransform)}
    # Their own rules: tests/training/test_masked.py and tests/methods/test_transforms.py.
    assert set(available()) - set(SPARSE) == {"acdc"} | transforms
    with pytest.raises(RegrowError, match="acdc moves no blocks"):
        check_method("acdc")


@pytest.mark.parametrize("sampling", ["norms", "sketch"])
def test_every_sampling_of_gse_conforms(sampling: str) -> None:
    from regrow.methods.gse import GSE

    check_method(GSE(sampling=sampling, candidates=0.5))


@pytest.mark.parametrize("random_share", [0.0, 0.4, 1.0])
def test_normalised_growth_of_gse_conforms(random_share: float) -> None:
    from regrow.methods.gse import GSE

    check_method(GSE(growth="normalised", random_share=random_share))


@dataclass(frozen=True)
class _WithRoom(DynSparse):
    """DynSparse that never draws a pruned position, on layers that have room for that.

    >>> _WithRoom().regrow_pruned
    False
    """

    regrow_pruned: bool = field(default=False, metadata={"help": "fixed"})

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        room = signals.topology.n_positions - signals.topology.n_blocks
        return None if signals.n_moved > room else super().propose(signals)


class _Broken(Method):
    """A rule-breaker."""

    name, paper, year, link = "broken", "none", 2026, "nowhere"


def _first(signals: Signals, k: int = 1) -> TopologyUpdate:
    positions = signals.topology.free_positions(k, signals.generator)
    columns = signals.topology.n_block_cols
    return TopologyUpdate(torch.arange(k), positions // columns, positions % columns)


def _changes_values(signals: Signals) -> TopologyUpdate:
    signals.values[0] += 1
    return _first(signals)


def _uses_global_randomness(signals: Signals) -> TopologyUpdate:
    torch.rand(1)
    return _first(signals)


def _depends_on_the_past(signals: Signals) -> TopologyUpdate:
    _depends_on_the_past.calls = getattr(_depends_on_the_past, "calls", 0) + 1
    update = _first(signals)
    return TopologyUpdate(update.slots + _depends_on_the_past.calls % 2, update.rows, update.cols)


def _takes_an_occupied_position(signals: Signals) -> TopologyUpdate:
    rows, cols = signals.topology.coordinates()
    return TopologyUpdate(torch.tensor([0]), rows[-1:], cols[-1:])


def _loses_a_block(signals: Signals) -> TopologyUpdate:
    empty = torch.empty(0, dtype=torch.int64)
    return TopologyUpdate(torch.tensor([0]), empty, empty)


def _forms_the_dense_weight(signals: Signals) -> TopologyUpdate:
    b = signals.values.shape[1]
    torch.zeros(signals.topology.n_block_rows * b, signals.topology.n_block_cols * b)
    return _first(signals)


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (_changes_values, "changed what it looked at"),
        (_uses_global_randomness, "global random state"),
        (_depends_on_the_past, "two different updates"),
        (_takes_an_occupied_position, "cannot be applied"),
        (_loses_a_block, "was asked for"),
        (_forms_the_dense_weight, "as large as the dense weight"),
    ],
)
def test_a_method_that_breaks_a_rule_fails(rule: object, complaint: str) -> None:
    cls = dataclass(frozen=True)(
        type(
            "Odd",
            (_Broken,),
            {"propose": lambda self, signals: rule(signals), "__doc__": "Odd.", "__module__": __name__},
        )
    )
    with pytest.raises(AssertionError, match=complaint):
        check_method(cls(), ranks=1)


def test_an_undeclared_method_fails() -> None:
    @dataclass(frozen=True)
    class Anonymous(Method):
        """Nothing."""

        def propose(self, signals: Signals) -> None:
            return None

    with pytest.raises(AssertionError, match="name is not set"):
        check_method(Anonymous())
