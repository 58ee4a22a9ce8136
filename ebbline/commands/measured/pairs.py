"""`ebbline compare` of measurements that `ebbline evaluate` wrote: each against the first one, over
the same prompts.

An argument is the folder of one measurement, such as measured/my-adapter, or of several, such as
measured. The tests are those of studies (ebbline.analysis.results.measurements).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebbline.analysis.report.answer import meaning
from ebbline.analysis.results.comparison import unlike_suites
from ebbline.analysis.results.measurements import Comparison, Measurement, compared
from ebbline.analysis.results.statistics import SHARES
from ebbline.analysis.results.wording import directed_label
from ebbline.commands.compare import MODEL_FIELDS, comparison_json, moved_label, short_label
from ebbline.commands.measured.outcome import DONE, FILES, METRICS_FOLDER, NO_ADAPTER, files_of
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import METRICS, Metric, Sample, read_metrics, read_samples
from ebbline.tasks.specs import GenerateSpec


@dataclass(frozen=True)
class Outcome:
    """One measurement: its metrics, its samples, and the settings that decide what it asked."""

    label: str
    metrics: dict[str, Metric]
    samples: list[Sample]
    settings: dict[str, object]


def is_outcome(path: Path) -> bool:
    return (path / METRICS_FOLDER / METRICS).is_file()


def outcome_folders(names: Sequence[str]) -> list[Path] | None:
    """The folders of measurements that the arguments of `compare` name; None if they name studies.

    Raises StudyError for measurements and studies together.
    """
    found: list[list[Path]] = []
    for path in map(Path, names):
        below = sorted(each for each in path.glob("*/") if is_outcome(each))
        below.sort(key=lambda each: each.name != NO_ADAPTER)  # the model itself comes first
        found.append([path] if is_outcome(path) else below)
    if not any(found):
        return None
    for name, folders in zip(names, found, strict=True):
        if not folders:
            raise StudyError(
                f"{name} holds no finished measurement of `ebbline evaluate`, and the others do; "
                "compare measurements with measurements, or studies with studies"
            )
    return list(dict.fromkeys(folder for folders in found for folder in folders))


def compare_measured(folders: Sequence[Path], as_json: bool) -> None:
    """Print the comparison of measurements. Raises StudyError if they cannot be compared."""
    if len(folders) < 2:
        raise StudyError(
            f"{folders[0]} is one measurement; give another one to compare it with, such as that "
            "of the model itself, which `ebbline evaluate` measures without --no-baseline"
        )
    first, *others = _outcomes(folders)
    rows = _compared(first, others)
    if as_json:
        found = [
            {
                "before": first.label,
                "after": other.label,
                "not_comparable": reason or None,
                "metrics": {name: comparison_json(each) for name, each in comparisons.items()},
            }
            for other, reason, comparisons in rows
        ]
        print(json.dumps({"comparisons": found}, indent=1))
        return
    for other, reason, comparisons in rows:
        print(f"{other.label} against {first.label}")
        if reason:
            print(f"  not comparable: {reason}; intervals only")
        for name, each in comparisons.items():
            before = f"{first.label} {short_label(each.before)}"
            after = f"{other.label} {short_label(each.after)}"
            print(f"  {directed_label(name)}: {before}; {after}; {moved_label(each)}")
        print()
    print(meaning([each for _, _, comparisons in rows for each in comparisons.values()]))


def _outcomes(folders: Sequence[Path]) -> list[Outcome]:
    names = [folder.resolve().name for folder in folders]
    return [
        _outcome(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _outcome(folder: Path, label: str) -> Outcome:
    metrics = {metric.name: metric for metric in read_metrics(folder / METRICS_FOLDER)}
    asked = folder / GenerateSpec.KIND
    stages = [path for path in (asked, folder / METRICS_FOLDER) if _has(path)]
    marks = [_spec_of(path) for path in stages]
    prompts = _read((asked if _has(asked) else folder / METRICS_FOLDER) / GenerateSpec.PROMPTS)
    settings: dict[str, object] = {
        name: value
        for spec in marks
        for name, value in spec.items()
        if name not in (*MODEL_FIELDS, "tokenizer")
    }
    settings["prompts"] = {name: each for name, each in prompts.items() if name != "chat"}
    return Outcome(label, metrics, read_samples(folder / METRICS_FOLDER), settings)


def _has(stage: Path) -> bool:
    return (stage / DONE).is_file()


def _spec_of(stage: Path) -> dict[str, Any]:
    """The settings of a finished stage. Raises StudyError if its files were changed afterwards."""
    mark = _read(stage / DONE)
    files = files_of(stage)
    if mark.get(FILES, files) != files:
        raise StudyError(
            f"{stage} was changed since it was measured; remove it, and measure it again with "
            "`ebbline evaluate`"
        )
    found: dict[str, Any] = mark.get("spec", {})
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{path} cannot be read ({type(error).__name__}); measure it again with `ebbline "
            "evaluate`"
        ) from None
    return found if isinstance(found, dict) else {}


def _compared(
    first: Outcome, others: Sequence[Outcome]
) -> list[tuple[Outcome, str, dict[str, Comparison]]]:
    """(other outcome, why it cannot be paired with the first, metric -> comparison).

    All comparisons are one family: their p-values are corrected together.
    """
    reasons = [
        dict(unlike_suites({"": first.settings}, {"": other.settings})).get("", "")
        for other in others
    ]
    places = [
        (index, name)
        for index, other in enumerate(others)
        for name in _shared_metrics(first, other)
    ]
    pairs = [
        (_measurement(first, name, reasons[at]), _measurement(others[at], name, reasons[at]))
        for at, name in places
    ]
    found = dict(zip(places, compared(pairs), strict=True))
    return [
        (
            other,
            reasons[index],
            {name: found[at, name] for at, name in places if at == index},
        )
        for index, other in enumerate(others)
    ]


def _shared_metrics(before: Outcome, after: Outcome) -> list[str]:
    names = [name for name in before.metrics if name in after.metrics]
    if not names:
        raise StudyError(
            f"{after.label} measures {', '.join(after.metrics)}, and {before.label} "
            f"{', '.join(before.metrics)}; compare measurements of one suite"
        )
    return names


def _measurement(outcome: Outcome, name: str, reason: str) -> Measurement:
    """A metric with its samples; without them if they do not decide it, or cannot be paired."""
    paired = name in SHARES and not reason
    return Measurement(outcome.metrics[name], {0: outcome.samples} if paired else {})
