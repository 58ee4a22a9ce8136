"""The guards of tests/conftest.py, on tests that break their rules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRONG = {
    "test_starts_a_process": "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
    "test_starts_a_process_and_swallows_it": "import os\n    try:\n        os.fork()\n    "
    "except BaseException:\n        pass",
    "test_starts_a_worker": "import multiprocessing; "
    "multiprocessing.get_context('spawn').Process(target=print).start()",
    "test_makes_a_model": "import torch; torch.nn.Linear(1, 1)",
    "test_waits": "import time; time.sleep(1.8)",
    "test_computes": "import time\n    end = time.process_time() + 0.7\n    "
    "while time.process_time() < end: pass",
    "test_skips_for_want_of_a_package": "import pytest; "
    "pytest.importorskip('a_package_that_nobody_has')",
}
SKIPS = "test_skips_for_want_of_a_program"
RIGHT = {
    "test_is_fast": "assert True",
    "test_may_start_a_process": "import subprocess, sys; "
    "subprocess.run([sys.executable, '-c', ''])",
    SKIPS: "import pytest; pytest.skip('no Chromium; on Debian: apt-get install chromium')",
}


@pytest.mark.process
def test_a_fast_test_that_starts_a_process_makes_a_model_or_takes_long_fails(
    tmp_path: Path,
) -> None:
    """Only here the guards of the tiers are seen to stop what they should."""
    marks = {"test_may_start_a_process": "@pytest.mark.process\n"}
    bodies = [
        f"{marks.get(name, '')}def {name}():\n    {body}\n"
        for name, body in {**WRONG, **RIGHT}.items()
    ]
    file = tmp_path / "test_rules.py"
    file.write_text("import pytest\nimport torch\n\n" + "\n".join(bodies))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-rA",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "EBBLINE_FAST_S": "0.5",
        },
    )
    lines = [line for line in done.stdout.splitlines() if "::test_" in line]
    outcomes = {line.split("::")[1].split(" ")[0]: line.split(" ")[0] for line in lines}
    passes = [name for name in RIGHT if name != SKIPS]
    assert outcomes == dict.fromkeys(WRONG, "FAILED") | dict.fromkeys(passes, "PASSED"), done.stdout
    assert f"{len(WRONG)} failed, {len(passes)} passed, 1 skipped" in done.stdout
