"""Prune a checkpoint: the state of a training at some step, without some of its blocks.

Everything else in it stays: weights, moments, learning rates, counters, random states, place in the data. So a
training that goes on from it is the one that would have gone on, without these blocks from that step on; and with no
block pruned it is that one, bitwise.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from regrow.bert.export import save, saved_tokenizer
from regrow.bert.model import BertForPreTraining
from regrow.bert.pretrain import PretrainConfig
from regrow.bert.run import writing
from regrow.bert.saved import load_saved
from regrow.errors import RegrowError
from regrow.methods.rules import exchange
from regrow.methods.scores import Norm, block_norm, weakest
from regrow.nn import BlockSparseLinear, named_sparse_layers
from regrow.nn.layout import record_layout
from regrow.training.checkpoint import JSON_FILE, TENSORS_FILE, TOPOLOGY_FILE, damaged, load_tensors
from regrow.training.manifest import damage, write_manifest
from regrow.training.trainer import TRAINER_FILE
from regrow.training.updater import apply_update

_OF_OPTIMIZER = re.compile(r"optimizer\.(\d{1,9})\.(\w+)")


@torch.no_grad()
def globally_kept(layers: Mapping[str, BlockSparseLinear], share: float, norm: Norm = "l1") -> dict[str, Tensor]:
    """Positions that stay when the weakest ``share`` of all blocks of all layers goes, ranked together by their norm.

    The strongest block of each layer stays whatever its norm: a layer is never empty. Ties go in the order of layers
    and slots.

    Args:
        layers: of one block size, so that their norms compare.
        share: of the blocks that exist, in [0, 1).

    Returns:
        for each layer int64 ``[n_kept]``, ascending flat positions.

    Raises:
        RegrowError: there is no layer, or their block sizes differ.

    Example:
        >>> layers = {name: BlockSparseLinear(32, 32, block_size=16, density=1.0) for name in "ab"}
        >>> for start, layer in zip((1.0, 5.0), layers.values()):
        ...     _ = layer.values.data.copy_(torch.arange(start, start + 4).view(4, 1, 1).expand(4, 16, 16))
        >>> {name: len(kept) for name, kept in globally_kept(layers, 0.25).items()}
        {'a': 2, 'b': 4}
    """
    if len({layer.block_size for layer in layers.values()}) != 1:
        raise RegrowError(
            "pruning ranks blocks of one size together; give a model with sparse layers of one block size"
        )
    norms = {name: block_norm(layer.values, norm).double().cpu() for name, layer in layers.items()}
    for of_layer in norms.values():
        of_layer[of_layer.argmax()] = float("inf")
    total = sum(map(len, norms.values()))
    doomed = torch.zeros(total, dtype=torch.bool)
    doomed[weakest(torch.cat(list(norms.values())), min(round(share * total), total - len(norms)))] = True
    parts = doomed.split([len(of_layer) for of_layer in norms.values()])
    return {
        name: layer.topology.keys().cpu()[~part].sort().values
        for (name, layer), part in zip(layers.items(), parts, strict=True)
    }


def prune_checkpoint(source: Path, target: Path, kept: Mapping[str, Tensor], config: PretrainConfig) -> None:
    """Write to ``target`` the checkpoint at ``source`` with only the blocks at the positions ``kept``.

    Args:
        source: a checkpoint of ``regrow pretrain``, of a method whose pattern did not move before it.
        target: a new folder, named as ``source``.
        kept: positions of each sparse layer, all of which hold a block.
        config: of the training that wrote it; it says in which order the optimizer holds the parameters.

    Raises:
        RegrowError: the checkpoint is damaged or of another model, or the target cannot be written.
    """
    if wrong := damage(source):
        raise RegrowError(f"{source / wrong}; begin the recipe anew in another --output")
    model = load_saved(source, BertForPreTraining)
    layers = dict(named_sparse_layers(model))
    if layers.keys() != kept.keys():
        raise RegrowError(f"{source} has other sparse layers than the model that was pruned")
    number = {id(p): i for i, p in enumerate(p for group in config.groups(model) for p in group["params"])}
    state, topology = load_tensors(source / TENSORS_FILE), load_tensors(source / TOPOLOGY_FILE)
    slots: dict[int, tuple[int, Tensor]] = {}
    for name, layer in layers.items():
        before = layer.topology.n_blocks
        lives = torch.isin(layer.topology.keys(), kept[name])
        if int(lives.sum()) != len(kept[name]):
            raise RegrowError(f"{source}: {name} lacks blocks of the pruned model; its pattern has moved")
        rows = lives.nonzero().flatten()
        slots[number[id(layer.values)]] = before, rows
        update = exchange(layer.topology, (~lives).nonzero().flatten(), rows.new_empty(0))
        if update is not None:
            apply_update(layer, update)
        topology[f"{name}.allocated_at"] = _rows(source / TOPOLOGY_FILE, topology, f"{name}.allocated_at", before, rows)
    record_layout(model, layers)
    for key, tensor in state.items():
        match = _OF_OPTIMIZER.fullmatch(key)
        if match and int(match[1]) in slots and tensor.dim() > 0:
            state[key] = _rows(source / TENSORS_FILE, state, key, *slots[int(match[1])])
    save(model, saved_tokenizer(source), target, target)
    with writing(str(target), "choose another --output"):
        save_file(state, target / TENSORS_FILE)
        save_file(topology, target / TOPOLOGY_FILE)
        for name in (JSON_FILE, TRAINER_FILE):
            shutil.copyfile(source / name, target / name)
        write_manifest(target)


def _rows(path: Path, tensors: Mapping[str, Tensor], key: str, n_blocks: int, rows: Tensor) -> Tensor:
    """The rows of a tensor that belong to the slots that stay."""
    tensor = tensors.get(key)
    if tensor is None or tensor.dim() == 0 or tensor.shape[0] != n_blocks:
        raise damaged(path, f"{key} does not belong to {n_blocks} blocks")
    return tensor[rows].contiguous()
