"""Lets transformers load a saved sparse model: ``import regrow; AutoModel.from_pretrained(path)``.

transformers hands ``config.quantization_config`` to the loader registered for its ``quant_method`` before any weight
is read. Ours swaps the dense skeleton's linear layers for sparse ones of the recorded sizes, and after the weights
have arrived validates every index. Nothing from a file reaches a kernel unchecked; no pickle is ever read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear, named_sparse_layers
from regrow.nn.gathered import sparse_linear
from regrow.nn.layout import FORMAT_VERSION, QUANT_METHOD
from regrow.nn.shape import BlockShape
from regrow.topology.blocks import check_counts
from regrow.training.checks import header, wrong_type


@register_quantization_config(QUANT_METHOD)
class RegrowConfig(QuantizationConfigMixin):
    """The layout :func:`regrow.nn.layout.layout` wrote, as transformers wants to hold it."""

    def __init__(
        self, layers: dict[str, dict[str, int]] | None = None, format_version: int = FORMAT_VERSION, **unknown: Any
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version != FORMAT_VERSION:
            raise RegrowError(
                f"this model is in regrow format {format_version}, this version reads {FORMAT_VERSION}; upgrade regrow"
            )
        if unknown:
            raise RegrowError(f"config.json: unknown entry {sorted(unknown)[0]!r} in quantization_config")
        if not isinstance(layers, dict) or not all(_is_layer_entry(entry) for entry in layers.values()):
            raise RegrowError("config.json: quantization_config.layers must map names to block_size and n_blocks")
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.layers = layers


@register_quantizer(QUANT_METHOD)
class RegrowLoader(HfQuantizer):
    """Builds the sparse skeleton before the weights are read and validates it afterwards."""

    quantization_config: RegrowConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        for name, entry in self.quantization_config.layers.items():
            found, dense = _find_linear(model, name)
            parent, _, leaf = found.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _skeleton(name, dense, entry))
        for path in checkpoint_files or ():
            if str(path).endswith(".safetensors"):
                _check_file(Path(path), model, self.quantization_config.layers)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layer in named_sparse_layers(model):
            for part, tensor in layer.state_dict(keep_vars=True).items():
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise RegrowError(f"the saved model lacks {name}.{part}, or holds it in another shape")
            try:
                layer.topology.validate()
            except RegrowError as error:
                raise RegrowError(f"{name}.topology: {error}") from None
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _is_layer_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() | {"block_cols"} == {"block_size", "block_cols", "n_blocks"}
        and {"block_size", "n_blocks"} <= entry.keys()
        and all(type(number) is int for number in entry.values())
    )


def _check_file(path: Path, model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Look at the header of a weights file: transformers converts types, and passes over what it does not know."""
    try:
        found = header(path)
    except (SafetensorError, OSError) as error:
        raise RegrowError(f"{path} is damaged ({error})") from None
    expected, prefix = model.state_dict(), f"{getattr(model, 'base_model_prefix', '')}."
    for name, (dtype, shape) in found.items():
        layer, _, part = name.partition(".topology.")
        if part and layer not in layers:
            raise RegrowError(f"{path}: {name} belongs to no sparse layer that config.json lists")
        known = (expected[n] for n in (name, name.removeprefix(prefix), prefix + name) if n in expected)
        tensor = next(known, None)
        if tensor is None:
            continue
        wrong = wrong_type(dtype, tensor, exact=False)
        if (part or name.removesuffix(".values") in layers) and list(tensor.shape) != shape:
            wrong = f"must be {list(tensor.shape)} by config.json, not {shape}"
        if wrong:
            raise RegrowError(f"{path}: {name} {wrong}")


def _find_linear(model: nn.Module, name: str) -> tuple[str, nn.Linear]:
    """A layer saved from ``BertForPreTraining`` is ``bert.encoder...`` there and ``encoder...`` in ``BertModel``."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        module = modules.get(candidate)
        if type(module) is nn.Linear:
            return candidate, module
    raise RegrowError(f"config.json lists sparse layer {name!r}, but the model has no linear layer of that name")


def _skeleton(name: str, dense: nn.Linear, entry: dict[str, int]) -> BlockSparseLinear:
    block_size, n_blocks = entry["block_size"], entry["n_blocks"]
    shape = BlockShape(block_size, entry.get("block_cols", block_size))
    try:
        rows, cols = shape.grid(dense.in_features, dense.out_features)
        check_counts(rows, cols, n_blocks)
        return sparse_linear(
            dense.in_features,
            dense.out_features,
            block=shape,
            density=n_blocks / (rows * cols),
            bias=dense.bias is not None,
            device="meta",
            dtype=dense.weight.dtype,
        )
    except RegrowError as error:
        raise RegrowError(f"config.json, layer {name!r}: {error}") from None
