"""The ``regrow`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from regrow.bert.pretrain import PretrainResult

INCOMPLETE, FAILED, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad input, 130 after Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _OneLineParser(prog="regrow", description="Train transformers whose weights are always sparse.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), help="; ".join(_summaries()))
    parser.epilog = "Each command teaches its options: regrow COMMAND --help"
    arguments = parser.parse_args(argv[:1])
    if arguments.version:
        from regrow import __version__

        print(f"regrow {__version__}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0
    from regrow.allocator import keep_freed_memory
    from regrow.errors import RegrowError

    keep_freed_memory()
    try:
        return COMMANDS[arguments.command](argv[1:])
    except RegrowError as error:
        print(f"regrow {arguments.command}: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"\nregrow {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def pretrain(argv: Sequence[str]) -> int:
    """pre-train a sparse BERT on text"""
    from regrow.bert.pretrain import PretrainConfig
    from regrow.bert.pretrain import pretrain as run_pretraining

    asked, rest = _read_sources(argv)
    defaults = _saved_flags(rest, PretrainConfig.output) if asked.resume else _flags_of_files(asked)
    method_class = _method_of([*defaults, *rest])
    parser = _pretrain_parser(PretrainConfig, method_class)
    config, method = _parse(parser, [*defaults, *rest])
    if asked.resume:
        _refuse_changes((config, method), _parse(parser, defaults))
    result = run_pretraining(config, method, resume=asked.resume)
    print(_describe(result))
    return 0 if result.finished else INTERRUPTED


def methods(argv: Sequence[str]) -> int:
    """list the sparse-training methods"""
    from regrow.methods.catalog import listing, markdown

    parser = _OneLineParser(
        prog="regrow methods",
        description="List the sparse-training methods: year, always sparse or not, what they look at, what an update "
        "costs, and their options.",
        epilog="example: regrow pretrain --method gse --sampling norms",
    )
    parser.add_argument("--markdown", action="store_true", help="print docs/methods.md instead")
    print(markdown() if parser.parse_args(argv).markdown else listing())
    return 0


def bench(argv: Sequence[str]) -> int:
    """measure sparse against dense on this machine"""
    parser = _OneLineParser(
        prog="regrow bench",
        description="Time sparse against dense in one process, taking turns; medians.",
        epilog="each teaches its options: regrow bench kernels --help",
    )
    what = {"kernels": _bench_kernels, "step": _bench_step}
    parser.add_argument("what", choices=list(what), help="kernels: one layer at a time; step: a whole training step")
    return what[parser.parse_args(argv[:1]).what](argv[1:])


def advise(argv: Sequence[str]) -> int:
    """say which block sizes and densities pay off here"""
    from regrow.bench.advise import advise as measure
    from regrow.bench.advise import table

    parser = _OneLineParser(
        prog="regrow advise",
        description="For each layer shape and block size: the sparsity beyond which sparse training beats dense on "
        "this machine, and the expected speed-up of a training step. Measured once, then remembered.",
        epilog="example: regrow advise small    or: regrow advise 512x2048,2048x512 --blocks 16",
    )
    parser.add_argument("target", metavar="WHAT", help="tiny ... large, shapes as 512x2048, or a model directory")
    parser.add_argument("--blocks", type=_list_of(int), default="1,4,8,16,32", help="block sizes")
    parser.add_argument("--tokens", type=int, default=4096, help="rows of the input")
    asked = parser.parse_args(argv)
    print(table(measure(_shapes_of(asked.target), blocks=asked.blocks, tokens=asked.tokens, progress=True)))
    return 0


def flops(argv: Sequence[str]) -> int:
    """count the floating-point operations of a training step"""
    from regrow import UpdateSchedule, count_flops
    from regrow.bert.flops import bert_skeleton
    from regrow.bert.fused import Fusions
    from regrow.bert.sizes import bert_config
    from regrow.methods import create

    parser = _OneLineParser(
        prog="regrow flops",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Count the FLOPs of a training step of BERT, part by part: forward and both gradients, topology "
        "updates, what is computed twice. Nothing is run. docs/flops.md says what is counted.",
        epilog="example: regrow flops --size base --density 0.1 --block-size 16 --convention paper",
    )
    parser.add_argument("--size", default="tiny", help="tiny ... large, or LAYERS/HIDDEN/HEADS")
    parser.add_argument("--density", type=float, help="share of encoder blocks that exist; without it all is dense")
    parser.add_argument("--block-size", type=int, default=16, help="edge of a block")
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
        bert_skeleton(config, density=asked.density, block_size=asked.block_size, fusions=fusions),
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


def study(argv: Sequence[str]) -> int:
    """train many runs that together answer a question"""
    parser = _OneLineParser(
        prog="regrow study",
        description="Train the runs of a study: each once, whatever stops in between, with a record of everything.",
        epilog="each teaches its options: regrow study run --help",
    )
    what = {"list": _study_list, "show": _study_show, "run": _study_run}
    parser.add_argument("what", choices=list(what), help="list: the studies that come with regrow; show, run: one")
    return what[parser.parse_args(argv[:1]).what](argv[1:])


def report(argv: Sequence[str]) -> int:
    """make one page of run records: curves, Pareto fronts, patterns, claims"""
    from regrow.study.report import write_report
    from regrow.study.runs import read_runs

    parser = _OneLineParser(
        prog="regrow report",
        description="Write one self-contained HTML page about finished runs: loss curves, Pareto fronts in FLOPs and "
        "in seconds, how the patterns moved, what the runs say about each claim of the paper, and a table of all runs.",
        epilog="example: regrow report runs/first-study --output report.html --figures figures",
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="record files, or folders that hold some")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page")
    parser.add_argument("--title", default="Runs", help="heading of the page")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also PNG and SVG pictures (needs regrow[plot])")
    asked = parser.parse_args(argv)
    found, broken = read_runs(asked.runs)
    print(f"{len(found)} runs: {write_report(found, asked.output, title=asked.title, notes=broken)}")
    if asked.figures is not None:
        from regrow.study.figures import write_figures

        for path in write_figures(found, asked.figures):
            print(path)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "pretrain": pretrain,
    "bench": bench,
    "advise": advise,
    "flops": flops,
    "study": study,
    "methods": methods,
    "report": report,
}


def _study_list(argv: Sequence[str]) -> int:
    from regrow.study.presets import listing

    _OneLineParser(prog="regrow study list", description="The studies that come with regrow.").parse_args(argv)
    print(listing())
    return 0


def _study_show(argv: Sequence[str]) -> int:
    from regrow.study.presets import describe

    parser = _OneLineParser(prog="regrow study show", description="The runs of a study: id, size, cost, name.")
    _add_study(parser)
    print(describe(_asked_study(parser.parse_args(argv))))
    return 0


def _study_run(argv: Sequence[str]) -> int:
    from regrow.study import run_study
    from regrow.study.pool import SubmititPool
    from regrow.study.presets import describe

    parser = _OneLineParser(
        prog="regrow study run",
        description="Train every run that has no record in the folder yet. Ctrl-C lets runs save a checkpoint; the "
        "same command goes on from there.",
        epilog="example: regrow study run c5 --scale cpu --workers 2 --only 'norm=l1,*'",
    )
    _add_study(parser)
    parser.add_argument("--folder", type=Path, default=Path("runs/studies"), help="for records, logs and checkpoints")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="of each run; by default the cores shared out")
    parser.add_argument("--only", metavar="GLOB", help="runs whose name or id matches; see regrow study show")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what they cost, and stop")
    parser.add_argument("--keep-models", action="store_true", help="of finished runs")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished runs")
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], help="through submitit (regrow[cluster])")
    parser.add_argument(
        "--cluster-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of submitit, as slurm_partition=gpu",
    )
    asked = parser.parse_args(argv)
    study = _asked_study(asked)
    if asked.dry_run:
        done = [path.stem for path in asked.folder.glob("records/*.json")]
        print(describe(study, study.only(asked.only) if asked.only else None, done))
        return 0
    pool = None
    if asked.cluster is not None:
        pool = SubmititPool(asked.folder / "submitit", asked.cluster, _assignments(asked.cluster_option))
    result = run_study(
        study,
        asked.folder,
        workers=asked.workers,
        threads=asked.threads,
        only=asked.only,
        pool=pool,
        keep_models=asked.keep_models,
        keep_checkpoints=asked.keep_checkpoints,
    )
    print(result)
    return 0 if result.complete else INTERRUPTED if result.interrupted else INCOMPLETE


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="STUDY", help="a name from regrow study list, or a .yaml file")
    parser.add_argument("--scale", help="cpu, gpu or paper, or one of the file's own; by default its first")
    parser.add_argument("--data", help="corpus of every run, as for regrow pretrain")
    parser.add_argument("--tokenizer", help="tokenizer of every run, as for regrow pretrain")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other option of every run, as steps=100"
    )


def _asked_study(asked: argparse.Namespace) -> Any:
    from regrow.study import load_study

    options = {name: getattr(asked, name) for name in ("data", "tokenizer") if getattr(asked, name) is not None}
    options |= _assignments(asked.set)
    return load_study(asked.name, asked.scale).with_options(**options)


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE as YAML reads the value."""
    import yaml

    from regrow.errors import RegrowError

    values = {}
    for text in texts:
        name, found, value = text.partition("=")
        if not found:
            raise RegrowError(f"{text!r} must be NAME=VALUE")
        values[name.strip().replace("-", "_")] = yaml.safe_load(value)
    return values


def _bench_kernels(argv: Sequence[str]) -> int:
    from regrow.bench.kernels import SHAPES, bench_kernels, bench_peers, peer_table, table, write_json
    from regrow.bench.roofline import memory_bandwidth, plot

    parser = _OneLineParser(
        prog="regrow bench kernels",
        description="Time forward + backward of BlockSparseLinear against torch.nn.Linear, both through autograd, in "
        "one process, taking turns; medians.",
        epilog="example: regrow bench kernels --blocks 4,16 --densities 0.1,0.05 --json speed.json",
    )
    default = ",".join(f"{i}x{o}" for i, o in SHAPES)
    parser.add_argument("--shapes", type=_list_of(_shape), default=default, help="IN x OUT, as 512x2048,768x768")
    parser.add_argument("--blocks", type=_list_of(int), default="1,4,8,16,32", help="block sizes")
    parser.add_argument("--densities", type=_list_of(float), default="0.1", help="shares of blocks that exist")
    parser.add_argument("--tokens", type=_list_of(int), default="4096", help="rows of the input")
    parser.add_argument("--rounds", type=int, default=7, help="medians are taken over so many rounds")
    parser.add_argument("--peers", action="store_true", help="also PyTorch's own CSR and BSR layouts")
    parser.add_argument("--quick", action="store_true", help="two shapes, three rounds: under 40 seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the machine to a file")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the roofline, as .png or .svg (needs regrow[plot])"
    )
    asked = parser.parse_args(argv)
    shapes, rounds = (asked.shapes[1:3], 3) if asked.quick else (asked.shapes, asked.rounds)
    rows = bench_kernels(
        shapes=shapes,
        blocks=asked.blocks,
        densities=asked.densities,
        tokens=asked.tokens,
        rounds=rounds,
        progress=True,
    )
    print(table(rows))
    peers = []
    if asked.peers:
        peers = bench_peers(shapes=shapes, density=asked.densities[0], tokens=asked.tokens[0], rounds=3)
        print(peer_table(peers))
    if asked.json is not None:
        write_json(rows, asked.json, peers)
    if asked.plot is not None:
        plot(rows, memory_bandwidth(), asked.plot)
    return 0


def _bench_step(argv: Sequence[str]) -> int:
    from regrow.bert.bench import StepConfig, bench_step, plot, table, write_json

    config = StepConfig()
    parser = _OneLineParser(
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
    parser.add_argument("--blocks", type=_list_of(int), default=[], help="other block sizes to time, as 4,1")
    parser.add_argument("--ablate", action="store_true", help="also the sparse step with each fused operation off")
    parser.add_argument("--quick", action="store_true", help="three rounds: under a minute for small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result and the machine to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it, as .png or .svg (needs regrow[plot])")
    asked = vars(parser.parse_args(argv))
    extras = {name: asked.pop(name) for name in ("blocks", "ablate")}
    quick, path, picture = (asked.pop(name) for name in ("quick", "json", "plot"))
    result = bench_step(StepConfig(**asked | ({"rounds": 3} if quick else {})), **extras, progress=True)
    print(table(result))
    if picture is not None:
        plot(result, picture)
    if path is not None:
        write_json(result, path)
    return 0


def _shapes_of(target: str) -> list[tuple[int, int]]:
    """Encoder layer shapes of a size, a model directory, or a list."""
    from regrow.bert.sizes import SIZES
    from regrow.errors import RegrowError

    if target in SIZES:
        hidden, inner = SIZES[target].hidden, 4 * SIZES[target].hidden
    elif (Path(target) / "config.json").is_file():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(target)
        hidden, inner = config.hidden_size, config.intermediate_size
    else:
        try:
            return _list_of(_shape)(target)
        except ValueError:
            raise RegrowError(
                f"{target!r} is no size ({', '.join(SIZES)}), no model directory, and no list of shapes as 512x2048"
            ) from None
    return [(hidden, hidden), (hidden, inner), (inner, hidden)]


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "comma-separated list"  # argparse names the type in its errors
    return parse


def _count_or_all(text: str) -> int | str:
    return text if text == "all" else int(text)


def _shape(text: str) -> tuple[int, int]:
    in_features, out_features = text.lower().split("x")
    return int(in_features), int(out_features)


class _OneLineParser(argparse.ArgumentParser):
    """Errors are one line that says where help is, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _summaries() -> list[str]:
    return [f"{name}: {(function.__doc__ or '').strip()}" for name, function in COMMANDS.items()]


def _read_sources(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take out the flags that say where other flags come from."""
    parser = _OneLineParser(prog="regrow pretrain", add_help=False, allow_abbrev=False)
    _add_sources(parser)
    return parser.parse_known_args(argv)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML of 'flag: value' lines; flags given here override it")
    parser.add_argument("--preset", metavar="NAME", help=f"a configuration that comes with regrow: {_presets()}")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output from its last checkpoint")


def _presets() -> str:
    folder = files("regrow") / "presets"
    return ", ".join(sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def _flags_of_files(asked: argparse.Namespace) -> list[str]:
    """Preset, then config file, as command-line flags: one parser checks them all, and later ones win."""
    from regrow.bert.run import read_yaml
    from regrow.errors import RegrowError

    flags: list[str] = []
    if asked.preset is not None:
        if asked.preset not in _presets().split(", "):
            raise RegrowError(f"unknown preset {asked.preset!r}; choose one of {_presets()}")
        flags += _as_flags(read_yaml(Path(str(files("regrow") / "presets" / f"{asked.preset}.yaml"))))
    if asked.config is not None:
        flags += _as_flags(read_yaml(Path(asked.config)))
    return flags


def _as_flags(config: dict[str, Any]) -> list[str]:
    # "--name=value" in one word: a value may begin with a dash
    return [f"--{name}={value}" for name, value in config.items() if value is not None]


def _method_of(argv: Sequence[str]) -> type:
    from regrow.methods import method_class

    parser = _OneLineParser(prog="regrow pretrain", add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default="dynsparse")
    return method_class(parser.parse_known_args(argv)[0].method)


def _pretrain_parser(config_class: type, method_class: type) -> Any:
    from transformers import HfArgumentParser

    parser_class: Any = type("PretrainParser", (_OneLineParser, HfArgumentParser), {})
    parser = parser_class(
        config_class,
        prog="regrow pretrain",
        usage="regrow pretrain [--FLAG VALUE ...]",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Pre-train a BERT (masked words and next sentences) whose encoder is always sparse. Every flag can "
        "also stand in a YAML file given with --config.",
        epilog="example: regrow pretrain --data corpus.txt --size tiny --density 0.1 --block-size 16 --steps 200 "
        "--output runs/first",
    )
    _add_sources(parser)
    if fields(method_class):
        method_class._argument_group_name = f"options of --method {method_class.name}"  # type: ignore[attr-defined]
    parser._add_dataclass_arguments(method_class)
    parser.dataclass_types.append(method_class)
    return parser


def _parse(parser: Any, argv: Sequence[str]) -> tuple[Any, Any]:
    """Configuration and method; the third result of the parser is the source flags, taken out before."""
    parser.parse_args(argv)  # unknown flags end here, in one line
    config, method = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[:2]
    return config, method


def _saved_flags(rest: Sequence[str], default_output: str) -> list[str]:
    """The configuration of the run to resume, as flags."""
    from regrow.bert.run import RunDirectory

    parser = _OneLineParser(prog="regrow pretrain", add_help=False, allow_abbrev=False)
    parser.add_argument("--output", default=default_output)
    output = parser.parse_known_args(rest)[0].output
    return _as_flags(RunDirectory(output).read_config() | {"output": output})


def _refuse_changes(asked: Sequence[Any], saved: Sequence[Any]) -> None:
    from regrow.errors import RegrowError

    for new, old in zip(asked, saved, strict=True):
        for name, value in asdict(old).items():
            if getattr(new, name) != value:
                raise RegrowError(
                    f"--resume continues a run as it was started, with --{name} {value}; "
                    f"drop --{name} {getattr(new, name)}, or start a new run in another --output"
                )


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
    share = result.stored_bytes / result.dense_bytes
    size = f"{result.stored_bytes:,} against {result.dense_bytes:,} dense ({share:.1%}, embeddings included)"
    rows.append(("stored bytes", size))
    rows.append(("saved model", str(result.path)))
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title:{width}}  {text}" for title, text in rows)
