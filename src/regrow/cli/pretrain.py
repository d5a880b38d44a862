"""``regrow pretrain``: pre-train a sparse BERT on text."""

from __future__ import annotations

from collections.abc import Sequence

from regrow.bert.pretrain import MAY_CHANGE, PretrainConfig, PretrainResult, pretrain
from regrow.cli.parser import INTERRUPTED
from regrow.cli.training import TrainingCommand, size_row, table
from regrow.ranks import leave, rank

COMMAND = TrainingCommand(
    "pretrain",
    PretrainConfig,
    "Pre-train a BERT (masked words and next sentences) whose encoder is always sparse.",
    "regrow pretrain --data corpus.txt --size tiny --density 0.1 --block-size 16 --steps 200 --output runs/first",
    MAY_CHANGE,
    presets=True,
)


def run(argv: Sequence[str]) -> int:
    config, method, layer, resume = COMMAND.parse(argv)
    result = pretrain(config, method, layer=layer, resume=resume)
    if rank() == 0:
        print(_describe(result))
    leave()
    return 0 if result.finished else INTERRUPTED


def _describe(result: PretrainResult) -> str:
    """What a user wants to know at the end, in a few lines."""
    if not result.finished:
        return (
            f"stopped after step {result.step}; a checkpoint is saved\n"
            f"continue with: regrow pretrain --output {result.path} --resume"
        )
    rows = []
    for name, title in (("mlm", "held-out MLM loss"), ("nsp", "held-out NSP loss")):
        before, after = ((e or {}).get(f"eval_{name}_loss", float("nan")) for e in (result.before, result.after))
        rows.append((title, f"{before:.4f} -> {after:.4f} nats ({after - before:+.4f})"))
    rows.append(("encoder density", f"{result.density:.4g}"))
    if result.coverage is not None:
        rows.append(("explored coverage", f"{result.coverage:.4f} of all block positions were active at some time"))
    return table([*rows, size_row(result.stored_bytes, result.dense_bytes), ("saved model", str(result.path))])
