"""Studies from YAML files: those that come with regrow, and a user's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from regrow.bert.run import read_yaml
from regrow.errors import RegrowError
from regrow.study.record import paper_flops
from regrow.study.spec import RunSpec, Study

SCALES = ("cpu", "gpu", "paper")
_FOLDER = Path(str(files("regrow") / "presets" / "studies"))
_COMMON = "_scales"
_TOP = ("name", "claim", "figure", "defaults", "experiments", "scales")


def available_studies() -> list[str]:
    """Names of the studies that come with regrow.

    Example:
        >>> "c1" in available_studies()
        True
    """
    names = [path.stem for path in _FOLDER.glob("*.yaml") if not path.stem.startswith("_")]
    return sorted(names, key=lambda name: (len(name), name))


def load_study(name: str | Path, scale: str | None = None) -> Study:
    """A study by the name of a preset or the path of a YAML file.

    A file holds ``claim``, ``defaults`` (options of every run) and ``experiments`` (a list of options that differ; a
    list as a value is an axis, see :class:`Study`). With ``scales`` it is several studies: each scale has ``defaults``
    and ``experiments`` of its own, which add to and replace those above it; cpu, gpu and paper also begin with the
    defaults that all presets of that scale share.

    Args:
        name: a preset, or a path.
        scale: one of the file's; by default the first.

    Raises:
        RegrowError: no such preset, file or scale, or a file that is no study.

    Example:
        >>> load_study("c5", "cpu").scale
        'cpu'
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in available_studies():
            raise RegrowError(
                f"unknown study {str(name)!r}; choose one of {', '.join(available_studies())}, or give a .yaml file"
            )
        path = _FOLDER / f"{name}.yaml"
    document = read_yaml(path)
    _check(document, _TOP, str(path))
    defaults, experiments = document.get("defaults", {}), document.get("experiments", [{}])
    scales = document.get("scales")
    if scales is None and scale is not None:
        raise RegrowError(f"{path} has no scales; leave scale={scale!r} out")
    if scales is not None:
        scale = str(next(iter(scales), "")) if scale is None else scale
        if scale not in scales:
            raise RegrowError(f"{path} has no scale {scale!r}; it has {', '.join(scales)}")
        own = scales[scale] or {}
        _check(own, ("defaults", "experiments"), f"{path}, scale {scale}")
        common = read_yaml(_FOLDER / f"{_COMMON}.yaml").get(scale, {})
        defaults = common | defaults | own.get("defaults", {})
        experiments = own.get("experiments", experiments)
    return Study(
        name=str(document.get("name", path.stem)),
        claim=" ".join(str(document.get("claim", "")).split()),
        scale=scale or "custom",
        defaults=defaults,
        experiments=experiments,
        figure=str(document.get("figure", "")),
    )


def listing() -> str:
    """A line per study that comes with regrow."""
    lines = []
    for name in available_studies():
        scales = read_yaml(_FOLDER / f"{name}.yaml").get("scales", {})
        study = load_study(name)
        lines.append(f"{name:5} {' '.join(scales):14} {study.claim}" + (f" ({study.figure})" if study.figure else ""))
    return "\n".join(lines)


def describe(study: Study, runs: Iterable[RunSpec] | None = None, done: Iterable[str] = ()) -> str:
    """The runs of a study as a table, with tokens and FLOPs, and their sum; ``done`` are ids that have a record."""
    labels, done = study.labels(), set(done)
    lines = [f"{study.name}, scale {study.scale}: {study.claim}" + (f" ({study.figure})" if study.figure else "")]
    lines.append(f"{'id':10} {'':5} {'steps':>8} {'tokens':>9} {'FLOPs':>9}  what")
    runs = study.runs() if runs is None else list(runs)
    for run in runs:
        state = "done" if run.id in done else ""
        lines.append(
            f"{run.id[:10]} {state:5} {run.config.steps:8,} {tokens(run):9.2g} {_flops(run):9.2g}  {labels[run.id]}"
        )
    left = [run for run in runs if run.id not in done]
    lines.append(
        f"{len(runs)} runs, {len(left)} to do: {sum(map(tokens, left)):.3g} tokens at most, "
        f"{sum(map(_flops, left)):.3g} non-embedding FLOPs"
    )
    return "\n".join(lines)


def tokens(run: RunSpec) -> int:
    """Of a whole run, padding counted."""
    return run.config.steps * run.config.batch_size * run.config.max_length


def _flops(run: RunSpec) -> float:
    return paper_flops(run.config, run.layer)["train_paper"]


def _check(document: Mapping[str, Any], known: tuple[str, ...], source: str) -> None:
    kinds = {"defaults": dict, "experiments": list, "scales": dict}
    if not isinstance(document, dict):
        raise RegrowError(f"{source}: must hold 'name: value' lines")
    for name, value in document.items():
        if name not in known:
            raise RegrowError(f"{source}: unknown entry {name!r}; a study has {', '.join(known)}")
        if name in kinds and not isinstance(value, kinds[name]):
            raise RegrowError(f"{source}: {name!r} must be {'a list' if kinds[name] is list else 'a mapping'}")
    for index, experiment in enumerate(document.get("experiments", [])):
        if not isinstance(experiment, dict):
            raise RegrowError(f"{source}: experiment {index + 1} must be a mapping of options")
