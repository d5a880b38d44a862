"""Methods whose density falls: where the curves lie, whose blocks go, and what that is on the mean."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from regrow import BlockSparseLinear, BlockTopology, RegrowError, UpdateSchedule
from regrow.methods import Gradient, Method, Signals, available, create
from regrow.methods.density import by_norm, cubic, geometric, sigmoid
from regrow.methods.journey import mean_density as journey_mean
from regrow.methods.journey import window
from regrow.methods.scores import block_norm
from regrow.optim import AdamW
from regrow.training import TopologyUpdater, mean_density

FALLING = ("gmp", "granet", "journey", "chtss")


def layer(rows: int, cols: int, n_blocks: int, *, seed: int, scale: float = 1.0, block: int = 2) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    topology = BlockTopology.random(rows, cols, n_blocks, generator)
    values = scale * torch.randn(n_blocks, block, block, generator=generator)
    return Signals(values, topology, 0.0, torch.Generator().manual_seed(seed), start_blocks=n_blocks)


@pytest.mark.parametrize(
    ("total", "first", "last", "final", "mean"),
    [
        # The published figures belong to final *sparsities* of 40 % and 20 %, densities of .6 and .8:
        # (2500 + 6375 * .4 / ln(1 / .6) + 4175 * .6) / 13050 = .7660; a final density of .4 would make that
        # (2500 + 6375 * .6 / ln(1 / .4) + 4175 * .4) / 13050 = .6394.
        (13050, 2500, 8875, 0.6, 0.7660),
        (11200, 2500, 8100, 0.8, 0.8928),
    ],
)
def test_journey_has_the_published_figures(total: int, first: int, last: int, final: float, mean: float) -> None:
    begins, ends = window(1.0, final)
    assert begins * total == pytest.approx(first, abs=25) and ends * total == pytest.approx(last, abs=25)  # of hundreds
    assert journey_mean(1.0, final) == pytest.approx(mean, abs=5e-4)
    # the same from the published steps alone, a step counting its density
    falling = (1 - final) / -torch.tensor(final).log().item()
    assert (first + (last - first) * falling + (total - last) * final) / total == pytest.approx(mean, abs=1e-4)
    # and as the updater would train it, an update every 50 steps
    planned = mean_density(create("journey", final_density=final), UpdateSchedule(total, total // 50), 1.0)
    assert planned == pytest.approx(mean, abs=2e-3)


def test_the_published_figures_are_not_those_of_these_densities() -> None:
    assert journey_mean(1.0, 0.4) == pytest.approx(0.610, abs=1e-3)
    assert journey_mean(1.0, 0.2) == pytest.approx(0.399, abs=1e-3)


@settings(max_examples=30)
@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.floats(0.0, 0.9), st.floats(0.05, 1.0))
@example(1.0, 0.9999999999999999, 0.5, 0.5)
def test_journeys_window_shares_out_the_compute(start: float, ratio: float, begin: float, rest: float) -> None:
    final, end = start * ratio, begin + rest * (1 - begin)
    first, last = window(start, final, begin, end)
    n = 5_000
    at = [(i + 0.5) / n for i in range(n)]
    journey = create("journey", final_density=final, begin=begin, end=end)
    cost = [journey.density_at(progress, start) / n for progress in at]
    before = sum(c for c, progress in zip(cost, at, strict=True) if progress < first)
    after = sum(c for c, progress in zip(cost, at, strict=True) if progress >= last)
    assert before / sum(cost) == pytest.approx(begin, abs=5e-3)
    assert after / sum(cost) == pytest.approx(1 - end, abs=5e-3)
    assert sum(cost) == pytest.approx(journey_mean(start, final, begin, end), rel=1e-3)


@pytest.mark.parametrize("curve", [cubic, sigmoid, geometric])
@given(start=st.floats(0.01, 1.0), ratio=st.floats(0.01, 1.0))
def test_curves_fall_from_one_end_to_the_other(curve: object, start: float, ratio: float) -> None:
    values = [curve(start, start * ratio, i / 20) for i in range(21)]
    assert values[0] == pytest.approx(start) and values[-1] == pytest.approx(start * ratio)
    assert all(a >= b - 1e-12 for a, b in pairwise(values))


def test_the_sigmoid_is_the_logistic_function_stretched() -> None:
    def logistic(p: float) -> float:
        return float(torch.sigmoid(torch.tensor(6 * (p - 0.5), dtype=torch.float64)))

    for p in (0.0, 0.2, 0.5, 0.7, 1.0):
        q = (logistic(p) - logistic(0)) / (logistic(1) - logistic(0))
        assert sigmoid(0.5, 0.1, p) == pytest.approx(0.5 - 0.4 * q)


@pytest.mark.parametrize("seed", range(10))
def test_the_strongest_blocks_of_the_whole_model_stay(seed: int) -> None:
    layers = {f"l{i}": layer(6, 4 + i, 20, seed=10 * seed + i, scale=1 + i / 4) for i in range(4)}
    density = 0.3
    n = round(density * sum(s.topology.n_positions for s in layers.values()))
    blocks = by_norm(layers, lambda progress, start: density, "l2")
    ranked = sorted(((float(x), name) for name, s in layers.items() for x in block_norm(s.values, "l2")), reverse=True)
    wanted = {name: sum(owner == name for _, owner in ranked[:n]) for name in layers}
    assert blocks == wanted and len(set(blocks.values())) > 1  # each has one among them here


def test_every_layer_keeps_a_block_and_ties_go_to_the_first() -> None:
    weak, strong = layer(2, 4, 8, seed=0, scale=1e-6), layer(2, 4, 8, seed=1)
    assert by_norm({"weak": weak, "strong": strong}, lambda *_: 0.5, "l1") == {"weak": 1, "strong": 7}
    assert by_norm({"weak": weak, "strong": strong}, lambda *_: 1e-9, "l1") == {"weak": 1, "strong": 1}
    same = {name: replace(weak, values=torch.ones(8, 2, 2)) for name in "abc"}
    assert by_norm(same, lambda *_: 0.5, "l1") == {"a": 8, "b": 3, "c": 1}
    assert by_norm(same, lambda *_: 1.0, "l1") == {"a": 8, "b": 8, "c": 8}


def test_blocks_of_different_sizes_are_not_ranked_together() -> None:
    layers = {"a": layer(2, 4, 8, seed=0), "b": layer(2, 4, 8, seed=1, block=4)}
    with pytest.raises(RegrowError, match="must have one size, got 2x2, 4x4"):
        create("journey").allocate(layers)


@pytest.mark.parametrize("name", FALLING)
def test_the_plan_is_what_happens(name: str) -> None:
    """The mean density of the plan is that of the layers as they train, to whole blocks."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(BlockSparseLinear(16, 16, block_size=1, density=0.6) for _ in range(2)))
    optimizer = AdamW(model.parameters(), lr=0.01)
    method, schedule = create(name, final_density=0.2), UpdateSchedule(60, 12, 0.3)
    updater = TopologyUpdater(model, optimizer, method, schedule=schedule)
    densities = []
    for _ in range(60):
        densities.append(sum(layer.topology.n_blocks for layer in model) / (2 * 256))
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        updater.step()
    assert densities[-1] == pytest.approx(0.2, abs=0.003) and sorted(densities, reverse=True) == densities
    start = densities[0]
    assert mean_density(method, schedule, start) == pytest.approx(sum(densities) / 60, abs=0.003)


def test_granet_is_rigl_once_the_density_has_arrived() -> None:
    topology = BlockTopology.random(9, 7, 15, torch.Generator().manual_seed(0))
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x, g = torch.randn(30, 28, generator=generator), torch.randn(30, 36, generator=generator)
        values = torch.randn(15, 4, 4, generator=generator)
        signals = Signals(values, topology, 0.4, torch.Generator(), gradient=Gradient(x, g, 4), progress=1.0)
        granet, rigl = (create(name).propose(signals) for name in ("granet", "rigl"))
        assert granet.slots.tolist() == rigl.slots.tolist()
        assert (granet.rows.tolist(), granet.cols.tolist()) == (rigl.rows.tolist(), rigl.cols.tolist())


def test_granet_prunes_first_and_exchanges_a_share_of_what_is_left() -> None:
    generator = torch.Generator().manual_seed(0)
    topology = BlockTopology.random(8, 8, 40, generator)
    values = torch.randn(40, 1, 1, generator=generator)
    x, g = torch.randn(30, 8, generator=generator), torch.randn(30, 8, generator=generator)
    signals = Signals(values, topology, 0.5, torch.Generator(), target=20, gradient=Gradient(x, g, 1))
    before = topology.keys()
    update = create("granet").propose(signals)
    strongest = set(before[values.flatten().abs().argsort(descending=True)[:10]].tolist())
    topology.reallocate(update)
    after = set(topology.keys().tolist())
    assert len(after) == 20 and strongest <= after
    scores = (g.T @ x).abs().flatten()
    scores[list(strongest)] = -1
    assert after - strongest == set(scores.argsort(descending=True)[:10].tolist())


def test_chtss_without_decay_is_chts() -> None:
    for seed in range(10):
        signals = replace(layer(9, 7, 20, seed=seed), fraction=0.3)
        chts, chtss = (
            create(name).propose(replace(signals, generator=torch.Generator().manual_seed(seed)))
            for name in ("chts", "chtss")
        )
        assert chts.slots.tolist() == chtss.slots.tolist() and chts.rows.tolist() == chtss.rows.tolist()


def test_mean_densities_of_methods_that_keep_theirs() -> None:
    schedule = UpdateSchedule(100, 10)
    for name in set(available()) - set(FALLING) - {"acdc"}:
        assert mean_density(create(name), schedule, 0.25) == 0.25, name


def test_masked_dense_weights_count_where_they_are_not_zero() -> None:
    schedule = UpdateSchedule(40, 4)
    assert mean_density(create("acdc"), schedule, 0.1) == pytest.approx(0.55)
    assert mean_density(create("acdc", dense_until=0.25), schedule, 0.1) == pytest.approx(0.25 + 0.075)
    assert mean_density(create("acdc", unused="freeze"), schedule, 0.1) == 1.0


def test_a_method_without_a_plan_has_no_mean_density() -> None:
    class Moody(Method):
        name = "moody"

        def propose(self, signals: Signals) -> None:
            return None

        def allocate(self, layers: dict) -> dict:
            return dict.fromkeys(layers, 1)

    assert mean_density(Moody(), UpdateSchedule(100, 10), 0.5) is None
    assert mean_density(Moody(), UpdateSchedule(100, 1), 0.5) == 0.5  # which never updates


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("journey", {"final_density": 0.0}, r"final_density must lie in \(0, 1\]"),
        ("journey", {"begin": 0.8}, "begin must be less than end"),
        ("granet", {"end": 1.5}, r"end must lie in \[0, 1\]"),
        ("chtss", {"steepness": 0}, "steepness must be positive"),
        ("chtss", {"start_power": -1}, "start_power must be >= 0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        create(name, **options)


@pytest.mark.parametrize("name", FALLING)
def test_a_layer_that_starts_too_sparse_is_refused(name: str) -> None:
    with pytest.raises(RegrowError, match=f"starts at density 0.133, below final_density=0.5; {name} only lets"):
        create(name, final_density=0.5).check_layers({"up": BlockTopology.random(6, 5, 4)})


# ---- growth of gse --------------------------------------------------------------------------------


def gse_signals(seed: int, *, block: int = 4, loud: float = 1.0) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    topology = BlockTopology.random(9, 7, 15, generator)
    x, g = torch.randn(30, 7 * block, generator=generator), torch.randn(30, 9 * block, generator=generator)
    x[:, :block] *= loud
    values = torch.randn(15, block, block, generator=generator)
    return Signals(values, topology, 0.4, torch.Generator().manual_seed(seed), gradient=Gradient(x, g, block))


def new_positions(signals: Signals, update: object) -> set[int]:
    return set((update.rows * signals.topology.n_block_cols + update.cols).tolist())


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_normalised_growth_ranks_by_the_cosine(seed: int, block: int) -> None:
    signals = gse_signals(seed, block=block)
    update = create("gse", growth="normalised", candidates=99.0).propose(signals)
    x, g = signals.gradient.x.view(30, 7, block), signals.gradient.g.view(30, 9, block)
    scores = torch.zeros(9, 7)
    for i in range(9):
        for j in range(7):
            whole = (g[:, i].T @ x[:, j]).norm()
            scores[i, j] = whole / (g[:, i].norm() * x[:, j].norm())
    assert scores.max() <= 1
    scores.view(-1)[signals.topology.keys()] = -1
    assert new_positions(signals, update) == set(scores.flatten().argsort(descending=True)[:6].tolist())


def test_normalised_growth_does_not_gather_on_a_loud_input() -> None:
    def on_the_loud_input(growth: str) -> int:
        drawn = 0
        for seed in range(20):
            update = create("gse", growth=growth, candidates=99.0).propose(gse_signals(seed, loud=100.0))
            drawn += int((update.cols == 0).sum())
        return drawn

    assert on_the_loud_input("gradient") > 3 * on_the_loud_input("normalised")
    for seed in range(5):  # how loud an input is plays no part at all
        normalised = create("gse", growth="normalised", candidates=99.0)
        quiet, loud = (normalised.propose(gse_signals(seed, loud=by)) for by in (1.0, 64.0))
        assert quiet.rows.tolist() == loud.rows.tolist() and quiet.cols.tolist() == loud.cols.tolist()


def test_an_input_that_is_zero_is_no_error() -> None:
    signals = gse_signals(0, loud=0.0)
    update = create("gse", growth="normalised").propose(signals)
    assert len(update) == 6


def test_a_share_of_what_comes_is_random() -> None:
    seen: set[int] = set()
    for seed in range(60):
        signals = gse_signals(0)
        signals = replace(signals, generator=torch.Generator().manual_seed(seed))
        best = create("gse", candidates=99.0).propose(signals)
        half = create("gse", candidates=99.0, random_share=0.5).propose(signals)
        assert len(half) == len(best) == 6
        three = set(list(zip(best.rows.tolist(), best.cols.tolist(), strict=True))[:3])  # strongest first
        assert three < set(zip(half.rows.tolist(), half.cols.tolist(), strict=True))
        seen |= new_positions(signals, half)
    assert seen == set(range(63)) - set(signals.topology.keys().tolist())


def test_all_random_growth_looks_at_no_candidate() -> None:
    signals = gse_signals(0)
    update = create("gse", random_share=1.0).propose(replace(signals, gradient=Gradient(*[torch.empty(0, 1)] * 2, 1)))
    assert len(update) == 6 and not new_positions(signals, update) & set(signals.topology.keys().tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growth": "cosine"}, "growth must be 'gradient' or 'normalised', got 'cosine'"),
        ({"random_share": 1.5}, r"random_share must lie in \[0, 1\]"),
    ],
)
def test_options_of_growth_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RegrowError, match=message):
        create("gse", **options)
