"""Runs that are killed, starved of disk or robbed of a process: nothing is lost, and resuming ends bitwise the same."""

import errno
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import processes
from pretraining import STEPS, config, metrics_without_clock
from regrow.bert.pretrain import pretrain
from regrow.cli import main
from regrow.methods import create
from regrow.ranks import rank
from regrow.training.manifest import damage, write_manifest

SAVE = {"save_steps": 8, "keep_checkpoints": 1}  # updates fall on 4, 8, 12, 16, 20, evaluations on 0, 10, 20, 24
TENSORS = ("model.safetensors", "training_state.safetensors", "topology_state.safetensors")


pytestmark = pytest.mark.usefixtures("cache")


def in_children(target: Callable, folder: Path, *arguments: Any, ranks: int = 1) -> tuple[list[int], list[Any]]:
    """The exit codes of processes that call ``target``, and what it returned where they lived to say it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["regrow.bert.pretrain"])
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"OMP_NUM_THREADS": "1", "REGROW_CACHE": os.environ["REGROW_CACHE"]}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children, results = [], [folder / f"{target.__name__}-{r}.pt" for r in range(ranks)]
    for r, result in enumerate(results):
        own = {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        name = f"{__file__}:{target.__name__}"
        children.append(context.Process(target=processes._child, args=(name, variables | own, result, arguments)))
        children[-1].start()
    for child in children:
        child.join(timeout=120)
        if child.exitcode is None:
            child.kill()
            pytest.fail("a process hangs")
    codes = [child.exitcode for child in children]
    return codes, [torch.load(path, weights_only=False) if path.exists() else None for path in results]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def instead(name: str, replacement: Callable) -> None:
    """Replace a function or method by ``replacement(original, *arguments)``; the process will not live to mind."""
    module, _, attribute = name.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        owner = getattr(importlib.import_module(module.rpartition(".")[0]), module.rpartition(".")[2])
    original = getattr(owner, attribute)
    setattr(owner, attribute, lambda *args, **kwargs: replacement(original, *args, **kwargs))


_CALLS = count()  # a child dies at one place


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def before_writing(original: Callable, trainer: Any, *args: Any) -> Any:
    return die() if trainer.state.global_step == 16 else original(trainer, *args)


def half_written(original: Callable, folder: Path, *args: Any) -> None:
    original(folder, *args)
    if folder.name == ".partial-checkpoint-16":
        halve(folder / "training_state.safetensors")
        die()


def before_renaming(original: Callable, source: Any, target: Any) -> None:
    return die() if Path(target).name == "checkpoint-16" else original(source, target)


def after_renaming(original: Callable, source: Any, target: Any) -> None:
    original(source, target)
    if Path(target).name == "checkpoint-16":
        die()


def within_rotation(original: Callable, path: Any, *args: Any, **kwargs: Any) -> None:
    if Path(path).name == "checkpoint-8" and Path(path).exists():
        (Path(path) / "model.safetensors").unlink()
        die()
    original(path, *args, **kwargs)


def within_an_update(original: Callable, *args: Any, calls: Iterator[int] = _CALLS) -> Any:
    return die() if next(calls) == 2 * 12 + 5 else original(*args)  # twelve layers; the third update


def within_an_evaluation(original: Callable, *args: Any, calls: Iterator[int] = _CALLS, **kwargs: Any) -> Any:
    if next(calls) == 2:
        batches = count()
        instead("regrow.bert.evaluate._batch_totals", lambda run, *args: die() if next(batches) == 1 else run(*args))
    return original(*args, **kwargs)


def within_the_finished_model(original: Callable, trainer: Any, output_dir: str, *args: Any) -> None:
    original(trainer, output_dir, *args)
    if not Path(output_dir).name.startswith("."):
        halve(Path(output_dir) / "model.safetensors")
        die()


PLACES = {  # where; what is patched; the checkpoints that are left
    before_writing: ("regrow.training.trainer.SafeTrainer._write_checkpoint", {"checkpoint-8"}),
    half_written: ("regrow.training.trainer.save_training_state", {"checkpoint-8", ".partial-checkpoint-16"}),
    before_renaming: ("os.replace", {"checkpoint-8", ".partial-checkpoint-16"}),
    after_renaming: ("os.replace", {"checkpoint-8", "checkpoint-16"}),
    within_rotation: ("shutil.rmtree", {"checkpoint-8", "checkpoint-16"}),
    within_an_update: ("regrow.training.updater.apply_update", {"checkpoint-8"}),
    within_an_evaluation: ("regrow.bert.trainer.evaluate_pretraining", {"checkpoint-16"}),
    within_the_finished_model: ("regrow.training.trainer.SafeTrainer._save", {"checkpoint-24"}),
}


def train(corpus: Path, output: Path, place: str | None = None, resume: bool = False) -> Any:
    """In a child: a run, killed at one of PLACES."""
    if place is not None:
        where = next(function for function in PLACES if function.__name__ == place)
        instead(PLACES[where][0], where)
    return pretrain(config(corpus, output, **SAVE), create("dynsparse"), resume=resume)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    codes, (result,) = in_children(train, folder, corpus, folder / "run")
    assert codes == [0] and result.finished
    return folder / "run"


def assert_same_end(run: Path, whole: Path) -> None:
    for name in TENSORS:
        ours, theirs = (load_file(path / f"checkpoints/checkpoint-{STEPS}" / name) for path in (run, whole))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
    ours, theirs = (
        json.loads((path / f"checkpoints/checkpoint-{STEPS}/training_state.json").read_text()) for path in (run, whole)
    )
    for state in (ours, theirs):
        del state["extra"]["totals"]["seconds"]
    assert ours == theirs
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert metrics_without_clock(run) == metrics_without_clock(whole)
    assert (run / "topology.jsonl").read_text() == (whole / "topology.jsonl").read_text()
    assert left(run) == {f"checkpoint-{STEPS}"}


def left(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_killed_run_goes_on_to_bitwise_the_same_end(
    place: Callable, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    codes, _ = in_children(train, tmp_path, corpus, tmp_path / "run", place.__name__)
    assert codes == [-signal.SIGKILL]
    assert left(tmp_path / "run") == PLACES[place][1]
    codes, (resumed,) = in_children(train, tmp_path, corpus, tmp_path / "run", None, True)
    assert codes == [0] and resumed.finished
    assert_same_end(tmp_path / "run", whole)


def rewind_and_die(run: Path) -> None:
    from regrow.bert.run import RunDirectory

    instead("os.replace", lambda original, source, target: die())
    RunDirectory(run).rewind(16)


def test_a_run_killed_while_it_drops_log_lines_keeps_the_others(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert in_children(rewind_and_die, tmp_path, tmp_path / "run")[0] == [-signal.SIGKILL]
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_damaged_newer_checkpoint_never_outlives_a_good_one(whole: Path, tmp_path: Path) -> None:
    """Rotation keeps the highest number, so what resuming passed over has to go."""
    from regrow.bert.run import RunDirectory

    run = RunDirectory(tmp_path / "run")
    shutil.copytree(whole, run.path)
    shutil.copytree(run.checkpoints / "checkpoint-24", run.checkpoints / "checkpoint-16")
    halve(run.checkpoints / "checkpoint-24/model.safetensors")
    with pytest.warns(UserWarning, match="going on from checkpoint-16 instead"):
        assert run.last_checkpoint().name == "checkpoint-16"
    run.rewind(16)
    assert left(run.path) == {"checkpoint-16"}


class DieInOneRank(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 12 and rank() == 1:
            die()


def train_together(corpus: Path, output: Path, kill: bool, resume: bool) -> Any:
    settings = config(corpus, output, **SAVE)
    try:
        return pretrain(settings, create("dynsparse"), resume=resume, callbacks=[DieInOneRank()] if kill else [])
    except Exception as error:
        torch.save((type(error).__name__, str(error)), output.parent / "error.pt")
        os._exit(2)  # without the farewell that waits for the other


def test_where_one_of_two_processes_is_killed_the_other_stops_and_says_so(corpus: Path, tmp_path: Path) -> None:
    codes, _ = in_children(train_together, tmp_path / "a", corpus, tmp_path / "whole", False, False, ranks=2)
    assert codes == [0, 0]
    codes, _ = in_children(train_together, tmp_path / "b", corpus, tmp_path / "run", True, False, ranks=2)
    assert codes == [2, -signal.SIGKILL]
    kind, message = torch.load(tmp_path / "error.pt")
    assert kind == "RegrowError"
    assert message.startswith("another process of this training has ended") and message.endswith("after step 12")
    assert left(tmp_path / "run") == {"checkpoint-8"}
    codes, _ = in_children(train_together, tmp_path / "b", corpus, tmp_path / "run", False, True, ranks=2)
    assert codes == [0, 0]
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill_the_disk(original: Callable, model: Any, folder: str, **kwargs: Any) -> None:
    original(model, folder, **kwargs)
    if folder.endswith("-16"):
        limit_files(1000)


class NoMoreSpace(TrainerCallback):
    """From a step on no file may grow beyond a size: what a full disk is like, for anybody."""

    def __init__(self, step: int, size: Callable[[], int]) -> None:
        self.step, self.size = step, size

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            limit_files(self.size())


class Replace(TrainerCallback):
    """In place of the folder of checkpoints somebody puts a file, which not even root can write into."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 12:
            self.checkpoints.rename(self.checkpoints.with_name("moved"))
            self.checkpoints.write_text("")


class KillWorker(TrainerCallback):
    """As the system does when memory is short."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 12:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)


class LoseHandover(TrainerCallback):
    """What a worker's end looks like between the closing of its sockets and the signal of its death."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 12:
            instead("multiprocessing.resource_sharer._resource_sharer.get_connection", reset)


def reset(original: Callable, *args: Any) -> NoReturn:
    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


TROUBLES: dict[str, Callable[[Path], TrainerCallback]] = {
    "checkpoint": lambda run: NoMoreSpace(12, lambda: 100_000),
    "tokenizer": lambda run: TrainerCallback(),
    "metrics": lambda run: NoMoreSpace(13, lambda: (run / "metrics.jsonl").stat().st_size + 20),
    "folder": lambda run: Replace(run / "checkpoints"),
    "worker": lambda run: KillWorker(),
    "worker's handover": lambda run: LoseHandover(),
}


def command(corpus: Path, output: Path, trouble: str | None = None, more: Sequence[str] = ()) -> tuple[int, str]:
    """In a child: exit status and last line of the command line."""
    if trouble is not None:
        instead(
            "regrow.cli.pretrain.pretrain",
            lambda original, *args, **kwargs: original(*args, **kwargs, callbacks=[TROUBLES[trouble](output)]),
        )
    if trouble == "tokenizer":  # after the weights, which are larger
        instead("regrow.bert.model.BertForPreTraining.save_pretrained", fill_the_disk)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as outside of tests
    flags = [f"--{k}={v}" for k, v in vars(config(corpus, output, **SAVE)).items() if v is not None]
    flags = [f"--output={output}", "--resume"] if "--resume" in more else flags
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as shown:
        status = main(["pretrain", *flags, *more])
    limit_files(resource.RLIM_INFINITY)
    return status, shown.getvalue()


LOST_WORKER = (
    "a process that prepares batches was killed (out of memory?): lower --workers, or prepare between steps "
    "with --workers 0, and go on with --resume; the run stopped after step 1"
)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (
            "checkpoint",
            "cannot write the checkpoint RUN/checkpoints/checkpoint-16: File too large; the run stopped at step 16; "
            "free space or make it writable, and go on with --resume",
        ),
        ("tokenizer", "cannot write the checkpoint RUN/checkpoints/checkpoint-16: File too large; the run stopped at"),
        ("metrics", "cannot write RUN/metrics.jsonl: File too large; the run stopped at step 15; free space"),
        ("folder", "cannot write the checkpoint RUN/checkpoints/checkpoint-16: Not a directory; the run stopped at"),
        ("worker", LOST_WORKER),
        ("worker's handover", LOST_WORKER),
    ],
)
def test_trouble_is_one_line_and_costs_only_what_came_after_the_checkpoint(
    trouble: str, message: str, corpus: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ["--workers", "1"] if message is LOST_WORKER else []
    codes, ((status, shown),) = in_children(command, tmp_path, corpus, run, trouble, more)
    *_, error = shown.strip().splitlines()
    assert (codes, status) == ([0], 2) and "Traceback" not in shown
    assert error.startswith("regrow pretrain: error: " + message.replace("RUN", str(run))), error
    if trouble == "folder":
        (run / "checkpoints").unlink()
        (run / "moved").rename(run / "checkpoints")
    assert left(run) == {"checkpoint-8"} and damage(run / "checkpoints/checkpoint-8") is None
    more = ["--resume", *(["--workers", "0"] if message is LOST_WORKER else [])]
    codes, ((status, shown),) = in_children(command, tmp_path, corpus, run, None, more)
    assert (codes, status) == ([0], 0), shown
    assert_same_end(run, whole)


def test_a_run_directory_that_cannot_be_made_is_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    flags = [f"--{k}={v}" for k, v in vars(config(corpus, tmp_path / "file/run")).items() if v is not None]
    assert main(["pretrain", *flags]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert f"cannot write the run directory {tmp_path / 'file/run'}: Not a directory; choose another" in error


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("extra", "sums", "steps"), -1.0, "extra.sums.steps is -1.0"),
        (("extra", "sums"), {"steps": 1.0}, "extra.sums are no sums of losses"),
        (("extra", "totals", "tokens"), "many", "extra.totals are no tokens and seconds"),
        (("extra", "totals", "seconds"), float("nan"), "extra.totals are no tokens and seconds"),
        (("ranks",), -1, "ranks is no number of processes"),
    ],
)
def test_totals_that_no_run_has_are_refused(
    path: tuple, value: Any, message: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    checkpoint = tmp_path / f"run/checkpoints/checkpoint-{STEPS}"
    document = within = json.loads((checkpoint / "training_state.json").read_text())
    for part in path[:-1]:
        within = within[part]
    within[path[-1]] = value
    (checkpoint / "training_state.json").write_text(json.dumps(document))
    write_manifest(checkpoint)
    assert main(["pretrain", "--output", str(tmp_path / "run"), "--resume"]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert f"{checkpoint / 'training_state.json'} is damaged ({message}" in error
