"""Export to ONNX, with the sparse layers as dense products or as products of the existing blocks only.

PyTorch's exporter writes the graph from transformers' own code; a sparse layer of which only blocks are wanted is one
marked node there, which :mod:`regrow.bert.onnx_blocks` expands. What was written is run by onnxruntime and compared.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from regrow.bert.export import Exported, compare, plain_copy, random_batches
from regrow.bert.model import dense_bytes, stored_bytes
from regrow.bert.onnx_blocks import block_product
from regrow.bert.output import new_output
from regrow.bert.run import writing
from regrow.errors import RegrowError
from regrow.nn import BlockSparseLinear, densify, named_sparse_layers
from regrow.nn.sparsify import replace_module

Weights = Literal["dense", "blocks"]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSETS = range(18, 24)
"""What PyTorch's exporter writes."""

_MARK = "regrow::BlockProduct"
_LARGEST = 2**31 - 2**20  # a protobuf message ends at 2 GiB; some of it is not weights


def export_onnx(
    model: PreTrainedModel,
    out: str | Path,
    *,
    weights: Weights = "dense",
    opset: int = 20,
    progress: bool = False,
) -> Exported:
    """Write ``model`` as an ONNX file, and keep it only if onnxruntime computes the model's outputs from it.

    Inputs are ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 ``[batch, length]`` with both axes
    dynamic; outputs have the names of transformers' (``logits``, ``last_hidden_state``, ...). The model itself is not
    changed; it may be fused.

    Args:
        model: one of :data:`regrow.bert.export.HEADS`, sparse or not.
        out: file to make.
        weights: ``"dense"`` for ordinary products, absent weights 0; ``"blocks"`` for products of existing blocks.
        opset: version of the operators, 18 to 23.
        progress: show what is being done.

    Raises:
        RegrowError: a package of ``regrow[onnx]`` is missing, ``out`` exists, the model's class is not known, it has no
            sparse layer (with ``"blocks"``), it exceeds 2 GB, or onnxruntime computes something else.
    """
    onnx, runtime = _packages()
    if weights not in ("dense", "blocks"):
        raise RegrowError(f"weights must be 'dense' or 'blocks', got {weights!r}")
    if opset not in OPSETS:
        raise RegrowError(f"opset must lie between {OPSETS[0]} and {OPSETS[-1]}, got {opset}")
    reference = plain_copy(model)
    with new_output(out) as aside:
        batches = random_batches(reference.config)
        with tqdm(total=1 + len(batches), disable=not progress, desc="writing the graph") as bar:
            document = _graph(_Named(_exportable(reference, weights)), batches[-1], opset)
            _expand(onnx, document, dict(named_sparse_layers(reference)))
            with writing(str(out), "choose another OUT"):
                onnx.save(document, str(aside))
            del document
            bar.update()
            bar.set_description("comparing")
            difference = compare(reference, _session(onnx, runtime, aside), _counted(batches, bar))
        n_bytes = aside.stat().st_size
    return Exported(Path(out), n_bytes, difference)


class _Marked(nn.Module):
    """A sparse layer as one node of the graph, which :func:`_expand` replaces.

    Exporters take long to reason about shapes; tracing the many operations of every layer took five times as long.
    """

    def __init__(self, name: str, layer: BlockSparseLinear) -> None:
        super().__init__()
        self.name, self.out_features, self.bias, self.activation = (
            name,
            layer.out_features,
            layer.bias,
            layer.activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        y = torch.onnx.ops.symbolic(_MARK, (x,), {"layer": self.name}, dtype=x.dtype, shape=shape, version=1)
        y = y if self.bias is None else y + self.bias
        return F.gelu(y) if self.activation == "gelu" else y


class _Named(nn.Module):
    """Positional inputs in the order of :data:`INPUTS`, and the outputs that exist, in a tuple."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        inputs = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, **inputs).to_tuple()


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401  (PyTorch's exporter needs it)
    except ImportError as error:
        raise RegrowError(f'export to ONNX needs {error.name}: pip install "regrow[onnx]"') from None
    if not hasattr(torch.onnx, "ops"):
        raise RegrowError(
            f"export to ONNX needs torch.onnx.ops, which PyTorch {torch.__version__} has not; upgrade torch"
        )
    return onnx, onnxruntime


def _exportable(reference: PreTrainedModel, weights: Weights) -> PreTrainedModel:
    size = dense_bytes(reference) if weights == "dense" else stored_bytes(reference)
    if size > _LARGEST:
        advice = "; weights='blocks' takes less" if weights == "dense" else ""
        raise RegrowError(f"the model takes {size / 1e9:.1f} GB, an ONNX file holds at most 2{advice}")
    layers = dict(named_sparse_layers(reference))
    if weights == "blocks" and not layers:
        raise RegrowError("weights='blocks' needs a sparse model, and this one has no sparse layer; use 'dense'")
    model = plain_copy(reference)
    if weights == "dense":
        return densify(model)
    for name, layer in layers.items():
        model = replace_module(model, name, _Marked(name, layer))
    return model


def _graph(model: _Named, batch: Mapping[str, Tensor], opset: int) -> Any:
    """The ONNX document of a model, as protobuf."""
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    inputs = tuple(batch[name] for name in INPUTS)
    names = list(model.model(**batch))
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                input_names=INPUTS,
                output_names=names,
                dynamic_shapes=tuple(axes for _ in INPUTS),
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise RegrowError(f"PyTorch cannot export this model: {' '.join(str(error).split())[:300]}") from None
    assert program is not None
    document = program.model_proto
    for part in (document, document.graph, *document.graph.node, *document.graph.value_info):
        part.ClearField("metadata_props")  # stack traces of the exporter, with paths of this machine
    return document


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports on its own doings, in three ways; what it cannot do it raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _expand(onnx: Any, document: Any, layers: Mapping[str, BlockSparseLinear]) -> None:
    """Replace every marked node by the operators of its layer, in place."""
    nodes = list(document.graph.node)
    document.graph.ClearField("node")
    for node in nodes:
        if f"{node.domain}::{node.op_type}" != _MARK:
            document.graph.node.append(node)
            continue
        name = onnx.helper.get_node_attr_value(node, "layer").decode()
        part = block_product(onnx, layers[name], name, node.input[0], node.output[0])
        document.graph.node.extend(part.nodes)
        document.graph.initializer.extend(part.constants)
    standard = [entry for entry in document.opset_import if not entry.domain]
    document.ClearField("opset_import")
    document.opset_import.extend(standard)


def _session(onnx: Any, runtime: Any, path: Path) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """``path`` as a function of a batch, once it has passed onnx's checker."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # neither library has one type for what it refuses
        raise RegrowError(f"onnx or onnxruntime refuses the export: {' '.join(str(error).split())[:300]}") from None
    names = [output.name for output in session.get_outputs()]

    def run(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = session.run(names, {name: batch[name].numpy() for name in INPUTS})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}

    return run


def _counted(batches: list[dict[str, Tensor]], bar: tqdm) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        yield batch
        bar.update()
