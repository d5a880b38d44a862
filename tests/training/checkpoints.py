"""A tiny sparse model, a real checkpoint of it, and what becomes of a copy that somebody has changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import TrainingArguments

from regrow import sparsify
from regrow.optim import AdamW
from regrow.training import RegrowCallback, SafeTrainer
from regrow.training.manifest import damage, write_manifest

STEPS, STOP = 12, 8


class Regression(nn.Module):
    """Two sparse layers of 13 blocks each, at 8 x 4 and 4 x 8 positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = sparsify(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), density=0.4, block_size=8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}

    def save_pretrained(self, folder: str, state_dict: dict | None = None) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self, str(Path(folder) / "model.safetensors"))


def trainer(folder: Path) -> SafeTrainer:
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
    )
    model = Regression()
    return SafeTrainer(
        model,
        arguments,
        train_dataset=[{"x": x, "labels": x.flip(0)} for x in torch.randn(4 * STEPS, 32, generator=generator)],
        optimizers=(AdamW(model.parameters(), lr=1e-2), None),
        callbacks=[RegrowCallback(n_updates=6, seed=3)],
    )


def train(folder: Path) -> SafeTrainer:
    """To the end; ``checkpoint-8`` is left on the way."""
    whole = trainer(folder)
    whole.train()
    return whole


def resume(checkpoint: Path) -> SafeTrainer:
    resumed = trainer(checkpoint.parent)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    return resumed


def changed(checkpoint: Path, folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy in which ``change`` was done to the tensors or the JSON of one file. Its manifest agrees with it."""
    copy = folder / checkpoint.name
    shutil.copytree(checkpoint, copy)
    path = copy / file
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
    write_manifest(copy)
    assert damage(copy) is None
    return copy
