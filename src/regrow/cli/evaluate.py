"""``regrow evaluate``: held-out loss, a task's metrics, or what changed between two models."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

from regrow.bert.changes import changes
from regrow.bert.essential import check_format, essential_sparsity, plot_sweep
from regrow.bert.finetune_config import FinetuneConfig
from regrow.bert.fused import fuse
from regrow.bert.heldout import HeldOut
from regrow.bert.output import check_new, new_output
from regrow.bert.pretrain import PretrainConfig
from regrow.bert.run import RunDirectory
from regrow.bert.saved import load_saved
from regrow.bert.skipping import Rule, skip_activations
from regrow.bert.tasks.load import load_problem
from regrow.bert.tasks.predictions import write_predictions
from regrow.cli import finetune, pretrain
from regrow.cli.parser import OneLineParser, list_of
from regrow.cli.training import table
from regrow.errors import RegrowError


def run(argv: Sequence[str]) -> int:
    asked = _parser().parse_args(argv)
    for path in (asked.json, asked.predictions, asked.plot):
        if path is not None:
            check_new(path)
    _check_essential(asked)
    _check_skip(asked)
    found: dict[str, Any]
    if asked.against is not None:
        found = _compare(asked)
    elif asked.task is not None or "task" in _saved(asked.model):
        found = _task(asked)
    else:
        found = _heldout(asked)
    sweep, skipped = found.pop("essential", None), found.pop("skipping", [])
    print(table([(name.replace("_", " "), _shown(value)) for name, value in found.items()]))
    if skipped:
        print(f"\n{_keeps(asked.skip, found, skipped)}")
        found["skipping"] = skipped
    if sweep is not None:
        print(f"\n{sweep}")
        found["essential"] = asdict(sweep)
    if asked.plot is not None:
        plot_sweep(sweep, asked.plot)
    if asked.json is not None:
        with new_output(asked.json) as aside:
            aside.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def scorer(model: str) -> Callable[[Any], float]:
    """A score for models like the one of a run, higher is better, on what that run held out.

    The main metric of the task it was fine-tuned on, or the negative masked-word loss.

    Raises:
        RegrowError: it is no run, or its data cannot be read.
    """
    if not RunDirectory(model).begun:
        raise RegrowError(f"{model} is no run, so nothing says what it is to be evaluated on")
    if "task" in _saved(model):
        problem, _ = load_problem(finetune.COMMAND.saved(RunDirectory(model), f"--model={model}"), train=False)
        return lambda other: problem.evaluate(fuse(copy.deepcopy(other)), progress=True)[problem.main_metric]
    heldout = HeldOut(model, pretrain.COMMAND.saved(RunDirectory(model)))

    def score(other: Any) -> float:
        twin = copy.deepcopy(heldout.model)
        twin.load_state_dict(other.state_dict())
        return -heldout.losses(twin)["mlm_loss"]

    return score


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="regrow evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Evaluate a model, as its run was: a pre-trained one on held-out text, a fine-tuned one on its "
        "task's held-out examples.\nOr compare two models.",
        epilog="examples:\n"
        "  regrow evaluate runs/small --pseudo-perplexity 64\n"
        "  regrow evaluate bert/ --data corpus.txt\n"
        "  regrow evaluate runs/small-sst2 --predictions sst2.tsv\n"
        "  regrow evaluate runs/small-sst2 --skip wina --keep 0.5,0.7,0.9\n"
        "  regrow evaluate runs/small-sst2 --against runs/small\n"
        "  regrow evaluate runs/small --essential --plot sweep.png",
    )
    parser.add_argument("model", help="directory of a run or of a saved model, sparse or dense")
    parser.add_argument("--data", help="another corpus, or another folder of the task's files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found to a new file")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences at a time (default: %(default)s)")
    text = parser.add_argument_group("pre-trained models")
    text.add_argument("--sequences", type=int, help="of the held-out text, at most (default: the run's)")
    text.add_argument(
        "--pseudo-perplexity",
        type=int,
        metavar="N",
        help="also of N sequences: how surprised the model is by each word given all others",
    )
    text.add_argument(
        "--activations",
        type=float,
        metavar="P",
        help="also how many feed-forward activations can be left out if the perplexity may rise by the share P",
    )
    tasks = parser.add_argument_group("fine-tuned models")
    tasks.add_argument("--task", help="the task, for a model without the configuration of its run")
    tasks.add_argument("--dev-data", metavar="FILE", help="the file to evaluate on")
    tasks.add_argument("--text-columns", metavar="A,B", help="for --task classification or regression")
    tasks.add_argument("--label-column", metavar="C", help="for --task classification or regression")
    tasks.add_argument("--max-length", type=int, metavar="N", help="tokens of an example")
    tasks.add_argument("--predictions", type=Path, metavar="FILE", help="new file for what it says of each example")
    sweep = parser.add_argument_group("how much can be pruned")
    sweep.add_argument(
        "--essential",
        action="store_true",
        help="also prune more and more of the encoder's weakest weights, or blocks, at once and without training: the "
        "loss or the main metric at each tenth, and the knee, from where on it falls fast (essential sparsity)",
    )
    sweep.add_argument("--prune-blocks", type=int, metavar="B", help="of a dense model, BxB blocks instead of weights")
    sweep.add_argument("--plot", type=Path, metavar="FILE", help="new .png, .svg or .pdf of it (needs regrow[plot])")
    skip = parser.add_argument_group("skipped activations")
    skip.add_argument(
        "--skip",
        choices=get_args(Rule),
        help="also with the input columns left out, token by token, that are lowest by |x| times the norm of the "
        "weight's column (wina), by |x| (teal), or by |x| in the feed-forward halves' second layers alone (cats)",
    )
    skip.add_argument(
        "--keep",
        type=list_of(float),
        metavar="SHARES",
        help="shares of the columns that stay, with commas between (default: 0.5)",
    )
    other = parser.add_argument_group("two models")
    other.add_argument("--against", metavar="MODEL", help="how many values are still what they are in this model")
    return parser


def _saved(model: str) -> dict[str, Any]:
    run = RunDirectory(model)
    return run.read_config() if run.begun else {}


def _check_essential(asked: argparse.Namespace) -> None:
    for name in ("plot", "prune_blocks"):
        if getattr(asked, name) is not None and not asked.essential:
            raise RegrowError(f"--{name.replace('_', '-')} is for --essential; give both")
    if asked.essential and asked.against is not None:
        raise RegrowError("--essential is about one model and --against compares two; drop one of both")
    if asked.plot is not None:
        check_format(asked.plot)


def _check_skip(asked: argparse.Namespace) -> None:
    if asked.keep is not None and asked.skip is None:
        raise RegrowError("--keep says how much stays; name the rule with --skip")
    if wrong := [keep for keep in asked.keep or () if not 0 < keep <= 1]:
        raise RegrowError(f"--keep must lie in (0, 1], got {wrong[0]:g}")
    if asked.skip is not None and asked.against is not None:
        raise RegrowError("--skip evaluates one model; leave out --against")


def _heldout(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.predictions is not None:
        raise RegrowError("--predictions is for fine-tuned models; name the --task")
    given = {"data": asked.data, "eval_sequences": asked.sequences}
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    if RunDirectory(asked.model).begun:
        config = pretrain.COMMAND.saved(RunDirectory(asked.model), *flags)
    elif asked.data is None:
        raise RegrowError(f"{asked.model} is no run, so give the text to evaluate on with --data")
    else:
        config = PretrainConfig(**{name: value for name, value in given.items() if value is not None})
    heldout = HeldOut(asked.model, config, asked.batch_size)
    found: dict[str, Any] = heldout.losses()
    found["skipping"] = _skipped(asked, heldout.model, heldout.losses)
    if asked.pseudo_perplexity is not None:
        found["pseudo_perplexity"] = heldout.pseudo_perplexity(asked.pseudo_perplexity)
    if asked.activations is not None:
        sparsity = heldout.activation_sparsity(asked.activations)
        found[f"activations_left_out_at_{asked.activations:g}"] = sparsity.share
        found |= {f"of_{name}": share for name, share in sparsity.by_layer.items()}
    if asked.essential:
        found["essential"] = heldout.essential_sparsity(asked.prune_blocks)
    return found


def _task(asked: argparse.Namespace) -> dict[str, Any]:
    if asked.pseudo_perplexity is not None or asked.activations is not None:
        raise RegrowError("--pseudo-perplexity and --activations are for pre-trained models")
    given = {
        name: value
        for name in ("task", "data", "dev_data", "text_columns", "label_column", "max_length")
        if (value := getattr(asked, name)) is not None
    }
    if "data" in given:
        given.setdefault("dev_data", given["data"])  # instead of the run's own file
    if "task" in _saved(asked.model):
        flags = [f"--{name}={value}" for name, value in given.items()]
        config = finetune.COMMAND.saved(RunDirectory(asked.model), *flags, f"--model={asked.model}")
    else:
        config = FinetuneConfig(model=asked.model, **given)
    model = load_saved(asked.model)
    problem, _ = load_problem(config, train=False)
    if not type(model).__name__.endswith(problem.head):
        raise RegrowError(f"{asked.model} is a {type(model).__name__}, without a head for {config.task}; fine-tune it")
    fuse(model)
    predicted = problem.predict(model, batch_size=asked.batch_size, progress=True)
    if asked.predictions is not None:
        write_predictions(problem, predicted, asked.predictions)
    found: dict[str, Any] = dict(problem.score(predicted))
    again = partial(problem.evaluate, model, batch_size=asked.batch_size, progress=True)
    found["skipping"] = _skipped(asked, model, again)
    if asked.essential:
        found["essential"] = essential_sparsity(
            model,
            lambda pruned: problem.evaluate(pruned, batch_size=asked.batch_size)[problem.main_metric],
            metric=problem.main_metric,
            lower_is_better=False,
            block_size=asked.prune_blocks,
            progress=True,
        )
    return found


def _skipped(asked: argparse.Namespace, model: Any, evaluate: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
    """What is found for every share that is kept."""
    rows = []
    for keep in (asked.keep or [0.5]) if asked.skip is not None else ():
        with skip_activations(model, asked.skip, keep):
            rows.append({"keep": keep, **evaluate()})
    return rows


def _keeps(rule: str, whole: dict[str, float], skipped: list[dict[str, float]]) -> str:
    """Metrics by the share that is kept, ending with all of it."""
    names = [name for name in skipped[0] if name != "keep"]
    lines = [[f"keep ({rule})", *(name.replace("_", " ") for name in names)]]
    rows = [*skipped, {"keep": 1.0, **{name: whole[name] for name in names}}]
    lines += [[f"{row['keep']:g}", *(_shown(row[name]) for name in names)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _compare(asked: argparse.Namespace) -> dict[str, Any]:
    found = changes(load_saved(asked.against), load_saved(asked.model))
    rows: dict[str, float] = {}
    for name, change in found.items():
        values = asdict(change)
        if not change.n_blocks:
            values = {key: value for key, value in values.items() if key not in ("n_blocks", "churn")}
        rows |= {f"{name}:_{key}": value for key, value in values.items()}
    return rows


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
