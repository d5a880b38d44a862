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
from regrow.nn import named_sparse_layers
from regrow.nn.layout import FORMAT_OF_OPTIONS, FORMAT_VERSION, QUANT_METHOD
from regrow.nn.options import Composite
from regrow.nn.replace import built_places
from regrow.topology import BlockTopology
from regrow.training.checks import header, wrong_type
from regrow.training.skeleton import belongs_to_option, build_layers, check_entries


@register_quantization_config(QUANT_METHOD)
class RegrowConfig(QuantizationConfigMixin):
    """The layout :func:`regrow.nn.layout.layout` wrote, as transformers wants to hold it."""

    def __init__(
        self,
        layers: dict[str, dict[str, int]] | None = None,
        format_version: int = FORMAT_VERSION,
        options: dict[str, dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format_version not in (FORMAT_VERSION, FORMAT_OF_OPTIONS):
            raise RegrowError(
                f"this model is in regrow format {format_version}, this version reads {FORMAT_VERSION} and "
                f"{FORMAT_OF_OPTIONS}; upgrade regrow"
            )
        if unknown:
            raise RegrowError(f"config.json: unknown entry {sorted(unknown)[0]!r} in quantization_config")
        if not isinstance(layers, dict) or not all(_is_layer_entry(entry) for entry in layers.values()):
            raise RegrowError("config.json: quantization_config.layers must map names to block_size and n_blocks")
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.layers = layers
        if format_version == FORMAT_OF_OPTIONS:  # no attribute otherwise: it would be written
            check_entries(options)
            self.options: dict[str, dict[str, Any]] = options or {}
        elif options is not None:
            raise RegrowError(f"config.json: quantization_config.options belongs to format {FORMAT_OF_OPTIONS}")


@register_quantizer(QUANT_METHOD)
class RegrowLoader(HfQuantizer):
    """Builds the sparse skeleton before the weights are read and validates it afterwards."""

    quantization_config: RegrowConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        layers = self.quantization_config.layers
        renamed, options = build_layers(model, layers, getattr(self.quantization_config, "options", {}))
        for path in checkpoint_files or ():
            if str(path).endswith(".safetensors"):
                _check_file(Path(path), model, layers)
        self.quantization_config.layers = renamed
        if options:
            self.quantization_config.options = options
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        composites = [(name, module) for name, module, _ in built_places(model) if isinstance(module, Composite)]
        for name, layer in [*composites, *named_sparse_layers(model)]:
            for part, tensor in layer.state_dict(keep_vars=True).items():
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise RegrowError(f"the saved model lacks {name}.{part}, or holds it in another shape")
        for name, sparse in named_sparse_layers(model):
            _validate(f"{name}.topology", sparse.topology)
        for name, composite in composites:
            _validate(name, composite)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _validate(name: str, part: BlockTopology | Composite) -> None:
    try:
        part.validate()
    except RegrowError as error:
        raise RegrowError(f"{name}: {error}") from None


def _is_layer_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"block_size", "n_blocks"}
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
        known = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in expected), None)
        if known is None:
            continue
        tensor = expected[known]
        wrong = wrong_type(dtype, tensor, exact=False)
        ours = part or name.removesuffix(".values") in layers or belongs_to_option(model, known)
        if ours and list(tensor.shape) != shape:
            wrong = f"must be {list(tensor.shape)} by config.json, not {shape}"
        if wrong:
            raise RegrowError(f"{path}: {name} {wrong}")
