"""Real tiny studies: to the end, killed, resumed, shared, failing."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from regrow import RegrowError
from regrow.cli import main
from regrow.study import RunRecord, Study, load_records, load_study, run_study
from regrow.study.pool import ClusterTask, Job, LocalPool, SubmititPool
from regrow.study.worker import RunFolder

Make = Callable[..., Study]
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
CLOCK = ("seconds", "tokens_per_second", "data_wait")


def without_clock(record: RunRecord) -> dict:
    """What must not depend on how often a run was stopped."""
    document = asdict(record)
    for points in (document["curve"], document["evaluations"]):
        for point in points:
            for name in CLOCK:
                point.pop(name, None)
    return {name: value for name, value in document.items() if name not in ("seconds", "memory")}


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def test_a_study_of_two_runs_to_its_end_and_never_again(tiny: Make, tmp_path: Path) -> None:
    study = tiny(method=["dynsparse", "static"], block_size=4)
    result = run_study(study, tmp_path, workers=2, progress=False)
    assert result.complete and [o.status for o in result.outcomes] == ["finished", "finished"], result
    records = {record.config["method"]: record for record in load_records([tmp_path])}
    moving, static = records["dynsparse"], records["static"]
    assert moving.id == study.runs()[0].id and moving.spec["block_size"] == 4 and "output" not in moving.config
    assert moving.final["eval_mlm_loss"] < moving.evaluations[0]["eval_mlm_loss"]
    assert [e["step"] for e in moving.evaluations] == [0, 10, 20]
    assert [p["step"] for p in moving.curve] == list(range(2, 21, 2))
    assert moving.seconds > 0 and moving.tokens == moving.curve[-1]["tokens"] > 0
    assert moving.machine["threads"] == 1 and moving.memory["peak_rss"] > 10**8
    assert [u["step"] for u in moving.topology["updates"]] == [4, 8, 12, 16]
    assert moving.topology["updates"][0].keys() == {"step", "coverage", "churn", "fresh_removed"}
    assert len(moving.topology["layers"]) == len(moving.patterns) == 12
    assert [picture["step"] for picture in next(iter(moving.patterns.values()))] == [0, 8, 12, 16, 20]
    assert [picture["step"] for picture in next(iter(static.patterns.values()))] == [0]
    left = {p.name for p in (tmp_path / "runs" / moving.id).rglob("*") if p.is_file()}
    assert left == {"spec.json", "log.txt", "lock", "patterns.json", "regrow.yaml", "metrics.jsonl", "topology.jsonl"}
    again = run_study(study, tmp_path, progress=False)
    assert [o.status for o in again.outcomes] == ["skipped", "skipped"]


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_record(tiny: Make, tmp_path: Path) -> None:
    study = tiny(method="dynsparse", block_size=4, steps=160, save_steps=20, eval_steps=80, n_updates=32)
    (run,) = study.runs()
    whole, cut = (RunFolder(tmp_path / name, run.id) for name in ("whole", "cut"))
    (cut.run / "checkpoints").mkdir(parents=True)  # as a run that was killed before its first checkpoint leaves it
    (cut.run / "regrow.yaml").write_text("seed: 1\n")
    processes = []
    for folder in (whole, cut):
        folder.create(run)
        command = [sys.executable, "-m", "regrow.study", str(folder.study), run.id]
        processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **QUIET))
    wait_for(lambda: any(_step(found) > 20 for found in cut.run.glob("checkpoints/checkpoint-*")))
    processes[1].kill()
    processes[1].wait()
    assert not cut.record.exists()
    assert processes[0].wait() == 0

    def finish(**keep: bool) -> RunRecord:
        assert run_study(study, cut.study, progress=False, threads=1, **keep).complete
        return RunRecord.load(cut.record)

    record = finish(keep_checkpoints=True, keep_models=True)
    assert without_clock(record) == without_clock(RunRecord.load(whole.record))
    assert len(next(iter(record.patterns.values()))) == 5
    assert record.seconds > 0 and [p["seconds"] for p in record.curve] == sorted(p["seconds"] for p in record.curve)
    assert (cut.run / "model.safetensors").exists() and (cut.run / "checkpoints/checkpoint-160").exists()
    cut.record.unlink()  # killed between the last checkpoint and the record
    assert without_clock(finish()) == without_clock(record)
    assert not (cut.run / "model.safetensors").exists() and not list(cut.run.glob("checkpoints/checkpoint-*"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def test_killed_and_stopped_by_ctrl_c_the_same_command_goes_on(
    tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The command line as a user has it, with a study of their own."""
    defaults = dict(tiny().defaults) | {"method": "static", "steps": 500, "save_steps": 1000}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"claim": "It works.", "defaults": defaults}))
    argv = ["study", "run", str(tmp_path / "mine.yaml"), "--folder", str(tmp_path), "--threads", "1"]
    folder = RunFolder(tmp_path, load_study(tmp_path / "mine.yaml").runs()[0].id)

    runner = subprocess.Popen(
        [sys.executable, "-m", "regrow", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for(lambda: folder.step()[0] > 10)
    runner.kill()  # nobody is left to wait for the run: it saves a checkpoint and stops by itself
    runner.wait()
    wait_for(lambda: _is_free(folder.lock))
    (checkpoint,) = folder.run.glob("checkpoints/checkpoint-*")
    assert 10 < _step(checkpoint) < 500

    def press_ctrl_c() -> None:
        wait_for(lambda: folder.step()[0] > _step(checkpoint) + 5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    assert main(argv) == 130
    thread.join()
    out, err = capsys.readouterr()
    assert "1 interrupted" in out and "save a checkpoint" in err
    assert _step(checkpoint) < max(map(_step, folder.run.glob("checkpoints/checkpoint-*"))) < 500
    assert main(argv) == 0
    assert "1 finished" in capsys.readouterr().out and len(load_records([tmp_path])) == 1


def _is_free(lock: FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return True
    except TimeoutError:
        return False


def test_a_failing_run_is_reported_and_the_others_go_on(
    tiny: Make, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study = tiny(method="static", data=["missing.txt", str(corpus)])
    result = run_study(study, tmp_path, workers=2)
    assert [o.status for o in result.outcomes] == ["failed", "finished"] and not result.complete
    assert str(result) == "1 finished, 1 failed"
    message = result.outcomes[0].message
    assert message.startswith("exit status 2; the end of ") and "corpus 'missing.txt': no such file" in message
    assert "no such file" in capsys.readouterr().err


def test_a_run_that_another_process_trains_is_left_to_it(tiny: Make, tmp_path: Path) -> None:
    study = tiny(method="static")
    folder = RunFolder(tmp_path, study.runs()[0].id)
    folder.create(study.runs()[0])
    with FileLock(folder.path / "lock"):
        result = run_study(study, tmp_path, progress=False)
    assert result.outcomes[0].status == "busy" and not result.complete
    assert not folder.run.exists()


class Stub:
    """A study's run as any command, to see what the runner makes of its end."""

    def __init__(self, code: str) -> None:
        self.code, self.inner = code, LocalPool(1)

    def submit(self, job: Job) -> object:
        return self.inner.submit(Job(job.name, (sys.executable, "-c", self.code), job.log, job.threads))


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "failed", "killed by SIGKILL (out of memory?)"),
        ("print('x\\n' * 99); raise SystemError('broken')", "failed", "SystemError: broken"),
        ("pass", "failed", "exit status 0"),  # but no record
        ("import sys; sys.exit(130)", "interrupted", ""),
        ("import os; os.kill(os.getpid(), 2)", "interrupted", ""),
    ],
)
def test_every_end_of_a_process_has_a_name(tiny: Make, tmp_path: Path, code: str, status: str, message: str) -> None:
    outcome = run_study(tiny(method="static"), tmp_path, pool=Stub(code), progress=False).outcomes[0]
    assert outcome.status == status and message in outcome.message
    assert len(outcome.message.splitlines()) <= 16


def test_the_pool_runs_so_many_at_a_time_with_so_many_threads(tmp_path: Path) -> None:
    pool = LocalPool(2)
    code = "import os, time; print(os.environ['OMP_NUM_THREADS'], flush=True); time.sleep(0.2)"
    handles = [pool.submit(Job(f"{i}", (sys.executable, "-c", code), tmp_path / f"{i}", 3)) for i in range(5)]
    most = 0
    while any(handle.status() is None for handle in handles):
        most = max(most, sum(handle.running() for handle in handles))
        time.sleep(0.01)
    assert most == 2 and [handle.status() for handle in handles] == [0] * 5
    assert [(tmp_path / f"{i}").read_text() for i in range(5)] == ["3\n"] * 5
    with pytest.raises(RegrowError, match="workers must be at least 1"):
        LocalPool(0)


def test_a_job_that_waits_never_begins_once_interrupted(tmp_path: Path) -> None:
    pool = LocalPool(1)
    code = "import time; time.sleep(60)"
    first, second = (pool.submit(Job(n, (sys.executable, "-c", code), tmp_path / n, 1)) for n in "ab")
    for handle in (second, first):
        handle.interrupt()
    wait_for(lambda: first.status() is not None)
    assert first.status() == -signal.SIGINT == second.status() and not (tmp_path / "b").exists()


HAS_SUBMITIT = importlib.util.find_spec("submitit") is not None


@pytest.mark.skipif(not HAS_SUBMITIT, reason="submitit is not installed")
def test_a_cluster_runs_a_study_too(tiny: Make, tmp_path: Path) -> None:
    pool = SubmititPool(tmp_path / "submitit", "debug")
    result = run_study(tiny(method="static"), tmp_path, pool=pool, threads=1)
    assert result.complete, result
    assert load_records([tmp_path])[0].machine["threads"] == 1


@pytest.mark.skipif(not HAS_SUBMITIT, reason="submitit is not installed")
def test_a_cluster_job_that_is_preempted_stops_its_process_and_queues_again(tmp_path: Path) -> None:
    code = "import time; print('ready', flush=True); time.sleep(60)"
    task = ClusterTask(Job("a", (sys.executable, "-c", code), tmp_path / "log", 1))
    thread = threading.Thread(target=task)
    thread.start()
    wait_for(lambda: (tmp_path / "log").exists() and "ready" in (tmp_path / "log").read_text())
    again = task.checkpoint()
    thread.join(timeout=10)
    assert not thread.is_alive() and again.function.job == task.job


def test_without_submitit_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RegrowError, match=r'pip install "regrow\[cluster\]"'):
        SubmititPool(tmp_path)


def test_a_folder_that_cannot_be_used(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegrowError, match="cannot use the study folder"):
        run_study(tiny(), tmp_path / "file", progress=False)


def test_a_dry_run_prints_what_would_be_done(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = ["--folder", str(tmp_path)]
    assert main(["study", "run", "c5", "--scale", "cpu", "--dry-run", "--set", "steps=500", *folder]) == 0
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and "Linf" in lines[0] and "norm=linf,seed=2" in lines[-2]
    assert last == "9 runs, 9 to do: 9.22e+06 tokens at most, 3.08e+12 non-embedding FLOPs"
    assert not list(tmp_path.iterdir())
    assert main(["study", "run", "c5", "--scale", "cpu", "--dry-run", "--only", "norm=l1,*", *folder]) == 0
    assert "3 runs, 3 to do" in capsys.readouterr().out
