"""Safe LoRA as a defence, and its gate: the choice of the modules to project, by their cosines.
Imports no torch.

A projection writes one row for each module to a file of its own. So thresholds are chosen, drawn
and swept without reading a weight. Both rules of the gate choose the modules of lowest cosine, so
the number of chosen modules identifies the outcome for an adapter.
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
"""The reasons for a module without a cosine."""


@dataclass(frozen=True)
class ModuleRow:
    """cos(C B A, B A) and ||C B A|| / ||B A|| of one module.

    A module without a cosine is never projected, and `reason` says why.
    """

    cosine: float | None
    norm_ratio: float | None
    reason: str = ""


@dataclass(frozen=True)
class ProjectedRows:
    """The rows of one adapter's modules, and the names of the modules chosen to be projected."""

    rows: Mapping[str, ModuleRow]
    chosen: frozenset[str]


def write_rows(rows: Mapping[str, ModuleRow], path: Path) -> None:
    path.write_text(
        json.dumps(
            {module: asdict(rows[module]) for module in sorted(rows)}, indent=1, allow_nan=False
        )
    )


def read_rows(path: Path) -> dict[str, ModuleRow]:
    """Module -> its row, from a file of `write_rows`."""
    return {module: ModuleRow(**row) for module, row in json.loads(path.read_text()).items()}


def cosines_by_module(rows: Mapping[str, ModuleRow]) -> dict[str, float]:
    """Module -> its cosine. Modules without a cosine are left out."""
    return {name: row.cosine for name, row in rows.items() if row.cosine is not None}


def projected_count(
    ascending: Sequence[float] | Reading, threshold: float | None, modules: int | None
) -> int | None:
    """The number of modules to project, by the ascending cosines of an adapter.

    A threshold projects the modules with cosine <= threshold, as the reference implementation does.
    `modules` projects exactly that many modules of lowest cosine; None when fewer have a cosine.
    Without a rule the number is 0.
    """
    if threshold is not None:
        return bisect.bisect_right(ascending, threshold)
    if modules is not None:
        return modules if modules <= len(ascending) else None
    return 0


def chosen(
    rows: Mapping[str, ModuleRow], threshold: float | None, modules: int | None
) -> frozenset[str]:
    """The modules that `projected_count` counts. Equal cosines are ordered by module name.

    Raises ProjectionError when fewer than `modules` modules have a cosine.
    """
    cosines = cosines_by_module(rows)
    lowest = sorted(cosines, key=lambda name: (cosines[name], name))
    count = projected_count([cosines[name] for name in lowest], threshold, modules)
    if count is None:
        raise ProjectionError(
            f"{modules} modules are to be projected, but the adapter has {len(cosines)} with a "
            "cosine"
        )
    return frozenset(lowest[:count])


def share_steps(rows: Mapping[str, ModuleRow]) -> list[tuple[float, float]]:
    """(cosine, share of all modules that this threshold projects) at each distinct cosine,
    ascending.
    """
    ascending = sorted(cosines_by_module(rows).values())
    steps = {value: projected_count(ascending, value, None) or 0 for value in ascending}
    return [(value, count / len(rows)) for value, count in steps.items()]


def chosen_by(rows: Mapping[str, ModuleRow], spec: ApplySpec) -> frozenset[str]:
    """The modules that a Spec projects. Raises ProjectionError as `chosen` does."""
    return chosen(rows, spec.threshold, spec.modules)


class SafeLora(Defence):
    """Safe LoRA (arXiv 2405.16833). An outcome is each adapter's number of projected modules."""

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
        cosines = cosines_by_module(read_rows(file(ProjectSpec.COSINES)))
        return np.sort(np.array(list(cosines.values()), dtype=np.float64))

    def is_possible(self, knobs: Mapping[str, Setting]) -> bool:
        return None in _rules(knobs)

    def is_off(self, knobs: Mapping[str, Setting]) -> bool:
        return _rules(knobs) == (None, None)

    def outcome(self, knobs: Mapping[str, Setting], adapters: Sequence[Reading]) -> Outcome | None:
        threshold, modules = _rules(knobs)
        if not self.is_possible(knobs):
            return None
        counts = [projected_count(cosines, threshold, modules) for cosines in adapters]
        possible = tuple(count for count in counts if count is not None)
        return possible if len(possible) == len(counts) else None

    def share(self, outcome: Outcome, adapters: Sequence[Reading]) -> float:
        return sum(outcome) / max(1, sum(len(cosines) for cosines in adapters))

    def edges(self, axis: str, adapters: Sequence[Reading]) -> Sequence[float] | None:
        if axis != self.main_knob:
            return None
        return [float(edge) for edge in np.unique(np.concatenate(adapters))] if adapters else []

    def rules(self, used: Mapping[str, str]) -> Sequence[str]:
        by_number = (
            f"The modules with the lowest cosines were projected, {used['apply.modules']} of them."
            if "apply.modules" in used
            else ""
        )
        by_threshold = (
            "A module was projected when the cosine between its projected and its original "
            f"update was at most the threshold: {used[self.main_knob]}."
        )
        return [by_number, by_threshold] if by_number else [by_threshold]

    def which(self, knobs: Mapping[str, Setting]) -> str:
        threshold, modules = _rules(knobs)
        return (
            f"lowest cosines, {modules} of them"
            if threshold is None
            else f"cosine at or below {threshold:g}"
        )

    def changed(self, measured_file: File, made_file: File) -> tuple[int, int]:
        adapter = self.projected_rows(measured_file, made_file)
        return len(adapter.chosen), len(adapter.rows)

    def projected_rows(self, measured_file: File, made_file: File) -> ProjectedRows:
        """The rows and the projected modules of one adapter, from the files of both stages."""
        names: list[str] = json.loads(made_file(ApplySpec.CHOSEN).read_text())
        return ProjectedRows(read_rows(measured_file(ProjectSpec.COSINES)), frozenset(names))


def _rules(knobs: Mapping[str, Setting]) -> tuple[float | None, int | None]:
    """The two knobs (threshold, modules); at most one may be set."""
    threshold, modules = knobs["apply.threshold"], knobs["apply.modules"]
    return (
        None if threshold is None else float(threshold),
        None if modules is None else int(modules),
    )


SAFE_LORA = SafeLora()
