"""The operating points that `ebbline pick` chose, recorded in the study's folder for the figures.

Invariant: only a point that holds the study's own refusal floor is recorded, one for each size: the
latest choice.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ebbline.sweeps.study.points import Result
from ebbline.tasks.files import write_whole

FILE = "picked.json"
_log = logging.getLogger(__name__)


class Choice(BaseModel):
    """A picked point: its number in the study, and the digest of its settings."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    number: int
    point: str


_CHOICES = TypeAdapter(dict[str, Choice])


def record_choices(folder: Path, picked: Collection[Result]) -> bool:
    """Record picked points beside the choices of other sizes. False, with a warning, if the folder
    cannot be written: a choice is for figures only.
    """
    choices = {**recorded_choices(folder)}
    for result in picked:
        choices[result.point.model] = Choice(number=result.number, point=result.point.id)
    text = json.dumps({model: dict(choice) for model, choice in choices.items()}, indent=1)
    try:
        write_whole(folder / FILE, lambda path: path.write_text(text + "\n"))
    except OSError as error:
        _log.warning("the choice was not recorded for the figures: %s", error)
        return False
    return True


def recorded_choices(folder: Path) -> Mapping[str, Choice]:
    """Size -> its recorded choice. A file that cannot be read marks nothing, with a warning."""
    path = folder / FILE
    try:
        return _CHOICES.validate_json(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, ValidationError) as error:
        _log.warning(
            "%s cannot be read (%s), so the figures mark no picked point; `ebbline pick` writes it "
            "again",
            path,
            type(error).__name__,
        )
        return {}


def chosen(results: Sequence[Result], folder: Path) -> list[Result]:
    """The finished results that are recorded as picked."""
    choices = recorded_choices(folder)
    return [
        result
        for result in results
        if result.status == "done"
        and (choice := choices.get(result.point.model)) is not None
        and choice.point == result.point.id
    ]
