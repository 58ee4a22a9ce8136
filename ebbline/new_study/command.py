"""`ebbline new`: ask for what is missing (on a terminal), look at it, write the study, say what to
type next.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import typer

from ebbline.new_study.files import (
    FoundPrompts,
    look_at_data,
    look_at_prompts,
    look_at_task,
)
from ebbline.new_study.models import FoundModel, base_of, look_at_model
from ebbline.new_study.text import NewStudy, name_from, path_from, require_bases, study_text
from ebbline.sweeps.study.pins import local_pin, require_rows, unpinned
from ebbline.sweeps.study.references import Local, template_text
from ebbline.sweeps.study.study_file import parse, with_pins
from ebbline.tasks.errors import DataError, EbblineError, ModelError, StudyError

T = TypeVar("T")
_ASK = {
    "model": "The chat model (a folder, a GGUF file, or ORG/NAME on the hub)",
    "data": "The training data (a file, or a folder of the hub)",
    "prompts": "The prompts that should be refused",
    "task": "The items of your task (prompt and answer)",
}


@dataclass(frozen=True)
class Given:
    """What the user gave; None or empty for what is missing."""

    models: Sequence[str] = ()
    bases: Sequence[str] = ()
    data: str | None = None
    prompts: str | None = None
    harmless: str | None = None
    task: str | None = None
    chat_template: str | None = None
    name: str | None = None


def new_study(given: Given, to: Path, as_json: bool) -> None:
    """Write a study to `to`, which must not exist. Raises EbblineError, and a usage error for a
    missing flag without a terminal; then nothing is written.
    """
    if to.suffix not in (".yaml", ".yml"):
        raise StudyError(f"{to} must end in .yaml")
    if to.exists():
        raise StudyError(f"{to} exists, and is not overwritten; give another file with --to")
    asks = is_terminal()
    missing = [
        f"--{name}"
        for name, value in (
            ("model", given.models),
            ("data", given.data),
            ("prompts", given.prompts),
            ("task", given.task),
        )
        if not value
    ]
    if missing and not asks:
        raise typer.BadParameter(
            f"give {', '.join(missing)} (without a terminal, nothing is asked for)"
        )
    found, notes = _look(given, asks)
    text = study_text(found, to)
    # Everything is checked before anything is written.
    study = parse(to, text)
    require_rows(study)
    print("computing the sha256 of every file, by which the study names it", file=sys.stderr)
    pins = {where: local_pin(ref) for where, ref in unpinned(study) if isinstance(ref, Local)}
    text = with_pins(text, pins)
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise StudyError(
            f"{to} exists, and is not overwritten; give another file with --to"
        ) from None
    _print(found, to, notes, len(unpinned(parse(to))) > 0, as_json)


def is_terminal() -> bool:
    """Whether somebody is there who can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _look(given: Given, asks: bool) -> tuple[NewStudy, list[str]]:
    """What the files hold, and remarks on what was assumed."""
    notes: list[str] = []
    models = [_one("model", name, look_at_model, asks) for name in given.models or (None,)]
    require_bases(models, given.bases)
    bases: list[FoundModel | None] = [look_at_model(name) for name in given.bases]
    if not bases:
        bases = [_base(model, asks, notes) for model in models]
    if (lacking := [m.given for m, base in zip(models, bases, strict=True) if base is None]) and (
        any(bases)
    ):
        raise StudyError(
            f"no base model is known for {lacking[0]}; give one --base for each --model"
        )
    template = given.chat_template
    unable = [model for model in models if model.has_template is False]
    if unable and template is None:
        if not asks:
            raise ModelError(
                f"{unable[0].given} has no chat template; give a file with one as --chat-template"
            )
        template = typer.prompt("It has no chat template. A file with one", err=True)
    if template is not None:
        _require_template(template)
    refuse = _one("prompts", given.prompts, _look_at_harmful, asks)
    found = NewStudy(
        name=given.name or name_from(models[0]),
        models=models,
        bases=bases,
        data=_one("data", given.data, look_at_data, asks),
        refuse=refuse,
        answer=None if given.harmless is None else look_at_prompts(given.harmless),
        task=_one("task", given.task, look_at_task, asks),
        chat_template=template,
    )
    return found, notes


def _one(name: str, value: str | None, look: Callable[[str], T], asks: bool) -> T:
    """What `look` finds at `value`. Without a value, the user is asked until there is something."""
    if value is not None:
        return look(value)
    while True:
        text = typer.prompt(_ASK[name], err=True)
        try:
            return look(text.strip())
        except EbblineError as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)


def _base(model: FoundModel, asks: bool, notes: list[str]) -> FoundModel | None:
    """The model before alignment: its likely name, which the user may change on a terminal."""
    likely = base_of(model)
    if asks:
        text = typer.prompt(
            f"The model before the alignment of {model.given} (- for none)",
            default=likely or "-",
            err=True,
        ).strip()
        return None if text == "-" else look_at_model(text)
    if likely is None:
        notes.append(
            f"no base model of {model.given} is known, so nothing is projected; --base names one"
        )
        return None
    where = " and may not exist there" if model.kind == "hub" else ""
    notes.append(
        f"the base is taken to be {likely}, after the model's name{where}; --base names it"
    )
    return look_at_model(likely)


def _require_template(template: str) -> None:
    try:
        template_text(Path(template).expanduser())
    except ValueError as error:
        raise ModelError(str(error)) from None


def _look_at_harmful(given: str) -> FoundPrompts:
    found = look_at_prompts(given)
    if found.labels.keys() == {"harmless"}:
        raise DataError(
            f"{given}: every prompt is labelled harmless; give it as --harmless, and prompts that "
            "should be refused as --prompts"
        )
    return found


def _print(found: NewStudy, to: Path, notes: Sequence[str], has_hub: bool, as_json: bool) -> None:
    seen = [
        *(("model", model.given, str(model)) for model in found.models),
        *(("base", base.given, str(base)) for base in found.bases if base is not None),
        ("data", found.data.given, found.data.about),
        ("prompts", found.refuse.given, found.refuse.about),
        *([("harmless", found.answer.given, found.answer.about)] if found.answer else []),
        ("task", found.task.given, found.task.about),
    ]
    study = path_from(Path("study.yaml"), str(to))
    commands = [
        *([f"ebbline pin {study} --to {study}"] if has_hub else []),
        f"ebbline validate {study}",
        f"ebbline plan {study}",
        f"ebbline run {study}",
    ]
    if as_json:
        files = [{"role": role, "given": given, "found": about} for role, given, about in seen]
        print(
            json.dumps(
                {"wrote": str(to), "found": files, "notes": list(notes), "next": commands}, indent=1
            )
        )
        return
    for role, given, about in seen:
        print(f"{role:9} {given}: {about}")
    for note in notes:
        print(f"note: {note}")
    print(f"settings for {found.largest.name}")
    print(f"wrote {to}; read it: every choice has its reason. Next:")
    why = {
        "pin": "fills in the commit and sha256 of what is on the hub",
        "validate": "checks it",
        "plan": "predicts time, memory and disk",
        "run": "runs it to a report; the same command continues it",
    }
    width = max(map(len, commands))
    for command in commands:
        print(f"  {command:{width}}  # {why[command.split()[1]]}")
