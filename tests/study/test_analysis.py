"""Reading records, grouping them, comparing them, and the tables of claims."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from regrow.errors import RegrowError
from regrow.study.analysis import (
    DenseFamily,
    best_learning_rates,
    configurations,
    difference,
    frontier_members,
    spearman,
)
from regrow.study.claims import claims
from regrow.study.claims.claim import Claim
from regrow.study.pareto import Estimate
from regrow.study.pictures import spread
from regrow.study.runs import Run, read_runs
from study import synthetic


def runs_of(*records: dict) -> list[Run]:
    return [Run(record) for record in records]


def with_losses(losses: dict[int, float], **changes) -> list[Run]:
    """A configuration whose losses are given by seed."""
    records = []
    for seed, loss in losses.items():
        record = synthetic.record(seed=seed, **changes)
        record["final"]["eval_mlm_loss"] = loss
        records.append(record)
    return runs_of(*records)


def table(runs: list[Run]) -> dict[str, Claim]:
    return {claim.id: claim for claim in claims(best_learning_rates(configurations(runs)))}


def test_files_and_folders_are_read_and_a_run_only_once(tmp_path: Path) -> None:
    records = [synthetic.record(seed=seed) for seed in range(3)]
    folder = synthetic.write(records, tmp_path / "deep" / "runs")
    (folder / "other.json").write_text('{"what": "no record"}')
    (folder / "torn.json").write_text('{"id": ')
    found, broken = read_runs([tmp_path, folder / f"{records[0]['id']}.json"])
    assert sorted(run.seed for run in found) == [0, 1, 2]
    assert len(broken) == 1 and "torn.json is not valid JSON" in broken[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "check the path"),
        ("{", "not valid JSON"),
        ("[1]", "no run record"),
        ('{"id": "a", "format": 1, "config": []}', "no run record"),
        ('{"id": "a", "format": 2, "config": {}}', "format 2"),
    ],
)
def test_a_named_file_that_is_no_record_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RegrowError, match=message):
        read_runs([path])


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegrowError, match="no run record in"):
        read_runs([tmp_path])


def test_a_record_of_nothing_but_its_identity_is_a_run() -> None:
    run = Run({"id": 7, "format": 1, "config": {}})
    assert (run.id, run.seed, run.loss, run.flops, run.seconds, run.coverage) == ("7", 0, None, None, None, None)
    assert run.learning_rate is None and run.n_updates is None and run.updates == []
    assert all(claim.verdict == "no data" and claim.missing for claim in table([run]).values())


@pytest.mark.parametrize(
    "damage",
    [
        {"final": {"eval_mlm_loss": "low"}, "flops": [1], "seconds": "long", "machine": 3, "topology": {"updates": {}}},
        {"curve": {"step": 1}, "patterns": [], "evaluations": "none", "topology": [], "final": None},
        {"config": {"size": "big", "density": "all", "seed": [], "steps": None, "dense": "no", "block_size": {}}},
        {"patterns": {"layer": [{"counts": [[1], [2, 3]]}, {"counts": "x"}, 4]}, "tokens": float("nan")},
    ],
)
def test_damaged_records_are_runs_without_what_is_damaged(damage: dict) -> None:
    from regrow.study.report import render, report_data

    page = render(report_data(runs_of(synthetic.record(), synthetic.record(seed=1) | damage)))
    assert "NaN" not in page.split('id="data">')[1].split("</script>")[0]


def test_seeds_make_a_configuration_and_settings_that_cannot_matter_do_not_part_it() -> None:
    runs = runs_of(
        synthetic.record(seed=0),
        synthetic.record(seed=1, output="elsewhere", workers=3),
        synthetic.record(seed=0, n_updates=80),
        synthetic.record(seed=0, dense=True),
        synthetic.record(seed=1, dense=True, density=0.5, method="rigl", n_updates=7, norm="l2"),
        synthetic.record(seed=0, method="static", n_updates=3),
        synthetic.record(seed=1, method="static", n_updates=5),
    )
    assert [len(c.runs) for c in configurations(runs)] == [2, 1, 2, 2]


def test_defaults_are_resolved() -> None:
    left, spelled = runs_of(synthetic.record("mini", n_updates=None), synthetic.record("mini", n_updates=20))
    assert left.n_updates == 20 and left.learning_rate == pytest.approx(8e-4 * 6.40, rel=1e-3)
    assert left.key == spelled.key
    # a given rate is that of the dense parameters too, whatever the rule says
    given, ruled = runs_of(
        synthetic.record("mini", learning_rate=left.learning_rate),
        synthetic.record("mini", learning_rate=left.learning_rate, lr_rule="supar", lr_scope="all"),
    )
    assert given.key == ruled.key != left.key


def test_a_size_is_the_same_by_its_name_and_by_its_numbers() -> None:
    named, numbered = runs_of(synthetic.record("mini"), synthetic.record("4/256/4"))
    assert named.size == numbered.size == "mini"
    rate = {"learning_rate": 1e-3}  # else the name has a tuned rate of its own
    assert len({Run(synthetic.record(size, **rate)).key for size in ("mini", "4/256/4")}) == 1
    assert Run({"id": 1, "config": {"size": "2/128"}}).size == "tiny"
    assert Run({"id": 1, "config": {"size": "3/192"}}).size == "3/192/3"
    assert Run({"id": 1, "config": {"size": "what"}}).size == "what"


def test_the_best_learning_rate_is_chosen_among_those_with_most_seeds() -> None:
    runs = (
        with_losses({0: 3.0, 1: 3.1}, learning_rate=1e-3)
        + with_losses({0: 2.9, 1: 3.0}, learning_rate=2e-3)
        + with_losses({0: 2.5}, learning_rate=4e-3)
        + runs_of(synthetic.record(seed=5, learning_rate=8e-3) | {"final": {}})
    )
    [tuned] = best_learning_rates(configurations(runs))
    assert tuned.best.get("learning_rate") == 2e-3 and tuned.tried == (1e-3, 2e-3, 4e-3) and not tuned.at_edge
    [scaled] = best_learning_rates(configurations(with_losses({0: 3.0}) + with_losses({0: 2.9}, lr_scale=0.5)))
    assert scaled.best.get("learning_rate") == scaled.tried[0] == pytest.approx(scaled.tried[1] / 2)


def test_differences_are_paired_by_seed() -> None:
    a, b, c = configurations(
        with_losses({0: 3.0, 1: 4.0, 2: 9.0})
        + with_losses({0: 2.9, 1: 3.9, 7: 1.0}, n_updates=80)
        + with_losses({8: 5.0, 9: 6.0}, n_updates=160)
    )
    paired = difference(a, b)
    assert paired is not None and paired.n == 2 and paired.mean == pytest.approx(0.1) and paired.sign == 1
    apart = difference(a, c)
    assert apart is not None and apart.n == 0 and apart.half_width is None and apart.sign == 0


def dense_and_sparse() -> list[Run]:
    """Dense of two sizes a factor 100 apart in cost; a sparse run in the middle, 0.2 below the line."""
    runs = []
    for seed in (0, 1):
        for size, cost, loss in (("2/64/1", 1e12, 3.0), ("4/256/4", 1e14, 1.0)):
            record = synthetic.record(size, dense=True, seed=seed) | {"seconds": cost / 1e12}
            record["flops"]["train_paper"], record["final"]["eval_mlm_loss"] = cost, loss + seed
            runs.append(Run(record))
        record = synthetic.record("4/256/4", seed=seed) | {"seconds": 5.0}
        record["flops"]["train_paper"], record["final"]["eval_mlm_loss"] = 1e13, 1.8 + seed + 0.001 * seed
        runs.append(Run(record))
    return runs


def test_the_dense_family_is_interpolated_seed_by_seed() -> None:
    *_, sparse = found = configurations(dense_and_sparse())
    family = DenseFamily(found, sparse)
    minus = family.difference()
    assert minus is not None and minus.n == 2 and minus.mean == pytest.approx(-0.1995) and minus.sign == -1
    assert family.loss() == pytest.approx(2.5)  # over both seeds
    assert family.reduction() == pytest.approx(10 ** (-0.1995), rel=1e-6)  # two decades for two nats
    # a sparse FLOP takes 0.5e-12 s, one of the dense model of that size 1e-12 s
    assert family.eps() == pytest.approx(0.5)
    assert family.reduction("seconds") == pytest.approx(0.5 * 10 ** (-0.1995), rel=1e-6)


def test_seconds_of_another_machine_and_losses_of_another_task_are_not_compared() -> None:
    runs = dense_and_sparse()
    other = [Run({**run.record, "machine": {"processor": "Other"}}) if run.dense else run for run in runs]
    *_, sparse = found = configurations(other)
    family = DenseFamily(found, sparse)
    assert family.reduction() is not None and family.reduction("seconds") is None and family.eps() is None
    changed = [Run({**run.record, "config": {**run.config, "data": "x"}}) if run.dense else run for run in runs]
    *_, sparse = found = configurations(changed)
    assert DenseFamily(found, sparse).members == []
    longer = [Run({**run.record, "config": {**run.config, "steps": 9}}) if run.dense else run for run in runs]
    *_, sparse = found = configurations(longer)
    assert DenseFamily(found, sparse).difference() is None


def test_frontier_members_leave_out_what_has_no_cost() -> None:
    found = configurations(dense_and_sparse() + runs_of(synthetic.record(n_updates=9) | {"flops": {}}))
    assert [c.first.family for c in frontier_members(found, "flops")] == ["dense", "dynsparse b=1 d=0.1", "dense"]


def test_rank_correlation() -> None:
    assert spearman([(1, 1), (2, 3), (3, 2), (4, 4)]) == pytest.approx(0.8)
    assert spearman([(1, 1), (2, 1), (3, 1)]) is spearman([(1, 2), (2, 1)]) is None
    assert spearman([(1, 1), (1, 1), (2, 2)]) == pytest.approx(1.0)


def test_claims_of_runs_that_follow_the_paper() -> None:
    found = table(runs_of(*synthetic.study()))
    assert list(found) == [*(f"C{i}" for i in range(1, 12)), "Gap"]
    supported = {name for name, claim in found.items() if claim.verdict == "supported"}
    assert supported == {"C1", "C2", "C3", "C5", "C6", "C7", "C9"}
    for name in ("C8", "C10", "C11", "Gap"):
        assert found[name].verdict == "no data" and found[name].missing
    for claim in found.values():
        assert all(len(row) == len(claim.columns) for row in claim.rows)


def test_claims_of_one_seed_are_undecided() -> None:
    found = table(runs_of(*synthetic.study(seeds=1)))
    assert {found[name].verdict for name in ("C1", "C2", "C3", "C5", "C7")} == {"undecided"}


def test_a_reversed_order_of_norms_contradicts() -> None:
    runs = [
        run
        for norm, loss in (("l1", 3.0), ("l2", 2.9), ("linf", 2.8))
        for run in with_losses({0: loss, 1: loss + 0.001}, norm=norm, block_size=16)
    ]
    assert table(runs)["C5"].verdict == "contradicted"


def test_methods_are_compared_whatever_options_each_has() -> None:
    found = runs_of(
        synthetic.record(patterns=True, growth="random"),
        synthetic.record(patterns=True, method="rigl", regrow_pruned=True),
    )
    claim = table(found)["C9"]
    assert claim.verdict == "supported" and len(claim.rows) == 2
    assert "spread over inputs 0." in claim.findings[0]
    fewer = [Run(run.record | {"patterns": {}}) for run in found]
    assert table(fewer)["C9"].verdict == "undecided" and "pictures" in table(fewer)["C9"].missing[0]
    spread_of = {str(family).split()[0]: inputs for _, family, _, _, inputs, _ in claim.rows}
    assert spread_of["rigl"] < 0.3 < 0.9 < spread_of["dynsparse"]


def gap_of(*others: list[Run]) -> Claim:
    """Beside large blocks at 3.0 and single weights at 2.8."""
    plain = [run for block, loss in ((1, 2.8), (16, 3.0)) for run in jittered(loss, block_size=block)]
    return table([*plain, *(run for runs in others for run in runs)])["Gap"]


def jittered(loss: float, **changes: Any) -> list[Run]:
    """Three seeds whose losses differ a little; what is changed decides how."""
    draw = random.Random(json.dumps(changes, sort_keys=True))
    return with_losses({seed: loss + draw.uniform(-2e-4, 2e-4) for seed in range(3)}, **changes)


@pytest.mark.parametrize(
    ("loss", "verdict", "finding"),
    [
        (2.8, "supported", ["lowrank closes 100% of the gap of blocks of 16"]),
        (2.9, "contradicted", ["lowrank closes 50% of the gap of blocks of 16"]),
        (3.1, "contradicted", []),
    ],
)
def test_whether_something_closes_the_gap_of_large_blocks(loss: float, verdict: str, finding: list[str]) -> None:
    claim = gap_of(jittered(loss, block_size=16, layer="lowrank"), jittered(3.0, block_size=16, method="rigl"))
    assert (claim.verdict, claim.findings) == (verdict, finding)
    assert [row[2] for row in claim.rows] == ["dynsparse, b = 1", "dynsparse", "lowrank", "rigl"]
    over_large, over_single = (float(str(cell).split()[0]) for cell in claim.rows[2][5:7])
    assert (over_large, over_single) == pytest.approx((loss - 3.0, loss - 2.8), abs=0.002)


def test_a_gap_is_not_closed_by_more_flops_nor_by_another_training() -> None:
    learned = [
        Run(run.record | {"flops": {"train_paper": 10 * (run.flops or 0)}})
        for run in jittered(2.7, block_size=16, layer="permuted", permutation="learned")
    ]
    fixed = jittered(3.0, block_size=16, layer="permuted", permutation="random")
    longer = jittered(2.5, block_size=16, method="rigl", steps=2000)
    claim = gap_of(learned, fixed, longer)
    assert [row[2] for row in claim.rows[2:]] == ["permuted, permutation = random", "permuted, permutation = learned"]
    assert claim.verdict == "contradicted"
    assert claim.findings == ["permuted, permutation = learned closes the gap, but at 10.0 times the FLOPs"]


def test_layer_options_bear_on_no_claim_of_the_paper() -> None:
    plain = [run for block, loss in ((1, 2.8), (16, 3.0)) for run in jittered(loss, block_size=block)]
    plain += jittered(3.1, block_size=16, method="rigl")
    permuted = [
        run
        for kind, loss in (("random", 2.5), ("learned", 2.6))  # two: like a method with its options in two ways
        for run in jittered(loss, block_size=16, layer="permuted", permutation=kind)
    ]
    alone, beside = table(plain), table([*plain, *permuted])
    assert alone["C7"].rows and len(alone["C9"].rows) == 2
    for name in alone.keys() - {"Gap"}:
        assert beside[name].rows == alone[name].rows, name
    assert len(beside["Gap"].rows) == len(alone["Gap"].rows) + 2
    assert permuted[0].family == "dynsparse permuted b=16 d=0.1"


def test_layers_of_other_densities_are_told_apart() -> None:
    dense_attention = jittered(3.1, block_size=16, layer="spark", distribution="*attention*=1.0")
    claim = gap_of(jittered(3.2, block_size=16, layer="spark"), dense_attention)
    names = [row[2] for row in claim.rows[2:]]
    assert sorted(map(str, names)) == ["spark, distribution = *attention*=1.0", "spark, distribution = uniform"]
    assert r"| spark, distribution = \*attention\*=1.0 |" in claim.markdown()


def test_votes() -> None:
    claim = Claim("C", "", [])
    verdicts = []
    for mean in (None, 0.1, -1.0, 1.0):
        claim.vote(None if mean is None else Estimate(mean, 0.1, 0.2, 3), -1)
        verdicts.append(claim.verdict)
    assert verdicts == ["no data", "undecided", "supported", "mixed"]


def test_the_learning_rate_rule_is_found_again() -> None:
    runs = []
    for density in (1.0, 0.5, 0.1):
        best = 1e-3 * {1.0: 1.0, 0.5: 1.89, 0.1: 6.40}[density]
        for factor, loss in ((0.5, 3.1), (1.0, 3.0), (2.0, 3.2)):
            runs += with_losses(
                {0: loss}, dense=density == 1.0, density=density, learning_rate=best * factor, size="2/64/1"
            )
    claim = table(runs)["C8"]
    assert claim.verdict == "supported" and len(claim.rows) == 2
    assert "exp(1.9" in claim.findings[0] and "paper: 1.969" in claim.findings[0]
    edge = table([run for run in runs if run.loss != 3.2])["C8"]
    assert any("beyond the edge" in text for text in edge.missing)


def test_spread_tells_stripes_from_evenness() -> None:
    even, stripes = [[2, 2], [2, 2]], [[4, 0], [4, 0]]
    record = synthetic.record() | {"patterns": {"layer": [{"step": 0, "counts": even}, {"step": 1, "counts": stripes}]}}
    assert spread(runs_of(record)) == (0.5, 1.0)
    assert spread(runs_of(synthetic.record())) == (None, None)


def test_records_of_the_generator_are_json() -> None:
    assert json.loads(json.dumps(synthetic.study(seeds=1)))


def acdc(losses: dict[int, float], **changes: object) -> list[Run]:
    return with_losses(losses, method="acdc", block_size=1, **changes)


def test_freezing_is_judged_by_a_margin_not_by_significance() -> None:
    def both(first: float, second: float) -> Claim:
        # a tenth of a seed's noise between the two: sure, and yet within 0.05 or not
        zero = acdc({0: 3.0, 1: 3.2, 2: 3.1}, unused="zero", dense_until=0.25)
        freeze = acdc(
            {s: loss + first + 0.001 * s for s, loss in enumerate((3.0, 3.2, 3.1))}, unused="freeze", dense_until=0.25
        )
        later = acdc(
            {s: loss + second + 0.001 * s for s, loss in enumerate((3.0, 3.2, 3.1))}, unused="zero", dense_until=0.5
        )
        return table([*zero, *freeze, *later])["C10"]

    assert both(0.01, -0.01).verdict == "supported"
    assert both(0.2, -0.2).verdict == "contradicted"
    assert both(0.2, -0.01).verdict == "mixed"
    single = [*acdc({0: 3.0}, unused="zero", dense_until=0.0), *acdc({0: 3.0}, unused="freeze", dense_until=0.0)]
    assert table(single)["C10"].verdict == "undecided"


def test_alternation_has_an_order_of_its_own_for_each_fate() -> None:
    def of(losses: dict[str, float], unused: str) -> list[Run]:
        return [
            run
            for choice, loss in losses.items()
            for run in acdc({s: loss + 0.1 * s for s in range(3)}, unused=unused, selection=choice, dense_until=None)
        ]

    zero = of({"magnitude": 2.685, "fixed": 3.199, "random": 6.094}, "zero")
    freeze = of({"random": 2.349, "magnitude": 2.354, "fixed": 2.358}, "freeze")
    claim = table([*zero, *freeze])["C11"]
    assert claim.verdict == "supported" and len(claim.rows) == 6
    assert table(of({"magnitude": 3.0, "fixed": 2.0}, "zero"))["C11"].verdict == "contradicted"


def test_pictures_hold_the_losses_that_a_claim_compares() -> None:
    found = table(runs_of(*synthetic.study()))
    assert set(found["C1"].panels) == {"training FLOPs", "training seconds"}
    for series in found["C1"].panels.values():
        assert set(series) == {"dynsparse", "static", "dense"}
        assert all(
            a < b for points in series.values() for (a, _), (b, _) in pairwise(sorted(points, key=lambda p: p[0]))
        )
    over_sparsity = found["C2"].panels["sparsity"]
    assert {x for x, _ in over_sparsity["dynsparse"]} == {x for x, _ in over_sparsity["dense at equal FLOPs"]}
    [(at, loss)] = over_sparsity["static"]  # only one sparsity has static runs
    [row] = [row for row in found["C2"].rows if row[2] == at]
    dynamic = dict(over_sparsity["dynsparse"])[at]
    assert f"{dynamic.mean - loss.mean:.3f}" in str(row[4])
    assert [x for x, _ in next(iter(found["C5"].panels["block norm"].values()))] == ["l1", "l2", "linf"]
    assert not found["C8"].panels and found["C4"].joined is False
