"""A corpus of a made-up language, and studies of it that take seconds."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from regrow.study import Study

STEPS = 20


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents in which words follow each other by rule."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("bdfgklmnprst")) + rng.choice(list("aeiou")) for _ in range(3)) for _ in range(60)]
    documents = []
    for _ in range(40):
        starts = rng.integers(60, size=6)
        sentences = (" ".join(words[(start + 7 * i) % 60] for i in range(8)).capitalize() + "." for start in starts)
        documents.append(" ".join(sentences))
    path = tmp_path_factory.mktemp("corpus") / "made-up.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny(corpus: Path) -> Callable[..., Study]:
    """Makes a study of tiny runs; its arguments are options of all of them, lists are axes."""

    def make(**options: object) -> Study:
        defaults = {
            "data": str(corpus),
            "vocab_size": 200,
            "size": "2/32",
            "steps": STEPS,
            "batch_size": 4,
            "max_length": 32,
            "n_updates": 5,
            "density": 0.25,
            "dropout": 0.1,  # so that a resumed run must restore the random state
            "logging_steps": 2,
            "eval_steps": 10,
            "save_steps": 5,
            "heldout_fraction": 0.2,
            "learning_rate": 2e-3,
        }
        return Study("tiny", "that tiny models train", defaults=defaults, experiments=[options])

    return make
