"""Safe LoRA as a defence, and its gate: which modules take C B, over cosines that were measured
once. Imports no torch.

What a projection found is a row per module, in a file of its own, so that a threshold is chosen,
drawn or swept without reading a weight. Both rules of the gate take the lowest cosines first, so of
one adapter an outcome is known by how many modules it takes.
"""

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ebbline.tasks.defences.defence import Defence, File, Outcome, Reading, Setting, Words
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.specs import ApplySpec, ProjectSpec, Spec, SubspaceSpec, TrainSpec

NO_DIRECTION = "base and aligned weights are equal"
NO_UPDATE = "the update is zero"
"""Why a module has no cosine."""


@dataclass(frozen=True)
class ModuleRow:
    """cos(C B A, B A) and ||C B A|| / ||B A|| of one module; or the `reason` why it has no cosine
    and is never projected.
    """

    cosine: float | None
    norm_ratio: float | None
    reason: str = ""


@dataclass(frozen=True)
class ProjectedRows:
    """What was measured of one adapter, module by module, and which modules took their
    projection.
    """

    rows: Mapping[str, ModuleRow]
    taken: frozenset[str]


def write_rows(rows: Mapping[str, ModuleRow], path: Path) -> None:
    path.write_text(
        json.dumps(
            {module: asdict(rows[module]) for module in sorted(rows)}, indent=1, allow_nan=False
        )
    )


def read_rows(path: Path) -> dict[str, ModuleRow]:
    """Module -> its row, from a file that `write_rows` wrote."""
    return {module: ModuleRow(**row) for module, row in json.loads(path.read_text()).items()}


def known_cosines(rows: Mapping[str, ModuleRow]) -> dict[str, float]:
    """Module -> its cosine, of the modules that have one."""
    return {name: row.cosine for name, row in rows.items() if row.cosine is not None}


def taken_count(
    ascending: Sequence[float] | Reading, threshold: float | None, modules: int | None
) -> int | None:
    """How many modules take C B, those of lowest cosine: cosine <= threshold (as the reference
    does), or exactly n; with neither, none.

    None when fewer than n modules have a cosine.
    """
    if threshold is not None:
        return bisect.bisect_right(ascending, threshold)
    if modules is not None:
        return modules if modules <= len(ascending) else None
    return 0


def chosen(
    rows: Mapping[str, ModuleRow], threshold: float | None, modules: int | None
) -> frozenset[str]:
    """The modules that `taken_count` counts; of equal cosines the first by name. Raises
    ProjectionError when fewer than n modules have a cosine.
    """
    known = known_cosines(rows)
    lowest = sorted(known, key=lambda name: (known[name], name))
    count = taken_count([known[name] for name in lowest], threshold, modules)
    if count is None:
        raise ProjectionError(
            f"{modules} modules are to be projected, but the adapter has {len(known)} that can be"
        )
    return frozenset(lowest[:count])


def share_steps(rows: Mapping[str, ModuleRow]) -> list[tuple[float, float]]:
    """(cosine, share of all modules that a threshold there takes), at each distinct cosine,
    ascending.
    """
    ascending = sorted(known_cosines(rows).values())
    steps = {value: taken_count(ascending, value, None) or 0 for value in ascending}
    return [(value, count / len(rows)) for value, count in steps.items()]


def chosen_by(rows: Mapping[str, ModuleRow], spec: ApplySpec) -> frozenset[str]:
    return chosen(rows, spec.threshold, spec.modules)


class SafeLora(Defence):
    """Safe LoRA (arXiv 2405.16833). An outcome is how many modules of each adapter take C B."""

    measures = ProjectSpec
    makes = ApplySpec
    kinds = (SubspaceSpec.KIND, ProjectSpec.KIND, ApplySpec.KIND)
    main_knob = "apply.threshold"
    words = Words(
        name="Safe LoRA",
        share="projected_share",
        knob="projection threshold (cosine)",
        short_knob="threshold (cosine)",
        along="projection threshold",
        against="Against the projection threshold: modules whose cosine is at or below it are "
        "projected.",
    )

    def shared(self, settings: Spec, train: TrainSpec) -> Spec | None:
        energy: float | None = ProjectSpec.model_validate(settings).energy
        if energy is None:
            return None
        return SubspaceSpec(energy=energy, target_modules=tuple(sorted(train.target_modules)))

    def measured(self, file: File) -> Reading:
        cosines = known_cosines(read_rows(file(ProjectSpec.COSINES)))
        return np.sort(np.array(list(cosines.values()), dtype=np.float64))

    def is_possible(self, knobs: Mapping[str, Setting]) -> bool:
        return None in _rules(knobs)

    def is_off(self, knobs: Mapping[str, Setting]) -> bool:
        return _rules(knobs) == (None, None)

    def outcome(self, knobs: Mapping[str, Setting], adapters: Sequence[Reading]) -> Outcome | None:
        threshold, modules = _rules(knobs)
        if not self.is_possible(knobs):
            return None
        counts = [taken_count(each, threshold, modules) for each in adapters]
        known = tuple(count for count in counts if count is not None)
        return known if len(known) == len(counts) else None

    def share(self, outcome: Outcome, adapters: Sequence[Reading]) -> float:
        return sum(outcome) / max(1, sum(len(each) for each in adapters))

    def edges(self, axis: str, adapters: Sequence[Reading]) -> Sequence[float] | None:
        if axis != self.main_knob:
            return None
        return [float(edge) for edge in np.unique(np.concatenate(adapters))] if adapters else []

    def rules(self, used: Mapping[str, str]) -> Sequence[str]:
        counted = (
            f"Projected were the modules with the lowest cosines, {used['apply.modules']} of them."
            if "apply.modules" in used
            else ""
        )
        compared = (
            "A module took its projection when the cosine between its projected and its own "
            f"update was at most the threshold: {used[self.main_knob]}."
        )
        return [counted, compared] if counted else [compared]

    def which(self, knobs: Mapping[str, Setting]) -> str:
        threshold, modules = _rules(knobs)
        return (
            f"lowest cosines, {modules} of them"
            if threshold is None
            else f"cosine at or below {threshold:g}"
        )

    def changed(self, measured: File, made: File) -> tuple[int, int]:
        found = self.projected_rows(measured, made)
        return len(found.taken), len(found.rows)

    def projected_rows(self, measured: File, made: File) -> ProjectedRows:
        """What both stages found of one adapter, module by module."""
        taken: list[str] = json.loads(made(ApplySpec.CHOSEN).read_text())
        return ProjectedRows(read_rows(measured(ProjectSpec.COSINES)), frozenset(taken))


def _rules(knobs: Mapping[str, Setting]) -> tuple[float | None, int | None]:
    """The two knobs, of which at most one is to be given."""
    threshold, modules = knobs["apply.threshold"], knobs["apply.modules"]
    return (
        None if threshold is None else float(threshold),
        None if modules is None else int(modules),
    )


SAFE_LORA = SafeLora()
