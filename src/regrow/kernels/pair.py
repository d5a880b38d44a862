"""Operators over two block-sparse weights with something between them: what both halves of a layer share."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels.checks import check_bias, check_blocks, check_contents, check_data, check_in
from regrow.kernels.reference import Weight

INDEX1, INDEX2 = (f"Tensor row_ptr{i}, Tensor col_idx{i}, Tensor slot{i}" for i in (1, 2))
"""In an operator's schema."""


def pair_of(arguments: Sequence[Any]) -> tuple[Weight, Weight]:
    """Both weights from an operator's ten arguments, or nine without the second bias, which no gradient needs."""
    values1, bias1, *index1, values2 = arguments[:6]
    bias2 = arguments[6] if len(arguments) == 10 else None
    return Weight(values1, bias1, index1), Weight(values2, bias2, arguments[-3:])


def check_pair(x: Tensor, first: Weight, second: Weight) -> None:
    """All but the width between them, which is for what lies there to say."""
    others = {"values1": first.values, "bias1": first.bias, "values2": second.values, "bias2": second.bias}
    check_data("x", x, others)
    check_blocks(first.values, first.indices, "1")
    check_blocks(second.values, second.indices, "2")
    b = first.values.shape[1]
    if second.values.shape[1] != b:
        raise RegrowError(f"values1 has blocks of {b} and values2 blocks of {second.values.shape[1]}; they must agree")
    check_in(x, b)
    check_bias(first.bias, first.indices[0], b, "1")
    check_bias(second.bias, second.indices[0], b, "2")


def check_pair_contents(x: Tensor, first: Weight, hidden: int, second: Weight) -> None:
    """What the compiled kernels check themselves; ``hidden`` is the width that ``second`` reads."""
    b = first.values.shape[1]
    check_contents(first.indices, x.shape[1] // b, "1")
    check_contents(second.indices, hidden // b, "2")


# ---- gradients: in x, values1, bias1, values2 and bias2 ---------------------------------------------


def empty_gradients(g: Tensor, x: Tensor, first: Weight, second: Weight, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Of no elements where not needed."""
    shapes = x.shape, first.values.shape, (first.out_features,), second.values.shape, (g.shape[1],)
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needed, strict=True))


def chosen(needed: Sequence[bool], grads: Sequence[Tensor], others: Sequence[Any] = (None,) * 5) -> tuple[Any, ...]:
    """``grads`` where needed, else ``others``."""
    return tuple(grad if need else other for grad, other, need in zip(grads, others, needed, strict=True))


def pair_gradients(
    backward: Any, arguments: Sequence[Any], need_x: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """In ``x``, and in each of the ten arguments that are the weights; ``needs`` is of those."""
    need_values1, need_bias1, _, _, _, need_values2, need_bias2, *_ = needs
    needed = need_x, need_values1, need_bias1, need_values2, need_bias2
    dx, dvalues1, dbias1, dvalues2, dbias2 = chosen(needed, backward(*arguments, *needed))
    return dx, dvalues1, dbias1, None, None, None, dvalues2, dbias2, None, None, None
