"""Remembers what a study's outputs were made of, so that unchanged ones are not made again.

    HOME/studies/NAME/outputs.cache     what they were made of, and the stamps of the files

The file can be deleted at any time. It is removed before an output is written, and written after
the last. So a command that is killed in between leaves none, and the next makes all outputs.

    what changes                                     how it is noticed
    a point, a control, a cost, a pick, a label,     the digest of all of these
    the plan, the profile, the code, a package
    a file of the store that an output was made of   its stamp (device, inode, size and times)
    an output was edited or deleted                  its stamp

A run that starts no job lengthens the hours of driving, and nothing else that an output shows. The
outputs get its hours when they are next made.
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ebbline.analysis.report.provenance import build, packages
from ebbline.analysis.results.picks.choices import FILE as PICKED
from ebbline.sweeps.forecast.prediction import NAME as PLANS
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.state.result_cache import code_digest
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.files import write_whole
from ebbline.tasks.identity import digest, stamp_of

NAME = "outputs.cache"
ANALYSIS = Path(__file__).parents[1]
# Beside those whose versions the report shows
DRAWING = (
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "scipy",
    "statsmodels",
    "Jinja2",
)


@dataclass(frozen=True)
class Made:
    """The outputs of a study, as of the last command that made all of them. `of` is the digest by
    `made_of`; empty when it is not known, and then nothing is remembered.
    """

    folder: Path
    of: str

    def unchanged(self) -> dict[str, Path] | None:
        """Name -> path of each output to print, in order; None when they must be made."""
        try:
            found = json.loads((self.folder / NAME).read_text("utf-8"))
            named = {name: self.folder / file for name, file in found["printed"].items()}
            same = found["of"] == self.of and all(
                stamp_of(self.folder / path) == stamp for path, stamp in found["stamps"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # absent or damaged, or a file is gone
        return named if same else None

    def begin(self) -> None:
        """Forget the last outputs: from now on they may be replaced."""
        (self.folder / NAME).unlink(missing_ok=True)

    def end(
        self, printed: Mapping[str, Path], written: Iterable[Path], read: Mapping[Path, str]
    ) -> None:
        """Remember that every output was made: the `written` files, from the `read` ones, which
        have the stamps as of their reading.
        """
        stamps = {path.name: stamp_of(path) for path in written}
        stamps |= {str(path.absolute()): stamp for path, stamp in read.items()}
        kept = {
            "of": self.of,
            "printed": {name: path.name for name, path in printed.items()},
            "stamps": stamps,
        }
        text = json.dumps(kept, indent=1)
        with suppress(OSError):  # it only saves time
            write_whole(self.folder / NAME, lambda path: path.write_text(text, "utf-8"))


def made_of(
    view: StudyView,
    results: Sequence[Result],
    controls: Sequence[ControlResult],
    code: Sequence[Path] = (),
) -> str:
    """A digest of everything that the outputs show, without the contents of the store, which never
    change under a key. `code` are further files of the program that make them.
    """
    folder = view.folder
    spent = replace(read_spent(folder), driving_s=0.0, keys=frozenset())
    own = [path for path in sorted(ANALYSIS.rglob("*")) if path.suffix in (".py", ".html", ".bib")]
    labels = sorted((folder / "labels").glob("*.json"))
    files = [folder / PICKED, folder / PLANS, folder / "plan.svg", *labels]
    return digest(
        {
            "study": view.study.model_dump(mode="json"),
            "profile": view.home.profile.model_dump(mode="json"),
            "results": _points(results),
            "controls": _points([each.result for each in controls]),
            "partners": hashlib.sha256(repr([each.of for each in controls]).encode()).hexdigest(),
            "spent": repr(spent),
            "files": {path.name: _sha256(path) for path in files},
            "code": code_digest(),
            "analysis": [_sha256(path) for path in [*own, *code]],
            "build": str(build()),
            "packages": {**packages(), **packages(DRAWING), "python": platform.python_version()},
        }
    )


def _points(results: Sequence[Result]) -> str:
    found = hashlib.sha256()
    for each in results:
        found.update(repr(each).encode())
        # A metric's own text leaves out the undecided samples of each seed
        found.update(repr([metric.seeds_undecided for metric in each.metrics.values()]).encode())
        # The costs' own text leaves out where their stages ran
        found.update(repr([cost.origin for cost in each.costs.values()]).encode())
    return found.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
