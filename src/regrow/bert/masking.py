"""Choosing and hiding the tokens of masked language modelling, whole words at a time."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from regrow.errors import RegrowError

IGNORE = -100
"""The label of a position that is not predicted: the value that PyTorch's cross-entropy leaves out."""


class WholeWordMasker:
    """Masks sequences of token ids as BERT does.

    Of a sequence of ``len`` tokens, ``[CLS]`` and ``[SEP]`` counted, at most

        n = min(max_predictions, max(1, round(probability * len)))

    positions are chosen. Words (a piece and its ``##`` continuations) are taken whole, in random order; a
    word that would exceed ``n`` is skipped. ``[CLS]``, ``[SEP]`` and ``[PAD]`` are never chosen. Each chosen
    piece on its own becomes ``[MASK]`` (80 %), stays (10 %), or becomes a random piece, uniform over the
    *whole* vocabulary (10 %).

    Args:
        vocabulary: a tokenizer, or ``(vocab_size, is_continuation, is_special, mask_id)`` where the two
            arrays are boolean of shape ``[vocab_size]``: which ids are ``##`` pieces, and which are never
            masked.
        max_predictions: the most positions per sequence.
        probability: the share of positions to choose.
        whole_word: `False` lets every piece be chosen on its own.

    Raises:
        RegrowError: an argument is out of range, or the tokenizer has no mask token.

    >>> continuation = np.array([False, False, False, False, False, True])
    >>> special = np.array([True, True, True, False, False, False])
    >>> masker = WholeWordMasker((6, continuation, special, 3), probability=0.6)
    >>> ids = np.array([1, 4, 5, 4, 2])
    >>> masked, labels = masker.mask(ids, np.random.default_rng(0))
    >>> labels
    array([-100,    4,    5,    4, -100])
    """

    def __init__(
        self,
        vocabulary: PreTrainedTokenizerBase | tuple[int, np.ndarray, np.ndarray, int],
        max_predictions: int = 20,
        probability: float = 0.15,
        *,
        whole_word: bool = True,
    ) -> None:
        if max_predictions < 1:
            raise RegrowError(f"max_predictions={max_predictions}: at least one position must be predicted")
        if not 0 < probability <= 1:
            raise RegrowError(f"probability={probability}: the share of masked positions lies in (0, 1]")
        if not isinstance(vocabulary, tuple):
            vocabulary = describe_vocabulary(vocabulary)
        self.vocab_size, self.is_continuation, self.is_special, self.mask_id = vocabulary
        for name, flags in (("is_continuation", self.is_continuation), ("is_special", self.is_special)):
            if flags.shape != (self.vocab_size,):
                raise RegrowError(f"{name} has shape {flags.shape}: one flag for each of {self.vocab_size} ids")
        self.max_predictions = max_predictions
        self.probability = probability
        self.whole_word = whole_word

    def mask(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Mask one unpadded sequence.

        Args:
            ids: token ids with the special tokens in place, shape ``[length]``; not changed.
            rng: the only source of chance.

        Returns:
            ``(masked_ids, labels)``, both int64 of shape ``[length]``; labels are the original ids at the
            chosen positions and -100 elsewhere.
        """
        masked = ids.astype(np.int64)
        labels = np.full(len(masked), IGNORE, dtype=np.int64)
        chosen = self._choose(masked, rng)
        original = masked[chosen]
        labels[chosen] = original
        fate = rng.random(len(chosen))
        replacement = rng.integers(self.vocab_size, size=len(chosen))
        masked[chosen] = np.where(fate < 0.8, self.mask_id, np.where(fate < 0.9, original, replacement))
        return masked, labels

    def _choose(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The positions to predict, in ascending order."""
        wanted = min(self.max_predictions, max(1, round(self.probability * len(ids))))
        positions = np.flatnonzero(~self.is_special[ids])
        if not self.whole_word:
            return np.sort(rng.permutation(positions)[:wanted])
        # A word begins at a piece that is no continuation, and also where the piece before it is not a
        # candidate: a segment cut in the middle of a word begins with "##", but is no part of the other
        # segment.
        begins = ~self.is_continuation[ids[positions]]
        begins[:1] = True
        begins[1:] |= np.diff(positions) > 1
        starts = np.append(np.flatnonzero(begins), len(positions))
        taken: list[np.ndarray] = []
        room = wanted
        first, last = starts[:-1].tolist(), starts[1:].tolist()
        for word in rng.permutation(len(starts) - 1).tolist():
            size = last[word] - first[word]
            if size <= room:
                taken.append(positions[first[word] : last[word]])
                room -= size
                if not room:
                    break
        return np.sort(np.concatenate(taken)) if taken else positions[:0]


def describe_vocabulary(tokenizer: PreTrainedTokenizerBase) -> tuple[int, np.ndarray, np.ndarray, int]:
    """``(vocab_size, is_continuation, is_special, mask_id)`` of a BERT tokenizer, for
    :class:`WholeWordMasker`.

    ``[UNK]`` is not special here: an unknown word in a sentence may be hidden and predicted, as in the
    original.
    """
    if tokenizer.mask_token_id is None:
        raise RegrowError("the tokenizer has no mask token: masked language modelling needs [MASK] in its vocabulary")
    vocab = tokenizer.get_vocab()
    size = max(vocab.values()) + 1
    is_continuation = np.zeros(size, dtype=bool)
    is_continuation[[number for piece, number in vocab.items() if piece.startswith("##")]] = True
    is_special = np.zeros(size, dtype=bool)
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    is_special[[number for number in special if number is not None]] = True
    return size, is_continuation, is_special, int(tokenizer.mask_token_id)
