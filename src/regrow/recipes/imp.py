"""Iterative magnitude pruning with rewinding: the search for lottery tickets. Not always sparse: it begins dense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.bert.model import BertForPreTraining
from regrow.bert.output import new_output
from regrow.bert.pretrain import PretrainConfig
from regrow.bert.run import METRICS_FILE, RunDirectory, writing
from regrow.bert.saved import load_saved
from regrow.bert.tokenizer import load_tokenizer
from regrow.errors import RegrowError
from regrow.methods import Method
from regrow.methods.scores import Norm
from regrow.nn import named_sparse_layers
from regrow.nn.options import LayerOption
from regrow.recipes.base import (
    RecipeFolder,
    in_columns,
    loss_of,
    option,
    pretraining,
    recipe,
    say,
    stopped,
    train_stage,
)
from regrow.recipes.pruning import globally_kept, prune_checkpoint

REWIND = "rewind"


@dataclass(frozen=True)
class ImpConfig(PretrainConfig):
    """Options of iterative magnitude pruning, beside those of its pre-trainings."""

    output: str = option("runs/imp", "folder for all rounds; must be new or empty unless --resume")
    density: float = option(1.0, "share of encoder blocks that the first training has, in (0, 1]")
    method: str = option("static", "static: between two prunings the pattern stays")
    rounds: int = option(5, "how often to prune, rewind and train again")
    prune_share: float = option(0.2, "share of the remaining blocks that each round prunes, of all layers together")
    prune_norm: Norm = option("l1", "block norm that ranks them: l1, l2 or linf")
    rewind_step: int | None = option(
        None, "step to whose values the survivors go back; by default after one twentieth of the steps"
    )

    @property
    def rewind_to(self) -> int:
        """The step to go back to."""
        return max(1, round(self.steps / 20)) if self.rewind_step is None else self.rewind_step

    def check(self) -> None:
        super().check()
        if self.dense:
            raise RegrowError("imp trains blocks, of which --density 1 has all: leave --dense out")
        if self.method != "static":
            raise RegrowError(
                f"imp moves the pattern itself, between trainings, so method {self.method!r} cannot: give --method "
                "static, and with a preset also the --density to begin with"
            )
        if self.rounds < 1:
            raise RegrowError(f"rounds must be at least 1, got {self.rounds}")
        if not 0 < self.prune_share < 1:
            raise RegrowError(f"prune_share must lie between 0 and 1, got {self.prune_share}")
        if not 1 <= self.rewind_to < self.steps:
            raise RegrowError(f"rewind_step must lie between 1 and steps - 1 = {self.steps - 1}, got {self.rewind_to}")


@dataclass(frozen=True)
class Round:
    """One training: ``loss`` is the held-out MLM loss at its end, in nats."""

    density: float
    n_blocks: int
    loss: float | None


@dataclass(frozen=True)
class ImpResult:
    """What the rounds came to, as far as they are finished."""

    path: Path
    rounds: Sequence[Round]
    total: int

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to prune and train."""
        return len(self.rounds) == self.total

    def __str__(self) -> str:
        rows = [
            [str(number), f"{r.density:.4f}", f"{r.n_blocks:,}", "-" if r.loss is None else f"{r.loss:.4f}"]
            for number, r in enumerate(self.rounds)
        ]
        text = in_columns(["round", "density", "blocks", "held-out MLM loss"], rows)
        if not self.finished:
            return f"{text}\n{stopped('imp', self.path, f'round {len(self.rounds)}')}"
        return f"{text}\nmodels: {self.path}/round-0 to {self.path}/round-{self.total - 1}"


@recipe(
    "imp",
    ImpConfig,
    paper="Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis",
    year=2020,
    link="https://arxiv.org/abs/1912.05671",
    always_sparse=False,
    example="--data corpus.txt --size tiny --steps 1000 --rounds 5 --output runs/imp",
)
def imp(config: ImpConfig, method: Method, layer: LayerOption, *, resume: bool = False) -> ImpResult:
    """Train, prune the weakest blocks, take the others back to an early step, and train again, for some rounds.

    Round 0 trains from the start, by default with all blocks. Each further round prunes the weakest share of the blocks
    that the round before ended with, ranked by norm over all layers together, and goes on from the state that round 0
    had after ``rewind_step`` steps, without the blocks pruned so far. What it goes back to is everything: weights,
    embeddings, moments, learning rate and place in the data. So a round that prunes nothing is round 0 again.

    T. Chen et al. 2020, *The Lottery Ticket Hypothesis for Pre-trained BERT Networks*, https://arxiv.org/abs/2007.12223,
    prune BERT so. Both prune single weights (``--block-size 1``).

    Args:
        config: see the fields of :class:`ImpConfig`.
        method: ``static``.
        layer: what stands in the place of linear layers.
        resume: go on in ``config.output``; finished rounds are not repeated.

    Raises:
        RegrowError: an argument or a file cannot be used. Nothing that exists is overwritten.
    """
    config.check()
    folder = RecipeFolder(config.output)
    folder.begin(config, method, layer, resume=resume)
    rewind = folder.path / REWIND / f"checkpoint-{config.rewind_to}"
    rounds: list[Round] = []
    for number in range(config.rounds + 1):
        stage = f"round-{number}"
        found = folder.result(stage, ("density", "n_blocks", "loss"))
        if found is None:
            of_round = pretraining(config, output=str(folder.path / stage))
            if number == 0:
                say(f"round 0: {config.steps} steps at density {config.density:g}")
            elif not RunDirectory(of_round.output).begun:
                _prune(of_round, (method, layer), folder.path / f"round-{number - 1}", rewind, config)
            result = train_stage(
                of_round, method, layer, *([_KeepStep(rewind, config.rewind_to)] if number == 0 else [])
            )
            if not result.finished:
                break
            n_blocks = sum(x.topology.n_blocks for _, x in named_sparse_layers(_model(result.path)))
            found = {"density": result.density, "n_blocks": n_blocks, "loss": loss_of(result)}
            folder.record(stage, found)
        rounds.append(Round(**found))
    return ImpResult(folder.path, tuple(rounds), config.rounds + 1)


def _prune(
    of_round: PretrainConfig, parts: tuple[Method, LayerOption], before: Path, rewind: Path, config: ImpConfig
) -> None:
    """Lay out the next round: a run that seems to have been interrupted at the step to go back to."""
    layers = dict(named_sparse_layers(_model(before)))
    kept = globally_kept(layers, config.prune_share, config.prune_norm)
    n_kept, n = sum(map(len, kept.values())), sum(layer.topology.n_blocks for layer in layers.values())
    say(f"{Path(of_round.output).name}: {n_kept:,} of {n:,} blocks stay, back to step {config.rewind_to}")
    with new_output(of_round.output) as aside:
        run = RunDirectory(aside)
        run.create(asdict(of_round) | asdict(parts[0]) | asdict(parts[1]))  # type: ignore[call-overload]
        prune_checkpoint(rewind, run.checkpoints / rewind.name, kept, of_round)
        with writing(of_round.output, "choose another --output"):
            load_tokenizer(rewind).save_pretrained(aside)
            lines = RunDirectory(before).read_metrics()  # the steps that they share
            shared = [json.dumps(line) + "\n" for line in lines if line["step"] <= config.rewind_to]
            (aside / METRICS_FILE).write_text("".join(shared))


class _KeepStep(TrainerCallback):
    """Keeps a copy of the checkpoint of one step, which the rotation of checkpoints would delete."""

    def __init__(self, copy: Path, step: int) -> None:
        self.copy, self.step = copy, step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep(args, state)  # killed between checkpoint and copy

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_save |= state.global_step == self.step
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._keep(args, state)

    def _keep(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.global_step == self.step and not self.copy.exists():
            with new_output(self.copy) as aside, writing(str(self.copy)):
                shutil.copytree(Path(args.output_dir) / self.copy.name, aside)


def _model(path: Path) -> BertForPreTraining:
    return load_saved(path, BertForPreTraining)
