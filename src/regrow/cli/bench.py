"""``regrow bench``: sparse against dense on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from regrow.cli.parser import OneLineParser, block, list_of, run_subcommand, shape


def run(argv: Sequence[str]) -> int:
    parser = OneLineParser(
        prog="regrow bench",
        description="Time sparse against dense in one process, taking turns; medians.",
        epilog="each teaches its options: regrow bench kernels --help",
    )
    summary = "kernels: one layer at a time; step: a whole training step; inference: a forward pass"
    return run_subcommand(parser, argv, {"kernels": _kernels, "step": _step, "inference": _inference}, summary)


def _kernels(argv: Sequence[str]) -> int:
    from regrow.bench.baseline import onednn_over_linear
    from regrow.bench.kernels import SHAPES, bench_kernels, bench_peers, peer_table, table, write_json
    from regrow.bench.place import Place
    from regrow.bench.roofline import memory_bandwidth, plot

    parser = OneLineParser(
        prog="regrow bench kernels",
        description="Time forward + backward of BlockSparseLinear against torch.nn.Linear, both through autograd, in "
        "one process, taking turns; medians.",
        epilog="example: regrow bench kernels --blocks 4,16 --densities 0.1,0.05 --json speed.json",
    )
    default = ",".join(f"{i}x{o}" for i, o in SHAPES)
    parser.add_argument("--shapes", type=list_of(shape), default=default, help="IN x OUT, as 512x2048,768x768")
    parser.add_argument(
        "--blocks", type=list_of(block), default="1,4,8,16,32", help="block sizes; 16x1: gathered blocks"
    )
    parser.add_argument("--densities", type=list_of(float), default="0.1", help="shares of blocks that exist")
    parser.add_argument("--tokens", type=list_of(int), default="4096", help="rows of the input")
    parser.add_argument("--rounds", type=int, default=7, help="medians are taken over so many rounds")
    parser.add_argument("--peers", action="store_true", help="also PyTorch's own CSR and BSR layouts")
    _add_place(parser)
    parser.add_argument("--quick", action="store_true", help="two shapes, three rounds: under 40 seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the machine to a file")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the roofline, as .png or .svg (needs regrow[plot])"
    )
    asked = parser.parse_args(argv)
    place = Place.named(asked.device, asked.dtype)
    shapes, rounds = (asked.shapes[1:3], 3) if asked.quick else (asked.shapes, asked.rounds)
    rows = bench_kernels(
        shapes=shapes,
        blocks=asked.blocks,
        densities=asked.densities,
        tokens=asked.tokens,
        rounds=rounds,
        progress=True,
        place=place,
    )
    print(table(rows))
    note_on_baseline(onednn_over_linear(place))
    peers = []
    if asked.peers:
        peers = bench_peers(shapes=shapes, density=asked.densities[0], tokens=asked.tokens[0], rounds=3, place=place)
        print(peer_table(peers))
    if asked.json is None and asked.plot is None:
        return 0
    bandwidth = memory_bandwidth(place)
    if asked.json is not None:
        write_json(rows, asked.json, peers, place=place, bandwidth=bandwidth)
    if asked.plot is not None:
        plot(rows, bandwidth, asked.plot, size=place.dtype.itemsize)
    return 0


def note_on_baseline(ratio: float | None) -> None:
    """Say on standard error if PyTorch's dense products, which all is compared with, could be faster here.

    Args:
        ratio: of :func:`regrow.bench.baseline.onednn_over_linear`.
    """
    from regrow.bench.baseline import handicap

    note = handicap(ratio)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the GPU (default: %(default)s)")
    parser.add_argument("--dtype", help="float32, bf16 or fp16; by default float32 on a CPU and bf16 on a GPU")


def _step(argv: Sequence[str]) -> int:
    from regrow.bert.bench import StepConfig, bench_step, plot, table, write_json

    config = StepConfig()
    parser = OneLineParser(
        prog="regrow bench step",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Time a whole training step of BERT (forward, backward, clipping, AdamW), sparse against the "
        "strongest dense baseline of PyTorch and transformers, and against the same dense model with this library's "
        "fused operations. Says where the time and the memory go.",
        epilog="example: regrow bench step --size small --block-size 16 --density 0.1 --json step.json",
    )
    parser.add_argument("--size", default=config.size, help="tiny ... large, or LAYERS/HIDDEN/HEADS")
    parser.add_argument("--dense-size", help="of the dense model, if another: to compare pairs of equal FLOPs")
    parser.add_argument("--block-size", type=int, default=config.block_size, help="edge of a block")
    parser.add_argument("--density", type=float, default=config.density, help="share of encoder blocks that exist")
    parser.add_argument("--batch-size", type=int, default=config.batch_size, help="sequences in a step")
    parser.add_argument("--max-length", type=int, default=config.max_length, help="tokens of a sequence")
    parser.add_argument("--vocab-size", type=int, default=config.vocab_size, help="size of the vocabulary")
    parser.add_argument("--dropout", type=float, help="by default the size's own, as in the paper")
    parser.add_argument("--fuse", default=config.fuse, help="operations fused in the sparse model: all, none, or some")
    parser.add_argument("--encoder-only", action="store_true", help="the encoder's layers alone")
    parser.add_argument("--rounds", type=int, default=config.rounds, help="medians are taken over so many rounds")
    parser.add_argument("--blocks", type=list_of(int), default=[], help="other block sizes to time, as 4,1")
    _add_place(parser)
    parser.add_argument("--compile", action="store_true", help="all models, also dense, through torch.compile")
    parser.add_argument("--ablate", action="store_true", help="also the sparse step with each fused operation off")
    parser.add_argument("--quick", action="store_true", help="three rounds: under a minute for small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result and the machine to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as .png or .svg (needs regrow[plot])")
    asked = vars(parser.parse_args(argv))
    extras = {name: asked.pop(name) for name in ("blocks", "ablate")}
    quick, path, picture = (asked.pop(name) for name in ("quick", "json", "plot"))
    result = bench_step(StepConfig(**asked | ({"rounds": 3} if quick else {})), **extras, progress=True)
    print(table(result))
    note_on_baseline(result["machine"]["onednn_over_linear"])
    if picture is not None:
        plot(result, picture)
    if path is not None:
        write_json(result, path)
    return 0


def _inference(argv: Sequence[str]) -> int:
    from regrow.bert.bench_inference import InferenceConfig, bench_inference, table, write_json

    config = InferenceConfig()
    parser = OneLineParser(
        prog="regrow bench inference",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Time forward passes of sparse BERT, prepared by regrow.bert.inference.prepare, against "
        "dense PyTorch and dense onnxruntime (if regrow[onnx] is installed), in one process, taking turns; medians.",
        epilog="example: regrow bench inference --size small --density 0.1,0.05 --blocks 4,16 --batch 1,8,32 "
        "--length 16,128 --json inference.json",
    )
    parser.add_argument("--size", default=config.size, help="tiny ... large, or LAYERS/HIDDEN/HEADS")
    parser.add_argument("--density", type=list_of(float), default="0.1", help="shares of encoder blocks that exist")
    parser.add_argument("--blocks", type=list_of(int), default="16", help="edges of a block")
    parser.add_argument("--batch", type=list_of(int), default="1,8,32", help="sequences in a batch")
    parser.add_argument("--length", type=list_of(int), default="16,128", help="tokens of a sequence")
    parser.add_argument("--vocab-size", type=int, default=config.vocab_size, help="size of the vocabulary")
    parser.add_argument("--compile", action="store_true", help="also dense through torch.compile: takes minutes")
    parser.add_argument("--no-onnx", action="store_true", help="leave onnxruntime out")
    parser.add_argument("--rounds", type=int, default=config.rounds, help="medians are taken over so many rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result and the machine to a file")
    asked = parser.parse_args(argv)
    result = bench_inference(
        InferenceConfig(
            size=asked.size,
            densities=tuple(asked.density),
            blocks=tuple(asked.blocks),
            batches=tuple(asked.batch),
            lengths=tuple(asked.length),
            vocab_size=asked.vocab_size,
            compiled=asked.compile,
            onnx=not asked.no_onnx,
            rounds=asked.rounds,
        ),
        progress=True,
    )
    print(table(result))
    note_on_baseline(result["machine"]["onednn_over_linear"])
    if asked.json is not None:
        write_json(result, asked.json)
    return 0
