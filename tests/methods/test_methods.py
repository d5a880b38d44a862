"""DynSparse does what its paper says; the registry says what is wrong."""

from dataclasses import dataclass

import pytest
import torch

from regrow import BlockTopology, RegrowError
from regrow.methods import Method, Signals, available, create, register
from regrow.methods.scores import block_norm


def signals(fraction: float, seed: int = 0, n_blocks: int = 12) -> Signals:
    topology = BlockTopology.random(6, 5, n_blocks, torch.Generator().manual_seed(1))
    values = torch.randn(n_blocks, 4, 4, generator=torch.Generator().manual_seed(2))
    return Signals(values, topology, fraction, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2), ("linf", float("inf"))])
def test_the_weakest_blocks_by_the_chosen_norm_go(norm: str, order: float) -> None:
    given = signals(0.25)
    update = create("dynsparse", norm=norm).propose(given)
    strength = torch.stack([torch.linalg.vector_norm(block, order) for block in given.values])
    assert update is not None and len(update) == 3
    assert set(update.slots.tolist()) == set(strength.argsort()[:3].tolist())
    torch.testing.assert_close(block_norm(given.values, norm), strength)


def test_new_positions_are_random_over_everything_but_survivors() -> None:
    seen, pruned_again = set(), 0
    for seed in range(200):
        given = signals(0.5, seed)
        update = create("dynsparse").propose(given)
        keys = given.topology.keys()
        positions = set((update.rows * 5 + update.cols).tolist())
        survivors = set(keys.tolist()) - set(keys[update.slots].tolist())
        assert len(positions) == 6 and not positions & survivors
        pruned_again += bool(positions & set(keys[update.slots].tolist()))
        seen |= positions
    assert seen == set(range(30)) - survivors
    assert pruned_again > 0


def test_pruned_positions_can_be_excluded() -> None:
    for seed in range(50):
        given = signals(0.5, seed)
        update = create("dynsparse", regrow_pruned=False).propose(given)
        assert not set((update.rows * 5 + update.cols).tolist()) & set(given.topology.keys().tolist())


def test_a_full_layer_cannot_avoid_its_pruned_positions() -> None:
    with pytest.raises(RegrowError, match="only 0 of 30 positions are free"):
        create("dynsparse", regrow_pruned=False).propose(signals(0.5, n_blocks=30))


@pytest.mark.parametrize("method", ["static", "dynsparse"])
def test_a_fraction_of_nothing_moves_nothing(method: str) -> None:
    assert create(method).propose(signals(0.0)) is None


def test_group_lasso_shrinks_by_the_papers_formula() -> None:
    values = torch.randn(3, 4, 4)
    expected = values.clone()
    for block, original in zip(expected, values.clone(), strict=True):
        block -= 0.1 * 2.0 * 0.02 * 16**0.5 * original / (original.square().sum() + 1e-6).sqrt()
    create("dynsparse", group_lasso=2.0).regularise_(values, lr=0.1)
    torch.testing.assert_close(values, expected)


def test_errors_name_the_method_and_the_choices() -> None:
    with pytest.raises(RegrowError, match="unknown method 'sett'; choose one of dynsparse, static"):
        create("sett")
    with pytest.raises(RegrowError, match="has no option 'colour'; its options: norm"):
        create("dynsparse", colour=1)
    with pytest.raises(RegrowError, match="norm must be one of l1, l2, linf"):
        create("dynsparse", norm="l3")
    with pytest.raises(RegrowError, match="group_lasso must be >= 0"):
        create("dynsparse", group_lasso=-1)


def test_registration_checks_the_class() -> None:
    with pytest.raises(RegrowError, match="must be a dataclass"):
        register("odd")(type("Odd", (Method,), {"propose": lambda self, signals: None}))

    @dataclass(frozen=True)
    class NoDefault(Method):
        strength: float

        def propose(self, signals: Signals) -> None:
            return None

    with pytest.raises(RegrowError, match="field 'strength' needs a default"):
        register("odd")(NoDefault)
    with pytest.raises(RegrowError, match="registered twice"):
        register("static")(dataclass(frozen=True)(type("Other", (Method,), {"propose": lambda self, signals: None})))
    assert "odd" not in available()
