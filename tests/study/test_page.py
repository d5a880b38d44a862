"""The page as a browser draws it; skipped where there is no Chromium (``apt-get install chromium``)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regrow.study.report import write_report
from regrow.study.runs import Run
from study import synthetic
from study.browser import Browser, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the path and none named by CHROMIUM")

SEEDS = 2
UNKNOWN = "\N{EN DASH}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser(find_chromium() or "")
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [Run(record) for record in synthetic.study(SEEDS)]


@pytest.fixture(scope="module")
def path(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("page") / "report.html", title="Many runs")


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Browser]:
    browser.open(path)
    yield browser
    assert browser.errors == []
    assert browser.requests == [path.as_uri()]


def count(page: Browser, selector: str) -> int:
    return page.run(f"document.querySelectorAll({json.dumps(selector)}).length")


def texts(page: Browser, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")


def click(page: Browser, selector: str) -> None:
    """With the mouse, where it is."""
    x, y = page.run(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
        "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    page.mouse(x, y, click=True)


def write_filter(page: Browser, text: str) -> None:
    page.run(
        f"(() => {{ const e = document.getElementById('filter'); e.value = {json.dumps(text)};"
        "e.dispatchEvent(new Event('input')); })()"
    )


def test_curves_and_points_are_drawn(page: Browser, runs: list[Run]) -> None:
    groups = len(runs) // SEEDS
    assert texts(page, "h1") == ["Many runs"]
    assert count(page, "#curves path.line") == len(runs)
    for chart in ("#pareto-flops", "#pareto-seconds"):
        assert count(page, f"{chart} circle.dot") == count(page, f"{chart} line.whisker") == groups
        assert count(page, f"{chart} path.frontier") == 1
    moving = sum(bool(run.updates) for run in runs)
    assert [count(page, f"#{name} path.line") for name in ("coverage", "churn", "fresh_removed")] == [moving] * 3
    # 100 logged steps to a run
    first = page.run("document.querySelector('#curves path.line').getAttribute('d').split('L').length")
    assert first == len(runs[0].record["curve"])
    assert count(page, "#claims details") == 12
    assert count(page, "#legend button") == len({run.family for run in runs})


def test_the_axis_switch_draws_against_steps_tokens_flops_and_seconds(page: Browser, runs: list[Run]) -> None:
    drawn = set()
    for axis, title in (("seconds", "seconds"), ("flops", "FLOPs"), ("tokens", "tokens"), ("step", "step")):
        click(page, f"#axis button[data-axis={axis}]")
        assert texts(page, "#curves text.title")[0] == title
        assert texts(page, "#axis button[aria-pressed=true]") == [{"step": "steps"}.get(axis, title)]
        assert count(page, "#curves path.line") == len(runs)
        drawn.add(
            page.run("[...document.querySelectorAll('#curves path.line')].map((e) => e.getAttribute('d')).join()")
        )
    assert len(drawn) == 3  # runs of one length look alike by steps and by tokens, but not by seconds or FLOPs


def test_other_curves_can_be_chosen(page: Browser, runs: list[Run]) -> None:
    page.run(
        "(() => { const e = document.getElementById('metric'); e.value = 1; e.dispatchEvent(new Event('change')); })()"
    )
    assert texts(page, "#curves text.title")[1] == "MLM loss (held out)"
    assert count(page, "#curves path.line") == len(runs)


def column(page: Browser, title: str) -> list[str]:
    index = texts(page, "#runs th button").index(title) + 1
    return texts(page, f"#runs tbody td:nth-child({index})")


def test_the_table_sorts_both_ways_and_by_text(page: Browser, runs: list[Run]) -> None:
    losses = sorted(run.loss or 0.0 for run in runs)
    assert [float(text) for text in column(page, "MLM loss")] == pytest.approx(losses, abs=1e-3)
    click(page, "#runs button[data-key=loss]")
    assert [float(text) for text in column(page, "MLM loss")] == pytest.approx(losses[::-1], abs=1e-3)
    assert texts(page, "#runs th[aria-sort=descending] button") == ["MLM loss"]
    click(page, "#runs button[data-key=seconds]")
    seconds = [page.run(f"data.runs.find((r) => r.id.startsWith('{i}')).seconds") for i in column(page, "run")]
    assert seconds == sorted(seconds)
    click(page, "#runs button[data-key=size]")
    each = [sum(run.size == size for run in runs) for size in ("2/64/1", "tiny", "mini")]
    assert column(page, "size") == ["2/64/1"] * each[0] + ["tiny"] * each[1] + ["mini"] * each[2]
    click(page, "#runs button[data-key=family]")
    families = list(dict.fromkeys(column(page, "family")))
    assert families[:4] == ["dense", "dynsparse b=1 d=0.1", "dynsparse b=1 d=0.25", "dynsparse b=1 d=0.5"]
    assert families[4:6] == ["dynsparse b=4 d=0.1", "dynsparse b=16 d=0.1"]
    # runs without a value stay below, whichever way
    for _ in range(2):
        click(page, "#runs button[data-key=coverage]")
        unknown = [text == UNKNOWN for text in column(page, "coverage")]
        assert unknown == sorted(unknown) and sum(unknown) == sum(not run.updates for run in runs)


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("b=1", lambda run: run.block_size == 1),
        ("STATIC seed=1", lambda run: run.method == "static" and run.seed == 1),
        ("d=0.5", lambda run: run.density == 0.5),
        ("nothing like it", lambda run: False),
    ],
)
def test_the_filter_is_for_table_and_charts(page: Browser, runs: list[Run], text: str, keep: Any) -> None:
    write_filter(page, text)
    kept = sum(map(keep, runs))
    assert count(page, "#runs tbody tr") == count(page, "#curves path.line") == kept
    assert count(page, "#pareto-flops circle.dot") == kept // (1 if "seed" in text else SEEDS)
    assert count(page, ".empty") == (0 if kept and "STATIC" not in text else 3 if "STATIC" in text else 6)


def test_families_can_be_hidden(page: Browser, runs: list[Run]) -> None:
    click(page, "#legend button")
    assert count(page, "#curves path.line") == sum(not run.dense for run in runs)
    click(page, "#legend button")
    assert count(page, "#curves path.line") == len(runs)


def test_a_row_opens_its_configuration_and_machine(page: Browser) -> None:
    click(page, "#runs tbody tr")
    assert page.run("document.getElementById('details').open")
    assert {"Machine", "Configuration", "Versions"} <= set(texts(page, "#details h3"))
    assert "Some Processor" in texts(page, "#details td")
    click(page, "#details button")
    assert not page.run("document.getElementById('details').open")


def test_the_pointer_finds_a_run_and_opens_it(page: Browser) -> None:
    x, y = page.run(
        "(() => { const e = document.querySelector('#pareto-flops circle.dot'); e.scrollIntoView({block: 'center'});"
        "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    page.mouse(x + 2, y + 2)
    tip = texts(page, "#tip")[0]
    assert not page.run("document.getElementById('tip').hidden")
    assert "2 seeds" in tip and "held-out MLM loss" in tip
    page.mouse(x + 2, y + 2, click=True)
    assert page.run("document.getElementById('details').open")


def test_patterns_are_painted(page: Browser) -> None:
    assert count(page, "#pictures canvas") == 8 * 3
    painted = page.run(
        "(() => { const c = document.querySelector('#pictures canvas');"
        "const pixels = [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data];"
        "return pixels.filter((value, i) => i % 4 === 3 && value).length })()"
    )
    assert 100 < painted <= 256


def test_a_phone_and_darkness(browser: Browser, path: Path, tmp_path: Path) -> None:
    browser.open(path, width=390, height=844, dark=True)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(13, 13, 13)"
    assert browser.run("document.querySelector('#pareto-seconds').getBoundingClientRect().width") > 250
    browser.screenshot(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 20_000
    assert browser.errors == []


def test_text_of_records_is_text(browser: Browser, tmp_path: Path) -> None:
    nasty = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
    record = synthetic.record(patterns=True)
    record |= {"id": nasty, "machine": {nasty: nasty}, "spec": {nasty: [nasty]}}
    record["config"] |= {"method": nasty, "size": nasty, "__proto__": {"hidden": True}}
    record["patterns"] = {nasty: next(iter(record["patterns"].values()))}
    browser.open(write_report([Run(record)], tmp_path / "nasty.html", title=nasty, notes=[nasty]))
    browser.run("details(data.runs[0])")
    assert browser.run("window.ran === undefined && document.images.length === 0")
    assert texts(browser, "h1") == [nasty]
    # even if text did become an element, the page's policy lets no other script run
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 3'}))"
    )
    assert browser.run("window.ran === undefined")
    assert len(browser.errors) == 1 and "Content Security Policy" in browser.errors[0]


def test_a_record_of_nothing_makes_a_page(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report([Run({"id": "a", "format": 1, "config": {}})], tmp_path / "nothing.html"))
    assert browser.errors == []
    assert count(browser, ".empty") == 6 and count(browser, "#runs tbody tr") == 1
    assert browser.run("document.getElementById('patterns').hidden && document.getElementById('topology').hidden")
