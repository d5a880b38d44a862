"""A sparse layer in plain ONNX operators that multiply existing blocks only.

Block rows with equally many blocks ``k`` form a group, whose blocks are one tensor ``[rows, b, k * b]``. The input is
turned to ``[columns, b, tokens]``, of which one ``Gather`` takes the ``k`` panels of each row as ``[rows, k * b,
tokens]``; one batched ``MatMul`` multiplies and adds up. So nothing is scattered, no row is padded to the longest, and
each existing weight is there once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regrow.nn import BlockSparseLinear


class Part:
    """Nodes and constants under construction; every name begins with that of the layer.

    Args:
        onnx: the package, which is imported only when it is needed.
    """

    def __init__(self, onnx: Any, name: str) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._onnx, self._name = onnx, name

    def constant(self, name: str, value: Tensor | list[int]) -> str:
        """Returns the constant's full name."""
        array = torch.as_tensor(value).contiguous().numpy()
        self.constants.append(self._onnx.numpy_helper.from_array(array, f"{self._name}.{name}"))
        return f"{self._name}.{name}"

    def node(self, operator: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Returns the name of the node's output, ``out`` or a new one."""
        out = out or f"{self._name}.{operator}_{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(operator, inputs, [out], **attributes))
        return out


def block_product(onnx: Any, layer: BlockSparseLinear, name: str, x: str, y: str) -> Part:
    """``y = x W^T`` of a sparse layer, without its bias.

    For each group of block rows with ``k`` blocks, ``b x w``, each: ``y^T[rows] = blocks [rows, b, k * w] @ x^T[c]``.

    Args:
        name: what names of nodes and constants begin with.
        x, y: names of the input ``[..., in_features]`` and the output ``[..., out_features]``, of any rank.
    """
    part = Part(onnx, name)
    tokens = part.node("Reshape", x, part.constant("tokens", [-1, layer.in_features]))
    panels = part.constant("panels", [layer.topology.n_block_cols, layer.block_shape.cols, -1])
    panels = part.node("Reshape", part.node("Transpose", tokens, perm=[1, 0]), panels)
    products = []
    for k, (blocks, columns) in grouped_blocks(layer).items():
        gathered = part.node("Gather", panels, part.constant(f"columns_{k}", columns.int()), axis=0)
        shape = part.constant(f"operand_{k}", [len(blocks), blocks.shape[2], -1])
        operand = part.node("Reshape", gathered, shape)
        products.append(part.node("MatMul", part.constant(f"blocks_{k}", blocks), operand))
    rows = part.node("Concat", *products, axis=0)
    rows = part.node("Gather", rows, part.constant("row_order", row_order(layer).int()), axis=0)
    rows = part.node("Reshape", rows, part.constant("rows", [layer.out_features, -1]))
    leading = part.node("Shape", x, end=-1)
    shape = part.node("Concat", leading, part.constant("width", [layer.out_features]), axis=0)
    part.node("Reshape", part.node("Transpose", rows, perm=[1, 0]), shape, out=y)
    return part


def grouped_blocks(layer: BlockSparseLinear) -> dict[int, tuple[Tensor, Tensor]]:
    """Blocks of rows with equally many: ``{k: (blocks [rows, b, k * w], columns [rows * k])}``, ``k`` ascending.

    A row without blocks gets one of zeros: ONNX has no product over nothing.
    """
    (b, width), (row_ptr, col_idx, slot) = layer.block_shape, (index.long() for index in layer.topology.indices())
    counts, groups = row_ptr.diff(), {}
    values = layer.values.detach()
    for k in counts.unique().tolist():
        rows = (counts == k).nonzero().squeeze(1)
        if k == 0:
            groups[k] = values.new_zeros(len(rows), b, width), torch.zeros_like(rows)
            continue
        entries = row_ptr[rows][:, None] + torch.arange(k)
        blocks = values[slot[entries]].transpose(1, 2).reshape(len(rows), b, k * width)
        groups[k] = blocks, col_idx[entries].flatten()
    return groups


def row_order(layer: BlockSparseLinear) -> Tensor:
    """Where each block row is, ``[R]``, once rows are sorted by their number of blocks, as the groups are."""
    return layer.topology.row_ptr.diff().argsort(stable=True).argsort()
