"""A method in somebody else's package: one file and an entry point, and it is everywhere ours are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

METHOD = '''
"""Oldest: the blocks in the first slots move, wherever they are.

>>> Oldest().share
0.5
"""
from dataclasses import dataclass, field

import torch
from regrow.methods import Method, Signals, register
from regrow.topology import TopologyUpdate


@register("oldest")
@dataclass(frozen=True)
class Oldest(Method):
    """Move the first slots."""

    paper = "A throw-away example"
    year = 2026
    link = "https://example.org"

    share: float = field(default=0.5, metadata={"help": "share of the scheduled blocks that really move"})

    def propose(self, signals: Signals) -> TopologyUpdate | None:
        topology = signals.topology
        k = min(int(signals.n_moved * self.share), topology.n_positions - topology.n_blocks)
        positions = topology.free_positions(k, signals.generator)
        columns = topology.n_block_cols
        return TopologyUpdate(torch.arange(k), positions // columns, positions % columns)
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What pip leaves behind when it installs such a package."""
    (tmp_path / "oldest_blocks.py").write_text(METHOD)
    info = tmp_path / "oldest_blocks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: oldest-blocks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[regrow.methods]\noldest = oldest_blocks\n")
    return tmp_path


def run(package: Path, *argv: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, check=True).stdout


def test_a_method_of_another_package_is_listed_gets_flags_and_is_checked(package: Path) -> None:
    assert "\noldest " in run(package, "-m", "regrow", "methods")
    shown = run(package, "-m", "regrow", "pretrain", "--method", "oldest", "--help")
    assert "options of --method oldest" in shown and "--share" in shown and "really move" in shown
    check = "from regrow.testing import check_method\nif __name__ == '__main__': print(check_method('oldest').name)"
    script = package / "check.py"
    script.write_text(check)
    assert run(package, str(script)) == "oldest\n"
