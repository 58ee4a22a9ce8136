"""Safe LoRA as a defence: its knobs, their masks and its names. Imports no torch.

The choice of modules is in `gate`, the computation in `projectors`, `subspace` and `project`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ebbline.tasks.defences.defence import Defence, Mask, Setting, Words
from ebbline.tasks.defences.gate import (
    File,
    Reading,
    cosines_by_module,
    projected_count,
    projected_rows,
    read_rows,
)
from ebbline.tasks.defences.methods.safe_lora import ProjectUpdates
from ebbline.tasks.defences.settings import DEFAULT_ENERGY, DEFAULT_THRESHOLD
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.specs import ApplySpec, ProjectSpec, Spec, SubspaceSpec, TrainSpec


class SafeLora(Defence):
    """Safe LoRA (arXiv 2405.16833). A mask is each adapter's number of projected modules."""

    name = ProjectUpdates.name
    method = ProjectUpdates()
    measures = ProjectSpec
    makes = ApplySpec
    measured_input = "projection"
    kinds = (SubspaceSpec.KIND, ProjectSpec.KIND, ApplySpec.KIND)
    main_knob = "apply.threshold"
    words = Words(
        name="Safe LoRA",
        knob="projection threshold (cosine)",
        short_knob="threshold (cosine)",
        along="projection threshold",
        against="Against the projection threshold: modules whose cosine is at or below it are "
        "projected.",
    )

    @property
    def knob_names(self) -> tuple[str, ...]:
        return (*ApplySpec.model_fields, *ProjectSpec.model_fields)

    def axis(self, knob: str) -> str:
        for spec in (ApplySpec, ProjectSpec):
            if knob in spec.model_fields:
                return f"{spec.KIND}.{knob}"
        raise ProjectionError(f"{self.name} has no knob {knob!r}")

    def is_knob(self, axis: str) -> bool:
        return axis.partition(".")[0] == ApplySpec.KIND

    def owns(self, axis: str) -> bool:
        return axis.partition(".")[0] in (ProjectSpec.KIND, ApplySpec.KIND)

    def specs(
        self, fixed: Mapping[str, Setting], largest: Mapping[str, Setting]
    ) -> tuple[Spec, Spec]:
        first = {name: value for name, value in fixed.items() if name in ProjectSpec.model_fields}
        second = {name: value for name, value in fixed.items() if name in ApplySpec.model_fields}
        if not second and not ApplySpec.model_fields.keys() & largest.keys():
            second = {"threshold": DEFAULT_THRESHOLD}
        if "projector" in largest and "energy" in first:  # of the exact one of an axis of both
            first["projector"] = "exact"
        if first.get("projector") == "exact":
            first.setdefault("energy", DEFAULT_ENERGY)
        return ProjectSpec.model_validate(first), ApplySpec.model_validate(second)

    def with_values(
        self, fixed: tuple[Spec, Spec], values: Mapping[str, Setting]
    ) -> tuple[Spec, Spec]:
        first, second = ({**spec.model_dump(), **_of_kind(spec.KIND, values)} for spec in fixed)
        if "project.projector" in values:  # an axis of both: only the exact one has an energy
            exact = first["projector"] == "exact"
            first["energy"] = (first["energy"] or DEFAULT_ENERGY) if exact else None
        return ProjectSpec.model_validate(first), ApplySpec.model_validate(second)

    def checked(self, knob: str, value: Setting) -> None:
        if self.is_knob(self.axis(knob)):
            ApplySpec.model_validate({knob: value})
        elif knob == "energy" or value == "exact":  # the exact projector has both
            exact = {"projector": "exact", "energy": DEFAULT_ENERGY}
            ProjectSpec.model_validate({**exact, knob: value})
        else:
            ProjectSpec.model_validate({knob: value})

    def knobs(self, fixed: Spec, values: Mapping[str, Setting]) -> dict[str, Setting]:
        named = {self.axis(name): getattr(fixed, name) for name in ApplySpec.model_fields}
        return {axis: values.get(axis, value) for axis, value in named.items()}

    def shared(self, settings: Spec, train: TrainSpec) -> Spec | None:
        return subspace_of(ProjectSpec.model_validate(settings), train)

    def reading(self, file: File) -> Reading:
        cosines = cosines_by_module(read_rows(file(ProjectSpec.COSINES)))
        return np.sort(np.array(list(cosines.values()), dtype=np.float64))

    def is_possible(self, knobs: Mapping[str, Setting]) -> bool:
        return None in _rules(knobs)

    def is_off(self, knobs: Mapping[str, Setting]) -> bool:
        return _rules(knobs) == (None, None)

    def mask(self, knobs: Mapping[str, Setting], adapters: Sequence[Reading]) -> Mask | None:
        threshold, modules = _rules(knobs)
        if not self.is_possible(knobs):
            return None
        counts = [projected_count(cosines, threshold, modules) for cosines in adapters]
        possible = tuple(count for count in counts if count is not None)
        return possible if len(possible) == len(counts) else None

    def share(self, mask: Mask, adapters: Sequence[Reading]) -> float:
        return sum(mask) / max(1, sum(len(cosines) for cosines in adapters))

    def edges(self, axis: str, adapters: Sequence[Reading]) -> Sequence[float] | None:
        if axis != self.main_knob:
            return None
        return [float(edge) for edge in np.unique(np.concatenate(adapters))] if adapters else []

    def is_continuous(self, axis: str) -> bool:
        return False

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
        adapter = projected_rows(measured_file, made_file)
        return len(adapter.chosen), len(adapter.rows)


def subspace_of(settings: ProjectSpec, train: TrainSpec) -> SubspaceSpec | None:
    """The exact projector's stage; None for the approximate one."""
    if settings.energy is None:
        return None
    return SubspaceSpec(energy=settings.energy, target_modules=tuple(sorted(train.target_modules)))


def _of_kind(kind: str, values: Mapping[str, Setting]) -> dict[str, Setting]:
    return {
        axis.partition(".")[2]: value
        for axis, value in values.items()
        if axis.startswith(f"{kind}.")
    }


def _rules(knobs: Mapping[str, Setting]) -> tuple[float | None, int | None]:
    """The two knobs (threshold, modules); at most one may be set."""
    threshold, modules = knobs["apply.threshold"], knobs["apply.modules"]
    return (
        None if threshold is None else float(threshold),
        None if modules is None else int(modules),
    )


SAFE_LORA = SafeLora()
