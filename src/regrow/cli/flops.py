"""``regrow flops``: count the floating-point operations of a training step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from regrow import UpdateSchedule, count_flops
from regrow.bert.flops import bert_skeleton
from regrow.bert.fused import Fusions
from regrow.bert.sizes import bert_config
from regrow.cli.parser import OneLineParser
from regrow.methods import create
from regrow.nn.replace import DEFAULT


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow flops",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Count the FLOPs of a training step of BERT, part by part: forward and both gradients, topology "
        "updates, what is computed twice. Nothing is run. docs/flops.md says what is counted.",
        epilog="example: regrow flops --size base --density 0.1 --block-size 16 --convention paper",
    )
    parser.add_argument("--size", default="tiny", help="tiny ... large, or LAYERS/HIDDEN/HEADS")
    parser.add_argument("--density", type=float, help="share of encoder blocks that exist; without it all is dense")
    parser.add_argument("--block-size", type=int, default=16, help="edge of a block")
    parser.add_argument("--layer", default=DEFAULT, help="what stands in the place of a layer, with default options")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences in a step")
    parser.add_argument("--seq-length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--vocab-size", type=int, default=30522, help="size of the vocabulary")
    what = "positions of a sequence that are predicted, or all; by default 15 %% of them"
    parser.add_argument("--predicted", type=_count_or_all, metavar="N", help=what)
    parser.add_argument(
        "--fuse", default="all", help="operations fused, some of which compute twice: all, none, or some"
    )
    what = "exact: all products; paper: encoder and attention alone"
    parser.add_argument("--convention", choices=("exact", "paper"), default="exact", help=what)
    parser.add_argument("--method", help="add the topology updates of this method")
    parser.add_argument("--n-updates", type=int, default=160, help="segments between its updates")
    parser.add_argument("--steps", type=int, default=1000, help="of the training")
    parser.add_argument("--optimizer", action="store_true", help="add AdamW")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to a file")
    asked = parser.parse_args(argv)
    config = bert_config(asked.size, vocab_size=asked.vocab_size, max_length=asked.seq_length)
    fusions = Fusions.named(asked.fuse)
    report = count_flops(
        bert_skeleton(config, density=asked.density, block_size=asked.block_size, fusions=fusions, layer=asked.layer),
        batch_size=asked.batch_size,
        seq_length=asked.seq_length,
        predicted=asked.predicted,
        method=create(asked.method) if asked.method else None,
        schedule=UpdateSchedule(asked.steps, asked.n_updates) if asked.method else None,
        optimizer=asked.optimizer,
        convention=asked.convention,
    )
    print(report)
    if asked.json is not None:
        asked.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    return 0


def _count_or_all(text: str) -> int | str:
    return text if text == "all" else int(text)
