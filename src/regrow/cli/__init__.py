"""The ``regrow`` command. Each command is a module of its name here, which is loaded when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from regrow import __version__
from regrow.allocator import keep_freed_memory
from regrow.cli.parser import FAILED, INTERRUPTED, OneLineParser
from regrow.errors import RegrowError

COMMANDS = {
    "pretrain": "pre-train a sparse BERT on text",
    "finetune": "fine-tune a pre-trained encoder on a task",
    "evaluate": "held-out loss, a task's metrics, or what changed between two models",
    "recipe": "run a method of the literature that is several trainings",
    "bench": "measure sparse against dense on this machine",
    "advise": "say which block sizes and densities pay off here",
    "flops": "count the floating-point operations of a training step",
    "export": "write a model for programs without regrow, or average models",
    "study": "train many runs that together answer a question",
    "inspect": "show the sparse layers of a saved model: blocks, weights, dead outputs, how patterns moved",
    "methods": "list everything: methods, controls, recipes, rules, tools",
    "report": "make one page of run records: curves, Pareto fronts, patterns, claims",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad input, 130 after Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(prog="regrow", description="Train transformers whose weights are always sparse.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    summaries = "; ".join(f"{name}: {summary}" for name, summary in COMMANDS.items())
    parser.add_argument("command", nargs="?", choices=list(COMMANDS), help=summaries)
    parser.epilog = "Each command teaches its options: regrow COMMAND --help"
    arguments = parser.parse_args(argv[:1])
    if arguments.version:
        print(f"regrow {__version__}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0
    keep_freed_memory()
    try:
        status = import_module(f"regrow.cli.{arguments.command}").run(argv[1:])
        sys.stdout.flush()
        return status
    except RegrowError as error:
        print(f"regrow {arguments.command}: error: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return 0
    except KeyboardInterrupt:
        print(f"\nregrow {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
