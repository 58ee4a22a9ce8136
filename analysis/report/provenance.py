"""Where a study's numbers come from: models and data with pins, software, seeds and hardware.

Invariants: of a path only the last part is shown; of machines, their number and type. A value that
is not known is reported as unknown.
"""

import json
import platform
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import NamedTuple

from ebbline.analysis.results.collect import SuitePrompts, costs_before, prompt_sets
from ebbline.analysis.results.costs import stage_costs
from ebbline.analysis.results.wording import natural
from ebbline.cluster.schedule.costs import Cost, Origin
from ebbline.sweeps.state.races.racing import races
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.study.changes import lasting
from ebbline.sweeps.study.pins import references
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.references import DataRef, Hub, Local
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import digest

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "lm-eval",
    "ray",
    "optuna",
    "moocore",
)
NAMELESS = {"cpu": "CPU", "cuda": "GPU of an unknown type"}  # a record's device -> its label
SOURCE = Path(__file__).resolve().parents[2]


class ProvenanceRow(NamedTuple):
    """A row of the provenance table: its group, label and value."""

    group: str
    label: str
    value: str


@dataclass(frozen=True)
class Pin:
    """External content and what fixes its version.

    `where` is its place in the study file ("models.7b.aligned.hub"). `name` is ORG/NAME on the
    hub, or the last part of a local path. `file` is one file of a hub repository.
    """

    where: str
    name: str
    hub: bool
    commit: str | None
    sha256: str | None
    file: str | None = None

    @property
    def is_model(self) -> bool:
        return self.where.startswith("models.") and ".tuned.data." not in self.where

    def __str__(self) -> str:
        name = f"{self.name}@{self.commit or '(no commit)'}" if self.hub else self.name
        return f"{name}{f', {self.file}' if self.file else ''}, sha256 {self.sha256 or '(none)'}"


@dataclass(frozen=True)
class Build:
    """The version of ebbline, and its commit if known.

    The commit is known in a git checkout or an installation from one. `changed` is True if files
    differ from the commit.
    """

    version: str
    commit: str | None = None
    changed: bool = False

    def __str__(self) -> str:
        commit = self.commit or "unknown (neither a git checkout nor installed from one)"
        return (
            f"{self.version}, commit {commit}{', with uncommitted changes' if self.changed else ''}"
        )


@dataclass(frozen=True)
class Hardware:
    """Stages of one kind on one type of device.

    `gpu_type` is None if Ray reports none, as for logical GPUs and CPUs. `hosts` are the machines'
    names and are not shown. `most_gpus` is the size of the largest gang.
    """

    kind: str
    device: str
    gpu_type: str | None
    hosts: tuple[str, ...]
    most_gpus: int
    stages: int
    gpu_s: float

    def __str__(self) -> str:
        gang = f"up to {self.most_gpus} at once, " if self.most_gpus > 1 else ""
        machines = f"{len(self.hosts)} machine{'s' if len(self.hosts) != 1 else ''}"
        stages = f"{self.stages} stage{'s' if self.stages != 1 else ''}"
        return (
            f"{self.gpu_type or NAMELESS.get(self.device, self.device)}, {gang}{machines}, {stages}"
        )


@dataclass(frozen=True)
class Provenance:
    """Everything that the results depend on.

    `generated` maps a place in the study file to a description of the model or data that ebbline
    makes there. `stage_versions` maps each stage kind behind the results to the VERSIONs in its
    keys.
    """

    study_sha256: str
    seeds: tuple[int, ...]
    seeds_used: int
    pins: tuple[Pin, ...]
    generated: Mapping[str, str]
    prompts: Mapping[str, SuitePrompts]
    build: Build
    python: str
    packages: Mapping[str, str]
    stage_versions: Mapping[str, tuple[int, ...]]
    hardware: tuple[Hardware, ...]
    driving: Mapping[str, str]

    def rows(self) -> list[ProvenanceRow]:
        """All rows of the table, sorted by group."""
        return [*self._study(), *self._content(), *self._software(), *self._hardware()]

    def _study(self) -> Iterator[ProvenanceRow]:
        yield ProvenanceRow(
            "Study",
            "study, sha256",
            f"{self.study_sha256} (its settings and pins, without its budget and where it ran)",
        )
        used = (
            f" (at most {self.seeds_used} used by a point so far)"
            if self.seeds_used < len(self.seeds)
            else ""
        )
        yield ProvenanceRow("Study", "seeds", ", ".join(map(str, self.seeds)) + used)
        yield from (ProvenanceRow("Study", label, value) for label, value in self.driving.items())

    def _content(self) -> Iterator[ProvenanceRow]:
        group = "Models and data"
        yield from (ProvenanceRow(group, where, text) for where, text in self.generated.items())
        yield from (
            ProvenanceRow(group, pin.where.rpartition(".")[0], str(pin)) for pin in self.pins
        )
        yield from (
            ProvenanceRow(group, f"prompts of {suite}", str(found))
            for suite, found in self.prompts.items()
        )

    def _software(self) -> Iterator[ProvenanceRow]:
        yield ProvenanceRow("Software", "ebbline (that wrote this page)", str(self.build))
        yield ProvenanceRow("Software", "python", self.python)
        yield from (ProvenanceRow("Software", name, found) for name, found in self.packages.items())
        kinds = [
            f"{kind} {', '.join(map(str, found))}" for kind, found in self.stage_versions.items()
        ]
        yield ProvenanceRow(
            "Software", "versions of the stage kinds", "; ".join(kinds) or "nothing has run yet"
        )

    def _hardware(self) -> Iterator[ProvenanceRow]:
        if not self.hardware:
            yield ProvenanceRow("Hardware", "ran on", "nothing has run yet")
        yield from (ProvenanceRow("Hardware", each.kind, str(each)) for each in self.hardware)


def provenance(view: StudyView, results: Sequence[Result]) -> Provenance:
    """The provenance of the results: software of this process, hardware from the stages' records,
    which the results carry.
    """
    study = view.study
    stages = list(stage_costs(results, costs_before(view)).values())
    return Provenance(
        study_sha256=digest(lasting(study.model_dump(mode="json"))),
        seeds=study.seeds,
        seeds_used=max(map(seeds_of, results), default=0),
        pins=tuple(pins(study)),
        generated=dict(generated_content(study)),
        prompts=prompt_sets(view),
        build=build(),
        python=platform.python_version(),
        packages=packages(),
        stage_versions=_versions(stages),
        hardware=tuple(hardware(stages)),
        driving=_driving(study),
    )


def pins(study: Study) -> Iterator[Pin]:
    """All external content that a study names, in file order; a judge at an endpoint has no pin."""
    for where, reference in references(study):
        if isinstance(reference, Hub):
            yield Pin(where, reference.id, True, reference.commit, reference.sha256, reference.file)
        else:
            yield Pin(where, _name(reference), False, None, reference.sha256)
    for name, judge in study.judges.items():
        if judge.settings.endpoint is not None:
            text = f"{judge.settings.model} at an endpoint, which may change without notice"
            yield Pin(f"judges.{name}.endpoint", text, False, None, None)


def generated_content(study: Study) -> Iterator[tuple[str, str]]:
    """(place in the study file, description) of the content that the study's stages make."""
    language = False
    for name, model in study.models.items():
        for role in ("base", "aligned", "unaligned"):
            reference = getattr(model, role)
            if reference is None:
                continue
            if reference.organism is not None:
                language = True
                yield (
                    f"models.{name}.{role}",
                    f"{reference.organism.size} organism, pretrained here from seed "
                    f"{reference.organism.seed}",
                )
            elif reference.tuned is not None:
                start, data = "base" if role == "aligned" else "aligned", reference.tuned.data
                yield (
                    f"models.{name}.{role}",
                    f"fully fine-tuned here from {start}, {data.settings.size} rows of "
                    f"{_source(data.pool)}",
                )
    data = study.data
    sets = {} if data is None else {"data.pool": data.pool, "data.mix": data.mix}
    for where, found in sets.items():
        if found is not None and found.language is not None:
            language = True
            yield where, f"{found.language} of the invented language"
    if language:
        yield "language", f"the invented language, made here from seed {study.language}"


def build(source: Path = SOURCE) -> Build:
    """The running ebbline. The commit is read only if `source` is the top folder of a checkout."""
    try:
        found = version("ebbline")
    except PackageNotFoundError:
        found = "unknown version"
    if (source / ".git").exists() and shutil.which("git"):
        commit, state = (
            _git(source, *command)
            for command in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
        if commit is not None:
            return Build(found, commit, bool(state))
    return Build(found, _installed_from())


def packages(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Name -> version of each installed package."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(stages: Sequence[Cost]) -> list[Hardware]:
    """Where the stages with GPUs (also logical ones) ran, by kind, device and GPU type."""
    found: dict[tuple[str, str, str | None], list[tuple[Origin, Cost]]] = defaultdict(list)
    for stage in stages:
        origin = stage.origin
        if origin is not None and origin.gpus:
            found[origin.kind, origin.device, origin.gpu_type].append((origin, stage))
    return [
        Hardware(
            kind,
            device,
            gpu_type,
            hosts=tuple(sorted({origin.host for origin, _ in own}, key=natural)),
            most_gpus=max(origin.gpus for origin, _ in own),
            stages=len(own),
            gpu_s=sum(3600 * stage.gpu_hours for _, stage in own),
        )
        for (kind, device, gpu_type), own in sorted(
            found.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or "")
        )
    ]


def _versions(stages: Sequence[Cost]) -> dict[str, tuple[int, ...]]:
    found: dict[str, set[int]] = defaultdict(set)
    for origin in {stage.origin for stage in stages if stage.origin is not None}:
        found[origin.kind].add(origin.version)
    return {kind: tuple(sorted(found[kind])) for kind in sorted(found)}


def _name(reference: Hub | Local) -> str:
    if isinstance(reference, Hub):
        return reference.id
    last = Path(reference.path).name
    return f"{last} of the package {reference.package}" if reference.package else last


def _source(reference: DataRef) -> str:
    found = reference.pinned()
    return str(reference.language) if found is None else _name(found)


def _git(source: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(source), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_from() -> str | None:
    """The commit that pip installed from, if direct_url.json has one (PEP 610)."""
    try:
        origin = json.loads(distribution("ebbline").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    commit = origin.get("vcs_info", {}).get("commit_id")
    return None if commit is None else str(commit)


def _driving(study: Study) -> dict[str, str]:
    """How points were chosen and repeated."""
    search, policy = study.search, study.replicates
    if search.in_turn:
        order = f"results reported in turn, {search.effective_window} points in flight"
    else:
        order = "results reported as points finish" + (
            f", at most {search.window} in flight" if search.window else ""
        )
    more = (
        f"{policy.at_least}, and more until it is certain at {policy.confidence:g} whether "
        "another point is better"
    )
    return {
        "search": f"{study.sampler}, seed {search.seed}, {order}",
        "stops when": f"the hypervolume grows by less than {search.stop}"
        if search.stop
        else "it has its points",
        "replicates": "every seed for every point" if policy.policy == "all" else more,
        **{
            f"raced: {suite}": str(race) for suite, race in races(study).items() if race is not None
        },
    }
