"""Turn the linear layers of any model into block-sparse ones, and back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from regrow.errors import RegrowError
from regrow.nn.gathered import sparse_linear
from regrow.nn.layout import record_layout
from regrow.nn.linear import BlockSparseLinear
from regrow.nn.shape import BlockShape
from regrow.nn.speed import known_speeds
from regrow.topology import BlockTopology, layer_densities
from regrow.topology.distribution import Distribution

Model = TypeVar("Model", bound=nn.Module)
Globs = str | Sequence[str]
Init = Literal["truncated_normal", "keep", "magnitude"]


def named_sparse_layers(model: nn.Module) -> Iterator[tuple[str, BlockSparseLinear]]:
    """Every :class:`BlockSparseLinear` of a model with its qualified name, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLinear):
            yield name, module


def density_of(layers: Iterable[BlockSparseLinear]) -> float:
    """Share of the weights of all these layers together that exist now.

    Example:
        >>> layers = [BlockSparseLinear(64, 64, block_size=16, density=d) for d in (0.25, 0.75)]
        >>> density_of(layers)
        0.5
    """
    layers = list(layers)
    return sum(x.values.numel() for x in layers) / sum(x.in_features * x.out_features for x in layers)


def sparsify(
    model: Model,
    *,
    density: float,
    block_size: int | tuple[int, int],
    include: Globs = "*",
    exclude: Globs = (),
    distribution: Distribution = "uniform",
    init: Init = "truncated_normal",
    on_mismatch: Literal["error", "skip"] = "error",
    on_slow: Literal["ignore", "warn"] = "ignore",
    seed: int = 0,
) -> Model:
    """Replace the chosen ``nn.Linear`` modules by :class:`BlockSparseLinear`, in place.

    Args:
        density: share of blocks that exist, in (0, 1].
        block_size: edge of a block, one of 1, 4, 8, 16, 32, 64; or ``(16, 1)`` for :class:`GatheredLinear`, whose
            blocks are 16 outputs of one input.
        include, exclude: one glob or several over qualified module names, ``"bert.encoder.*"``; a layer is
            replaced if any ``include`` and no ``exclude`` matches.
        distribution: how density varies over layers: ``"uniform"``, ``"er"``, ``"erk"``, or ``{glob: density}`` where
            ``density`` is that of the layers no glob matches. Q, K and V count as layers of their own.
        init: ``"truncated_normal"`` draws a random pattern and new values as the paper does, with zero bias;
            ``"keep"`` draws a random pattern, and copies the bias and the dense weight's values there; ``"magnitude"``
            copies the bias and the blocks with the greatest sums of absolute values: one-shot pruning.
        on_mismatch: a layer that the block does not divide is an error, or is left dense with one warning.
        on_slow: ``"warn"`` names the layers that ``regrow advise`` measured to be slower than dense here.
        seed: of patterns and values; the global random state is not touched.

    A model laid out on the meta device gets real sparse layers on the CPU, so it need never have been dense.

    Returns:
        the same model (a new module if ``model`` itself is an ``nn.Linear``).

    Raises:
        RegrowError: nothing matches, a block does not divide a layer, a matched weight is shared with another
            module, or an argument is out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> sparsify(model, density=0.25, block_size=16, include="0")[0].values.shape
        torch.Size([4, 16, 16])
    """
    if init not in get_args(Init):
        raise RegrowError(f"init must be one of {', '.join(map(repr, get_args(Init)))}, got {init!r}")
    if on_slow not in ("ignore", "warn"):
        raise RegrowError(f"on_slow must be 'ignore' or 'warn', got {on_slow!r}")
    chosen = chosen_layers(model, include, exclude)
    block = BlockShape.of(block_size)
    chosen = _divisible(chosen, block, on_mismatch)
    if not chosen:
        raise RegrowError(f"no nn.Linear matches include={include!r}, exclude={exclude!r}; nothing to sparsify")
    _refuse_shared(model, chosen)
    shapes = {name: block.grid(layer.in_features, layer.out_features) for name, layer in chosen.items()}
    densities = layer_densities(shapes, density, distribution)
    if on_slow == "warn":
        _warn_of_slow(chosen, block, densities)
    generator = torch.Generator().manual_seed(seed)
    for name, dense in chosen.items():
        sparse = _replacement(dense, block, densities[name], generator)
        if init == "magnitude":
            sparse.topology = strongest_blocks(dense.weight, block, sparse.topology.n_blocks)
        if init != "truncated_normal":
            sparse.load_dense_(dense.weight)
            if sparse.bias is not None:
                sparse.bias.data.copy_(dense.bias)
        model = replace_module(model, name, sparse)
    record_layout(model, dict(named_sparse_layers(model)))
    return model


def densify(model: Model) -> Model:
    """Replace every :class:`BlockSparseLinear` by the ``nn.Linear`` of equal function, in place; absent = 0.

    Raises:
        RegrowError: a layer has an activation.

    Example:
        >>> model = nn.Sequential(BlockSparseLinear(32, 32, block_size=16, density=0.5))
        >>> x = torch.ones(1, 32)
        >>> before = model(x)
        >>> torch.allclose(densify(model)(x), before, atol=1e-6), type(model[0]).__name__
        (True, 'Linear')
    """
    layers = list(named_sparse_layers(model))
    for name, sparse in layers:
        if sparse.activation is not None:
            raise RegrowError(f"{name or 'the model'} has an activation, which nn.Linear has not; set it to None first")
    for name, sparse in layers:
        dense = nn.Linear(sparse.in_features, sparse.out_features, bias=sparse.bias is not None, device="meta")
        dense.weight = nn.Parameter(sparse.to_dense(), requires_grad=sparse.values.requires_grad)
        if sparse.bias is not None:
            dense.bias = sparse.bias
        model = replace_module(model, name, dense.train(sparse.training))
    record_layout(model, {})
    return model


@torch.no_grad()
def strongest_blocks(weight: Tensor, block_size: int | tuple[int, int], n_blocks: int) -> BlockTopology:
    """The ``n_blocks`` blocks of a dense ``weight [out, in]`` with the greatest sum of absolute values.

    Args:
        block_size: edge of a block, or its outputs and inputs.

    Example:
        >>> strongest_blocks(torch.tensor([[1.0, -5.0], [2.0, 0.0]]), 1, 2).keys().tolist()
        [1, 2]
    """
    height, width = BlockShape.of(block_size)
    rows, cols = weight.shape[0] // height, weight.shape[1] // width
    strength = weight.abs().view(rows, height, cols, width).sum((1, 3)).flatten()
    keys = strength.topk(n_blocks).indices.sort().values
    return BlockTopology.from_coordinates(keys // cols, keys % cols, n_block_rows=rows, n_block_cols=cols)


def chosen_layers(model: nn.Module, include: Globs, exclude: Globs = ()) -> dict[str, nn.Linear]:
    """Every plain ``nn.Linear`` whose name any ``include`` and no ``exclude`` matches."""
    include, exclude = _as_globs(include), _as_globs(exclude)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and any(fnmatchcase(name, glob) for glob in include)
        and not any(fnmatchcase(name, glob) for glob in exclude)
    }


def _as_globs(globs: Globs) -> Sequence[str]:
    return (globs,) if isinstance(globs, str) else globs


def _divisible(layers: dict[str, nn.Linear], block: BlockShape, on_mismatch: str) -> dict[str, nn.Linear]:
    if on_mismatch not in ("error", "skip"):
        raise RegrowError(f"on_mismatch must be 'error' or 'skip', got {on_mismatch!r}")
    fitting, skipped = {}, []
    for name, layer in layers.items():
        if on_mismatch == "skip" and (layer.in_features % block.cols or layer.out_features % block.rows):
            skipped.append(name)
            continue
        try:
            block.grid(layer.in_features, layer.out_features)
        except RegrowError as error:
            raise RegrowError(f"{name or 'the layer'}: {error}, or exclude={name!r}") from None
        fitting[name] = layer
    if skipped:
        warnings.warn(f"left dense, block_size {block} does not divide: {', '.join(skipped)}", stacklevel=3)
    return fitting


def _warn_of_slow(layers: dict[str, nn.Linear], block: BlockShape, densities: dict[str, float]) -> None:
    speeds = {(s.in_features, s.out_features): s for s in known_speeds() if str(s.block_size) == str(block)}
    unknown, slow = [], []
    for name, layer in layers.items():
        speed = speeds.get((layer.in_features, layer.out_features))
        if speed is None:
            unknown.append(f"{layer.in_features}x{layer.out_features}")
        elif speed.speedup(densities[name]) < 1.0:
            slow.append(f"{name} ({speed.speedup(densities[name]):.2f}x)")
    if slow:
        warnings.warn(f"slower than dense on this machine at block_size {block}: {', '.join(slow)}", stacklevel=3)
    if unknown:
        shapes = ",".join(dict.fromkeys(unknown))
        warnings.warn(f"speed not known yet; measure with: regrow advise {shapes} --blocks {block}", stacklevel=3)


def _refuse_shared(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    uses = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for name, layer in chosen.items():
        if uses[id(layer.weight)] > 1:
            raise RegrowError(f"{name}: its weight is tied to another module; leave it dense with exclude={name!r}")


def _replacement(dense: nn.Linear, block: BlockShape, density: float, generator: torch.Generator) -> BlockSparseLinear:
    sparse = sparse_linear(
        dense.in_features,
        dense.out_features,
        block=block,
        density=density,
        bias=dense.bias is not None,
        generator=generator,
        device="cpu",
        dtype=dense.weight.dtype,
    )
    if not dense.weight.is_meta:  # a skeleton gets real sparse layers: so a model need never have been dense
        sparse = sparse.to(dense.weight.device)
    return sparse.train(dense.training)


def replace_module(model: Model, name: str, module: nn.Module) -> Model:
    """Put ``module`` where ``name`` is; returns the model, which is ``module`` itself if ``name`` is empty."""
    if not name:
        return module  # type: ignore[return-value]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    return model
