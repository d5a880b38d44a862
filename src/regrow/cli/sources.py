"""Flags of a training that come from elsewhere: a preset, a file, the run to resume."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from regrow.bert.run import RunDirectory, read_yaml
from regrow.cli.parser import OneLineParser
from regrow.errors import RegrowError


def add_sources(parser: argparse.ArgumentParser, *, presets: bool) -> None:
    """The flags that say where other flags come from; the configurations that come with regrow are pre-trainings."""
    parser.add_argument("--config", metavar="FILE", help="YAML of 'flag: value' lines; flags given here override it")
    if presets:
        parser.add_argument("--preset", metavar="NAME", help=f"a configuration that comes with regrow: {_presets()}")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output from its last checkpoint")


def read_sources(argv: Sequence[str], *, presets: bool) -> tuple[argparse.Namespace, list[str]]:
    """Take out the flags that say where other flags come from."""
    parser = _partial_parser()
    add_sources(parser, presets=presets)
    parser.set_defaults(preset=None)
    return parser.parse_known_args(argv)


def value_of(flag: str, argv: Sequence[str], *, default: str) -> str:
    """The value of one flag, before all others can be known."""
    parser = _partial_parser()
    parser.add_argument(flag, dest="value", default=default)
    return parser.parse_known_args(argv)[0].value


def flags_of_files(asked: argparse.Namespace) -> list[str]:
    """Preset, then config file, as command-line flags: one parser checks them all, and later ones win."""
    flags: list[str] = []
    if asked.preset is not None:
        if asked.preset not in _presets().split(", "):
            raise RegrowError(f"unknown preset {asked.preset!r}; choose one of {_presets()}")
        flags += _as_flags(read_yaml(Path(str(files("regrow") / "presets" / f"{asked.preset}.yaml"))))
    if asked.config is not None:
        flags += _as_flags(read_yaml(Path(asked.config)))
    return flags


def saved_flags(run: RunDirectory) -> list[str]:
    """The configuration of the run to resume, as flags."""
    return _as_flags(run.read_config() | {"output": run.path})


def refuse_changes(asked: Sequence[Any], saved: Sequence[Any], may_change: Sequence[str]) -> None:
    """Raise :class:`RegrowError` where configuration or method are not those of the run to resume."""
    for new, old in zip(asked, saved, strict=True):
        for name, value in asdict(old).items():
            if name not in may_change and getattr(new, name) != value:
                raise RegrowError(
                    f"--resume continues a run as it was started, with --{name} {value}; "
                    f"drop --{name} {getattr(new, name)}, or start a new run in another --output"
                )


def _partial_parser() -> OneLineParser:
    return OneLineParser(prog="regrow", add_help=False, allow_abbrev=False)


def _presets() -> str:
    folder = files("regrow") / "presets"
    return ", ".join(sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def _as_flags(config: dict[str, Any]) -> list[str]:
    # "--name=value" in one word: a value may begin with a dash
    return [f"--{name}={value}" for name, value in config.items() if value is not None]
