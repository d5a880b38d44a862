"""What ``regrow methods`` says of methods: what they look at, and what an update costs."""

from __future__ import annotations

from regrow.entries import Entry, entry_of
from regrow.methods.base import LayerSize, Method, available, create

LAYER, TOKENS = LayerSize(in_features=768, out_features=3072, block_size=16, n_blocks=922), 4096
"""The layer whose update is priced: BERT-Base's first feed-forward one at density 0.1, and the tokens of a batch."""

PRICE = (
    "Extra FLOPs: of one update of a 768 -> 3072 layer (density 0.1, 16x16 blocks, 4,096 tokens), in training steps of "
    "that layer."
)


def methods(*, dense_layout: bool) -> list[Method]:
    """All methods with their defaults: those that move blocks, or those that train dense weights."""
    return [method for method in map(create, available()) if method.dense_layout is dense_layout]


def entry(method: Method) -> Entry:
    """A method as the list shows it."""
    return entry_of(method, "control" if method.dense_layout else "method", f"regrow pretrain --method {method.name}")


def signals_of(method: Method) -> str:
    """What a method looks at besides the weights."""
    if method.dense_layout:
        return "dense weights"
    if not method.needs_gradient:
        return "values" if method.moves else "nothing"
    return "candidate gradients" if method.always_sparse else "dense gradient"


def extra_steps(method: Method) -> float:
    """FLOPs of one update of :data:`LAYER` beyond ordinary training, in training steps of that layer."""
    step = 3 * 2 * TOKENS * LAYER.n_blocks * LAYER.block_size**2
    return method.update_flops(LAYER, TOKENS) / step


def extra_of(method: Method) -> str:
    """:func:`extra_steps` in words."""
    steps = extra_steps(method)
    if steps == 0:
        return "none"
    return f"{steps:.2f} steps" if steps >= 0.005 else "< 0.01 steps"
