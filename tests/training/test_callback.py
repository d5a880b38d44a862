"""A stock transformers Trainer needs one added line, and resumes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from regrow import RegrowError, sparsify
from regrow.training import RegrowCallback, UpdateRecord


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = sparsify(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), density=0.4, block_size=8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def train(folder: Path, callback: RegrowCallback, resume: str | None = None, steps: int = 20) -> Regression:
    generator = torch.Generator().manual_seed(1)
    data = [{"x": x, "labels": x.flip(0)} for x in torch.randn(80, 32, generator=generator)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=7,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = Regression()
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train(resume_from_checkpoint=resume)
    return model


def test_the_callback_rewires_and_its_state_travels_in_checkpoints(tmp_path: Path) -> None:
    records: list[UpdateRecord] = []
    whole = train(tmp_path / "a", RegrowCallback(n_updates=5, seed=3, on_update=records.extend))
    assert [r.step for r in records] == [4, 4, 8, 8, 12, 12, 16, 16]
    assert all(r.n_moved > 0 for r in records)
    assert json.loads((tmp_path / "a/checkpoint-14/trainer_state.json").read_text())["global_step"] == 14

    again = train(tmp_path / "a", RegrowCallback(n_updates=5, seed=3), str(tmp_path / "a/checkpoint-14"))
    for (name, x), y in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_a_checkpoint_without_topology_state_is_refused(tmp_path: Path) -> None:
    train(tmp_path, RegrowCallback(n_updates=5), steps=8)
    (tmp_path / "checkpoint-7/topology_state.safetensors").unlink()
    with pytest.raises(RegrowError, match=r"topology_state\.safetensors is damaged \(missing\)"):
        train(tmp_path, RegrowCallback(n_updates=5), str(tmp_path / "checkpoint-7"), steps=8)


def test_too_many_updates_are_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(RegrowError, match="n_updates must lie between 1 and total_steps=20"):
        train(tmp_path, RegrowCallback(n_updates=21))
