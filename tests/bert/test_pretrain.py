"""The whole path on a small text: train, rewire, interrupt, resume, save, load, refuse."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback, pipeline
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import regrow
from pretraining import STEPS, config, lines_with_clock, metrics_without_clock
from regrow.bert.model import BertForPreTraining, build_model
from regrow.bert.pretrain import PretrainConfig, PretrainResult, pretrain
from regrow.bert.progress import ProgressBar
from regrow.bert.sizes import bert_config
from regrow.cli import main
from regrow.errors import RegrowError
from regrow.methods import create
from regrow.nn import named_sparse_layers

STOP_AT = 13  # updates fall on steps 4, 8, 12, 16, 20: the stop is between two of them


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainResult:
    return pretrain(config(corpus, tmp_path_factory.mktemp("run") / "whole"), create("dynsparse"))


def test_a_run_learns_rewires_and_reports(finished: PretrainResult) -> None:
    assert finished.finished and finished.step == STEPS
    assert finished.after["eval_mlm_loss"] < finished.before["eval_mlm_loss"]
    assert finished.coverage > 0.3  # density alone would be 0.2
    assert finished.stored_bytes < finished.dense_bytes
    updates = [json.loads(line) for line in (finished.path / "topology.jsonl").read_text().splitlines()]
    assert {u["step"] for u in updates} == {4, 8, 12, 16, 20}
    assert len({u["layer"] for u in updates}) == 12
    lines = metrics_without_clock(finished.path)
    assert [line["step"] for line in lines if "eval_mlm_loss" in line] == [0, 10, 20, 24]
    assert [line["step"] for line in lines if "mlm_loss" in line] == [5, 10, 15, 20]
    means = {line["step"]: line["update_churn"] for line in lines if "update_churn" in line}
    for step, mean in means.items():
        assert mean == pytest.approx(np.mean([u["churn"] for u in updates if u["step"] == step]))
    assert set(means) == {4, 8, 12, 16, 20}
    assert all(line.keys() >= {"tokens", "seconds"} for line in lines_with_clock(finished.path))
    assert yaml.safe_load((finished.path / "regrow.yaml").read_text())["norm"] == "l1"


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ProgressBar.on_step_begin

    def press_ctrl_c(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(ProgressBar, "on_step_begin", press_ctrl_c)


def test_an_interrupted_run_resumes_to_bitwise_the_same_end(
    corpus: Path, finished: PretrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(STOP_AT, patch)
        stopped = pretrain(settings, create("dynsparse"))
    assert not stopped.finished and stopped.step == STOP_AT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.manual_seed(123)  # whatever the new process has drawn
    resumed = pretrain(settings, create("dynsparse"), resume=True)
    assert resumed.finished
    for name in ("model.safetensors", "training_state.safetensors", "topology_state.safetensors"):
        ours, theirs = (
            load_file(run / f"checkpoints/checkpoint-{STEPS}" / name) for run in (resumed.path, finished.path)
        )
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
    assert metrics_without_clock(resumed.path) == metrics_without_clock(finished.path)
    assert (resumed.path / "topology.jsonl").read_text() == (finished.path / "topology.jsonl").read_text()
    assert {**resumed.after, "seconds": 0} == {**finished.after, "seconds": 0}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
@pytest.mark.parametrize("change", [{"workers": 2}, {"gradient_checkpointing": True}], ids=str)
def test_what_costs_no_result_changes_none(
    corpus: Path, finished: PretrainResult, tmp_path: Path, change: dict
) -> None:
    result = pretrain(config(corpus, tmp_path / "run", **change), create("dynsparse"))
    assert metrics_without_clock(result.path) == metrics_without_clock(finished.path)


def test_losses_agree_without_the_fused_operations(corpus: Path, tmp_path: Path) -> None:
    """At the same learning rate, without dropout, whose masks differ."""
    curves = []
    for fused in ("all", "none"):
        result = pretrain(config(corpus, tmp_path / fused, fuse=fused, dropout=0.0), create("dynsparse"))
        curves.append([line["mlm_loss"] for line in metrics_without_clock(result.path) if "mlm_loss" in line])
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_the_gpu_kernels_train_as_those_for_a_cpu_do(corpus: Path, tmp_path: Path, device: torch.device) -> None:
    """Through topology updates, which draw the same blocks on every device."""
    short = {"size": "1/32", "steps": 4, "n_updates": 2, "logging_steps": 1, "eval_steps": 4, "dropout": 0.0}
    pretrain(config(corpus, tmp_path / "gpu", **short), create("dynsparse"))
    command = [sys.executable, "-m", "regrow", "pretrain", *flags(config(corpus, tmp_path / "cpu", **short))]
    subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True, capture_output=True)
    runs = tmp_path / "gpu", tmp_path / "cpu"
    curves = [[line["mlm_loss"] for line in metrics_without_clock(run) if "mlm_loss" in line] for run in runs]
    assert len(curves[0]) == 4 and curves[0] == pytest.approx(curves[1], abs=1e-3)
    patterns = [load_file(run / "model.safetensors") for run in runs]
    indices = [name for name in patterns[0] if name.endswith("col_idx")]
    assert indices and all(torch.equal(patterns[0][name], patterns[1][name]) for name in indices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_16_bits_need_a_gpu(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(regrow.RegrowError, match="precision='bf16' needs a CUDA GPU"):
        pretrain(config(corpus, tmp_path / "run", precision="bf16"), create("dynsparse"))
    with pytest.raises(regrow.RegrowError, match="precision must be one of float32, bf16, got 'int4'"):
        pretrain(config(corpus, tmp_path / "run", precision="int4"), create("dynsparse"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("gmp", {"density": 0.8}),
        ("journey", {"density": 0.8}),
        ("granet", {"density": 0.8}),
        ("snfs", {}),
        ("srigl", {"density": 0.3}),
        ("gse", {"distribution": "erk", "lr_scope": "sparse"}),
        ("smet", {"lr_rule": "supar", "learning_rate": None}),
        ("chts", {"block_size": 4, "distribution": "*.query=0.1,*.intermediate.*=0.05"}),
        ("acdc", {"block_size": 4}),
    ],
)
def test_every_kind_of_method_resumes_to_bitwise_the_same_end(
    method: str, changes: dict, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(config(corpus, tmp_path / "whole", **changes), create(method))
    settings = config(corpus, tmp_path / "run", **changes)
    with monkeypatch.context() as patch:
        interrupt_at(STOP_AT, patch)
        pretrain(settings, create(method))
    resumed = pretrain(settings, create(method), resume=True)
    ours, theirs = (load_file(run.path / "model.safetensors") for run in (resumed, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert whole.after["eval_mlm_loss"] < whole.before["eval_mlm_loss"]
    sparse = list(named_sparse_layers(AutoModelForMaskedLM.from_pretrained(whole.path)))
    assert len(sparse) == (0 if method == "acdc" else 12)
    if method in ("gmp", "journey", "granet"):
        assert whole.density == pytest.approx(0.1, abs=0.02)


def test_log_lines_beyond_the_checkpoint_are_dropped_on_resume(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(STOP_AT, patch)
        pretrain(settings, create("static"))
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "mlm_loss": 1.0}\n{"step": 1')  # as a killed run would leave it
    pretrain(settings, create("static"), resume=True)
    assert [line["step"] for line in metrics_without_clock(tmp_path / "run")].count(15) == 1


def test_seconds_are_of_training_and_go_on_after_a_stop(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation and checkpoint is made to seem an hour long: none of it may be counted."""
    late = [0.0]
    monkeypatch.setattr("regrow.bert.run_trainer.time.perf_counter", lambda: time.monotonic() + late[0])
    for name in ("regrow.bert.trainer.evaluate_pretraining", "regrow.training.trainer.save_training_state"):
        module, _, function = name.rpartition(".")
        original = getattr(importlib.import_module(module), function)

        def slow(*args, original=original, **kwargs):
            late[0] += 3600.0
            return original(*args, **kwargs)

        monkeypatch.setattr(name, slow)
    settings = config(corpus, tmp_path / "run", save_steps=5)
    with monkeypatch.context() as patch:
        interrupt_at(STOP_AT, patch)
        pretrain(settings, create("dynsparse"))
    pretrain(settings, create("dynsparse"), resume=True)
    seconds = [line["seconds"] for line in lines_with_clock(tmp_path / "run")]
    tokens = [line["tokens"] for line in lines_with_clock(tmp_path / "run")]
    assert seconds[0] == tokens[0] == 0
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 3600 and len(set(seconds)) > 5
    assert tokens == sorted(tokens) and STEPS * 4 * 8 < tokens[-1] <= STEPS * 4 * 32


def test_trackers_get_losses_and_topology(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {}

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            for name in logs:
                seen.setdefault(name, []).append(state.global_step)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "notebook", Tracker)
    monkeypatch.setattr("regrow.bert.options.get_available_reporting_integrations", lambda: ["notebook"])
    pretrain(config(corpus, tmp_path / "run", report_to="notebook", steps=12), create("dynsparse"))
    assert seen["mlm_loss"] == seen["coverage"] == [5, 10]
    assert len(seen["update_churn"]) == len(seen["update_coverage"]) == 5
    assert seen["eval_mlm_loss"] == [0, 10, 12]
    with pytest.raises(regrow.RegrowError, match=r"report_to='papyrus' .* choose from: none, notebook"):
        pretrain(config(corpus, tmp_path / "other", report_to="papyrus"), create("dynsparse"))


def test_plain_transformers_loads_the_run(finished: PretrainResult) -> None:
    model = AutoModelForMaskedLM.from_pretrained(finished.path)
    base = AutoModel.from_pretrained(finished.path)
    trained = BertForPreTraining.from_pretrained(finished.path)
    layers = dict(named_sparse_layers(trained))
    assert len(layers) == 12 and len(list(named_sparse_layers(model))) == 12
    for name, layer in layers.items():
        for other in (model.get_submodule(name), base.get_submodule(name.removeprefix("bert."))):
            assert torch.equal(layer.values, other.values)
            for a, b in zip(layer.topology.indices(), other.topology.indices(), strict=True):
                assert torch.equal(a, b)
    answers = pipeline("fill-mask", model=str(finished.path))("babadu [MASK].")
    assert len(answers) == 5


def test_a_loaded_model_can_be_saved_again_and_densified(finished: PretrainResult, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(finished.path).eval()
    batch = AutoTokenizer.from_pretrained(finished.path)("babadu [MASK].", return_tensors="pt")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(AutoModelForMaskedLM.from_pretrained(tmp_path / "again")(**batch).logits, expected)
    regrow.densify(model).save_pretrained(tmp_path / "dense")
    stored = json.loads((tmp_path / "dense/config.json").read_text())
    assert "quantization_config" not in stored
    names = set(load_file(tmp_path / "dense/model.safetensors"))
    assert "bert.encoder.layer.0.attention.self.query.weight" in names
    assert not any("topology" in name or "values" in name for name in names)
    dense = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_only_blocks_and_indices_are_stored_and_nothing_is_pickled(finished: PretrainResult) -> None:
    tensors = load_file(finished.path / "model.safetensors")
    encoder = {k: v for k, v in tensors.items() if k.startswith("bert.encoder.") and v.dim() > 1}
    assert encoder and all(k.endswith(".values") and v.shape[1:] == (16, 16) for k, v in encoder.items())
    suffixes = {path.suffix for path in finished.path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".yaml", ".safetensors"}


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("topology.col_idx", 10**6, r"query\.topology: col_idx must lie in"),
        ("topology.slot", 10**6, "slot must lie in"),
        ("topology.row_ptr", -5, "row_ptr must rise"),
        (None, None, r"lacks bert\.encoder\.layer\.0\.attention\.self\.query\.values"),
    ],
)
def test_damaged_models_do_not_load(
    finished: PretrainResult, tmp_path: Path, entry: str | None, value: int | None, message: str
) -> None:
    prefix = "bert.encoder.layer.0.attention.self.query."
    tensors = load_file(finished.path / "model.safetensors")
    if entry is None:
        del tensors[prefix + "values"]
    else:
        tensors[prefix + entry][0] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((finished.path / "config.json").read_text())
    with pytest.raises(regrow.RegrowError, match=message):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "regrow format 99"),
        ({"layers": {"bert.encoder.layer.0.attention.self.query": {"block_size": 16}}}, "must map names to block_size"),
        ({"layers": {"bert.nowhere": {"block_size": 16, "n_blocks": 3}}}, "no linear layer of that name"),
        (
            {"layers": {"bert.encoder.layer.0.attention.self.query": {"block_size": 16, "n_blocks": 10**6}}},
            "n_blocks must lie between 1 and 64",
        ),
        (
            {"layers": {"bert.encoder.layer.0.attention.self.query": {"block_size": 0, "n_blocks": 1}}},
            "block_size must be one of",
        ),
    ],
)
def test_damaged_layouts_do_not_load(finished: PretrainResult, tmp_path: Path, change: dict, message: str) -> None:
    document = json.loads((finished.path / "config.json").read_text())
    document["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "model.safetensors").write_bytes((finished.path / "model.safetensors").read_bytes())
    with pytest.raises(regrow.RegrowError, match=message):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


def flags(settings: PretrainConfig) -> list[str]:
    return [f"--{name}={value}" for name, value in vars(settings).items() if value is not None]


def test_the_command_line_is_the_same_run(
    corpus: Path, finished: PretrainResult, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = config(corpus, tmp_path / "run")
    assert main(["pretrain", *flags(settings), "--norm", "l1"]) == 0
    shown = capsys.readouterr().out
    assert "held-out MLM loss" in shown and "explored coverage" in shown and str(tmp_path / "run") in shown
    ours, theirs = (load_file(run / "model.safetensors") for run in (tmp_path / "run", finished.path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_yaml_gives_flags_and_the_command_line_overrides_them(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    document = dict(vars(config(corpus, tmp_path / "run", steps=500)))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document | {"method": "static"}))
    assert main(["pretrain", "--config", str(tmp_path / "config.yaml"), "--steps", "10", "--n-updates", "2"]) == 0
    saved = yaml.safe_load((tmp_path / "run/regrow.yaml").read_text())
    assert (saved["steps"], saved["method"], saved["density"]) == (10, "static", 0.2)
    assert not (tmp_path / "run/topology.jsonl").exists()
    capsys.readouterr()


def test_ctrl_c_exits_cleanly_and_says_how_to_go_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    settings = config(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(STOP_AT, patch)
        assert main(["pretrain", *flags(settings)]) == 130
    assert f"--output {tmp_path / 'run'} --resume" in capsys.readouterr().out
    assert main(["pretrain", "--output", str(tmp_path / "run"), "--resume", "--steps", "99"]) == 2
    assert "drop --steps 99" in capsys.readouterr().err
    assert main(["pretrain", "--output", str(tmp_path / "run"), "--resume"]) == 0


def test_the_dense_baseline_trains_too(corpus: Path, tmp_path: Path) -> None:
    result = pretrain(config(corpus, tmp_path / "run", dense=True, steps=6, n_updates=1), create("static"))
    assert result.stored_bytes == result.dense_bytes and result.coverage is None
    assert not list(named_sparse_layers(AutoModelForMaskedLM.from_pretrained(result.path)))


def one_line_error(capsys: pytest.CaptureFixture) -> str:
    *progress, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("regrow pretrain: error: "), error
    assert not any("Error" in line or "Traceback" in line for line in progress)
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0"], r"density must lie in (0, 1], got 0.0"),
        (["--density", "1.5"], r"density must lie in (0, 1], got 1.5"),
        (["--density", "much"], "--density: invalid float value: 'much'"),
        (["--block-size", "5"], "block_size must be one of"),
        (["--block-size", "64", "--size", "mini", "--method", "magic"], "unknown method 'magic'; choose one of"),
        (["--size", "huge"], "unknown size 'huge'; choose one of tiny"),
        (["--preset", "nothing"], "unknown preset 'nothing'; choose one of demo"),
        (["--config", "missing.yaml"], "cannot read missing.yaml"),
        (["--norm", "l7"], "--norm: invalid choice: 'l7'"),
        (["--colour", "red"], "unrecognized arguments: --colour"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "10", "--n-updates", "11"], "n_updates must lie between 1 and total_steps=10"),
        (["--learning-rate", "-1"], "learning_rate must be positive"),
        (["--lr-scale", "0"], "lr_scale must be positive"),
        (["--data", "no/such/file.txt"], "no/such/file.txt"),
        (["--resume"], "nothing to resume there"),
        (["--tokenizer", "no/such/vocab.txt"], "no/such/vocab.txt"),
        (["--size", "2/100/3"], "HEADS dividing HIDDEN"),
        (["--distribution", "even"], "unknown distribution 'even'; choose one of uniform, er, erk"),
        (["--distribution", "*.query=lots"], "distribution must be uniform, er, erk or GLOB=DENSITY"),
        (["--distribution", "*.nowhere=0.5"], "matches no sparse layer"),
        (["--distribution", "*.query=1.5"], "distribution['*.query'] must lie in (0, 1]"),
        (["--steps", "10", "--n-updates", "1"], "the schedule never updates the topology"),
        (["--stop-updates", "0"], "stop is a share of the training in (0, 1]"),
        (["--final-fraction", "0.9"], "final_fraction must lie in [0, drop_fraction=0.5]"),
        (["--method", "srigl", "--density", "0.05"], "which srigl needs; raise density above"),
        (["--method", "gmp", "--final-density", "0.5"], "below final_density=0.5"),
        (["--block-warmup", "-1"], "regrow_warmup is a number of steps >= 0"),
        (["--base-width", "-1"], "base_width must be positive"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, corpus: Path
) -> None:
    argv = ["pretrain", "--output", str(tmp_path / "run"), *([] if "--data" in arguments else ["--data", str(corpus)])]
    try:
        status = main([*argv, *arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    assert message in one_line_error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", [], "holds no text"),
        ("Only one sentence here.\n", [], "two sentences"),
        ("One here. Two here.\n\nOnly one.\n\nA b c. D e f.\n", ["--short-documents", "error"], "Only one."),
    ],
)
def test_corpora_that_cannot_be_used(
    text: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text.txt").write_text(text)
    argv = ["--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "run"), "--vocab-size", "100"]
    assert main(["pretrain", *argv, *options]) == 2
    assert message in one_line_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_without_mask_is_refused(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n")
    argv = ["--data", str(corpus), "--output", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "vocab.txt")]
    assert main(["pretrain", *argv]) == 2
    assert "[MASK]" in one_line_error(capsys)


def test_a_directory_in_use_is_never_overwritten(
    finished: PretrainResult, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}
    assert main(["pretrain", "--data", str(corpus), "--output", str(finished.path)]) == 2
    assert "already holds a run; choose another --output" in one_line_error(capsys)
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")} == before
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["pretrain", "--data", str(corpus), "--output", str(tmp_path)]) == 2
    assert "already holds other files" in one_line_error(capsys)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "training_state.safetensors", "training_state.json", "topology_state.safetensors"],
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_truncated_checkpoints_are_named(
    name: str, damage: str, finished: PretrainResult, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    _copy(finished.path, run)
    victim = run / f"checkpoints/checkpoint-{STEPS}" / name
    whole = victim.read_bytes()
    victim.unlink()
    if damage == "truncated":
        victim.write_bytes(whole[: len(whole) // 2])
    before = (run / "model.safetensors").read_bytes()
    assert main(["pretrain", "--output", str(run), "--resume"]) == 2
    error = one_line_error(capsys)
    assert f"{victim} is damaged" in error and "no checkpoint is intact; start the run anew" in error
    assert ("(missing)" in error) == (damage == "missing")
    assert (run / "model.safetensors").read_bytes() == before


def test_the_newest_intact_checkpoint_is_taken(corpus: Path, tmp_path: Path) -> None:
    settings = config(corpus, tmp_path / "run", save_steps=8)
    whole = pretrain(settings, create("static"))
    victim = tmp_path / "run/checkpoints/checkpoint-24/model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1  # no length changes
    victim.write_bytes(data)
    with pytest.warns(UserWarning, match=r"its checksum is not .*: going on from checkpoint-16 instead"):
        again = pretrain(settings, create("static"), resume=True)
    assert {**again.after, "seconds": 0} == {**whole.after, "seconds": 0}


class Explode(TrainerCallback):
    """One gradient of one step is infinite."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 9:
            values = kwargs["model"].bert.encoder.layer[1].intermediate.dense.values
            hook = values.register_hook(
                lambda gradient: (hook.remove(), gradient.index_fill(0, torch.tensor(0), torch.inf))[1]
            )


def test_a_gradient_that_is_not_finite_stops_with_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    settings = config(corpus, tmp_path / "run")
    message = r"of bert\.encoder\.layer\.1\.intermediate\.dense\.values is not finite in step 10; .*--on_nonfinite skip"
    with pytest.raises(RegrowError, match=message):
        pretrain(settings, create("dynsparse"), callbacks=[Explode()])
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-9"]
    resumed = pretrain(settings, create("dynsparse"), resume=True)  # whatever it was is gone
    assert resumed.finished and resumed.after["eval_mlm_loss"] < resumed.before["eval_mlm_loss"]


def test_a_step_whose_gradient_is_not_finite_can_be_skipped(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result = pretrain(config(corpus, tmp_path / "run", on_nonfinite="skip"), create("dynsparse"), callbacks=[Explode()])
    assert result.finished and np.isfinite(result.after["eval_mlm_loss"])
    assert "step 10 is left out: the gradient of bert.encoder.layer.1" in "".join(capsys.readouterr())


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def test_a_sparse_model_is_never_dense_while_it_is_built() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                Largest.elements = max(Largest.elements, out.numel())
            return out

    with Largest():
        build_model(bert_config("mini", vocab_size=100, max_length=128), density=0.1, block_size=16)
    assert 0 < Largest.elements < 256 * 1024 / 2  # an up-projection has 256 x 1024


def test_head_and_loss_equal_transformers_on_all_positions() -> None:
    import transformers

    torch.manual_seed(0)
    settings = bert_config("tiny", vocab_size=300, max_length=32)
    ours = build_model(settings, density=None, block_size=16).eval()
    theirs = transformers.BertForPreTraining(settings).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(5, 300, (3, 32))
    labels = torch.where(torch.rand(3, 32) < 0.15, ids, -100)
    batch = {"input_ids": ids, "labels": labels, "next_sentence_label": torch.tensor([0, 1, 1])}
    a, b = ours(**batch), theirs(**batch)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.prediction_logits, b.prediction_logits[labels != -100])
    torch.testing.assert_close(a.seq_relationship_logits, b.seq_relationship_logits)
    a.loss.backward()
    b.loss.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_scale_of_the_learning_rate_holds_for_every_group() -> None:
    model = build_model(bert_config("2/64", vocab_size=60, max_length=16), density=0.1, block_size=16)
    rates, halves = (
        [group["lr"] for group in PretrainConfig(size="2/64", lr_scale=scale).groups(model)] for scale in (1, 0.5)
    )
    assert len(set(rates)) > 1 and halves == pytest.approx([rate / 2 for rate in rates])
