"""``regrow recipe``: several trainings that together are one method of the literature."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from regrow.bert.pretrain import MAY_CHANGE, PretrainConfig
from regrow.cli.parser import INTERRUPTED, OneLineParser
from regrow.cli.training import TrainingCommand
from regrow.entries import entries, prose, summary
from regrow.recipes import Recipe, available, recipe_named


def run(argv: Sequence[str]) -> int:
    names = available()
    width = max(map(len, names))
    lines = [f"  {entry.name:{width}}  {summary(entry)}" for entry in entries("recipe")]
    parser = OneLineParser(
        prog="regrow recipe",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a method of the literature that is several trainings, each in a folder below --output.\n"
        "Ctrl-C saves a checkpoint; with --resume what is finished is not repeated.\n\n" + "\n".join(lines),
        epilog=f"each teaches its options: regrow recipe {names[0]} --help",
    )
    parser.add_argument("name", metavar="NAME", choices=names, help=f"one of {', '.join(names)}")
    recipe = recipe_named(parser.parse_args(argv[:1]).name)
    config, method, layer, resume = _command(recipe).parse(argv[1:])
    try:
        result = recipe.run(config, method, layer, resume=resume)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; continue with: regrow recipe {recipe.name} --output {config.output} --resume",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(result)
    return 0 if result.finished else INTERRUPTED


class _RecipeCommand(TrainingCommand):
    """A recipe's own options come last, where a terminal shows them."""

    def _parser(self, flags: Sequence[str]) -> Any:
        parser = super()._parser(flags)
        own = {of.name for of in fields(self.config)} - {of.name for of in fields(PretrainConfig)}
        group, usual = parser.add_argument_group(f"options of {self.name}"), parser._optionals._group_actions
        group._group_actions += [action for action in usual if action.dest in own]
        usual[:] = [action for action in usual if action.dest not in own]
        return parser


def _command(recipe: Recipe) -> TrainingCommand:
    return _RecipeCommand(
        f"recipe {recipe.name}",
        recipe.config,
        " ".join(prose(recipe.run.__doc__ or "").split()),
        f"regrow recipe {recipe.name} {recipe.example}",
        MAY_CHANGE,
        presets=True,
    )
