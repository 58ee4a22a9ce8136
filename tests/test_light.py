"""An installation without extras: commands that need no study work, and every other one names the
command that installs what is missing.
"""

import importlib.abc
import json
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import datasketch  # noqa: F401  # imported here, so that no fast test is charged for it
import pytest
import torch
import transformers
import typer
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner, Result

from ebbline.tasks.extras import SWEEP_MODULES
from ebbline.tasks.measuring.completions import Completion, write_completions
from tests.tiny import Pair

ROOT = Path(__file__).parents[1]
COMMAND = 'pip install "ebbline[sweep]"'
# Distributions whose modules have another name
MODULES = {"scikit-learn": "sklearn", "lm-eval": "lm_eval", "nvidia-ml-py": "pynvml"}
LIGHT = ("project", "evaluate", "rescore", "prompts check", "studies")
WITH_EXTRA = ("validate", "plan", "run", "status", "report", "pick", "export", "compare", "doctor")


class Hidden(importlib.abc.MetaPathFinder):
    """Makes packages unimportable, as if they were not installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in SWEEP_MODULES:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[typer.Typer]:
    """The command line, imported anew where the packages of the extra do not exist."""
    kept = _imported_anew()
    for name in kept:
        del sys.modules[name]
    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    monkeypatch.chdir(tmp_path)
    try:
        from ebbline.cli import app

        yield app
    finally:
        # Other modules stay: fontTools.subset changes the classes of modules that it imports
        for name in _imported_anew():
            del sys.modules[name]
        sys.modules.update(kept)


def _imported_anew() -> dict[str, ModuleType]:
    """The imported modules that a light installation lacks, and ebbline's own."""
    again = {"ebbline", *SWEEP_MODULES}
    return {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] in again}


def commands(app: typer.Typer) -> dict[str, click.Command]:
    """Every command by its words, such as `store du`."""
    root: Any = typer.main.get_command(app)
    found: dict[str, click.Command] = {}
    for name, command in root.commands.items():
        nested = getattr(command, "commands", {})
        found |= {f"{name} {each}": nested[each] for each in nested} or {name: command}
    return found


def invoked(app: typer.Typer, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def required(command: click.Command) -> list[str]:
    """A command's required parameters, with names of files that do not exist."""
    given: list[str] = []
    for parameter in command.params:
        if parameter.required:
            if parameter.param_type_name == "option":
                given.append(parameter.opts[0])
            given.append("nowhere")
    return given


def test_a_command_without_a_study_needs_no_package_of_the_extra(light: typer.Typer) -> None:
    found = commands(light)
    for name in LIGHT:
        assert invoked(light, *name.split(), "--help").exit_code == 0
        done = invoked(light, *name.split(), *required(found[name]))
        assert not isinstance(done.exception, ImportError), name
        # `rescore nowhere` may be a study, and studies need the extra
        assert (COMMAND in done.output) == (name == "rescore"), (name, done.output)


@pytest.mark.slow
def test_every_other_command_names_the_command_that_installs_what_is_missing(
    light: typer.Typer,
) -> None:
    for name, command in commands(light).items():
        done = invoked(light, *name.split(), *required(command))
        assert not done.exception or isinstance(done.exception, SystemExit), name
        if name in WITH_EXTRA:
            assert done.exit_code == 1 and COMMAND in done.output, (name, done.output)
            assert len(done.output.strip().splitlines()) == 1, done.output


def test_sets_are_checked_and_completions_are_rescored_without_the_extra(
    light: typer.Typer, tmp_path: Path
) -> None:
    (tmp_path / "stored").mkdir()
    texts = ("I cannot help with that.", "Of course: a zorp.")
    rows = [
        Completion(str(i), "", "", "", "Name a zorp.", "", text, 3, True)
        for i, text in enumerate(texts)
    ]
    write_completions(tmp_path / "stored", rows)
    (tmp_path / "set.csv").write_text("prompt\nName a zorp.\nName a tarn.\n")
    done = invoked(light, "prompts", "check", "set.csv")
    assert done.exit_code == 0 and "2" in done.output, done.output
    done = invoked(light, "rescore", "stored", "--scorer", "anywhere", "--json")
    assert done.exit_code == 0 and json.loads(done.output)[0]["n"] == 2, done.output


def test_adapters_are_projected_reported_and_measured_without_the_extra(
    light: typer.Typer, pair: Pair, tmp_path: Path
) -> None:
    from ebbline import evaluate
    from ebbline.tasks.errors import MissingExtra

    model = transformers.AutoModelForCausalLM.from_pretrained(pair.aligned)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, tensor in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(tensor, 0.01)
    lora.save_pretrained(tmp_path / "adapter")
    (tmp_path / "set.csv").write_text("prompt\nName a zorp.\n")
    models = ("--base", pair.base, "--aligned", pair.aligned)
    report = tmp_path / "report.html"
    done = invoked(
        light, "project", "--adapter", "adapter", *models, "--out", "safer", "--report", report
    )
    assert done.exit_code == 0 and report.stat().st_size > 0, done.output
    _, found = evaluate(
        pair.aligned,
        "refusal",
        "set.csv",
        "measured",
        adapters=["safer"],
        settings={"max_new_tokens": 2},
        dtype="float32",
    )
    assert found.metrics["refusal_rate"].n == 1
    with pytest.raises(MissingExtra, match=f"'mmlu', a task of lm-eval.*{re.escape(COMMAND)}"):
        evaluate(pair.aligned, "mmlu", "set.csv", "other")


def test_the_table_of_modules_is_that_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[\[<>=]", each)[0] for each in project["optional-dependencies"]["sweep"]]
    assert {MODULES.get(name, name.replace("-", "_")) for name in names} == SWEEP_MODULES
    light = {re.split(r"[\[<>=]", each)[0] for each in project["dependencies"]}
    assert not light & set(names)
