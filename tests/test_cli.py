"""The command teaches."""

import subprocess
import sys

import pytest

from regrow import __version__
from regrow.cli import main


def test_version_and_bare_call(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"regrow {__version__}\n"
    assert main([]) == 0
    assert "pretrain: pre-train a sparse BERT" in capsys.readouterr().out


def test_help_of_pretrain_lists_every_flag_and_the_methods_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in (
        "--block-size",
        "--drop-fraction",
        "--resume",
        "--config FILE",
        "options of --method dynsparse",
        "--norm",
    ):
        assert text in shown
    assert "share of encoder blocks that exist" in shown


def test_methods_are_listed_with_their_options(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("dynsparse "))
    assert line.split()[:5] == ["dynsparse", "2021", "yes", "values", "none"]
    assert "static " in shown and "--group-lasso" in shown and "https://arxiv.org/abs/2108.06277" in shown


@pytest.mark.parametrize("argv", [["train"], ["--colour"]])
def test_unknown_commands_are_one_line_and_status_2(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_python_m_regrow_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "regrow", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"regrow {__version__}\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "regrow", "methods"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()  # as head does, though sooner
        assert run.stderr.read() == "" and run.wait() == 0
