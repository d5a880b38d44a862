"""One-shot pruning of a trained model, and where it begins to hurt."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig

from pretraining import config
from regrow import RegrowError
from regrow.bert.essential import essential_sparsity, knee_of
from regrow.bert.heldout import HeldOut
from regrow.bert.model import build_model
from regrow.bert.pretrain import pretrain
from regrow.cli import main
from regrow.methods import create
from regrow.nn import named_sparse_layers

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def model(density: float | None) -> nn.Module:
    return build_model(BertConfig(**SMALL), density=density, block_size=8)


def encoder_weights(dense: nn.Module) -> torch.Tensor:
    found = [m.weight.flatten() for n, m in dense.named_modules() if "encoder" in n and isinstance(m, nn.Linear)]
    return torch.cat(found).detach()


@pytest.mark.parametrize("block_size", [None, 8])
def test_the_weakest_of_all_layers_go_first(block_size: int | None) -> None:
    dense, states = model(None), []
    before = encoder_weights(dense).clone()
    others = {name: p.clone() for name, p in dense.named_parameters() if "encoder" not in name or "bias" in name}

    def score(pruned: nn.Module) -> float:
        states.append(encoder_weights(pruned).clone())
        return float((states[-1] == 0).float().mean())

    found = essential_sparsity(dense, score, metric="zeros", lower_is_better=True, block_size=block_size)
    for sparsity, density, zeros, state in zip(found.sparsity, found.density, found.values, states, strict=True):
        assert zeros == pytest.approx(sparsity, abs=0.01) and density == pytest.approx(1 - sparsity, abs=0.01)
        if block_size is None and sparsity:
            assert before[state == 0].abs().max() <= before[state != 0].abs().min()
        assert torch.equal(state[state != 0], before[state != 0])
    if block_size:
        query = dense.bert.encoder.layer[0].attention.self.query.weight.detach().view(4, 8, 4, 8)
        shares = (query == 0).float().mean((1, 3))
        assert set(shares.flatten().tolist()) <= {0.0, 1.0}  # whole blocks
    assert all(torch.equal(dense.get_parameter(name), p) for name, p in others.items())


def test_blocks_of_a_sparse_model_are_pruned_whole() -> None:
    sparse = model(0.5)
    layers = dict(named_sparse_layers(sparse))
    norms = {name: layer.values.detach().abs().sum((1, 2)).clone() for name, layer in layers.items()}
    found = essential_sparsity(sparse, lambda m: 1.0, metric="m", lower_is_better=True, sparsities=(0.0, 0.4))
    gone = torch.cat([norms[name][(layer.values == 0).all((1, 2))] for name, layer in layers.items()])
    kept = torch.cat([norms[name][(layer.values != 0).any((1, 2))] for name, layer in layers.items()])
    assert len(gone) == round(0.4 * (len(gone) + len(kept))) and gone.max() <= kept.min()
    assert found.density == pytest.approx((0.5, 0.3), abs=0.01) and found.knee is None


def test_the_knee_is_the_point_farthest_below_the_line() -> None:
    assert knee_of([0.0, 0.5, 1.0], [0.0, 0.1, 1.0]) == 0.5
    assert knee_of([0.0, 0.5, 0.75, 1.0], [0.0, 0.0, 0.1, 1.0]) == 0.75  # .65 below the line, against .5
    assert knee_of([0.0, 0.5, 1.0], [0.0, 0.9, 1.0]) is None  # above it
    assert knee_of([0.0, 0.5, 1.0], [0.0, 0.0, 0.0]) is None
    assert knee_of([0.0, 0.5, 1.0], [0.0, float("nan"), float("nan")]) is None
    accuracies = iter((0.9, 0.9, 0.5))
    found = essential_sparsity(
        model(None), lambda m: next(accuracies), metric="accuracy", lower_is_better=False, sparsities=(0.0, 0.5, 0.9)
    )
    assert found.knee == 0.5


def test_arguments_that_are_no_use() -> None:
    def sweep(of: nn.Module, **changes: object) -> None:
        essential_sparsity(of, lambda m: 0.0, metric="m", lower_is_better=True, **changes)

    for arguments, message in (
        ({"sparsities": (0.5, 0.1)}, "must ascend in"),
        ({"sparsities": (0.0, 1.0)}, "must ascend in"),
        ({"block_size": 8}, "pruned by its own blocks"),
    ):
        with pytest.raises(RegrowError, match=message):
            sweep(model(0.5), **arguments)
    with pytest.raises(RegrowError, match="block_size must be one of"):
        sweep(model(None), block_size=7)
    with pytest.raises(RegrowError, match="no encoder"):
        sweep(nn.Linear(4, 4))


def test_a_run_is_swept_from_the_command_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    pretrain(config(corpus, run, size="1/32/2", block_size=8), create("static"))
    picture, document = tmp_path / "sweep.svg", tmp_path / "sweep.json"
    pytest.importorskip("matplotlib")
    assert main(["evaluate", str(run), "--essential", "--plot", str(picture), "--json", str(document)]) == 0
    found = json.loads(document.read_text())
    sweep = found["essential"]
    assert sweep["sparsity"] == [n / 10 for n in range(10)] and len(sweep["values"]) == 10
    assert sweep["values"][0] == pytest.approx(found["mlm_loss"], rel=1e-6)
    assert sweep["values"][0] == pytest.approx(HeldOut(run, config(corpus, run)).losses()["mlm_loss"], rel=1e-6)
    shown = capsys.readouterr().out
    assert f"{sweep['values'][9]:.4f}" in shown and "knee" in shown
    assert picture.read_text().startswith("<?xml")
    assert main(["evaluate", str(run), "--essential", "--plot", str(picture)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    for flags, message in (
        (["--plot", str(tmp_path / "new.png")], "--plot is for --essential"),
        (["--essential", "--plot", str(tmp_path / "new.txt")], "must end with .png"),
        (["--essential", "--against", str(run)], "drop one of both"),
    ):
        assert main(["evaluate", str(run), *flags]) == 2
        assert message in capsys.readouterr().err
