"""`ebbline export`: write a study's results as files for a paper, and compare a bundle's rerun with
the original.
"""

import json
from pathlib import Path
from typing import Literal

from ebbline.analysis.paper.bundle_keys import check_bundle
from ebbline.analysis.paper.export import Export, Style, write_export
from ebbline.outputs import attempts_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import EbblineError, StudyError

BOTH: tuple[Style, ...] = ("neurips", "acl")


def export_study(
    view: StudyView, to: Path, style: Literal["neurips", "acl", "both"], as_json: bool
) -> None:
    """Write the export and list its content."""
    study = view.study
    if edited := view.edited():
        changes = "\n".join(f"  {line}" for line in edited)
        raise StudyError(
            f"{view.source} is not what {study.study!r} was begun with in {view.home.root}:\n"
            f"{changes}\nName the study by its name alone, or run the file first"
        )
    try:
        done = write_export(view, to, BOTH if style == "both" else (style,))
    except EbblineError:
        raise
    except Exception as error:
        attempts = attempts_of(view)
        attempts.note("the export", error)
        raise StudyError(
            f"{attempts.lines()[0]}. Nothing was changed in {to}; the whole reason is in "
            f"{attempts.log}. The tables and the report of the study are not affected"
        ) from error
    if as_json:
        print(json.dumps(_as_json(study, done), indent=1))
        return
    others = ", ".join(
        f"{count} {status}" for status, count in sorted(done.points.items()) if status != "done"
    )
    print(
        f"{study.study}: {done.points['done']} points "
        f"done{f', {others}' if others else ''}; {len(done.files)} files in {done.folder}"
    )
    for name, content in {
        **{
            f"{each}/": "figures and LaTeX tables"
            for each in (BOTH if style == "both" else (style,))
        },
        "data/": "CSV and Parquet",
        "methods.md .tex": "the methods, with citations",
        "evidence.md": "one page on what the claims rest on",
        "references.bib": "the cited works",
        "bundle/": "the files that rerun the study",
    }.items():
        print(f"  {name:16} {content}")
    for each in done.bring:
        print(
            f"not in the bundle: {each.what}, {each.place} (sha256 {each.sha256[:12]}); "
            "a rerun needs a copy of it"
        )
    print(
        f"next: see {done.folder / 'README.md'}; to rerun elsewhere: `ebbline run "
        f"{done.folder / 'bundle' / 'study.yaml'} --home OTHER`"
    )


def _as_json(study: Study, done: Export) -> dict[str, object]:
    return {
        "study": study.study,
        "to": str(done.folder),
        "points": dict(sorted(done.points.items())),
        "files": list(done.files),
        "bring": [
            {"place": each.place, "what": each.what, "sha256": each.sha256, "uses": list(each.uses)}
            for each in done.bring
        ],
    }


def check(bundle: Path, home: Home, as_json: bool) -> int:
    """Print whether a bundle's keys equal those of this home; the exit code is 0 when they do, else
    1.
    """
    found = check_bundle(bundle, home)
    whole = not found.differ and not found.absent
    if as_json:
        print(json.dumps({"same": whole, "stages": vars(found)}, indent=1))
        return 0 if whole else 1
    total = found.same + found.absent + found.differ
    if whole:
        print(
            f"all {total} stages of {found.points} points have the keys of {bundle} and the "
            "same results"
        )
        return 0
    print(
        f"{found.same} of {total} stages are the same, {found.differ} differ, "
        f"{found.absent} are missing here;"
        f" {found.points_same} of {found.points} points have all their keys"
    )
    print(f"the first difference: {found.first}")
    return 1
