"""What the README shows runs as written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_first_example_runs() -> None:
    if not README.exists():
        pytest.skip("the README is not beside the tests")
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    names: dict = {}
    exec(example[1], names)
    assert names["updater"].n_steps == 100 and names["updater"].last_update_step == 90
    assert names["updater"].coverage > 0.2
