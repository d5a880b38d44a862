"""Two processes rewire alike, say so, and train what one process with the doubled batch trains."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from processes import together
from regrow import RegrowError, TopologyUpdater, UpdateSchedule, sparsify
from regrow.optim import AdamW
from regrow.ranks import rank, world_size
from regrow.training import RegrowCallback, gradient_bytes

STEPS, BATCH = 24, 16
METHODS = ("dynsparse", "rigl", "gse", "set", "snfs", "srigl", "gmp")


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    return sparsify(net, density=0.4, block_size=4, seed=1)


def data() -> torch.Tensor:
    return torch.randn(STEPS, BATCH, 32, generator=torch.Generator().manual_seed(3))


def train(method: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the whole batches, and what was trained, on as many ranks as there are."""
    net = network()
    model = DistributedDataParallel(net, broadcast_buffers=False) if world_size() > 1 else net
    optimizer = AdamW(model.parameters(), lr=0.01)
    updater = TopologyUpdater(model, optimizer, method, schedule=UpdateSchedule(STEPS, 6, 0.3), seed=2)
    losses = []
    for batch in data():
        x = batch.chunk(world_size())[rank()]
        optimizer.zero_grad()
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        updater.step()
        if world_size() > 1:
            dist.all_reduce(loss.data)
        losses.append(loss.item() / world_size())
    return losses, net.state_dict()


def train_all() -> dict[str, Any]:
    dist.init_process_group("gloo")
    return {method: train(method) for method in METHODS}


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
def test_two_ranks_train_what_one_does_with_the_doubled_batch(tmp_path: Path) -> None:
    ranks = together(2, f"{__file__}:train_all", tmp_path)
    for method in METHODS:
        losses, alone = train(method)
        (first, ours), (second, theirs) = (result[method] for result in ranks)
        assert first == second == pytest.approx(losses, abs=1e-5), method
        assert losses[-1] < losses[0]
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), f"{method}: {name}"
            torch.testing.assert_close(value, alone[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def disagree() -> tuple[str, str]:
    """One rank's pattern differs at the start, or comes to differ."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    sparsify(net, density=0.4, block_size=4, seed=rank())
    errors = []
    with pytest.raises(RegrowError) as caught:
        TopologyUpdater(net, AdamW(net.parameters()), schedule=UpdateSchedule(STEPS, 6))
    errors.append(str(caught.value))
    net = network()
    optimizer = AdamW(net.parameters())
    updater = TopologyUpdater(net, optimizer, schedule=UpdateSchedule(4, 2, 0.5))
    updater.step()
    if rank() == 1:
        net[2].values.data.neg_().exp_()  # so that it prunes other blocks
    with pytest.raises(RegrowError) as caught:
        updater.step()
    return *errors, str(caught.value)


def test_ranks_that_disagree_stop_and_name_the_layer(tmp_path: Path) -> None:
    results = together(2, f"{__file__}:disagree", tmp_path)
    assert results[0] == results[1]
    start, later = results[0]
    assert start.startswith("0: the ranks do not have the same blocks at the start; build the model from one seed")
    assert later.startswith("2: the ranks do not have the same blocks after the update of step 2")


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.body(x), labels)}


def train_with_callback(folder: str, method: str, resume: str | None = None) -> tuple[dict[str, torch.Tensor], float]:
    """A stock Trainer."""
    items = [{"x": x, "labels": x.flip(0)} for x in data().flatten(0, 1)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        train_sampling_strategy="sequential",
        learning_rate=1e-2,
        save_steps=14,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    model, callback = Regression(), RegrowCallback(method, n_updates=6, drop_fraction=0.3)
    trainer = Trainer(model, arguments, train_dataset=items, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return model.state_dict(), callback.updater.coverage


def train_stock(folder: str) -> Any:
    whole = {method: train_with_callback(f"{folder}/{method}", method) for method in ("gse", "snfs")}
    again = train_with_callback(f"{folder}/gse", "gse", f"{folder}/gse/checkpoint-14")
    return whole, again


def test_the_callback_works_in_a_stock_trainer_on_two_ranks(tmp_path: Path) -> None:
    results = together(2, f"{__file__}:train_stock", tmp_path, str(tmp_path / "two"))
    for method in ("gse", "snfs"):
        alone, coverage = train_with_callback(str(tmp_path / "one" / method), method)
        for whole, _ in results:
            state, covered = whole[method]
            assert covered == coverage > 0.4
            for name, value in state.items():
                torch.testing.assert_close(value, alone[name], atol=1e-4, rtol=1e-4)
    for whole, again in results:
        assert all(torch.equal(value, again[0][name]) for name, value in whole["gse"][0].items())


def train_alone_together(folder: str) -> str:
    arguments = TrainingArguments(output_dir=folder, max_steps=2, report_to="none", disable_tqdm=True)
    items = [{"x": x, "labels": x} for x in data()[0]]
    trainer = Trainer(Regression(), arguments, train_dataset=items, callbacks=[RegrowCallback(n_updates=2)])
    with pytest.raises(RegrowError) as caught:
        trainer.train()
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they meet on the GPU")
def test_processes_that_would_each_train_alone_are_refused(tmp_path: Path) -> None:
    for message in together(2, f"{__file__}:train_alone_together", tmp_path, str(tmp_path / "run")):
        assert "2 processes were started but each would train alone" in message and "use_cpu=True" in message


def test_only_blocks_are_exchanged() -> None:
    net = network()
    sent, dense = gradient_bytes(net)
    biases = 4 * (64 + 32)
    assert dense == 4 * 2 * 32 * 64 + biases
    assert sent == sum(4 * layer.values.numel() for layer in (net[0], net[2])) + biases
