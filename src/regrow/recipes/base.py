"""What a recipe is, how it is found by name, and the folder in which it remembers what is finished."""

from __future__ import annotations

import importlib
import math
import pkgutil
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm.auto import tqdm
from transformers import TrainerCallback

from regrow.bert.pretrain import PretrainConfig, PretrainResult, pretrain
from regrow.bert.run import CONFIG_FILE, RunDirectory
from regrow.entries import Option, listed
from regrow.errors import RegrowError
from regrow.methods import Method
from regrow.nn.options import LayerOption
from regrow.ranks import started_by_torchrun
from regrow.study.record import read_json, write_json

RESULTS_FILE = "results.json"


class Result(Protocol):
    """What a recipe came to; as text it is what a user wants to know."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""

    def __str__(self) -> str: ...


Run = TypeVar("Run", bound=Callable[..., Result])


@dataclass(frozen=True)
class Recipe:
    """A recipe by name.

    Args:
        name: as in ``regrow recipe NAME``.
        config: dataclass of its options, those of the trainings among them.
        run: ``run(config, method, layer, resume=...)``.
        example: what follows ``regrow recipe NAME``, for help.
    """

    name: str
    config: type[PretrainConfig]
    run: Callable[..., Result]
    example: str


_RECIPES: dict[str, Recipe] = {}


def recipe(
    name: str,
    config: type[PretrainConfig],
    *,
    paper: str,
    year: int,
    link: str,
    always_sparse: bool,
    example: str,
    passed_on: str | None = None,
) -> Callable[[Run], Run]:
    """Decorator: make a function a recipe, and list it by what its docstring says.

    Args:
        passed_on: how the names of options begin that are just passed on to a training, and not listed again.
    """

    def decorate(run: Run) -> Run:
        _RECIPES[name] = Recipe(name, config, run, example)
        entry = listed(
            "recipe",
            name,
            paper=paper,
            year=year,
            link=link,
            always_sparse=always_sparse,
            command=f"regrow recipe {name} {example}",
            options=_own_options(config, passed_on),
        )
        return entry(run)

    return decorate


def available() -> list[str]:
    """Names of all recipes.

    Example:
        >>> "imp" in available()
        True
    """
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__, __package__ + "."):
        importlib.import_module(module.name)
    return sorted(_RECIPES)


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        RegrowError: there is none; the message lists the known ones.
    """
    if name not in available():
        raise RegrowError(f"unknown recipe {name!r}; choose one of {', '.join(available())}")
    return _RECIPES[name]


def option(default: Any, meaning: str) -> Any:
    """A field of a recipe's configuration."""
    return field(default=default, metadata={"help": meaning})


def pretraining(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    """The pre-training options of a recipe's configuration, some of them changed."""
    options = {of.name: getattr(config, of.name) for of in fields(PretrainConfig)}
    return PretrainConfig(**(options | changes))


class RecipeFolder:
    """The folder of a recipe: ``regrow.yaml`` says what it is, ``results.json`` what is finished; stages lie beside.

    Args:
        path: the folder.

    A stage is finished if it has a result, which is written last. So whatever stops a recipe, all it loses is what
    the stage under way does not have in a checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, config: Any, method: Method, layer: LayerOption, *, resume: bool) -> None:
        """Write what the recipe is, unless it goes on.

        Raises:
            RegrowError: there is something in the folder already; or nothing to resume; or several processes.
        """
        if started_by_torchrun():
            raise RegrowError("a recipe runs in one process; start it without torchrun")
        run = RunDirectory(self.path)
        if resume:
            run.read_config()
            return
        run.check_free()
        run.create(asdict(config) | asdict(method) | asdict(layer))  # type: ignore[call-overload]
        run.checkpoints.rmdir()  # the stages have their own

    def results(self) -> dict[str, dict[str, Any]]:
        """What each finished stage came to.

        Raises:
            RegrowError: the file is damaged.
        """
        path = self.path / RESULTS_FILE
        found = read_json(path) if path.exists() else {}
        for stage, values in found.items():
            if not isinstance(values, dict) or not all(_is_result(value) for value in values.values()):
                raise RegrowError(f"{path} is damaged: {stage!r} holds no results; delete the file to do stages again")
        return found

    def result(self, stage: str, names: Sequence[str]) -> dict[str, Any] | None:
        """The result of one stage, None if it is not finished.

        Raises:
            RegrowError: the file is damaged, or the result lacks one of ``names``.
        """
        found = self.results().get(stage)
        lacking = [name for name in names if found is not None and name not in found]
        if lacking:
            raise RegrowError(f"{self.path / RESULTS_FILE} is damaged: {stage!r} lacks {lacking[0]!r}")
        return found

    def record(self, stage: str, values: Mapping[str, Any]) -> None:
        """Remember that a stage is finished, and with what."""
        stored = {name: value if _is_result(value) else None for name, value in values.items()}
        write_json(self.path / RESULTS_FILE, self.results() | {stage: stored})


def train_stage(
    config: PretrainConfig, method: Method, layer: LayerOption, *callbacks: TrainerCallback
) -> PretrainResult:
    """Begin or continue the pre-training of a stage, in ``config.output``."""
    run = RunDirectory(config.output)
    clear_unbegun(run)
    return pretrain(config, method, layer=layer, resume=run.begun, callbacks=callbacks)


def clear_unbegun(run: RunDirectory) -> None:
    """Remove what a kill left of a run that had not yet begun: an empty folder, at most."""
    if run.begun or not run.path.is_dir():
        return
    files = [path for path in run.path.rglob("*") if not path.is_dir()]
    if all(path.name == f".{CONFIG_FILE}" for path in files):
        shutil.rmtree(run.path)


def say(text: str) -> None:
    """A line above whatever progress bar lives."""
    tqdm.write(text)


def loss_of(result: PretrainResult) -> float | None:
    """Held-out MLM loss at the end, in nats."""
    return (result.after or {}).get("eval_mlm_loss")


def stopped(name: str, folder: Path, where: str) -> str:
    """What to say of a recipe that was interrupted."""
    return f"stopped in {where}; a checkpoint is saved\ncontinue with: regrow recipe {name} --output {folder} --resume"


def in_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with right-aligned columns.

    Example:
        >>> print(in_columns(["round", "loss"], [["0", "5.1"], ["1", "5.25"]]))
        round  loss
            0   5.1
            1  5.25
    """
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join("  ".join(f"{text:>{w}}" for text, w in zip(row, widths, strict=True)) for row in [head, *rows])


def _own_options(config: type[PretrainConfig], passed_on: str | None) -> list[Option]:
    """Options that are not those of a pre-training, or have another default there."""
    usual = {of.name: of.default for of in fields(PretrainConfig)}
    return [
        (of.name.replace("_", "-"), of.default, str(of.metadata.get("help", "")).replace("%%", "%"))
        for of in fields(config)
        if of.name not in usual or of.default != usual[of.name]
        if passed_on is None or not of.name.startswith(passed_on)
    ]


def _is_result(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int | str)
