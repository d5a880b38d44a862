"""On paper: memory, arithmetic and traffic of one training step on many devices, dense and sparse.

    python benchmarks/scaling.py --size large --batch-size 4096 --devices 8,64,256,1024

Nothing is run. Per device and step, all in float32: *state* is weights, gradients and AdamW's two moments; *traffic*
is what a device sends, by ring all-reduce of the gradients with DDP, by two all-gathers of the weights and a
reduce-scatter of the gradients with FSDP. Seconds add up arithmetic and traffic as if nothing overlapped.
"""

from __future__ import annotations

import argparse

from regrow import count_flops
from regrow.bert.flops import bert_skeleton
from regrow.bert.model import BertForPreTraining
from regrow.bert.sizes import bert_config
from regrow.nn.flops_family import ENCODER

_STATE = 4
"""Numbers held for each weight: itself, its gradient, two moments."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", help="of BERT")
    parser.add_argument("--density", type=float, default=0.1, help="of the sparse encoder")
    parser.add_argument("--block-size", type=int, default=16, help="of the sparse encoder")
    parser.add_argument("--batch-size", type=int, default=4096, help="sequences in a step, of all devices")
    parser.add_argument("--seq-length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--devices", default="8,64,256,1024", help="how many, comma-separated")
    parser.add_argument("--flops", type=float, default=20e12, help="that a device does in a second on dense products")
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of it that sparse products reach")
    parser.add_argument("--bandwidth", type=float, default=12.5e9, help="bytes a second that a device sends")
    asked = parser.parse_args()
    config = bert_config(asked.size, vocab_size=30522, max_length=asked.seq_length)
    models = {
        "dense": bert_skeleton(config, density=None, block_size=asked.block_size),
        "sparse": bert_skeleton(config, density=asked.density, block_size=asked.block_size),
    }
    print("| devices | model | state, DDP | state, FSDP | traffic, DDP | traffic, FSDP | TFLOPs | s, DDP | s, FSDP |")
    print("|---" * 9 + "|")
    for devices in map(int, asked.devices.split(",")):
        for name, model in models.items():
            print(f"| {devices} | {name} | {' | '.join(_row(asked, model, devices, name == 'sparse'))} |")


def _row(asked: argparse.Namespace, model: BertForPreTraining, devices: int, sparse: bool) -> list[str]:
    report = count_flops(model, batch_size=asked.batch_size, seq_length=asked.seq_length)
    of_encoder = report.parts[ENCODER].total / devices
    others = report.products.total / devices - of_encoder
    seconds = (of_encoder / (asked.efficiency if sparse else 1) + others) / asked.flops
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    indices = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    moved = (devices - 1) / devices * weights
    states = _STATE * weights + indices, _STATE * weights / devices + indices
    return [
        *(f"{state / 1e6:,.0f} MB" for state in states),
        *(f"{times * moved / 1e6:,.0f} MB" for times in (2, 3)),
        f"{(of_encoder + others) / 1e12:.2f}",
        *(f"{seconds + times * moved / asked.bandwidth:.3f}" for times in (2, 3)),
    ]


if __name__ == "__main__":
    main()
