"""Two processes that hold a share of the parameters each train what one does with all of them."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, TrainerCallback

from pretraining import STEPS, config, metrics_without_clock
from processes import together
from regrow import RegrowError
from regrow.bert.pretrain import PretrainResult, pretrain
from regrow.bert.run import RunDirectory
from regrow.methods import create
from regrow.nn import named_sparse_layers
from regrow.ranks import rank
from regrow.shards import own, own_rows, shared_out, whole

METHODS, STOP_AT = ("dynsparse", "rigl"), 13
EVERY_STEP = {"dropout": 0.0, "logging_steps": 1}
SHARED = {"parallel": "fsdp"}


pytestmark = pytest.mark.usefixtures("cache")


class Watch(TrainerCallback):
    """Bytes that this rank holds, and a stop in the middle."""

    def __init__(self, stop_at: int = STEPS) -> None:
        self.stop_at = stop_at
        self.rows: dict[str, tuple[int, int, int]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.stop_at
        control.should_save |= state.global_step == self.stop_at
        optimizer = kwargs["optimizer"]
        for name, layer in named_sparse_layers(kwargs["model"]):
            moment = optimizer.state[layer.values]["exp_avg"]
            self.rows[name] = (layer.topology.n_blocks, len(own(layer.values)), len(own(moment)))


def train_all(corpus: Path, folder: Path) -> dict[str, Any]:
    refused = {}
    for method in ("snfs", "acdc"):
        with pytest.raises(RegrowError) as refusal:
            pretrain(config(corpus, folder / method, **SHARED), create(method))
        refused[method] = str(refusal.value)
    watch, shown = Watch(), io.StringIO()
    with redirect_stdout(shown):
        results = {
            method: pretrain(config(corpus, folder / method, **EVERY_STEP, **SHARED), create(method), callbacks=[watch])
            for method in METHODS
        }
    # With dropout: two processes that stop and go on are two that do not.
    settings = config(corpus, folder / "run", eval_sequences=3, **SHARED)  # so that one has nothing to evaluate
    stopped = pretrain(settings, create("dynsparse"), callbacks=[Watch(STOP_AT)])
    torch.manual_seed(123)
    resumed = pretrain(settings, create("dynsparse"), resume=True)
    pretrain(config(corpus, folder / "whole", eval_sequences=3, **SHARED), create("dynsparse"))
    gone_on = pretrain(config(corpus, folder / "one", **EVERY_STEP, **SHARED), create("dynsparse"), resume=True)
    return {
        "refused": refused,
        "results": results,
        "shown": shown.getvalue(),
        "rows": watch.rows,
        "stopped": stopped,
        "resumed": resumed,
        "gone on": gone_on,
    }


def test_two_processes_with_half_of_the_parameters_train_what_one_does(corpus: Path, tmp_path: Path) -> None:
    begun = config(corpus, tmp_path / "two/one", **EVERY_STEP)
    pretrain(begun, create("dynsparse"), callbacks=[Watch(STOP_AT)])
    first, second = together(2, f"{__file__}:train_all", tmp_path / "ranks", corpus, tmp_path / "two")

    assert "method 'snfs' changes how many blocks a layer has" in first["refused"]["snfs"]
    assert "method 'acdc' masks dense weights" in second["refused"]["acdc"]
    assert first["shown"].count("the encoder's weights travel twice besides") == len(METHODS)
    assert first["shown"].count("process 0 keeps ") == len(METHODS) and second["shown"] == ""
    for name, (n_blocks, rows, moments) in first["rows"].items():
        assert rows == moments == -(-n_blocks // 2) and second["rows"][name] == (
            n_blocks,
            n_blocks - rows,
            n_blocks - rows,
        )

    for method in METHODS:
        ours = first["results"][method]
        alone = pretrain(config(corpus, tmp_path / method, **EVERY_STEP), create(method))
        assert ours == second["results"][method] and ours.finished
        assert ours.after["eval_mlm_loss"] < ours.before["eval_mlm_loss"]
        equal_losses(ours, alone)
        saved, expected = (load_file(result.path / "model.safetensors") for result in (ours, alone))
        assert saved.keys() == expected.keys()  # what is tied is stored once
        AutoModelForMaskedLM.from_pretrained(ours.path)

    assert first["stopped"].step == STOP_AT and first["resumed"].finished
    for name in ("model.safetensors", "training_state.safetensors", "topology_state.safetensors"):
        ours, expected = (
            load_file(tmp_path / "two" / run / f"checkpoints/checkpoint-{STEPS}" / name) for run in ("run", "whole")
        )
        assert ours.keys() == expected.keys()
        for key in ours:
            assert torch.equal(ours[key], expected[key]), f"{name}: {key}"
    assert metrics_without_clock(tmp_path / "two/run") == metrics_without_clock(tmp_path / "two/whole")

    # Begun by one process that held all, gone on by two; and begun by those two, gone on by one.
    equal_losses(first["gone on"], first["results"]["dynsparse"])
    alone = pretrain(config(corpus, tmp_path / "two/run", eval_sequences=3), create("dynsparse"), resume=True)
    assert alone.finished


def equal_losses(ours: PretrainResult, other: PretrainResult) -> None:
    lines, expected = (metrics_without_clock(result.path) for result in (ours, other))
    assert len(lines) == len(expected) > STEPS
    for line, like in zip(lines, expected, strict=True):
        assert line.keys() == like.keys() and line["step"] == like["step"]
        losses = [name for name in line if name.endswith("loss")]
        assert [line[name] for name in losses] == pytest.approx([like[name] for name in losses], abs=1e-5, rel=0)
    moves, expected = (
        [(update["step"], update["layer"], update["n_moved"]) for update in RunDirectory(result.path).read_updates()]
        for result in (ours, other)
    )
    assert moves == expected


def rows_of_each(rows: int) -> list[list[int]]:
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    like = torch.distributed.tensor.distribute_tensor(
        torch.zeros(rows, 2), mesh, [torch.distributed.tensor.Shard(0)], src_data_rank=None
    )
    numbers = shared_out(torch.arange(rows), like)
    assert torch.equal(whole(numbers), torch.arange(rows))
    wanted = torch.arange(rows).flip(0)
    found = own(numbers)[own_rows(numbers, wanted)]
    assert rank() in (0, 1)
    return [own(numbers).tolist(), found.tolist()]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_are_found_where_they_are(rows: int, tmp_path: Path) -> None:
    parts = together(2, f"{__file__}:rows_of_each", tmp_path, rows)
    assert [number for held, _ in parts for number in held] == list(range(rows))
    for held, found in parts:
        assert sorted(found) == held


def test_one_process_alone_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RegrowError, match="start several with torchrun"):
        pretrain(config(corpus, tmp_path / "run", **SHARED), create("static"))
