"""BERT's sizes by name.

Layers, width and heads: Turc et al. 2019 (arXiv 1908.08962) and Devlin et al. 2019. Dropout and dense learning
rates: Dietrich et al. 2021 (arXiv 2108.06277), appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import BertConfig

from regrow.errors import RegrowError
from regrow.optim import dense_learning_rate


@dataclass(frozen=True)
class Size:
    """Shape of an encoder; the feed-forward width is four times ``hidden``."""

    layers: int
    hidden: int
    heads: int
    dropout: float
    tuned_lr: float | None = None

    @property
    def encoder_weights(self) -> int:
        """Elements of the encoder's linear weights when dense: ``12 * layers * hidden^2``."""
        return 12 * self.layers * self.hidden**2

    @property
    def dense_lr(self) -> float:
        """Best dense learning rate: the paper's where it tuned one, otherwise its fit in the number of weights."""
        return self.tuned_lr or dense_learning_rate(self.encoder_weights)


SIZES = {
    "tiny": Size(2, 128, 2, dropout=0.0),
    "mini": Size(4, 256, 4, dropout=0.0, tuned_lr=8e-4),
    "small": Size(4, 512, 8, dropout=0.0, tuned_lr=4e-4),
    "medium": Size(8, 512, 8, dropout=0.1, tuned_lr=2e-4),
    "base": Size(12, 768, 12, dropout=0.1, tuned_lr=2e-4),
    "large": Size(24, 1024, 16, dropout=0.1),
}


def size_named(name: str) -> Size:
    """Look a size up, or read one: ``LAYERS/HIDDEN`` or ``LAYERS/HIDDEN/HEADS``, by default with heads of 64.

    Raises:
        RegrowError: unknown name; the message lists the known ones. Or numbers that make no model.

    Example:
        >>> size_named("small").encoder_weights
        12582912
        >>> size_named("2/192")
        Size(layers=2, hidden=192, heads=3, dropout=0.0, tuned_lr=None)
    """
    if name in SIZES:
        return SIZES[name]
    try:
        layers, hidden, *rest = (int(part) for part in name.split("/"))
        heads = rest[0] if rest else max(1, hidden // 64)
    except ValueError:
        raise RegrowError(
            f"unknown size {name!r}; choose one of {', '.join(SIZES)}, or give LAYERS/HIDDEN/HEADS, as 2/192/3"
        ) from None
    if len(rest) > 1 or min(layers, hidden, heads) < 1 or hidden % heads:
        raise RegrowError(f"size {name!r} must be LAYERS/HIDDEN/HEADS, all positive, with HEADS dividing HIDDEN")
    return Size(layers, hidden, heads, dropout=0.0)


def bert_config(name: str, *, vocab_size: int, max_length: int, dropout: float | None = None) -> BertConfig:
    """transformers' configuration of a size; ``dropout=None`` takes the paper's (0.1 above Small, else 0)."""
    size = size_named(name)
    dropout = size.dropout if dropout is None else dropout
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=max(max_length, 128),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
