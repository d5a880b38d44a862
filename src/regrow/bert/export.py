"""Hand a trained model to programs that do not know regrow.

What every kind of export shares is here: a copy that computes with transformers' own code, batches on which the
result is compared with the model, output that appears whole or not at all; and the simplest export, to an ordinary
directory of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.bert.modeling_bert import BertLayer, BertModel
from transformers.utils import logging

from regrow.bert import model as pretraining
from regrow.bert.fused import FusedBertLayer
from regrow.bert.output import new_output
from regrow.bert.run import writing
from regrow.bert.saved import load_saved, model_folder
from regrow.errors import RegrowError
from regrow.nn import densify

HEADS = (
    transformers.BertModel,
    transformers.BertForPreTraining,
    transformers.BertForMaskedLM,
    transformers.BertForNextSentencePrediction,
    transformers.BertForSequenceClassification,
    transformers.BertForTokenClassification,
    transformers.BertForQuestionAnswering,
)
"""Classes whose inputs are ``[batch, length]``, and which encode: no decoder, no multiple choice."""

ACCEPTED = 1e-4
"""A result that differs by more, relative to the largest output, is not kept. Rounding gives about 1e-6."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        path: the file or directory.
        n_bytes: its size.
        difference: ``max |theirs - ours| / max |ours|``, the largest of all outputs and batches.
    """

    path: Path
    n_bytes: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.n_bytes / 1e6:.2f} MB; its outputs differ by at most {self.difference:.1e} (relative)"
        )


def export_dense(source: str | Path, out: str | Path) -> Exported:
    """Write the model saved at ``source`` as an ordinary transformers directory, in which absent weights are 0.

    The directory needs no regrow. It is read back and compared with the sparse model before it appears.

    Args:
        source: what :func:`regrow.bert.saved.load_saved` takes.
        out: directory to make.

    Raises:
        RegrowError: ``out`` exists, the model cannot be loaded, or what was written computes something else.
    """
    with new_output(out) as aside:
        model, tokenizer = load_saved(source), saved_tokenizer(source)
        reference = plain_copy(model)
        save(densify(model), tokenizer, aside, out)
        written = load_saved(aside, dtype=torch.float32)
        difference = compare(reference, lambda batch: written(**batch), random_batches(model.config))
        n_bytes = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file())
    return Exported(Path(out), n_bytes, difference)


def saved_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model saved at ``source``; None if there is none.

    Raises:
        RegrowError: it is damaged.
    """
    local = Path(source).exists()
    folder = model_folder(source) if local else source
    if local and not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # the library behind it has no type of its own for a damaged file
        raise RegrowError(f"cannot load the tokenizer of {folder}: {' '.join(str(error).split())}") from None


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, aside: Path, out: str | Path) -> None:
    """Write a model and its tokenizer into the directory ``aside``, which errors call ``out``.

    Raises:
        RegrowError: it cannot be written.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one of transformers' own, over a single file
    try:
        with writing(str(out), "choose another OUT"):
            model.save_pretrained(aside)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
    finally:
        if bars:
            logging.enable_progress_bar()


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in evaluation mode and float32 on the CPU, computed by transformers' own code around our sparse layers.

    Of a model that :func:`regrow.bert.fused.fuse` changed it is what there was before: exporters cannot follow fused
    operations. :class:`regrow.bert.model.BertForPreTraining` becomes transformers' class, which needs no labels.

    Raises:
        RegrowError: the model is none of :data:`HEADS`, or a decoder.
    """
    kind = transformers.BertForPreTraining if type(model) is pretraining.BertForPreTraining else type(model)
    if kind not in HEADS:
        raise RegrowError(f"cannot export a {kind.__name__}; known are {', '.join(head.__name__ for head in HEADS)}")
    if model.config.is_decoder or model.config.add_cross_attention:
        raise RegrowError(f"cannot export a decoder; set is_decoder of this {kind.__name__} to false")
    # deepcopy and not `kind(config)`: that would take memory for the dense model that never was.
    plain = nn.Module.float(copy.deepcopy(model).cpu().eval())  # transformers' own refuses for sparse models
    plain.__class__ = kind
    for module in plain.modules():
        if isinstance(module, BertModel):
            for name in ("forward", "fusions"):
                vars(module).pop(name, None)
        elif isinstance(module, FusedBertLayer):
            module.__class__ = BertLayer
    plain.config.output_hidden_states = plain.config.output_attentions = False
    plain.config.return_dict = True
    return plain


def random_batches(config: PretrainedConfig, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of several shapes, with and without padding: ``input_ids``, ``attention_mask``, ``token_type_ids``."""
    longest = min(config.max_position_embeddings, 128)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for batch, length in dict.fromkeys([(1, 1), (1, longest), (2, min(7, longest)), (5, min(33, longest))]):
        real = torch.randint(1, length + 1, (batch, 1), generator=generator)
        real[0] = length
        batches.append(
            {
                "input_ids": torch.randint(config.vocab_size, (batch, length), generator=generator),
                "attention_mask": (torch.arange(length) < real).long(),
                "token_type_ids": torch.randint(config.type_vocab_size, (batch, length), generator=generator),
            }
        )
    return batches


@torch.no_grad()
def compare(
    reference: PreTrainedModel,
    other: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    batches: Iterable[dict[str, Tensor]],
) -> float:
    """``max |other - reference| / max |reference|``, the largest of all outputs and batches.

    Raises:
        RegrowError: it exceeds :data:`ACCEPTED`, an output is not a number, or outputs are not the same.
    """
    largest = 0.0
    for batch in batches:
        ours, theirs = dict(reference(**batch)), other(batch)
        if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
            raise RegrowError(f"the export has outputs {list(theirs)}, the model {list(ours)}, or of other shapes")
        for name, expected in ours.items():
            scale = float(expected.abs().max())
            error = float((theirs[name] - expected).abs().max()) / (scale or 1.0)
            if not error <= ACCEPTED:  # NaN, too
                shape = list(batch["input_ids"].shape)
                raise RegrowError(
                    f"{name} of the export differs by {error:.1e} (relative) from the model's on a batch of {shape}, "
                    f"more than {ACCEPTED:g}; it was not kept"
                )
            largest = max(largest, error)
    return largest
