"""All methods as text: what ``regrow methods`` prints and docs/methods.md holds."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable

from regrow.methods.base import LayerSize, Method, available, create
from regrow.nn import options as layers

LAYER, TOKENS = LayerSize(in_features=768, out_features=3072, block_size=16, n_blocks=922), 4096
"""The layer whose update is priced: BERT-Base's first feed-forward one at density 0.1, and the tokens of a batch."""


def extra_steps(method: Method) -> float:
    """FLOPs of one update of :data:`LAYER` beyond ordinary training, in training steps of that layer."""
    step = 3 * 2 * TOKENS * LAYER.n_blocks * LAYER.block_size**2
    return method.update_flops(LAYER, TOKENS) / step


def listing() -> str:
    """One line a method, and its options below it."""
    lines = [f"{'name':10} {'year':5} {'always sparse':14} {'looks at':20} {'extra FLOPs':12} what it does"]
    for method in _all():
        sparse = "yes" if method.always_sparse else "no"
        facts = f"{method.name:10} {method.year:<5} {sparse:14} {signals_of(method):20} {_extra(method):12}"
        lines.append(f"{facts} {_summary(method)}")
        lines.append(f"{'':10} {method.paper}, {method.link}")
        lines += [f"    --{name:22} {default!s:10} {text}" for name, default, text in _options(method)]
    return "\n".join([*lines, _PRICE])


def markdown() -> str:
    """docs/methods.md."""
    rows = []
    for method in _all():
        sparse = "yes" if method.always_sparse else "no"
        rows.append(
            f"| [{method.name}](#{method.name}) | {method.year} | {sparse} | {signals_of(method)} | {_extra(method)} "
            f"| [{method.paper}]({method.link}) |"
        )
    parts = [_HEAD.format(price=_PRICE, rows="\n".join(rows))]
    for method in _all():
        doc = (sys.modules[type(method).__module__].__doc__ or "").strip()
        parts.append(f"## {method.name}\n\n{_summary(method)}\n\n{_prose(doc)}\n")
        options = [f"| `--{name}` | `{default}` | {text} |" for name, default, text in _options(method)]
        if options:
            parts.append("\n".join(["| option | default | |", "|---|---|---|", *options, ""]))
    return "\n".join(parts)


def layer_entries() -> list[tuple[layers.LayerOption, float]]:
    """Every layer option, and its products at :data:`LAYER` as a share of the dense ones.

    Of an option for feed-forward halves, those of the half that begins with that layer.
    """
    size = LAYER
    place = layers.Place(size.in_features, size.out_features, True, size.block_size, 0.1, device="meta")
    back = place.of(size.out_features, size.in_features)
    dense, entries = size.in_features * size.out_features, []
    for name in layers.available():
        option = layers.create(name)
        weights = option.pair_weights(place, back) / 2 if option.pairs else option.weights(place)
        entries.append((option, weights / dense))
    return entries


def layer_listing() -> str:
    """One line a layer option, and its options below it."""
    lines = [f"{'name':12} {'year':5} {'always sparse':14} {'products':9} what it does"]
    for option, share in layer_entries():
        sparse = "yes" if option.always_sparse else "no"
        lines.append(f"{option.name:12} {option.year:<5} {sparse:14} {f'{share:.3f}':9} {_summary(option)}")
        lines.append(f"{'':12} {option.paper}, {option.link}")
        lines += [f"    --{name:22} {default!s:10} {text}" for name, default, text in _options(option)]
    return "\n".join([*lines, _PRODUCTS])


def layer_markdown() -> str:
    """docs/layers.md."""
    rows, parts = [], []
    for option, share in layer_entries():
        sparse, where = "yes" if option.always_sparse else "no", "feed-forward halves" if option.pairs else "each"
        rows.append(
            f"| [{option.name}](#{option.name}) | {option.year} | {sparse} | {where} | {share:.3f} "
            f"| [{option.paper}]({option.link}) |"
        )
        doc = (sys.modules[type(option).__module__].__doc__ or "").strip()
        parts.append(f"## {option.name}\n\n{_summary(option)}\n\n{_prose(doc)}\n")
        options = [f"| `--{name}` | `{default}` | {text} |" for name, default, text in _options(option)]
        if options:
            parts.append("\n".join(["| option | default | |", "|---|---|---|", *options, ""]))
    return "\n".join([_LAYER_HEAD.format(products=_PRODUCTS, rows="\n".join(rows)), *parts])


def signals_of(method: Method) -> str:
    """What a method looks at besides the weights."""
    if method.dense_layout:
        return "dense weights"
    if not method.needs_gradient:
        return "values" if method.moves else "nothing"
    return "candidate gradients" if method.always_sparse else "dense gradient"


_PRICE = """
Extra FLOPs: of one update of a 768 -> 3072 layer (density 0.1, 16x16 blocks, 4,096 tokens), in training steps of that
layer. Always sparse: nothing of a dense weight's size or cost is ever computed."""

_HEAD = """# Methods

Made by `regrow methods --markdown` from the methods themselves. How they compare in training is measured in
[methods-compared.md](methods-compared.md).
{price}

| method | year | always sparse | looks at | extra FLOPs | paper |
|---|---|---|---|---|---|
{rows}
"""


_PRODUCTS = """
Products: of a token at a 768 -> 3072 layer (density 0.1, 16x16 blocks), as a share of the dense layer's; of options for
feed-forward halves those of the half. Always sparse: nothing of a dense weight's size or cost is ever computed."""

_LAYER_HEAD = """# Layers

Made by `regrow methods --layers --markdown` from the options themselves: what may stand in the place of a linear layer,
`regrow pretrain --layer NAME` and `regrow.sparsify(model, ..., layer=NAME)`, or `layer=create(NAME, OPTION=VALUE)` with
`regrow.nn.options.create`. Options for feed-forward halves replace two layers with an activation between, and leave
plain blocks elsewhere. Any method moves the blocks inside; [formats.md](formats.md) says how they are saved.
{products}

| layer | year | always sparse | replaces | products | paper |
|---|---|---|---|---|---|
{rows}
"""


def _all() -> Iterable[Method]:
    return [create(name) for name in available()]


def _extra(method: Method) -> str:
    steps = extra_steps(method)
    if steps == 0:
        return "none"
    return f"{steps:.2f} steps" if steps >= 0.005 else "< 0.01 steps"


def _summary(method: object) -> str:
    return (method.__doc__ or "").strip().splitlines()[0]


def _options(method: object) -> list[tuple[str, object, str]]:
    return [
        (field.name.replace("_", "-"), getattr(method, field.name), str(field.metadata.get("help", "")))
        for field in dataclasses.fields(method)  # type: ignore[arg-type]
    ]


def _prose(doc: str) -> str:
    """A module's docstring without its title and with its examples as code."""
    body = doc.split("\n", 1)[1].strip() if "\n" in doc else ""
    lines, inside = [], False
    for line in body.replace(".. math:: ", "    ").split("\n"):
        example = line.startswith("    >>>") or (inside and line.startswith("    "))
        if example != inside:
            lines.append("```python" if example else "```")
            inside = example
        lines.append(line[4:] if example else line)
    return "\n".join([*lines, "```"] if inside else lines)
