"""The output of one measurement of `ebbline evaluate`: its folder, its mark, and how it is printed.
No torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ebbline.analysis.results.wording import metric_label, percent
from ebbline.commands.measured.backend_check import DIFFERENCES
from ebbline.tables import print_table
from ebbline.tasks.headers.files import ADAPTER_CONFIG
from ebbline.tasks.identity import folder_files
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.specs import ScoreSpec

METRICS_FOLDER = "metrics"
DONE = "done.json"  # the mark of a finished stage
FILES = "files"  # the field of the mark with the digests of the measured files
NO_ADAPTER = "model"  # the folder of the model itself


@dataclass(frozen=True)
class Measured:
    """The metrics of one adapter and their folder. `adapter` is empty for the model itself."""

    adapter: str
    folder: Path
    metrics: Mapping[str, Metric]
    # What differs in a tokenizer that was saved beside the adapter and was not used
    unused_beside_adapter: Sequence[str] = ()
    # Every update of the adapter is zero, so these are the metrics of the model itself
    changes_nothing: bool = False
    # The base that the adapter's config names, if it is not the measured model
    other_base: str = ""
    # Rows of the set that repeat the prompt of an earlier row, which is asked once
    repeats: int = 0
    # Completions of a server that differ from transformers'; None if that was not checked
    differing: int | None = None


def files_of(stage: Path) -> dict[str, str]:
    """Name -> digest of each file of a stage, without its mark."""
    return {name: sha for name, sha in folder_files(stage).items() if name != DONE}


def print_measured(measured: Sequence[Measured], as_json: bool, wide: bool = False) -> None:
    if as_json:
        print(json.dumps([_record(each) for each in measured], indent=1))
        return
    columns = ("adapter", "metric", "value", "95% interval", "n", "undecided")
    rows = [_row(each, name, metric) for each in measured for name, metric in each.metrics.items()]
    print_table(columns, rows, wide, right=columns[2:])
    console = Console(markup=False)
    for line in [*(str(each.folder) for each in measured), *_notes(measured)]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _record(each: Measured) -> dict[str, Any]:
    return {
        "adapter": each.adapter,
        "folder": str(each.folder),
        "unused_beside_adapter": list(each.unused_beside_adapter),
        "changes_nothing": each.changes_nothing,
        "other_base": each.other_base,
        "repeats": each.repeats,
        "differing": each.differing,
        "agreement": _agreement(each.folder),
    } | {
        name: {
            **asdict(metric),
            "value": metric.value,
            "low": metric.interval[0],
            "high": metric.interval[1],
        }
        for name, metric in each.metrics.items()
    }


def _agreement(folder: Path) -> object:
    path = folder / METRICS_FOLDER / ScoreSpec.AGREEMENT
    return json.loads(path.read_text()) if path.exists() else None


def _row(each: Measured, name: str, metric: Metric) -> tuple[str, ...]:
    low, high = metric.interval
    return (
        each.folder.name,
        metric_label(name),
        percent(metric.value),
        f"{percent(low)} to {percent(high)}",
        str(metric.n),
        str(metric.undecided),
    )


def _notes(measured: Sequence[Measured]) -> Iterator[str]:
    """What a reader must know beside the numbers."""
    if measured[0].repeats:
        yield (
            f"{measured[0].repeats} rows of the set repeat the prompt of an earlier row; a prompt "
            "is asked and counted once"
        )
    for each in measured:
        if each.differing is not None:
            differ = f"{each.differing}" if each.differing else "none"
            yield (
                f"{each.folder.name}: {differ} of its completions differ from those of "
                f"transformers ({each.folder / DIFFERENCES})"
            )
        if each.changes_nothing:
            yield (
                f"{each.folder.name}: every update B A of this adapter is zero, so this is a "
                "measurement of the model itself; was the adapter trained?"
            )
        if each.other_base:
            yield (
                f"{each.folder.name}: its {ADAPTER_CONFIG} names the base {each.other_base}, which "
                "is another name than that of the measured model; is it the same model?"
            )
        if each.unused_beside_adapter:
            yield (
                f"{each.folder.name}: the tokenizer beside the adapter differs from the model's in "
                f"{', '.join(each.unused_beside_adapter)} and was not used; --tokenizer adapter "
                "uses it"
            )
