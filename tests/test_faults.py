"""The table of planted faults (tests/faults.yaml) fits the code and the tests."""

from pathlib import Path

import pytest

from tests.mutations import Imports, problems_of, read_faults

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_planted_fault_fits_its_file_and_is_reached_by_a_test_file() -> None:
    """A fault without a test file near it would never be judged."""
    faults, imports = read_faults(), Imports(ROOT)
    assert [problem for fault in faults for problem in problems_of(fault, ROOT)] == []
    assert [fault.name for fault in faults if not imports.near(fault, "tests")] == []
    count = f"There are {len(faults)} faults."
    assert count in (ROOT / "docs" / "contributing.md").read_text("utf-8")
