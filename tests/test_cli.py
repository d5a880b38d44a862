"""The command teaches."""

import subprocess
import sys

import pytest

from regrow import __version__
from regrow.cli import COMMANDS, main


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
    assert "static " in shown and "https://arxiv.org/abs/2108.06277" in shown
    for name, command in (
        ("acdc", "regrow pretrain --method acdc"),
        ("lowrank", "regrow pretrain --layer lowrank"),
        ("imp", "regrow recipe imp "),
        ("erk", "regrow pretrain --distribution erk"),
        ("soup", "regrow export soup "),
        ("essential", "regrow evaluate MODEL --essential"),
    ):
        lines = shown.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith(f"{name} "))
        assert lines[start].split()[1].isdecimal() and lines[start].split()[2] in ("yes", "no")
        assert "https://" in lines[start + 1] and command in lines[start + 2]


def test_one_method_is_shown_in_full(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods", "dynsparse"]) == 0
    shown = capsys.readouterr().out
    assert "--group-lasso" in shown and ">>>" in shown and "regrow pretrain --method dynsparse" in shown
    assert main(["methods", "imp"]) == 0
    assert "--prune-share" in capsys.readouterr().out
    assert main(["methods", "soop"]) == 2
    assert "nothing is called 'soop'; there is soup" in capsys.readouterr().err


def test_every_entry_of_the_list_is_complete() -> None:
    from regrow.cli.catalog import sections

    found = {section.title: {entry.name for entry in section.entries} for section in sections()}
    assert {"imp", "spdf", "random-search"} <= found["Recipes"]
    assert {"soup", "changes", "activations", "essential"} <= found["Tools"]
    for section in sections():
        for entry in section.entries:
            assert entry.paper and entry.year > 1900 and entry.link.startswith("https://"), entry.name
            assert entry.doc.strip() and entry.command.startswith("regrow "), entry.name
            command = entry.command.split()[1]
            assert command in COMMANDS, entry.name


def test_recipes_teach_their_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["recipe", "--help"])
    assert stop.value.code == 0 and "imp " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["recipe", "imp", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    own = shown.split("options of recipe imp:")[1]
    assert "--prune-share" in own and "--learning-rate" not in own and "--learning-rate" in shown


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
