"""Where a study's numbers come from: the study itself, its models and data with their pins, the
software, the seeds, the hardware.

Invariants: of a path only its last part is told, and of machines their number and kind; what is not
known is said to be unknown.
"""

import json
import platform
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import NamedTuple

from ebbline.analysis.results.collect import SuitePrompts, artifacts_behind, prompt_sets
from ebbline.analysis.results.wording import natural
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.state.racing import races
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.references import DataRef, Hub, Local
from ebbline.sweeps.study.study import Study, lasting, references
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
NAMELESS = {"cpu": "CPU", "cuda": "GPU of an unknown type"}  # by a record's device
SOURCE = Path(__file__).resolve().parents[2]


class ProvenanceRow(NamedTuple):
    """A line of the table: the group it stands in, what it is about, and what is known."""

    group: str
    label: str
    value: str


@dataclass(frozen=True)
class Pin:
    """Content from outside: `where` the study file names it ("models.7b.aligned.hub"), and what
    holds it fixed.

    `name` is ORG/NAME on the hub, or a local file's or folder's last part; `file` one file of a hub
    repository.
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
    """This ebbline: its version, and its commit when it runs from a git checkout or was installed
    from one; `changed` when files differ.
    """

    version: str
    commit: str | None = None
    changed: bool = False

    def __str__(self) -> str:
        commit = self.commit or "unknown (neither a git checkout nor installed from one)"
        return (
            f"{self.version}, commit "
            f"{commit}{', with changes that are not committed' if self.changed else ''}"
        )


@dataclass(frozen=True)
class Hardware:
    """Stages of one kind on one sort of device. `gpu_type` is None where Ray named none, as for
    logical GPUs and CPUs.

    `hosts` are the machines' names, for those who run them; `most_gpus` is the largest gang.
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
    """`made` says where the study file names models that ebbline makes itself, and what they are;
    `stage_versions` maps the kinds of the stages behind the results to the versions of their
    meaning that are part of their keys.
    """

    study_sha256: str
    seeds: tuple[int, ...]
    seeds_used: int
    pins: tuple[Pin, ...]
    made: Mapping[str, str]
    prompts: Mapping[str, SuitePrompts]
    build: Build
    python: str
    packages: Mapping[str, str]
    stage_versions: Mapping[str, tuple[int, ...]]
    hardware: tuple[Hardware, ...]
    driving: Mapping[str, str]

    def rows(self) -> list[ProvenanceRow]:
        """The whole as a table, groups in order."""
        return [*self._study(), *self._content(), *self._software(), *self._hardware()]

    def _study(self) -> Iterator[ProvenanceRow]:
        yield ProvenanceRow(
            "Study",
            "study, sha256",
            f"{self.study_sha256} (its settings and pins; not its budget, nor where it ran)",
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
        yield from (ProvenanceRow(group, where, made) for where, made in self.made.items())
        yield from (
            ProvenanceRow(group, pin.where.rpartition(".")[0], str(pin)) for pin in self.pins
        )
        yield from (
            ProvenanceRow(group, f"prompts of {suite}", str(found))
            for suite, found in self.prompts.items()
        )

    def _software(self) -> Iterator[ProvenanceRow]:
        yield ProvenanceRow("Software", "ebbline (of this page)", str(self.build))
        yield ProvenanceRow("Software", "python", self.python)
        yield from (ProvenanceRow("Software", name, found) for name, found in self.packages.items())
        told = [
            f"{kind} {', '.join(map(str, found))}" for kind, found in self.stage_versions.items()
        ]
        yield ProvenanceRow(
            "Software", "versions of the stage kinds", "; ".join(told) or "nothing has run yet"
        )

    def _hardware(self) -> Iterator[ProvenanceRow]:
        if not self.hardware:
            yield ProvenanceRow("Hardware", "ran on", "nothing has run yet")
        yield from (ProvenanceRow("Hardware", each.kind, str(each)) for each in self.hardware)


def provenance(
    view: StudyView, results: Sequence[Result], artifacts: Sequence[Artifact] | None = None
) -> Provenance:
    """What is known of where the results come from, now: software is that of this process, hardware
    that of the stages' records.

    `artifacts` are those behind the results, for a caller who has them already.
    """
    study = view.study
    artifacts = artifacts_behind(view, results) if artifacts is None else artifacts
    return Provenance(
        study_sha256=digest(lasting(study.model_dump(mode="json"))),
        seeds=study.seeds,
        seeds_used=max(map(seeds_of, results), default=0),
        pins=tuple(pins(study)),
        made=dict(made(study)),
        prompts=prompt_sets(view),
        build=build(),
        python=platform.python_version(),
        packages=packages(),
        stage_versions=_versions(artifacts),
        hardware=tuple(hardware(artifacts)),
        driving=_driving(study),
    )


def pins(study: Study) -> Iterator[Pin]:
    """All content from outside that a study names, in the order of its file; a judge behind an
    endpoint has no pin.
    """
    for where, reference in references(study):
        if isinstance(reference, Hub):
            yield Pin(where, reference.id, True, reference.commit, reference.sha256, reference.file)
        else:
            yield Pin(where, _name(reference), False, None, reference.sha256)
    for name, judge in study.judges.items():
        if judge.settings.endpoint is not None:
            said = f"{judge.settings.model} at an endpoint, which may change without notice"
            yield Pin(f"judges.{name}.endpoint", said, False, None, None)


def made(study: Study) -> Iterator[tuple[str, str]]:
    """(where, what) of the models that the study's own stages make, and of the invented
    language.
    """
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
    sets = {"data.pool": study.data.pool, "data.mix": study.data.mix}
    for where, found in sets.items():
        if found is not None and found.language is not None:
            language = True
            yield where, f"{found.language} of the invented language"
    if language:
        yield "language", f"the invented language, made here from seed {study.language}"


def build(source: Path = SOURCE) -> Build:
    """This ebbline. A commit is told only of a checkout that `source` is the top of: never of a
    folder that it happens to lie in.
    """
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
    """Name -> installed version, of those that are."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(artifacts: Sequence[Artifact]) -> list[Hardware]:
    """What the stages that needed a GPU (or a stand-in for one) ran on, by kind, device and type of
    GPU.
    """
    found: dict[tuple[str, str, str | None], list[Artifact]] = defaultdict(list)
    for artifact in artifacts:
        said = artifact.provenance
        if said.get("gpus"):
            found[
                artifact.kind, str(said.get("device", "an unknown device")), said.get("gpu_type")
            ].append(artifact)
    return [
        Hardware(
            kind,
            device,
            gpu_type,
            hosts=tuple(
                sorted({str(each.provenance.get("host", "unknown")) for each in own}, key=natural)
            ),
            most_gpus=max(int(each.provenance["gpus"]) for each in own),
            stages=len(own),
            gpu_s=sum(
                float(each.provenance["seconds"]) * int(each.provenance["gpus"]) for each in own
            ),
        )
        for (kind, device, gpu_type), own in sorted(
            found.items(), key=lambda item: (item[0][0], item[0][1], item[0][2] or "")
        )
    ]


def _versions(artifacts: Sequence[Artifact]) -> dict[str, tuple[int, ...]]:
    counted: dict[str, Counter[int]] = defaultdict(Counter)
    for artifact in artifacts:
        counted[artifact.kind][int(artifact.hashed["version"])] += 1
    return {kind: tuple(sorted(counted[kind])) for kind in sorted(counted)}


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
    """The commit that pip installed from, where it was told one (PEP 610)."""
    try:
        told = json.loads(distribution("ebbline").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return None
    commit = told.get("vcs_info", {}).get("commit_id")
    return None if commit is None else str(commit)


def _driving(study: Study) -> dict[str, str]:
    """How points were chosen and repeated: what the numbers depend on beside the points
    themselves.
    """
    search, policy = study.search, study.replicates
    if search.in_turn:
        order = f"told in turn, {search.effective_window} points in flight"
    else:
        order = "told as points land" + (
            f", at most {search.window} in flight" if search.window else ""
        )
    more = (
        f"{policy.at_least}, and more while it is not certain at {policy.confidence:g} whether "
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
