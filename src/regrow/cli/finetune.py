"""``regrow finetune``: fine-tune a pre-trained encoder on a task."""

from __future__ import annotations

from collections.abc import Sequence

from regrow.bert.finetune import FinetuneResult, finetune
from regrow.bert.finetune_config import MAY_CHANGE, FinetuneConfig
from regrow.cli.parser import INTERRUPTED
from regrow.cli.training import TrainingCommand, size_row, table

COMMAND = TrainingCommand(
    "finetune",
    FinetuneConfig,
    "Fine-tune a pre-trained encoder, sparse or dense, on a task of GLUE, on question answering as in SQuAD, or on "
    "classes or scores in a CSV, TSV or JSON Lines file.",
    "regrow finetune --model runs/small --task sst2 --data glue/SST-2 --output runs/small-sst2",
    MAY_CHANGE,
)


def run(argv: Sequence[str]) -> int:
    config, method, _, resume = COMMAND.parse(argv)
    result = finetune(config, method, resume=resume)
    print(_describe(result))
    return 0 if result.finished else INTERRUPTED


def _describe(result: FinetuneResult) -> str:
    if not result.finished:
        return (
            f"stopped after step {result.step} of {result.steps}; a checkpoint is saved\n"
            f"continue with: regrow finetune --output {result.path} --resume"
        )
    rows = [(f"held-out {name}", f"{value:.4f}") for name, value in (result.metrics or {}).items()]
    rows += [("training seconds", f"{result.seconds:.1f}"), ("encoder density", f"{result.density:.4g}")]
    return table([*rows, size_row(result.stored_bytes, result.dense_bytes), ("saved model", str(result.path))])
