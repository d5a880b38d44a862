"""Small pictures of the patterns, taken while they move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.nn import named_sparse_layers
from regrow.study.record import read_json, write_json
from regrow.topology import BlockTopology
from regrow.training import UpdateSchedule

EDGE = 32
"""Most cells of a picture along a side."""


class PatternSnapshots(TrainerCallback):
    """Keeps pictures of every sparse layer in a JSON file: at the start, at three updates between, and at the end.

    The file maps a layer to a list of ``{"step", "shape", "counts"}``: ``shape`` is block rows and block columns of the
    layer, ``counts`` the number of blocks in each cell of a grid of at most 32 x 32. On resume, pictures from beyond
    the checkpoint are taken again.

    Args:
        path: of the file.
        schedule: of the updates.
        moves: whether the pattern moves at all; if not, one picture is enough.
    """

    def __init__(self, path: Path, schedule: UpdateSchedule, *, moves: bool = True) -> None:
        self.path = path
        updates = [step for step in range(1, schedule.total_steps) if schedule.is_update(step)] if moves else []
        between = {updates[len(updates) * i // 4] for i in (1, 2, 3)} if updates else set()
        self.moments = between | ({schedule.total_steps} if updates else set())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            write_json(self.path, {})
            self._take(0, kwargs["model"])
            return
        kept = read_json(self.path) if self.path.exists() else {}
        for name, pictures in kept.items():
            kept[name] = [picture for picture in pictures if picture["step"] <= state.global_step]
        write_json(self.path, kept)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.moments:
            self._take(state.global_step, kwargs["model"])

    def _take(self, step: int, model: torch.nn.Module) -> None:
        pictures = read_json(self.path)
        for name, layer in named_sparse_layers(model):
            topology = layer.topology
            shape = [topology.n_block_rows, topology.n_block_cols]
            picture = {"step": step, "shape": shape, "counts": occupancy(topology)}
            pictures.setdefault(name, []).append(picture)
        write_json(self.path, pictures)


def occupancy(topology: BlockTopology, edge: int = EDGE) -> list[list[int]]:
    """Blocks in each cell of a grid of at most ``edge x edge`` laid over a layer.

    Example:
        >>> topology = BlockTopology.from_coordinates([0, 1, 3], [0, 1, 2], n_block_rows=4, n_block_cols=3)
        >>> occupancy(topology, edge=2)
        [[2, 0], [0, 1]]
    """
    shape = topology.n_block_rows, topology.n_block_cols
    n_rows, n_cols = (min(edge, n) for n in shape)
    rows, cols = (index.cpu().long() for index in topology.coordinates())
    cells = rows * n_rows // shape[0] * n_cols + cols * n_cols // shape[1]
    return torch.bincount(cells, minlength=n_rows * n_cols).view(n_rows, n_cols).tolist()
