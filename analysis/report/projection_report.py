"""The report of a projection: one HTML file with what was projected, why, and what was
measured of every module; figures beside it.

Invariants: it asks for nothing from outside; it shows no absolute path but one in `settings`; the
same input gives the same bytes.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ebbline.analysis.figures.drawing import save
from ebbline.analysis.figures.projection import cosine_map, share_figure
from ebbline.analysis.report.page import shown_cosines, shown_shares, template
from ebbline.analysis.results.wording import natural, percent, without_paths
from ebbline.tasks.defences import words
from ebbline.tasks.defences.gate import ModuleRow, ProjectedRows, cosines_by_module
from ebbline.tasks.files import write_whole

MOST_MAPS = 8


def write_projection_report(
    path: Path,
    adapters: Mapping[str, ProjectedRows],
    settings: Mapping[str, object],
    notes: Sequence[str],
    thresholds: Sequence[float] = (),
) -> dict[str, Path]:
    """The report at `path` and, as STEM-MAPS and STEM-share beside it, its figures, with MAPS of
    ebbline.tasks.defences.words; what -> where, the report first.

    `settings` are rows of a label and a value, `notes` warnings, `thresholds` those that were used:
    dotted lines. Modules are drawn for the first MOST_MAPS adapters. Raises ValueError without
    adapters, or when one has no module.
    """
    named = dict(
        zip(
            _distinct([_name(label.rstrip("/")) for label in adapters]),
            adapters.values(),
            strict=True,
        )
    )
    curves = {label: adapter.rows for label, adapter in named.items()}
    share = share_figure(curves, thresholds)
    maps = {
        label: cosine_map(adapter.rows, adapter.projected, label)
        for label, adapter in list(named.items())[:MOST_MAPS]
    }
    page = template("report/projection_template.html").render(
        settings=settings,
        notes=[without_paths(note) for note in notes],
        sentences=[projection_sentence(label, adapter) for label, adapter in named.items()],
        figures=[
            *(
                shown_cosines(figure, label, named[label].rows, named[label].projected)
                for label, figure in maps.items()
            ),
            shown_shares(
                share, f"{len(named)} adapters" if len(named) > 1 else next(iter(named)), curves
            ),
        ],
        left_out=len(named) - len(maps),
        drawn=len(maps),
        modules={label: _module_rows(adapter) for label, adapter in named.items()},
    )
    written = {"report": write_whole(path, lambda fresh: fresh.write_text(page, "utf-8"))}
    for name, figure in zip(
        [*_file_names(list(maps)), "share"], [*maps.values(), share], strict=True
    ):
        for file in save(figure, path.parent, f"{path.stem}-{name}"):
            written[f"{name}{file.suffix}"] = file
    return written


def projection_sentence(label: str, adapter: ProjectedRows) -> str:
    """One adapter's projection in words."""
    total, taken = len(adapter.rows), len(adapter.projected)
    text = f"{label}: {taken} of {total} modules projected ({percent(taken / total)})."
    return text + words.spread_sentence(adapter.rows)


def _module_rows(adapter: ProjectedRows) -> list[tuple[str, str, str, str]]:
    """Name, value, norm ratio and what became of each module, in natural order."""
    known = cosines_by_module(adapter.rows)
    return [
        (
            module,
            _decimals(known.get(module)),
            _decimals(row.norm_ratio),
            _outcome(row, module in adapter.projected, module in known),
        )
        for module, row in sorted(adapter.rows.items(), key=lambda item: natural(item[0]))
    ]


def _outcome(row: ModuleRow, taken: bool, known: bool) -> str:
    if taken:
        return "projected"
    return "not projected" if known else f"{words.NO_QUANTITY}: {without_paths(row.reason)}"


def _decimals(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _name(label: str) -> str:
    """A folder's own name, without where it lies."""
    return label.rpartition("/")[2] if label.startswith("/") else label


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where one was there before."""
    distinct: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        distinct.append(
            next(tried for tried in itertools.chain([name], numbered) if tried not in distinct)
        )
    return distinct


def _file_names(labels: Sequence[str]) -> list[str]:
    """`words.MAPS`, or with several adapters that and a name, which holds nothing that a file name
    may not.
    """
    if len(labels) == 1:
        return [words.MAPS]
    return _distinct(
        [
            f"{words.MAPS}-{re.sub(r'[^A-Za-z0-9._=-]+', '-', label).strip('-.') or 'adapter'}"
            for label in labels
        ]
    )
