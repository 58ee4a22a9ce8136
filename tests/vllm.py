"""vLLM for the tests that run it: an environment of its own, which `make vllm` makes in build/vllm.

`EBBLINE_TEST_VLLM` names the interpreter of another one.
"""

import os
import subprocess
from pathlib import Path

from ebbline.tasks.measuring.served.place import VERSION_OF_VLLM
from tests.shared import ROOT

VARIABLE = "EBBLINE_TEST_VLLM"
MISSING = "vLLM is not installed: `make vllm` makes an environment for it in build/vllm"


def interpreter() -> Path | None:
    """The Python of the environment with vLLM; None without one."""
    given = os.environ.get(VARIABLE)
    found = Path(given) if given else ROOT / "build" / "vllm" / "bin" / "python"
    return (
        found if found.exists() and (given or (found.parents[1] / "installed").exists()) else None
    )


def version(python: Path) -> str:
    """The version of its vLLM."""
    return subprocess.run(
        [python, "-c", VERSION_OF_VLLM], capture_output=True, text=True, check=True
    ).stdout.strip()
