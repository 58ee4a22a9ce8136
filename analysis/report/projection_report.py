"""The report of a projection: an HTML file with every module's values, and figures beside it.

Invariants: the page loads nothing from other addresses. It shows no absolute path except those in
`settings`. The same input gives the same bytes.
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
    """Writes the report to `path` and its figures beside it; returns name -> file, report first.

    The figures are STEM-MAPS and STEM-share, with MAPS of ebbline.tasks.defences.words. `settings`
    maps labels to values, `notes` are warnings, and `thresholds` are drawn as dotted lines. Only
    the first MOST_MAPS adapters have a map. Raises ValueError without adapters, or when an adapter
    has no module.
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
        label: cosine_map(adapter.rows, adapter.chosen, label)
        for label, adapter in list(named.items())[:MOST_MAPS]
    }
    page = template("report/projection_template.html").render(
        settings=settings,
        notes=[without_paths(note) for note in notes],
        sentences=[projection_sentence(label, adapter) for label, adapter in named.items()],
        figures=[
            *(
                shown_cosines(figure, label, named[label].rows, named[label].chosen)
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
    """A sentence on one adapter: how many modules were projected, and how their values spread."""
    total, projected = len(adapter.rows), len(adapter.chosen)
    text = f"{label}: {projected} of {total} modules projected ({percent(projected / total)})."
    return text + words.spread_sentence(adapter.rows)


def _module_rows(adapter: ProjectedRows) -> list[tuple[str, str, str, str]]:
    """Name, cosine, norm ratio and outcome of each module, in natural order."""
    cosines = cosines_by_module(adapter.rows)
    return [
        (
            module,
            _decimals(cosines.get(module)),
            _decimals(row.norm_ratio),
            _outcome(row, module in adapter.chosen, module in cosines),
        )
        for module, row in sorted(adapter.rows.items(), key=lambda item: natural(item[0]))
    ]


def _outcome(row: ModuleRow, projected: bool, measured: bool) -> str:
    if projected:
        return "projected"
    return "not projected" if measured else f"{words.NO_QUANTITY}: {without_paths(row.reason)}"


def _decimals(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _name(label: str) -> str:
    """A label; an absolute path is reduced to its last part."""
    return label.rpartition("/")[2] if label.startswith("/") else label


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with -2, -3, ... added to duplicates."""
    distinct: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        distinct.append(
            next(free for free in itertools.chain([name], numbered) if free not in distinct)
        )
    return distinct


def _file_names(labels: Sequence[str]) -> list[str]:
    """`words.MAPS`; with several adapters, followed by each label without characters that are
    invalid in file names.
    """
    if len(labels) == 1:
        return [words.MAPS]
    return _distinct(
        [
            f"{words.MAPS}-{re.sub(r'[^A-Za-z0-9._=-]+', '-', label).strip('-.') or 'adapter'}"
            for label in labels
        ]
    )
