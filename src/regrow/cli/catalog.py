"""Everything there is, as text: what ``regrow methods`` prints and docs/methods.md holds."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from regrow import recipes
from regrow.entries import Entry, Kind, entries, entry_of, summary
from regrow.errors import RegrowError
from regrow.methods.catalog import LAYER, PRICE, entry, extra_of, methods, signals_of
from regrow.nn import options as layers

_DECLARING = ("regrow.topology", "regrow.optim", "regrow.bert", "regrow.study")
"""Rooms in which rules and tools are declared, beside their code; each is searched to the bottom."""
_ALWAYS_SPARSE = "Always sparse: nothing of a dense weight's size or cost is ever computed."
_CONTROLS = (
    "They train dense weights at dense cost, and mask or transform them: nothing is saved here. What a transform "
    "leaves may be an N:M pattern that other hardware can use."
)
_LAYERS = (
    "What stands in the place of a linear layer, `regrow pretrain --layer NAME` or `regrow.sparsify(model, ..., "
    "layer=NAME)`; any method may move its blocks. Those for feed-forward halves leave plain blocks elsewhere. "
    "Products: of a token at a 768 -> 3072 layer (density 0.1, 16x16 blocks), as a share of the dense layer's; of a "
    "feed-forward half those of the half."
)
_WIDTH = 110


@dataclass(frozen=True)
class Section:
    """Entries of one kind.

    Args:
        title: heading.
        about: a sentence below it.
        entries: by name.
        facts: more columns: title to a text for each entry.
    """

    title: str
    about: str
    entries: Sequence[Entry]
    facts: Mapping[str, Callable[[str], str]] = field(default_factory=dict)


def sections() -> list[Section]:
    """All that can be listed."""
    moving = {method.name: method for method in methods(dense_layout=False)}
    dense = [entry(method) for method in methods(dense_layout=True)]
    options = [entry_of(layers.create(name), "layer", f"regrow pretrain --layer {name}") for name in layers.available()]
    recipes.available()  # imports them
    for room in _DECLARING:
        _import_all(room)
    return [
        Section(
            "Methods that move blocks",
            f"How the pattern of sparse layers changes in training; adding one is adding a file. {PRICE}",
            [entry(method) for method in moving.values()],
            {"looks at": lambda name: signals_of(moving[name]), "extra FLOPs": lambda name: extra_of(moving[name])},
        ),
        Section("Controls over dense weights", _CONTROLS, dense),
        Section("Layers", _LAYERS, options, {"replaces": _replaces, "products": _products}),
        Section("Recipes", "Several trainings that together are one method.", entries("recipe")),
        Section("Rules", "How densities and learning rates are set.", entries("rule")),
        Section("Tools", "What looks at a trained model, or makes another one of it.", entries("tool")),
    ]


def listing() -> str:
    """A few lines an entry, by section."""
    lines = []
    for section in sections():
        if not section.entries:
            continue
        columns = ["name", "year", "always sparse", *section.facts]
        rows = [
            [e.name, str(e.year), _yes(e), *(fact(e.name) for fact in section.facts.values())] for e in section.entries
        ]
        widths = [max(len(row[column]) for row in [columns, *rows]) for column in range(len(columns))]
        lines += [f"## {section.title}", *textwrap.wrap(section.about, _WIDTH), ""]
        lines.append(f"{_aligned(columns, widths)}  what it does")
        for row, of_row in zip(rows, section.entries, strict=True):
            lines.append(f"{_aligned(row, widths)}  {summary(of_row)}")
            lines.append(f"{'':{widths[0]}}  {_reference(of_row)}")
            lines.append(f"{'':{widths[0]}}  $ {of_row.command}")
        lines.append("")
    return "\n".join([*lines, f"{_ALWAYS_SPARSE}\nOne in full, with its options: regrow methods NAME"])


def details(name: str) -> str:
    """All there is to say of an entry, or of several of one name.

    Raises:
        RegrowError: there is none; the message names similar ones.
    """
    everything = [(section, e) for section in sections() for e in section.entries]
    found = [_in_full(section, e) for section, e in everything if e.name == name]
    if not found:
        names = [e.name for _, e in everything]
        similar = difflib.get_close_matches(name, names, n=3) or sorted(names)
        raise RegrowError(f"nothing is called {name!r}; there is {', '.join(similar)} (regrow methods lists all)")
    return "\n\n".join(found)


def markdown() -> str:
    """docs/methods.md."""
    parts = [_HEAD]
    for section in sections():
        if not section.entries:
            continue
        columns = ["name", "year", "always sparse", *(section.facts or ("what it does",)), "paper"]
        parts.append(f"## {section.title}\n\n{section.about}\n")
        parts.append("\n".join([_row(columns), _row(["---"] * len(columns)), *_rows(section), ""]))
        for e in section.entries:
            text = _prose(e.doc.partition("\n\n")[2])
            parts.append("\n\n".join(filter(None, (f"### {e.name}", summary(e), text, f"`{e.command}`"))) + "\n")
            options = [_row([f"`--{option}`", f"`{default}`", text]) for option, default, text in e.options]
            if options:
                parts.append("\n".join(["| option | default | |", "|---|---|---|", *options, ""]))
    return "\n".join(parts)


_HEAD = f"""# Methods and all around them

Made by `regrow methods --markdown` from the code itself: every entry is declared beside what does it. How the methods
compare in training is measured in [methods-compared.md](methods-compared.md); recipes are shown at work in
[recipes.md](recipes.md).

{_ALWAYS_SPARSE}
"""


def _replaces(name: str) -> str:
    return "feed-forward halves" if layers.create(name).pairs else "each layer"


def _products(name: str) -> str:
    option, size = layers.create(name), LAYER
    place = layers.Place(size.in_features, size.out_features, True, size.block_size, 0.1, device="meta")
    back = place.of(size.out_features, size.in_features)
    weights = option.pair_weights(place, back) / 2 if option.pairs else option.weights(place)
    return f"{weights / (size.in_features * size.out_features):.3f}"


def _import_all(room: str) -> None:
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _in_full(section: Section, e: Entry) -> str:
    kinds: dict[Kind, str] = {
        "control": "control over dense weights",
        "layer": "layer option",
        "method": "method that moves blocks",
    }
    facts = [("paper", _reference(e)), ("year", str(e.year)), ("always sparse", _yes(e))]
    facts += [(title, fact(e.name)) for title, fact in section.facts.items()]
    lines = [f"{e.name}, a {kinds.get(e.kind, e.kind)}: {summary(e)}", ""]
    lines += [f"  {title:14} {text}" for title, text in [*facts, ("command", e.command)]]
    if e.options:
        lines += ["", "options:"]
        for name, default, text in e.options:
            indent = " " * 37
            shown = "" if default == "" else str(default)
            wrapped = textwrap.wrap(text, _WIDTH - len(indent))
            lines.append(f"  --{name:22} {shown:10} {wrapped[0] if wrapped else ''}".rstrip())
            lines += [indent + line for line in wrapped[1:]]
    body = e.doc.partition("\n\n")[2]
    return "\n".join([*lines, *(["", body] if body else [])])


def _rows(section: Section) -> list[str]:
    rows = []
    for e in section.entries:
        middle = [fact(e.name) for fact in section.facts.values()] or [summary(e)]
        rows.append(_row([f"[{e.name}](#{e.name})", str(e.year), _yes(e), *middle, f"[{e.paper}]({e.link})"]))
    return rows


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))


def _reference(e: Entry) -> str:
    return f"{e.paper}, {e.link}"


def _yes(e: Entry) -> str:
    return "yes" if e.always_sparse else "no"


def _prose(body: str) -> str:
    """An explanation with its examples and equations as code."""
    lines, inside = [], False
    for line in body.replace(".. math:: ", "    ").split("\n"):
        example = line.startswith("    >>>") or (inside and line.startswith("    "))
        if example != inside:
            lines.append("```python" if example else "```")
            inside = example
        lines.append(line[4:] if example else line)
    return "\n".join([*lines, "```"] if inside else lines)
