"""Transformed weights in a Trainer: what travels in checkpoints, and what nobody could have written there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from regrow.errors import RegrowError
from regrow.methods import create
from regrow.nn import TransformedLinear, harden, transform_linears
from regrow.optim import AdamW
from regrow.training import RegrowCallback, SafeTrainer, UpdateSchedule
from regrow.training.manifest import damage, write_manifest
from regrow.training.transformed import TransformedTraining
from training.checkpoints import Regression

STEPS, STOP = 12, 7
NAMES = ["maskllm", "masksparsity", "pdp", "pgf", "srste", "sste"]


class Transformed(Regression):
    """Two linear layers, transformed."""

    def __init__(self, method: str) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        self.body = transform_linears(layers, create(method), density=0.4, block_size=8)


def trainer(folder: Path, method: str, kind: type[Trainer] = SafeTrainer, **changes: object) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=STOP,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **changes,
    )
    model = Transformed(method)
    return kind(
        model,
        arguments,
        train_dataset=[{"x": x, "labels": x.flip(0)} for x in torch.randn(8 * STEPS, 32, generator=generator)],
        optimizers=(AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), None),
        callbacks=[RegrowCallback(method, n_updates=1, seed=3)],
    )


def resume(checkpoint: Path, method: str) -> nn.Module:
    again = trainer(checkpoint.parent, method)
    again.train(resume_from_checkpoint=str(checkpoint))
    return again.model


@pytest.fixture(scope="module", params=NAMES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, nn.Module]:
    folder = tmp_path_factory.mktemp(request.param)
    training = trainer(folder, request.param)
    training.train()
    return request.param, folder / f"checkpoint-{STOP}", training.model


def test_a_resumed_training_is_bitwise_the_uninterrupted_one(finished: tuple[str, Path, nn.Module]) -> None:
    method, checkpoint, whole = finished
    torch.manual_seed(99)
    for (name, a), b in zip(whole.state_dict().items(), resume(checkpoint, method).state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_stock_trainer_needs_one_line_and_hardening(tmp_path: Path) -> None:
    stock = trainer(tmp_path, "srste", Trainer, gradient_accumulation_steps=2)
    stock.train()
    moment = stock.model.body[0].moment
    assert (moment.step, moment.total_steps, moment.backward_passes) == (STEPS, STEPS, 2)
    x = torch.randn(3, 32)
    before = stock.model.body.eval()(x)
    hard = harden(stock.model)
    assert torch.equal(hard.body(x), before)
    assert ((hard.body[0].weight != 0).view(-1, 4).sum(1) == 2).all()


Change = Callable[[dict[str, torch.Tensor]], object]


def changed(checkpoint: Path, copy: Path, file: str, change: Change) -> Path:
    """A copy with one file rewritten, and checksums that agree."""
    copy = copy / checkpoint.name
    copy.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / file)
    change(tensors)
    save_file(tensors, copy / file)
    write_manifest(copy)
    assert damage(copy) is None
    return copy


@pytest.mark.parametrize(
    ("method", "file", "change", "message"),
    [
        ("maskllm", "model", lambda t: t["body.0.logits"][3].fill_(float("nan")), "body.0.logits holds NaN"),
        ("maskllm", "model", lambda t: t["body.2.logits"][0].fill_(float("inf")), "body.2.logits holds NaN"),
        ("maskllm", "model", lambda t: t.pop("body.0.logits"), "body.0.logits"),
        ("maskllm", "model", lambda t: t.update({"body.0.logits": t["body.0.logits"][1:]}), "does not fit this model"),
        (
            "maskllm",
            "model",
            lambda t: t.update({"body.0.logits": t["body.0.logits"].double()}),
            "must be F32, not F64",
        ),
        ("sste", "model", lambda t: t["body.0.beta"].fill_(0.5), "body.0.beta must be at least 1, got 0.5"),
        ("sste", "model", lambda t: t["body.0.beta"].fill_(float("inf")), "body.0.beta holds NaN or infinity"),
        ("masksparsity", "model", lambda t: t["body.0.doomed"].fill_(True), "doomed must hold 19 blocks, got 32"),
        ("masksparsity", "model", lambda t: t["body.2.doomed"].fill_(False), "doomed must hold 19 blocks, got 0"),
        ("srste", "topology_state", lambda t: t["counters"].fill_(STEPS + 1), "counters are 13 steps of 12"),
        ("srste", "topology_state", lambda t: t["counters"].fill_(-1), "counters are -1 steps of 12"),
        ("srste", "topology_state", lambda t: t["counters"].fill_(3), "is of step 3"),
        ("srste", "topology_state", lambda t: t.update(counters=torch.ones(2).long()), "does not belong to a training"),
        ("srste", "topology_state", lambda t: t.update(other=torch.ones(1)), "does not belong to a training"),
    ],
)
def test_what_nobody_could_have_written_is_refused(
    method: str, file: str, change: Change, message: str, tmp_path: Path
) -> None:
    training = trainer(tmp_path / "run", method)
    training.train()
    checkpoint = tmp_path / "run" / f"checkpoint-{STOP}"
    copy = changed(checkpoint, tmp_path / "copy", f"{file}.safetensors", change)
    with pytest.raises(RegrowError, match=message) as error:
        resume(copy, method)
    assert "\n" not in str(error.value) and re.search(r"\.safetensors", str(error.value))


def test_layers_of_another_method_are_refused() -> None:
    schedule = UpdateSchedule(2, 1)
    with pytest.raises(RegrowError, match=r"needs transformed layers; call regrow.nn.transform_linears first"):
        TransformedTraining(nn.Linear(4, 4), create("srste"), schedule=schedule)
    layers = transform_linears(nn.Sequential(nn.Linear(8, 8)), create("srste"))
    with pytest.raises(RegrowError, match=r"0 was made for SRSTE\(n=2, m=4"):
        TransformedTraining(layers, create("srste", n=1), schedule=schedule)


def test_draws_differ_between_layers_and_steps() -> None:
    layers = transform_linears(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), create("maskllm"))
    training = TransformedTraining(layers, create("maskllm"), schedule=UpdateSchedule(3, 1), seed=1)
    seeds = set()
    training.start()
    for _ in range(3):
        seeds |= {layer.moment.seed for layer in layers if isinstance(layer, TransformedLinear)}
        training.step()
    assert len(seeds) == 6
