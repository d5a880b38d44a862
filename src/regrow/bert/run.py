"""The directory of one run.

=====================  =====================================================================================
``regrow.yaml``        the configuration, every field; ``--resume`` reads it
``metrics.jsonl``      one line per logging step and evaluation
``topology.jsonl``     one line per layer and topology update (:class:`regrow.UpdateRecord`)
``checkpoints/``       ``checkpoint-<step>`` directories to resume from
``config.json`` ...    the finished model, as ``from_pretrained`` reads it
=====================  =====================================================================================
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from regrow.errors import RegrowError
from regrow.ranks import rank
from regrow.training import UpdateRecord
from regrow.training.manifest import damage
from regrow.training.metrics import mean_record

CONFIG_FILE, METRICS_FILE, TOPOLOGY_LOG = "regrow.yaml", "metrics.jsonl", "topology.jsonl"
CHECKPOINTS = "checkpoints"
GO_ON = "free space or make it writable, and go on with --resume"


class RunDirectory:
    """Paths and logs of one run; never overwrites another run. Of several processes, rank 0 writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Where the trainer keeps its checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def begun(self) -> bool:
        """Whether a run was created here."""
        return (self.path / CONFIG_FILE).exists()

    def check_free(self) -> None:
        """Raise :class:`RegrowError` if the directory holds anything already."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RegrowError(
                f"{self.path} already holds {'a run' if self.begun else 'other files'}; "
                "choose another --output, or continue a run with --resume"
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Begin a run here.

        Raises:
            RegrowError: the directory holds something already, or cannot be written.
        """
        if rank() > 0:
            return
        self.check_free()
        with writing(f"the run directory {self.path}", "choose another --output"):
            self.checkpoints.mkdir(parents=True)
            aside = self.path / f".{CONFIG_FILE}"
            aside.write_text(yaml.safe_dump(dict(config), sort_keys=False))
            os.replace(aside, self.path / CONFIG_FILE)  # half a configuration would be another one

    def read_config(self) -> dict[str, Any]:
        """The configuration of the run that is here.

        Raises:
            RegrowError: there is none, or it is damaged.
        """
        return read_yaml(self.path / CONFIG_FILE, "nothing to resume there; check --output")

    def last_checkpoint(self) -> Path | None:
        """The newest intact checkpoint, None if there is none yet; warns of newer ones that are damaged.

        Raises:
            RegrowError: none is intact.
        """
        found = self._checkpoints()
        if not found:
            return None
        broken: list[str] = []
        for step in sorted(found, reverse=True):
            wrong = damage(found[step])
            if wrong is None:
                if broken and rank() == 0:
                    warnings.warn(f"{'; '.join(broken)}: going on from {found[step].name} instead", stacklevel=2)
                return found[step]
            broken.append(str(found[step] / wrong))
        raise RegrowError(f"{'; '.join(broken)}: no checkpoint is intact; start the run anew in another --output")

    def rewind(self, step: int) -> None:
        """Drop what a killed run left beyond the checkpoint of ``step``: log lines, half and damaged checkpoints.

        Raises:
            RegrowError: the directory cannot be written.
        """
        if rank() > 0:
            return
        self.drop_partial()
        for number, checkpoint in self._checkpoints().items():
            if number > step:  # or rotation would keep it for the newest
                shutil.rmtree(checkpoint, ignore_errors=True)
        for name in (METRICS_FILE, TOPOLOGY_LOG):
            path = self.path / name
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
                aside = path.with_name(f".partial-{name}")
                with writing(str(path)):
                    aside.write_text("".join(line + "\n" for line in kept))
                    os.replace(aside, path)  # killed meanwhile, the whole log is still there

    def drop_partial(self) -> None:
        """Delete checkpoints that were never finished: they are of no use but take space."""
        for partial in self.checkpoints.glob(".partial-*"):
            shutil.rmtree(partial, ignore_errors=True)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every complete line of ``metrics.jsonl``."""
        return self._read(METRICS_FILE)

    def read_updates(self) -> list[dict[str, Any]]:
        """Every complete line of ``topology.jsonl``: a :class:`regrow.UpdateRecord` each."""
        return self._read(TOPOLOGY_LOG)

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        self._append(METRICS_FILE, [metrics])

    def log_updates(self, records: Sequence[UpdateRecord], totals: Mapping[str, Any]) -> None:
        """A line per record to ``topology.jsonl``, and ``totals`` and their means to ``metrics.jsonl``."""
        self._append(TOPOLOGY_LOG, [asdict(record) for record in records])
        means = {f"update_{name}": value for name, value in mean_record(records).items()}
        self.log_metrics({"step": records[0].step, **totals, **means})

    def _checkpoints(self) -> dict[int, Path]:
        return {
            int(match[1]): path
            for path in self.checkpoints.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d{1,18})", path.name))
        }

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if _step_of(line) < float("inf")]

    def _append(self, name: str, entries: list[Any]) -> None:
        if rank() > 0:
            return
        path, step = self.path / name, dict(entries[-1]).get("step")
        with writing(str(path), f"the run stopped at step {step}; {GO_ON}"), path.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)


@contextmanager
def writing(what: str, advice: str = GO_ON) -> Iterator[None]:
    """Say in one line what could not be written, and why.

    safetensors and tokenizers have no type of their own for what the system refuses; they quote it.

    Raises:
        RegrowError: instead of the system's error.

    Example:
        >>> with writing("model.safetensors", "free space"):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        regrow.errors.RegrowError: cannot write model.safetensors: No space left on device; free space
    """
    try:
        yield
    except Exception as error:
        quoted = re.search(r"([^:]+) \(os error \d+\)", str(error))
        if quoted is None and not isinstance(error, OSError):
            raise
        why = quoted[1].strip() if quoted else getattr(error, "strerror", None) or error
        raise RegrowError(f"cannot write {what}: {why}; {advice}") from None


def read_yaml(path: Path, hint: str = "check the path") -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        RegrowError: missing, not YAML, or no mapping.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RegrowError(f"cannot read {path} ({error.strerror}); {hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RegrowError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise RegrowError(f"{path} must hold 'name: value' lines")
    return document


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):  # a line cut short by a kill
        return float("inf")
