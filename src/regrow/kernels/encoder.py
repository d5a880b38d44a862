"""An encoder's layers without a gradient, their weights packed once: for inference.

Every other operator packs its weights and checks their indices at each call, which is nothing beside a training batch
but much beside a few tokens; and each is called from Python. Here a layer's six weights are copied once into memory
that native code owns, and all layers are one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regrow.errors import RegrowError
from regrow.kernels import cpu
from regrow.kernels.checks import check_bias, check_blocks, check_data, check_offsets, check_tensor
from regrow.kernels.reference import Weight

NAMES = ("query", "key", "value", "output", "first", "second")
"""The order of a layer's weights."""


class PackedEncoder:
    r"""Layers of self-attention and feed-forward halves, each followed by a residual sum and a LayerNorm:

    .. math::
        y &= \mathrm{LayerNorm}_1(x + \mathrm{attention}(x W_{qkv}^T + b_{qkv}) W_o^T + b_o) \\
        z &= \mathrm{LayerNorm}_2(y + \mathrm{gelu}(y W_1^T + b_1) W_2^T + b_2)

    with the exact GELU. It copies what it is given and can neither be changed nor saved: it belongs to one instruction
    set. Results do not depend on the number of threads.

    Args:
        heads: of each attention.
        width: of ``x``, a multiple of ``heads``; a head's part is a multiple of 16 and of the block edge.

    Raises:
        RegrowError: sizes do not fit.

    One layer of width 16 whose weights are zero only normalises:

    >>> index = [torch.tensor(i, dtype=torch.int32) for i in ([0, 0], [], [])]
    >>> nothing = Weight(torch.empty(0, 16, 16), None, index)
    >>> encoder = PackedEncoder(heads=1, width=16)
    >>> encoder.add_layer([nothing] * 6, torch.tensor([[1.0], [0.0], [1.0], [0.0]]).expand(4, 16), (0.0, 0.0))
    >>> y = encoder(torch.arange(16.0).view(1, 16), torch.tensor([0, 1], dtype=torch.int32))
    >>> round(float(y.std(correction=0)), 4)
    1.0

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.1.
    """

    def __init__(self, heads: int, width: int) -> None:
        if heads < 1 or width < 1 or width % heads or width // heads % 16:
            raise RegrowError(f"heads is {heads}, width {width}; each head's part of it must be a multiple of 16")
        self.heads, self.width, self.n_layers = heads, width, 0
        self._native = cpu.native().Encoder(heads, width // heads)

    def __deepcopy__(self, memo: dict) -> PackedEncoder:
        return self  # once its layers are added nothing changes it

    def add_layer(self, weights: Sequence[Weight], norms: Tensor, eps: tuple[float, float]) -> None:
        """Check, copy and pack one more layer.

        Args:
            weights: the six of :data:`NAMES`, of one block size, float32 on a CPU. ``first`` is ``[hidden, width]`` and
                ``second [width, hidden]``, all others ``[width, width]``.
            norms: ``[4, width]``: weight and bias of the first LayerNorm, and of the second.
            eps: added to the variances.

        Raises:
            RegrowError: shapes, dtypes or devices disagree, or an index is out of range or order.
        """
        b = weights[0].values.shape[-1]
        width, hidden = self.width, weights[4].out_features
        for name, weight in zip(NAMES, weights, strict=True):
            which = f" of {name}"
            check_blocks(weight.values, weight.indices, which)
            check_bias(weight.bias, weight.indices[0], weight.values.shape[1], which)
            check_data(f"values{which}", weight.values, {f"bias{which}": weight.bias})
            rows = hidden if name == "first" else width
            if weight.values.shape[1] != b or weight.out_features != rows or not cpu.supports(weight.values, b):
                raise RegrowError(
                    f"values{which} are blocks of {weight.values.shape[1]} for {weight.out_features} rows, "
                    f"{weight.values.dtype} on {weight.values.device}; expected {b} for {rows}, float32 on cpu"
                )
        if width // self.heads % b:
            raise RegrowError(f"blocks of {b} do not divide the {width // self.heads} columns of a head")
        check_tensor("norms", norms, (4, width), torch.float32, torch.device("cpu"))
        arrays = [a for weight in weights for a in (weight.values, weight.bias, *weight.indices)]
        kept = [None if a is None else a.detach().contiguous() for a in [*arrays, norms]]  # until the call returns
        *addresses, of_norms = [0 if a is None else a.data_ptr() for a in kept]
        n_blocks = [weight.values.shape[0] for weight in weights]
        try:
            self._native.add_layer(addresses, n_blocks, of_norms, *eps, hidden, b)
        except ValueError as error:
            raise RegrowError(str(error)) from None
        self.n_layers += 1

    @property
    def n_bytes(self) -> int:
        """Of the packed weights and their indices."""
        return self._native.bytes()

    def __call__(self, x: Tensor, offsets: Tensor) -> Tensor:
        """All layers.

        Args:
            x: ``[N, width]`` float32 on a CPU, sequences one after the other.
            offsets: int32 ``[B + 1]``, from 0 to ``N``: sequence ``s`` is the tokens ``offsets[s]`` to
                ``offsets[s + 1]``.

        Returns:
            ``[N, width]``, without a gradient.

        Raises:
            RegrowError: ``x`` has another shape, dtype or device, or ``offsets`` does not rise from 0 to ``N``.
        """
        if x.dim() != 2 or x.shape[1] != self.width or x.dtype is not torch.float32 or not x.is_cpu:
            raise RegrowError(
                f"x is {list(x.shape)} {x.dtype} on {x.device}; expected [N, {self.width}] float32 on cpu"
            )
        check_offsets(offsets, x.device)
        y, offsets = x.detach().clone(memory_format=torch.contiguous_format), offsets.contiguous()
        sizes = y.shape[0], offsets.shape[0] - 1, torch.get_num_threads()
        try:
            self._native.run(y.data_ptr(), offsets.data_ptr(), *sizes)
        except ValueError as error:
            raise RegrowError(str(error)) from None
        return y


def embed(
    ids: Tensor,
    positions: Tensor | int,
    types: Tensor | None,
    tables: Sequence[Tensor],
    norm: Sequence[Tensor],
    eps: float,
) -> Tensor:
    """``LayerNorm(word[ids] + place[positions] + kind[types])``, without a gradient.

    Args:
        ids: int64 ``[N]``.
        positions: int64 ``[N]``, or the length ``L`` of all sequences: then token ``i`` has the position ``i % L``.
        types: int64 ``[N]``; None for 0.
        tables: ``word``, ``place`` and ``kind``, rows of ``H`` numbers, float32 on a CPU.
        norm: weight and bias ``[H]`` of the LayerNorm.
        eps: added to the variance.

    Returns:
        ``[N, H]``.

    Raises:
        RegrowError: a row does not exist, or shapes, dtypes or devices disagree.

    >>> word, place, kind = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.zeros(1, 2), torch.zeros(1, 2)
    >>> embed(torch.tensor([1]), 1, None, (word, place, kind), (torch.ones(2), torch.zeros(2)), 0.0)
    tensor([[-1.,  1.]])
    """
    n, width, cpu_device = ids.numel(), tables[0].shape[-1], torch.device("cpu")
    for name, rows in (("input_ids", ids), ("positions", positions), ("token_type_ids", types)):
        if isinstance(rows, Tensor):
            check_tensor(name, rows, (n,), torch.int64, cpu_device)
    for name, table in zip(("word", "place", "kind"), tables, strict=True):
        check_tensor(name, table, (table.shape[0], width), torch.float32, cpu_device)
    for name, affine in zip(("weight", "bias"), norm, strict=True):
        check_tensor(name, affine, (width,), torch.float32, cpu_device)
    where, length = (positions, 1) if isinstance(positions, Tensor) else (None, max(positions, 1))
    y = torch.empty(n, width)
    sizes = n, length, *(table.shape[0] for table in tables), width, eps
    cpu.call("embed", (ids, where, types, *tables, *norm, y), *sizes)
    return y
