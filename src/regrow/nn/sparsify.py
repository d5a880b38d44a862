"""Turn the linear layers of any model into block-sparse ones, and back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from regrow.errors import RegrowError
from regrow.nn.layout import record_layout
from regrow.nn.linear import BlockSparseLinear, check_block_size
from regrow.nn.options import LayerOption, Place, create
from regrow.nn.replace import DEFAULT, built_places, replace_layers, replace_module
from regrow.nn.speed import known_speeds
from regrow.topology import BlockTopology, layer_densities
from regrow.topology.distribution import Distribution

Model = TypeVar("Model", bound=nn.Module)
Globs = str | Sequence[str]
Init = Literal["truncated_normal", "keep", "magnitude"]
_EXTRA = 2**40
"""From the seed of patterns and blocks to that of all else."""


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
    block_size: int,
    include: Globs = "*",
    exclude: Globs = (),
    distribution: Distribution = "uniform",
    layer: str | LayerOption = DEFAULT,
    init: Init = "truncated_normal",
    on_mismatch: Literal["error", "skip"] = "error",
    on_slow: Literal["ignore", "warn"] = "ignore",
    seed: int = 0,
) -> Model:
    """Replace the chosen ``nn.Linear`` modules by :class:`BlockSparseLinear`, or what holds some, in place.

    Args:
        density: share of blocks that exist, in (0, 1].
        block_size: edge of a block, one of 1, 4, 8, 16, 32, 64.
        include, exclude: one glob or several over qualified module names, ``"bert.encoder.*"``; a layer is
            replaced if any ``include`` and no ``exclude`` matches.
        distribution: how density varies over layers: ``"uniform"``, ``"er"``, ``"erk"``, or ``{glob: density}`` where
            ``density`` is that of the layers no glob matches. Q, K and V count as layers of their own.
        layer: what stands in the place of a layer: a name from ``regrow.nn.options.available()``, with its default
            options, or a :class:`~regrow.nn.options.LayerOption`. ``"blocks"`` is the sparse layer alone;
            docs/layers.md has all. Options for feed-forward halves leave plain blocks elsewhere.
        init: ``"truncated_normal"`` draws a random pattern and new values as the paper does, with zero bias;
            ``"keep"`` draws a random pattern, and copies the bias and the dense weight's values there; ``"magnitude"``
            copies the bias and the blocks with the greatest sums of absolute values: one-shot pruning. Both are for
            ``layer="blocks"``.
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
    option = create(layer) if isinstance(layer, str) else layer
    if init != "truncated_normal" and option.name != DEFAULT:
        raise RegrowError(f"init={init!r} is for layer='blocks'; layer={option.name!r} draws new values")
    chosen = chosen_layers(model, include, exclude)
    chosen = _divisible(chosen, block_size, on_mismatch)
    if not chosen:
        raise RegrowError(f"no nn.Linear matches include={include!r}, exclude={exclude!r}; nothing to sparsify")
    _refuse_shared(model, chosen)
    densities = _densities(chosen, block_size, density, distribution)
    if on_slow == "warn":
        _warn_of_slow(chosen, block_size, densities)
    places = _places(chosen, block_size, densities, seed)
    model = replace_layers(model, chosen, places, option)
    if init != "truncated_normal":
        for name, dense in chosen.items():
            _copy_values(dense, model.get_submodule(name), init)
    record_layout(model, dict(named_sparse_layers(model)))
    return model


def sparse_skeleton(
    model: Model,
    *,
    density: float,
    block_size: int,
    include: Globs = "*",
    distribution: Distribution = "uniform",
    layer: str | LayerOption = DEFAULT,
) -> Model:
    """:func:`sparsify` without memory: the new layers are on the meta device, to be counted.

    Example:
        >>> sparse_skeleton(nn.Sequential(nn.Linear(64, 64)), density=0.25, block_size=16)[0].values.is_meta
        True
    """
    option = create(layer) if isinstance(layer, str) else layer
    chosen = _divisible(chosen_layers(model, include), block_size, "error")
    densities = _densities(chosen, block_size, density, distribution)
    return replace_layers(model, chosen, _places(chosen, block_size, densities), option)


def densify(model: Model) -> Model:
    """Replace every sparse layer, of whatever option, by the ``nn.Linear`` of equal function, in place; absent = 0.

    Raises:
        RegrowError: a layer has an activation, or computes what no one dense matrix does; nothing has changed then.

    Example:
        >>> model = nn.Sequential(BlockSparseLinear(32, 32, block_size=16, density=0.5))
        >>> x = torch.ones(1, 32)
        >>> before = model(x)
        >>> torch.allclose(densify(model)(x), before, atol=1e-6), type(model[0]).__name__
        (True, 'Linear')
    """
    layers: dict[str, Any] = {}
    inside: set[int] = set()
    for name, module, built in built_places(model):
        if built.part != "single" or not getattr(module, "is_linear", True):
            raise RegrowError(
                f"{name} is of layer {built.option.name!r}, which no nn.Linear of {built.in_features} -> "
                f"{built.out_features} can stand for"
            )
        layers[name] = module
        inside |= {id(part) for part in module.modules()}
    layers |= {name: layer for name, layer in named_sparse_layers(model) if id(layer) not in inside}
    for name, sparse in layers.items():
        if getattr(sparse, "activation", None) is not None:
            raise RegrowError(f"{name or 'the model'} has an activation, which nn.Linear has not; set it to None first")
    for name, sparse in layers.items():
        dense = nn.Linear(sparse.in_features, sparse.out_features, bias=sparse.bias is not None, device="meta")
        trained = any(p.requires_grad for part, p in sparse.named_parameters() if not part.endswith("bias"))
        dense.weight = nn.Parameter(sparse.to_dense(), requires_grad=trained)
        if sparse.bias is not None:
            dense.bias = sparse.bias
        model = replace_module(model, name, dense.train(sparse.training))
    record_layout(model, {})
    return model


@torch.no_grad()
def strongest_blocks(weight: Tensor, block_size: int, n_blocks: int) -> BlockTopology:
    """The ``n_blocks`` blocks of a dense ``weight [out, in]`` with the greatest sum of absolute values.

    Example:
        >>> strongest_blocks(torch.tensor([[1.0, -5.0], [2.0, 0.0]]), 1, 2).keys().tolist()
        [1, 2]
    """
    rows, cols = weight.shape[0] // block_size, weight.shape[1] // block_size
    strength = weight.abs().view(rows, block_size, cols, block_size).sum((1, 3)).flatten()
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


def _divisible(layers: dict[str, nn.Linear], block_size: int, on_mismatch: str) -> dict[str, nn.Linear]:
    if on_mismatch not in ("error", "skip"):
        raise RegrowError(f"on_mismatch must be 'error' or 'skip', got {on_mismatch!r}")
    fitting, skipped = {}, []
    for name, layer in layers.items():
        if on_mismatch == "skip" and (layer.in_features % block_size or layer.out_features % block_size):
            skipped.append(name)
            continue
        try:
            check_block_size(layer.in_features, layer.out_features, block_size)
        except RegrowError as error:
            raise RegrowError(f"{name or 'the layer'}: {error}, or exclude={name!r}") from None
        fitting[name] = layer
    if skipped:
        warnings.warn(f"left dense, block_size {block_size} does not divide: {', '.join(skipped)}", stacklevel=3)
    return fitting


def _warn_of_slow(layers: dict[str, nn.Linear], block_size: int, densities: dict[str, float]) -> None:
    speeds = {(s.in_features, s.out_features): s for s in known_speeds() if s.block_size == block_size}
    unknown, slow = [], []
    for name, layer in layers.items():
        speed = speeds.get((layer.in_features, layer.out_features))
        if speed is None:
            unknown.append(f"{layer.in_features}x{layer.out_features}")
        elif speed.speedup(densities[name]) < 1.0:
            slow.append(f"{name} ({speed.speedup(densities[name]):.2f}x)")
    if slow:
        warnings.warn(f"slower than dense on this machine at block_size {block_size}: {', '.join(slow)}", stacklevel=3)
    if unknown:
        shapes = ",".join(dict.fromkeys(unknown))
        warnings.warn(f"speed not known yet; measure with: regrow advise {shapes} --blocks {block_size}", stacklevel=3)


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


def _densities(
    chosen: dict[str, nn.Linear], block_size: int, density: float, distribution: Distribution
) -> dict[str, float]:
    shapes = {
        name: (layer.out_features // block_size, layer.in_features // block_size) for name, layer in chosen.items()
    }
    return layer_densities(shapes, density, distribution)


def _places(
    chosen: dict[str, nn.Linear], block_size: int, densities: dict[str, float], seed: int | None = None
) -> dict[str, Place]:
    """Where the chosen layers are, in numbers; without a seed for skeletons."""
    generator = extra = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        extra = torch.Generator().manual_seed((seed + _EXTRA) % 2**63)
    return {
        name: Place(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            block_size,
            densities[name],
            # a skeleton gets real sparse layers: so a model need never have been dense
            device="meta" if seed is None else "cpu",
            dtype=dense.weight.dtype,
            generator=generator,
            extra=extra,
        )
        for name, dense in chosen.items()
    }


@torch.no_grad()
def _copy_values(dense: nn.Linear, sparse: nn.Module, init: str) -> None:
    assert isinstance(sparse, BlockSparseLinear)
    if init == "magnitude":
        sparse.topology = strongest_blocks(dense.weight, sparse.block_size, sparse.topology.n_blocks)
    sparse.load_dense_(dense.weight)
    if sparse.bias is not None:
        sparse.bias.copy_(dense.bias)
