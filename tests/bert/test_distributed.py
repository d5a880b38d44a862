"""Pre-training on two processes is pre-training on one, stops as one, and goes on as one or two."""

import io
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, TrainerCallback

from pretraining import STEPS, config, lines_with_clock, metrics_without_clock
from processes import together
from regrow import RegrowError
from regrow.bert.pretrain import pretrain
from regrow.bert.run import RunDirectory
from regrow.methods import create
from regrow.ranks import rank, wait_for_all

METHODS, STOP_AT = ("dynsparse", "rigl"), 13
EVERY_STEP = {"dropout": 0.0, "logging_steps": 1}


pytestmark = pytest.mark.usefixtures("cache")


class SignalOne(TrainerCallback):
    """What only one of the processes notices."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP_AT - 1 and rank() == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def train_all(corpus: Path, folder: Path) -> dict[str, Any]:
    """On each rank: the results of every method, what was printed, and the message of a batch that cannot be shared."""
    with pytest.raises(RegrowError) as refusal:
        pretrain(config(corpus, folder / "refused", batch_size=3), create("static"))
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        results = {
            method: pretrain(config(corpus, folder / method, **EVERY_STEP), create(method)) for method in METHODS
        }
    gone_on = pretrain(config(corpus, folder / "one", **EVERY_STEP), create("dynsparse"), resume=True)
    return {"refusal": str(refusal.value), "results": results, "shown": shown.getvalue(), "gone on": gone_on}


def test_two_processes_train_what_one_does(corpus: Path, tmp_path: Path) -> None:
    stopped = config(corpus, tmp_path / "two/one", **EVERY_STEP)
    pretrain(stopped, create("dynsparse"), callbacks=[SignalOne(0)])
    first, second = together(2, f"{__file__}:train_all", tmp_path / "ranks", corpus, tmp_path / "two")
    assert first["refusal"] == second["refusal"]
    assert first["refusal"].startswith("batch_size=3 sequences in a step cannot be shared evenly by 2 processes")
    assert second["shown"] == "" and first["shown"].count("2 processes of 2 sequences; gradient bytes per step: ") == 2
    for method in METHODS:
        ours, alone = (
            first["results"][method],
            pretrain(config(corpus, tmp_path / method, **EVERY_STEP), create(method)),
        )
        assert ours == second["results"][method] and ours.finished and ours.step == STEPS
        assert ours.after["eval_mlm_loss"] < ours.before["eval_mlm_loss"]
        lines, expected = (metrics_without_clock(result.path) for result in (ours, alone))
        assert len(lines) == len(expected) > STEPS
        for line, other in zip(lines, expected, strict=True):
            assert line.keys() == other.keys() and line["step"] == other["step"] and line["tokens"] == other["tokens"]
            losses = [name for name in line if name.endswith("loss")]
            assert [line[name] for name in losses] == pytest.approx([other[name] for name in losses], abs=1e-5, rel=0)
        # Not which blocks: where heads have no keys, the gradients of queries are rounding, and so is their order.
        moves, expected = (
            [(update["step"], update["layer"], update["n_blocks"], update["n_moved"]) for update in updates]
            for updates in (RunDirectory(result.path).read_updates() for result in (ours, alone))
        )
        assert moves == expected
        assert all(line["tokens_per_second"] > 0 for line in lines_with_clock(ours.path) if "loss" in line)
        AutoModelForMaskedLM.from_pretrained(ours.path)
    whole, continued = (first["results"]["dynsparse"], first["gone on"])  # begun by one, and gone on by two
    assert continued.step == STEPS
    assert continued.after["eval_mlm_loss"] == pytest.approx(whole.after["eval_mlm_loss"], abs=1e-5)


def stop_and_go_on(corpus: Path, folder: Path) -> Any:
    """Uninterrupted, and stopped by a signal to one rank and resumed; a copy of the stopped run is left."""
    whole = pretrain(config(corpus, folder / "whole"), create("gse"))
    settings = config(corpus, folder / "run")
    stopped = pretrain(settings, create("gse"), callbacks=[SignalOne(1)])
    if rank() == 0:
        shutil.copytree(folder / "run", folder / "copy")
    wait_for_all()
    torch.manual_seed(123)  # whatever the new process has drawn
    return whole, stopped, pretrain(settings, create("gse"), resume=True)


def test_all_ranks_stop_together_and_go_on_as_two_or_one(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results = together(2, f"{__file__}:stop_and_go_on", tmp_path / "ranks", corpus, tmp_path)
    for _, stopped, resumed in results:
        assert not stopped.finished and stopped.step == STOP_AT and resumed.finished
    assert [path.name for path in (tmp_path / "copy/checkpoints").iterdir()] == [f"checkpoint-{STOP_AT}"]
    for name in ("model.safetensors", "training_state.safetensors", "topology_state.safetensors"):
        ours, whole = (load_file(tmp_path / run / f"checkpoints/checkpoint-{STEPS}" / name) for run in ("run", "whole"))
        assert ours.keys() == whole.keys()
        for key in ours:
            assert torch.equal(ours[key], whole[key]), f"{name}: {key}"
    states = load_file(tmp_path / f"run/checkpoints/checkpoint-{STEPS}/training_state.safetensors")
    assert not torch.equal(states["random.torch"], states["random.1.torch"])
    assert metrics_without_clock(tmp_path / "run") == metrics_without_clock(tmp_path / "whole")
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".yaml", ".safetensors"}

    alone = pretrain(config(corpus, tmp_path / "copy"), create("gse"), resume=True)
    assert alone.finished and alone.after["eval_mlm_loss"] < alone.before["eval_mlm_loss"]
    assert "the checkpoint is of 2 processes, and now there are 1" in capsys.readouterr().out
    tokens, expected = (
        [(line["step"], line["tokens"]) for line in lines_with_clock(tmp_path / run)] for run in ("copy", "whole")
    )
    assert tokens == expected  # so the batches are the same
