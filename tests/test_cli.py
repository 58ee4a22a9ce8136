"""The command line's promises that no single folder owns: what it imports, what it exits with, what it says."""

import subprocess
import sys
from pathlib import Path

import pytest


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def ebbline(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "ebbline.cli", *arguments], capture_output=True, text=True, timeout=60)


HEAVY = ("torch", "ray", "optuna", "transformers", "wandb", "pandas")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom typer.testing import CliRunner\nfrom ebbline.cli import app\nCliRunner().invoke(app, ['--help'])\n"
    assert python(code + f"print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_a_driver_process_imports_no_torch() -> None:
    modules = "sweeps.drive, ebbline.running, ebbline.show, cluster.ray_executor, analysis.mirror, analysis.report"
    assert python(f"import sys, {modules}\nprint('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("command", ["validate", "plan", "run", "status", "report"])
def test_a_misspelt_study_is_an_error_with_a_suggestion_and_no_traceback(command: str, tmp_path: Path) -> None:
    home = [] if command == "validate" else ["--home", str(tmp_path)]
    done = ebbline(command, "quickstrat", *home)
    assert done.returncode == 1
    assert "did you mean 'quickstart'" in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_validate_says_how_to_pin_the_llama2_study() -> None:
    done = ebbline("validate", "llama2")
    assert done.returncode == 1 and "ebbline pin llama2 --to" in done.stderr and "models.70b.base.hub" in done.stderr
