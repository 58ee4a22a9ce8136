"""The command line: imports, exit codes, messages and shell completion."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.options import EXIT_CODES


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def ebbline(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "ebbline.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


HEAVY = ("torch", "ray", "optuna", "transformers", "wandb", "pandas")
LIGHT = {
    "typer",
    "rich",
    "shellingham",
    "pygments",
    "markdown_it",
    "mdurl",
    "attr",
    "ebbline",
    "annotated_doc",
}
PARSING = {
    "pydantic",
    "pydantic_core",
    "typing_extensions",
    "typing_inspection",
    "annotated_types",
}  # typer's, of a command's options
AS_TYPED = "import sys; sys.argv[0] = 'ebbline'; from ebbline.cli import main; main()"


@pytest.mark.process
@pytest.mark.parametrize("command", [[], ["run"], ["status"], ["store", "gc"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    """Imports take the time of `--help`: it imports the standard library and what draws the help.
    docs/terminal.md has the seconds.
    """
    code = f"""
import sys
before = set(sys.modules)
from typer.testing import CliRunner
from ebbline.cli import app
assert CliRunner().invoke(app, {[*command, "--help"]}).exit_code == 0
found = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(found - sys.stdlib_module_names))
"""
    loaded = set(python(code).split())
    assert "ebbline" in loaded and not loaded & set(HEAVY)
    assert {name for name in loaded if not name.startswith("_sysconfigdata")} <= (
        LIGHT | PARSING if command else LIGHT
    )


def commands() -> dict[str, Any]:
    """Every command by its words, such as `store gc`."""
    found: dict[str, Any] = {}

    def walk(group: Any, words: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{words}{name} ")
            else:
                found[f"{words}{name}"] = command

    walk(typer.main.get_command(app), "")
    return found


HELP = {
    "A study, in the order of use": "new studies validate pin plan run confirm slurm status "
    "dashboard",
    "Its outcome": "report pick label compare papers export sync wandb-workspace",
    "Single tools, without a study": "project evaluate rescore rerun defend prompts",
    "Upkeep": "ls doctor study store",
}


def test_the_help_groups_its_commands_by_what_one_wants() -> None:
    """The golden text of `ebbline --help`: every command is in a group, with one line."""
    printed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout
    found: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if title := re.match(r"╭─ (.*?) ─+╮", line):
            found[title[1]] = []
        elif line.startswith("│"):
            found[list(found)[-1]].append(line.strip("│ ").split(" ")[0])
    assert found.pop("Options")
    assert {title: " ".join(names) for title, names in found.items()} == HELP


PAGES = {"dashboard"}  # commands without output for scripts


def test_every_command_prints_json_for_scripts() -> None:
    without = {
        name
        for name, command in commands().items()
        if not any("--json" in option.opts for option in command.params)
    }
    assert without == PAGES


@pytest.mark.process
def test_an_error_is_json_with_the_option_json(tmp_path: Path) -> None:
    done = ebbline("status", "quickstrat", "--home", str(tmp_path), "--json")
    printed = json.loads(done.stdout)
    assert (done.returncode, printed["exit_code"], printed["kind"]) == (
        1,
        1,
        "StudyError",
    ) and "did you mean" in printed["error"]
    assert "error: " in done.stderr


@pytest.mark.process
def test_the_help_of_run_has_the_exit_codes_that_the_documentation_has() -> None:
    printed, page = (
        " ".join(ebbline("run", "--help").stdout.split()),
        (Path(__file__).parents[1] / "docs" / "terminal.md").read_text(),
    )
    codes = re.findall(r"(\d+) ([^;.]+)", EXIT_CODES)
    assert len(codes) > 4
    for code, what in codes:
        assert f"{code} {what.split(' (')[0]}" in printed
        assert re.search(rf"^\| {code} \|", page, re.MULTILINE), (
            f"docs/terminal.md does not explain exit code {code}"
        )


def completed(words: str, shell: str = "bash", **environment: str) -> list[str]:
    asked = {
        "_EBBLINE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    asked |= {"_TYPER_COMPLETE_ARGS": words}
    done = subprocess.run(
        [sys.executable, "-c", AS_TYPED],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **asked, **environment},
    )
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.mark.process
def test_a_shell_completes_commands_options_and_studies_that_ship_or_lie_in_the_home(
    tmp_path: Path,
) -> None:
    own = tmp_path / "studies" / "quick-mine"
    own.mkdir(parents=True)
    (own / "file").write_text("/somewhere/mine.yaml")
    assert {"run", "rescore", "report"} <= set(completed("ebbline r"))
    assert "--executor" in completed("ebbline run --ex")
    assert completed("ebbline run q", EBBLINE_HOME=str(tmp_path / "none")) == ["quickstart"]
    assert completed("ebbline status q", EBBLINE_HOME=str(tmp_path)) == ["quick-mine", "quickstart"]
    assert completed(f"ebbline status --home {tmp_path} quick-") == ["quick-mine"]
    assert completed("ebbline export quick-", EBBLINE_HOME=str(tmp_path)) == ["quick-mine"]
    assert completed(f"ebbline compare --home {tmp_path} quick-") == ["quick-mine"]
    assert completed("ebbline run --executor ") == ["ray", "inline"]
    assert any(
        "quick-mine" in line
        for line in completed("ebbline status q", "zsh", EBBLINE_HOME=str(tmp_path))
    )


@pytest.mark.process
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_installed_completion_works_in_a_real_bash(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "ebbline"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{AS_TYPED.replace('; ', chr(10))}\n")
    program.chmod(0o755)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "EBBLINE_HOME": str(tmp_path),
    }
    install = [
        "bash",
        "--norc",
        "-c",
        "ebbline --install-completion; exit $?",
    ]  # from a shell, which is what it is installed for
    subprocess.run(install, env=environment, check=True, capture_output=True, timeout=300)
    script = (
        "source ~/.bashrc; COMP_WORDS=(ebbline run qu); COMP_CWORD=2; _ebbline_completion "
        "ebbline; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["quickstart"], done


@pytest.mark.process
def test_a_driver_process_imports_no_torch() -> None:
    modules = (
        "ebbline.sweeps.drive.loop, ebbline.commands.run, ebbline.show, "
        "ebbline.cluster.executors.ray_executor, ebbline.analysis.wandb.mirror, "
        "ebbline.analysis.report.report"
    )
    assert python(f"import sys, {modules}\nprint('torch' in sys.modules)") == "False"


@pytest.mark.process
@pytest.mark.parametrize("command", ["validate", "plan", "run", "status", "report"])
def test_a_misspelt_study_is_an_error_with_a_suggestion_and_no_traceback(
    command: str, tmp_path: Path
) -> None:
    home = [] if command == "validate" else ["--home", str(tmp_path)]
    done = ebbline(command, "quickstrat", *home)
    assert done.returncode == 1
    assert "did you mean 'quickstart'" in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.process
def test_validate_prints_how_to_pin_the_llama2_study() -> None:
    done = ebbline("validate", "llama2")
    assert (
        done.returncode == 1
        and "ebbline pin llama2 --to" in done.stderr
        and "models.70b.base.hub" in done.stderr
    )
