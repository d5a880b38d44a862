"""Mask-equivalence: the sparse path trains exactly as a dense model whose masks are driven by the same updates."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig

from regrow import BlockSparseLinear, TopologyUpdate, TopologyUpdater, UpdateSchedule
from regrow.bert.model import BertForPreTraining, build_model
from regrow.methods import Method, Signals
from regrow.methods.dynsparse import DynSparse
from regrow.nn import named_sparse_layers
from regrow.optim import parameter_groups

STEPS, UPDATES, TOLERANCE = 60, 6, 1e-4
CONFIG = BertConfig(
    vocab_size=97,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=512,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@dataclass(frozen=True)
class Recorded(Method):
    """DynSparse that keeps what it proposed."""

    inner: Method = field(default_factory=DynSparse)
    updates: list[TopologyUpdate | None] = field(default_factory=list)

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        self.updates.append(self.inner.propose(signals))
        return self.updates[-1]


class MaskedTwin:
    """The dense model with multiplied masks, written without any of the sparse code."""

    def __init__(self, sparse: BertForPreTraining) -> None:
        self.model = build_model(CONFIG, density=None, block_size=16)
        self.masks: dict[str, Tensor] = {}
        state = dict(sparse.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                layer_name = name.removesuffix(".weight")
                if name in state:
                    parameter.copy_(state[name])
                else:
                    layer = sparse.get_submodule(layer_name)
                    assert isinstance(layer, BlockSparseLinear)
                    parameter.copy_(layer.to_dense())
                    self.masks[name] = pattern(layer)
        self.optimizer = make_optimizer(self.model)

    def step(self, batch: dict[str, Tensor]) -> float:
        loss = train_step(self.model, self.optimizer, batch, self.masks)
        return loss

    @torch.no_grad()
    def rewire(self, name: str, old: Tensor, moved_to: Tensor) -> None:
        """``old``: mask before; ``moved_to``: positions the update allocated. Both as element masks."""
        parameter = self.model.get_parameter(f"{name}.weight")
        survivors = self.masks[f"{name}.weight"] & ~old
        for tensor in (parameter, *(s for s in self.optimizer.state[parameter].values() if s.dim() == 2)):
            tensor *= survivors
        self.masks[f"{name}.weight"] = survivors | moved_to


def pattern(layer: BlockSparseLinear) -> Tensor:
    return elements(layer, *layer.topology.coordinates())


def elements(layer: BlockSparseLinear, rows: Tensor, cols: Tensor) -> Tensor:
    grid = torch.zeros(layer.topology.n_block_rows, layer.topology.n_block_cols, dtype=torch.bool)
    grid[rows, cols] = True
    return grid.repeat_interleave(layer.block_size, 0).repeat_interleave(layer.block_size, 1)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.01), lr=2e-3, eps=1e-6)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, masks: dict[str, Tensor]) -> float:
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    for name, mask in masks.items():
        model.get_parameter(name).grad *= mask
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def batches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(5, CONFIG.vocab_size, (4, 32), generator=generator)
        labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.15, ids, -100)
        yield {
            "input_ids": ids.masked_fill(labels != -100, 4),
            "attention_mask": (torch.arange(32) < torch.tensor([[32], [20], [32], [9]])).long(),
            "token_type_ids": (torch.arange(32) >= 12).long().expand(4, 32),
            "labels": labels,
            "next_sentence_label": torch.randint(2, (4,), generator=generator),
        }


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_losses_agree_with_a_masked_dense_model_at_every_step(block_size: int) -> None:
    torch.manual_seed(0)
    model = build_model(CONFIG, density=0.3, block_size=block_size, seed=1)
    twin, layers = MaskedTwin(model), dict(named_sparse_layers(model))
    assert len(layers) == 12 and len(twin.masks) == 12
    optimizer, method = make_optimizer(model), Recorded()
    updater = TopologyUpdater(model, optimizer, method, schedule=UpdateSchedule(STEPS, UPDATES + 1, 0.5), seed=2)
    updates_seen = 0
    for batch in batches():
        before = {name: layer.topology.coordinates() for name, layer in layers.items()}
        sparse_loss, dense_loss = train_step(model, optimizer, batch, {}), twin.step(batch)
        assert abs(sparse_loss - dense_loss) < TOLERANCE
        method.updates.clear()
        if not updater.step():
            continue
        updates_seen += 1
        for (name, layer), update in zip(layers.items(), method.updates, strict=True):
            if update is None:  # a few blocks of a small layer, late in the cosine
                continue
            rows, cols = before[name]
            removed = elements(layer, rows[update.slots], cols[update.slots])
            twin.rewire(name, removed, elements(layer, update.rows, update.cols))
            assert torch.equal(twin.masks[f"{name}.weight"], pattern(layer))
    assert updates_seen == UPDATES
    for name, layer in layers.items():
        weight = twin.model.get_parameter(f"{name}.weight")
        torch.testing.assert_close(layer.to_dense(), weight.detach(), atol=1e-4, rtol=1e-3)
