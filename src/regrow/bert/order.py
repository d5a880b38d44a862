"""The order in which examples are seen: an endless stream, exactly repeatable."""

from __future__ import annotations

import numpy as np

# First word of every seed. Zeros at the end of a seed do not count in numpy, so without these the draws for the order
# of an epoch and for the mask of its pair 0 would be the same. (1 and 2 belong to the preparation of pairs.)
ORDER, MASK = 3, 4


class ShuffledOrder:
    """Item ``i`` of ``n`` examples shuffled anew in every epoch: epoch ``i // n``, and that epoch's permutation.

    A pure function of ``(n, seed, i)``, so a run resumes by going on at its next item, and the number of ``DataLoader``
    workers changes nothing.

    Example:
        >>> order = ShuffledOrder(4, seed=0)
        >>> [order[i][1] for i in range(8)]
        [3, 2, 1, 0, 2, 0, 1, 3]
        >>> order[5]
        (1, 0)
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._permutations: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, object]:
        # a worker makes its own permutations: cheaper than sending them
        return {"n": self.n, "seed": self.seed, "_permutations": {}}

    def __getitem__(self, item: int) -> tuple[int, int]:
        """Epoch and example of an item."""
        epoch, position = divmod(int(item), self.n)
        if epoch not in self._permutations:
            if len(self._permutations) > 2:
                self._permutations.clear()
            self._permutations[epoch] = np.random.default_rng((ORDER, self.seed, epoch)).permutation(self.n)
        return epoch, int(self._permutations[epoch][position])
