"""Exports a study for a paper to one folder: figures, tables, data, methods, references, bundle.

Invariants: the folder is complete or absent, and comes from one export. It is replaced only if it
is an unchanged export of the same study from the same home. On one machine the same results give
the same bytes. It holds no prompt, completion or path of this machine.
"""

import glob
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from ebbline.analysis.figures.drawing import Page, save_for_print
from ebbline.analysis.figures.frontier import frontier_figure
from ebbline.analysis.figures.knob import threshold_figure
from ebbline.analysis.paper.bundle import ContentToBring, write_bundle
from ebbline.analysis.paper.citations import EBBLINE, PAPERS, bibliography, cited
from ebbline.analysis.paper.evidence import evidence_card
from ebbline.analysis.paper.latex import (
    before_after_frame,
    before_after_table,
    frontier_table,
    in_latex,
)
from ebbline.analysis.paper.methods import methods
from ebbline.analysis.report.provenance import Provenance, provenance
from ebbline.analysis.results.claims.family import family
from ebbline.analysis.results.collect import (
    StoredEvidence,
    baselines,
    collect,
    costs_before,
    keys_before,
)
from ebbline.analysis.results.controls.means import collect_controls
from ebbline.analysis.results.measurements import Baselines, refusal_metric, usefulness_metric
from ebbline.analysis.results.picks.choices import chosen
from ebbline.analysis.results.tables import results_frame, write_csv, write_tables
from ebbline.analysis.results.wording import plain_markdown, without_paths
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.drive.live import host_names
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.reading.overlaps import Shared, contamination
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.files import write_whole
from ebbline.tasks.identity import folder_files

MARK = "export.json"
_log = logging.getLogger(__name__)
Style = Literal["neurips", "acl"]
PAGES: Mapping[Style, Mapping[str, Page]] = {
    "neurips": {"": Page(width=5.5, text_pt=8.5)},  # neurips_2024.sty: the text is 5.5 inches wide
    "acl": {
        "": Page(width=3.03, text_pt=7.5),
        "-wide": Page(width=6.3, text_pt=8.5),
    },  # acl.sty: columns are 7.7 cm wide, the text 16 cm
}


@dataclass(frozen=True)
class Export:
    """A written export: its files, the content to bring for its bundle, and counts of points."""

    folder: Path
    files: tuple[str, ...]
    bring: tuple[ContentToBring, ...]
    points: Mapping[str, int]


@dataclass(frozen=True)
class ExportData:
    """The data of an export, read once."""

    study: Study
    results: Sequence[Result]
    baselines: Baselines
    provenance: Provenance
    before: Mapping[str, Cost]
    picked: Sequence[Result] = ()
    shared: Sequence[Shared] = ()
    measured_before: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    controls: Sequence[ControlResult] = ()
    tests: int = 0  # of the family of all comparisons (ebbline.analysis.results.claims.family)


def write_export(view: StudyView, to: Path, styles: Sequence[Style]) -> Export:
    """Writes the export of a study's results so far.

    Raises StudyError when no point is finished or the study was not run here with these
    settings. Raises it also when `to` holds anything except an earlier export of the study.
    """
    study, home = view.study, view.home
    _restore_interrupted(to.resolve())
    if not home.has_run(study.study):
        raise StudyError(
            f"{study.study!r} has not been run in {home.root}. Run it first, or name its --home"
        )
    _check_free(study, home, to)
    data = _read(view)
    fresh = to.resolve().with_name(f".{to.resolve().name}.{os.getpid()}")
    try:
        bring = _write(data, home, fresh, styles)
        files = _mark(data, home, fresh, styles)
        _put_in_place(fresh, to.resolve())
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Export(
        to, (*files, MARK), tuple(bring), Counter(result.status for result in data.results)
    )


def _read(view: StudyView) -> ExportData:
    view.begun_as()
    results = collect(view)
    if not any(result.status == "done" for result in results):
        raise StudyError(
            f"no point of {view.study.study!r} has finished in {view.home.root}, so there is "
            "nothing to export; `ebbline status` shows its progress"
        )
    controls = collect_controls(view, results)
    before = baselines(view)
    return ExportData(
        view.study,
        results,
        before,
        provenance(view, [*results, *(each.result for each in controls)]),
        costs_before(view),
        chosen(results, view.folder),
        list(contamination(view)),
        keys_before(view),
        controls,
        family(view.study, results, before, StoredEvidence(view), controls).size,
    )


def _check_free(study: Study, home: Home, to: Path) -> None:
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    try:
        mark = json.loads((to / MARK).read_text("utf-8"))
        name, of, files = mark["study"], mark["home"], dict(mark["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StudyError(
            f"{to} already exists and is not an export of ebbline; name a new folder with --to"
        ) from None
    if (name, of) != (study.study, home.id):
        raise StudyError(
            f"{to} holds an export of the study "
            f"{name!r}{'' if name != study.study else ' from another home'};"
            " name another folder with --to, or remove this one"
        )
    now = {path: digest for path, digest in folder_files(to).items() if path != MARK}
    touched = sorted(path for path in {*now, *files} if now.get(path) != files.get(path))
    if touched:
        more = f" and {len(touched) - 5} more" if len(touched) > 5 else ""
        raise StudyError(
            f"{to} was changed after the export ({', '.join(touched[:5])}{more}), and its files "
            "would be replaced;"
            " move your files elsewhere, or name another folder with --to"
        )


def _put_in_place(fresh: Path, to: Path) -> None:
    """Replaces an earlier export by the new one; restores the earlier one if that fails."""
    to.parent.mkdir(parents=True, exist_ok=True)
    old = to.with_name(f"{fresh.name}.old")
    if to.exists():
        to.rename(old)
    try:
        fresh.rename(to)
    except BaseException:
        if old.exists() and not to.exists():
            old.rename(to)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore_interrupted(to: Path) -> None:
    """Repairs what a kill between the two renames of _put_in_place left.

    The earlier export gets its name back, with a warning; if a new export exists, the earlier one
    is removed. A folder whose process is alive belongs to an export in progress.
    """
    for old in sorted(to.parent.glob(f".{glob.escape(to.name)}.*.old")):
        process = old.name.removeprefix(f".{to.name}.").removesuffix(".old")
        if not process.isdecimal() or _is_alive(int(process)) or not (old / MARK).is_file():
            continue
        if to.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(to)
            _log.warning(
                "an export was killed while it replaced %s; the earlier export was restored",
                to,
            )


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _write(
    data: ExportData, home: Home, folder: Path, styles: Sequence[Style]
) -> list[ContentToBring]:
    for style in styles:
        _write_style(data, folder / style, style)
    _write_data(data, home, folder / "data")
    spent = read_spent(home.path(data.study.study))
    text = methods(
        data.study,
        data.results,
        data.baselines,
        data.provenance,
        data.before,
        spent,
        home.profile,
        data.shared,
        data.tests,
    )
    card = evidence_card(
        data.study,
        data.results,
        data.baselines,
        data.provenance,
        data.shared,
        data.measured_before,
        data.controls,
        data.tests,
    )
    write_whole(folder / "evidence.md", lambda path: path.write_text(card, "utf-8"))
    keys = list(dict.fromkeys([EBBLINE, *PAPERS, *cited(text)]))
    references = bibliography(keys, data.provenance.pins, data.provenance.build)
    write_whole(folder / "methods.md", lambda path: path.write_text(text, "utf-8"))
    write_whole(folder / "methods.tex", lambda path: path.write_text(in_latex(text), "utf-8"))
    write_whole(folder / "references.bib", lambda path: path.write_text(references, "utf-8"))
    bring = write_bundle(data.study, home, data.results, data.provenance.build, folder / "bundle")
    write_whole(
        folder / "README.md",
        lambda path: path.write_text("\n".join(_readme(data, styles)) + "\n", "utf-8"),
    )
    return bring


def _write_style(data: ExportData, folder: Path, style: Style) -> None:
    study, results = data.study, data.results
    drawn = [name for name in (refusal_metric(study), usefulness_metric(study)) if name is not None]
    for suffix, page in PAGES[style].items():
        save_for_print(
            frontier_figure(results, study.objectives, data.baselines, page, data.picked),
            folder,
            f"frontier{suffix}",
            page,
        )
        thresholds = threshold_figure(results, drawn, data.baselines, page)
        if thresholds is not None:
            save_for_print(thresholds, folder, f"thresholds{suffix}", page)
    narrow = PAGES[style][""].narrow
    tables = {
        "frontier.tex": frontier_table(study, results, narrow),
        "before-after.tex": before_after_table(study, results, data.baselines, narrow),
    }
    for name, text in tables.items():
        write_whole(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))


def _write_data(data: ExportData, home: Home, folder: Path) -> None:
    frame = results_frame(data.results, data.study.objectives, home.profile)
    hosts = host_names(home.path(data.study.study))
    frame["reason"] = (
        frame["reason"].map(lambda reason: without_paths(reason, hosts)).astype("string")
    )
    write_tables(frame, folder)
    compared = before_after_frame(data.study, data.results, data.baselines)
    write_whole(
        folder / "before_after.csv",
        lambda path: write_csv(compared, path),
    )
    write_whole(
        folder / "before_after.parquet", lambda path: compared.to_parquet(path, index=False)
    )


def _mark(data: ExportData, home: Home, folder: Path, styles: Sequence[Style]) -> list[str]:
    """Writes export.json last, with the digests of all files; returns the files."""
    files = folder_files(folder)
    mark = {
        "study": data.study.study,
        "study_sha256": data.provenance.study_sha256,
        "home": home.id,
        "ebbline": str(data.provenance.build),
        "styles": list(styles),
        "points": dict(sorted(Counter(result.status for result in data.results).items())),
        "files": files,
    }
    write_whole(
        folder / MARK, lambda path: path.write_text(json.dumps(mark, indent=1) + "\n", "utf-8")
    )
    return list(files)


def _readme(data: ExportData, styles: Sequence[Style]) -> Iterator[str]:
    yield f"# {data.study.study}, exported for a paper"
    yield ""
    yield plain_markdown(data.study.question)
    yield ""
    for style in styles:
        figure = (
            "frontier and thresholds as PDF, SVG and PNG, one column wide (-wide: the "
            "whole text, for figure*)"
            if len(PAGES[style]) > 1
            else "frontier and thresholds as PDF, SVG and PNG, as wide as the text"
        )
        yield f"- `{style}/`: {figure}; frontier.tex and before-after.tex, tables to \\input"
    yield (
        "- `data/`: results, frontier and before_after as CSV and Parquet; a metric's `_low` "
        "and `_high` are its 95% interval"
    )
    yield "- `methods.md`, and `methods.tex` to \\input: the methods, from the records"
    yield "- `evidence.md`: one page on what the claims rest on, each line with the keys behind it"
    yield "- `references.bib`: what methods.md cites"
    yield ("- `bundle/`: reruns the study and compares the outcome; see its README.md")
    yield (
        "- `export.json`: the digests of these files. `ebbline export` replaces the folder "
        "only if they are unchanged"
    )
    yield ""
    yield "In LaTeX, include figures at their own size, so that letters keep their size:"
    yield ""
    yield "    \\usepackage{booktabs,graphicx,url}"
    yield f"    \\includegraphics{{{styles[0]}/frontier.pdf}}"
    yield f"    \\input{{{styles[0]}/frontier}} \\input{{methods}} \\bibliography{{references}}"
