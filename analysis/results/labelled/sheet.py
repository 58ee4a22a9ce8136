"""The sheet of a suite: completions drawn at random within each arm, for a person to label.

The sheet is STUDY/labels/SUITE.json. It names completions by the key of their generation and the id
of their prompt, and holds no text.

Invariant: what is drawn depends on the seed and on the completions alone, and a sheet never changes
but by labels.
"""

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.files import write_whole

Measure = Literal["refusal", "over_refusal", "harm"]
CANNOT_TELL = "cannot tell"
LABELS: Mapping[Measure, tuple[str, ...]] = {
    "refusal": ("refused", "partial", "complied"),
    "over_refusal": ("refused", "partial", "complied"),
    "harm": ("harmful", "harmless"),
}


@dataclass(frozen=True)
class Drawn:
    """A completion of the sheet; `label` is None until a person gives one."""

    arm: str
    key: str
    id: str
    label: str | None = None


@dataclass(frozen=True)
class Sheet:
    """The drawn completions in the order in which they are shown, and how many each arm has."""

    suite: str
    measure: Measure
    seed: int
    populations: Mapping[str, int]
    rows: tuple[Drawn, ...]

    @property
    def labelled(self) -> int:
        return sum(row.label is not None for row in self.rows)

    @property
    def weights(self) -> dict[str, float]:
        """Arm -> the completions that each of its decided labels stands for."""
        decided = Counter(row.arm for row in self.rows if row.label not in (None, CANNOT_TELL))
        return {arm: self.populations[arm] / count for arm, count in decided.items()}

    def with_label(self, place: int, label: str | None) -> "Sheet":
        rows = list(self.rows)
        rows[place] = replace(rows[place], label=label)
        return replace(self, rows=tuple(rows))


def sheet_path(study_folder: Path, suite: str) -> Path:
    return study_folder / "labels" / f"{suite}.json"


def draw(
    suite: str,
    measure: Measure,
    arms: Mapping[str, Sequence[tuple[str, str]]],
    count: int,
    seed: int,
) -> Sheet:
    """A sheet of `count` completions, as evenly over the arms as their sizes allow. `arms` maps an
    arm to its completions, as (key of the generation, id).

    Raises EvaluationError without completions.
    """
    arms = {arm: sorted(set(found)) for arm, found in arms.items() if found}
    if not arms:
        raise EvaluationError(f"suite {suite!r} has no completions yet; `ebbline run` makes them")
    rows = [
        Drawn(arm, key, identifier)
        for arm, size in _sizes({arm: len(found) for arm, found in arms.items()}, count).items()
        for key, identifier in random.Random(f"{seed} {arm}").sample(arms[arm], size)
    ]
    random.Random(seed).shuffle(rows)
    return Sheet(
        suite, measure, seed, {arm: len(found) for arm, found in arms.items()}, tuple(rows)
    )


def _sizes(available: Mapping[str, int], count: int) -> dict[str, int]:
    """Arm -> how many to draw: equally many, where an arm has so many."""
    sizes = dict.fromkeys(available, 0)
    left = min(count, sum(available.values()))
    while left:
        for arm in available:
            if left and sizes[arm] < available[arm]:
                sizes[arm] += 1
                left -= 1
    return sizes


def write_sheet(path: Path, sheet: Sheet) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(sheet), indent=1)
    write_whole(path, lambda fresh: fresh.write_text(text + "\n", "utf-8"))


def read_sheet(path: Path) -> Sheet | None:
    """The sheet in a file; None if there is no file. Raises EvaluationError for another content."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        rows = tuple(Drawn(**row) for row in found.pop("rows"))
        sheet = Sheet(rows=rows, **found)
        allowed = {None, CANNOT_TELL, *LABELS[sheet.measure]}
        if any(row.label not in allowed or row.arm not in sheet.populations for row in rows):
            raise ValueError("unknown label or arm")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"{path} is no sheet of labels ({type(error).__name__}); restore it, or remove it and "
            "label anew"
        ) from None
    return sheet
