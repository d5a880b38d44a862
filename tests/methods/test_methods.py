"""DynSparse does what its paper says; the registry says what is wrong."""

from dataclasses import dataclass, replace

import pytest
import torch

from regrow import BlockTopology, RegrowError
from regrow.methods import Gradient, Method, Signals, available, create, register
from regrow.methods.cht import ch2_l3n
from regrow.methods.scores import block_norm, random_keys


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
    with pytest.raises(RegrowError, match="unknown method 'sett'; choose one of acdc, cht, chts, chtss, dynsparse"):
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


def gradient_signals(fraction: float, *, rows: int, cols: int, block: int, n_blocks: int, seed: int) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    topology = BlockTopology.random(rows, cols, n_blocks, generator)
    values = torch.randn(n_blocks, block, block, generator=generator)
    x, g = torch.randn(30, cols * block, generator=generator), torch.randn(30, rows * block, generator=generator)
    return Signals(values, topology, fraction, torch.Generator().manual_seed(seed), gradient=Gradient(x, g, block))


def dense_gradient(signals: Signals) -> torch.Tensor:
    """Block norms [R, C] of the gradient, formed whole."""
    given = signals.gradient
    b = given.block_size
    whole = (given.g.T @ given.x).view(given.n_block_rows, b, given.n_block_cols, b)
    return whole.abs().sum(dim=(1, 3))


def new_positions(signals: Signals, update: object) -> set[int]:
    return set((update.rows * signals.topology.n_block_cols + update.cols).tolist())


@pytest.mark.parametrize(
    ("rows", "cols", "block", "n_blocks"), [(40, 24, 1, 96), (6, 5, 4, 12), (1, 40, 2, 9), (40, 1, 2, 9)]
)
def test_the_gradient_in_pieces_is_the_dense_one(rows: int, cols: int, block: int, n_blocks: int) -> None:
    given = gradient_signals(0.3, rows=rows, cols=cols, block=block, n_blocks=n_blocks, seed=3)
    pieces = list(given.gradient.norms("l1"))
    torch.testing.assert_close(torch.cat([scores for _, scores in pieces]), dense_gradient(given))
    assert [first for first, _ in pieces] == list(range(0, rows, max(1, rows // 16)))
    r, c = torch.tensor([0, rows - 1]), torch.tensor([cols - 1, 0])
    whole = given.gradient.g.T @ given.gradient.x
    for block_gradient, i, j in zip(given.gradient.at(r, c), r.tolist(), c.tolist(), strict=True):
        expected = whole[i * block : (i + 1) * block, j * block : (j + 1) * block]
        torch.testing.assert_close(block_gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 4])
def test_rigl_takes_the_strongest_gradients(block: int) -> None:
    for seed in range(10):
        given = gradient_signals(0.4, rows=9, cols=7, block=block, n_blocks=15, seed=seed)
        update, keys = create("rigl").propose(given), given.topology.keys()
        weakest = set(block_norm(given.values).argsort()[:6].tolist())
        kept = [k for slot, k in enumerate(keys.tolist()) if slot not in weakest]
        scores = dense_gradient(given).flatten()
        scores[kept] = -1
        best = set(scores.argsort(descending=True)[:6].tolist())
        stays = best & {int(keys[slot]) for slot in weakest}
        assert new_positions(given, update) == best - stays
        assert set(update.slots.tolist()) == {slot for slot in weakest if int(keys[slot]) not in stays}


@pytest.mark.parametrize("sampling", ["uniform", "norms", "sketch"])
@pytest.mark.parametrize("regrow_pruned", [True, False])
def test_gse_with_all_candidates_is_rigl(sampling: str, regrow_pruned: bool) -> None:
    for seed in range(10):
        given = gradient_signals(0.3, rows=9, cols=7, block=4, n_blocks=15, seed=seed)
        rigl = create("rigl", regrow_pruned=regrow_pruned).propose(given)
        gse = create("gse", sampling=sampling, candidates=99.0, regrow_pruned=regrow_pruned).propose(given)
        assert rigl.slots.tolist() == gse.slots.tolist()
        assert rigl.rows.tolist() == gse.rows.tolist() and rigl.cols.tolist() == gse.cols.tolist()


def test_gse_samples_likely_gradients_more_often() -> None:
    x, g = torch.ones(5, 8), torch.ones(5, 8)  # an odd number of signs never cancels
    x[:, 0] = g[:, 0] = 50.0
    topology = BlockTopology.from_coordinates(list(range(1, 8)), list(range(1, 8)), n_block_rows=8, n_block_cols=8)
    for sampling, least in (("norms", 90), ("sketch", 90), ("uniform", 0)):
        hits = 0
        for seed in range(100):
            given = Signals(
                torch.ones(7, 1, 1), topology, 1 / 7, torch.Generator().manual_seed(seed), gradient=Gradient(x, g, 1)
            )
            hits += new_positions(given, create("gse", sampling=sampling).propose(given)) == {0}
        assert hits >= least
        assert sampling != "uniform" or hits < 40  # 7 candidates of 57


def test_set_keeps_blocks_that_are_drawn_again() -> None:
    kept = 0
    for seed in range(50):
        given = signals(0.5, seed, n_blocks=20)
        update = create("set").propose(given)
        kept += 10 - len(update)
        assert not new_positions(given, update) & set(given.topology.keys().tolist())
    assert kept > 50


def test_cht_scores_equal_the_dense_formula() -> None:
    links = BlockTopology.random(37, 23, 160, torch.Generator().manual_seed(0))
    a = torch.zeros(37, 23)
    a[links.coordinates()] = 1

    def weights(adjacency: torch.Tensor) -> torch.Tensor:
        shared, degree = adjacency @ adjacency.T, adjacency.sum(1)
        outside = torch.where(shared > 0, (degree - shared).clamp_min(1) - 1, 0)
        return (shared + (shared > 0)) / (outside + 1)

    expected = weights(a) @ a + (weights(a.T) @ a.T).T
    torch.testing.assert_close(torch.cat([scores for _, scores in ch2_l3n(links)]), expected)


def test_chts_grows_in_proportion_to_the_score() -> None:
    weights, counts = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.zeros(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        counts[random_keys(weights, generator).argmax()] += 1
    torch.testing.assert_close(counts / 4000, weights / 8, atol=0.03, rtol=0)


def test_chts_removal_hardens_with_progress() -> None:
    def mean_rank(progress: float) -> float:
        ranks = []
        for seed in range(100):
            given = replace(signals(0.25, seed), progress=progress)
            update = create("chts").propose(given)
            order = block_norm(given.values).argsort().argsort()
            ranks += [] if update is None else order[update.slots].tolist()
        return sum(ranks) / len(ranks)

    assert mean_rank(1.0) < mean_rank(0.0) - 0.5


def test_snfs_moves_the_budget_and_keeps_the_total() -> None:
    given = {f"layer{i}": replace(signals(0.5, i), momentum=torch.full((12, 4, 4), 0.1 * i)) for i in range(5)}
    targets = create("snfs").allocate(given)
    assert sum(targets.values()) == 5 * 12
    assert targets["layer0"] == 6 and targets["layer4"] > targets["layer1"]
    capped = create("snfs", cap=0.5).allocate(given)
    assert sum(capped.values()) == 60 and max(capped.values()) <= 15


def test_snfs_without_momentum_leaves_every_layer_its_size() -> None:
    assert create("snfs").allocate({"a": signals(0.5), "b": signals(0.5)}) == {"a": 12, "b": 12}


def test_srigl_gives_every_active_row_the_same_number() -> None:
    removed = 0
    for seed in range(20):
        given = gradient_signals(0.3, rows=12, cols=10, block=4, n_blocks=40, seed=seed)
        given.values[given.topology.coordinates()[0] < 2] *= 0.01  # rows that deserve to go
        given.gradient.g[:, :8] *= 0.01
        update = create("srigl", gamma=0.9).propose(given)
        given.topology.reallocate(update)
        per_row = given.topology.row_ptr.diff()
        active = int((per_row > 0).sum())
        assert set(per_row.tolist()) <= {0, 40 // active}
        removed += 12 - active
    assert removed > 0


def test_gmp_follows_the_cubic() -> None:
    gmp, given = create("gmp", final_density=0.2, begin=0.1, end=0.6), signals(0.5, n_blocks=30)
    blocks = [gmp.allocate({"a": replace(given, progress=p)})["a"] for p in (0.0, 0.1, 0.35, 0.6, 1.0)]
    assert blocks == [30, 30, round(30 * (0.2 + 0.8 * 0.5**3)), 6, 6]


def test_quota_gives_every_group_the_same_number() -> None:
    for rows, quota_rows in ((6, 1), (6, 2)):
        given = signals(0.3, n_blocks=13)
        update = create("dynsparse", quota_rows=quota_rows).propose(given)
        given.topology.reallocate(update)
        per_group = given.topology.row_ptr.diff().view(-1, quota_rows).sum(1)
        assert per_group.max() - per_group.min() <= 1 and per_group.sum() == 13 and len(per_group) == rows // quota_rows


def test_unexplored_growth_visits_everything_first() -> None:
    from regrow.topology import ExploredPositions

    given = signals(0.5)
    explored = ExploredPositions(30)
    explored.add(given.topology.keys())
    for _ in range(3):  # 12 + 3 * 6 = 30
        update = create("dynsparse", growth="unexplored").propose(replace(given, explored=explored))
        assert not explored.contains(update.rows * 5 + update.cols).any()
        given.topology.reallocate(update)
        explored.add(given.topology.keys())
    assert explored.coverage == 1.0
    assert len(create("dynsparse", growth="unexplored").propose(replace(given, explored=explored))) == 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dynsparse", {"quota_rows": -1}, "quota_rows must be >= 0"),
        ("dynsparse", {"growth": "fast"}, "growth must be 'random' or 'unexplored'"),
        ("dynsparse", {"quota_rows": 1, "growth": "unexplored"}, "choose one"),
        ("gse", {"sampling": "odd"}, "sampling must be"),
        ("gse", {"candidates": 0}, "candidates must be positive"),
        ("gmp", {"begin": 0.9}, "begin must be less than end"),
        ("gmp", {"final_density": 0}, r"final_density must lie in \(0, 1\]"),
        ("srigl", {"gamma": 2}, r"gamma must lie in \[0, 1\]"),
        ("snfs", {"cap": 0}, "cap must lie"),
        ("smet", {"regrow_warmup": -1}, "regrow_warmup must be >= 0"),
        ("chts", {"end_power": -1}, "end_power must be >= 0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        create(name, **options)


def test_layers_that_do_not_suit_are_refused() -> None:
    sparse = BlockTopology.random(6, 5, 4)
    with pytest.raises(
        RegrowError, match=r"up: 4 blocks leave less than one for each of 6 block rows, which srigl needs"
    ):
        create("srigl").check_layer("up", sparse)
    with pytest.raises(RegrowError, match="less than one for each of its 6 groups"):
        create("dynsparse", quota_rows=1).check_layer("up", sparse)
    with pytest.raises(RegrowError, match="quota_rows=4 does not divide the 6 block rows of up"):
        create("dynsparse", quota_rows=4).check_layer("up", sparse)
    with pytest.raises(RegrowError, match="below final_density"):
        create("gmp", final_density=0.5).check_layer("up", sparse)


def test_the_documentation_is_what_the_methods_say() -> None:
    from pathlib import Path

    from regrow.cli.catalog import listing, markdown

    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert page.read_text() == markdown() + "\n", "run: regrow methods --markdown > docs/methods.md"
    for name in ("dynsparse", "static", "set", "smet", "gse", "cht", "chts", "rigl", "snfs", "srigl", "gmp"):
        assert f"\n{name} " in listing()


def test_the_comparison_is_what_the_committed_runs_say() -> None:
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parents[2]
    made = subprocess.run(
        [sys.executable, "benchmarks/compare_methods.py", "page", "benchmarks/methods.json"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == (root / "docs" / "methods-compared.md").read_text()
