"""Safe LoRA as a defence: its knobs, their masks and its names. Imports no torch.

The choice of modules is in `gate`, the computation in `projectors`, `subspace` and `project`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ebbline.tasks.defences.defence import Defence, File, Mask, Reading, Setting, Words
from ebbline.tasks.defences.gate import (
    cosines_by_module,
    projected_count,
    projected_rows,
    read_rows,
)
from ebbline.tasks.specs import ApplySpec, ProjectSpec, Spec, SubspaceSpec, TrainSpec


class SafeLora(Defence):
    """Safe LoRA (arXiv 2405.16833). A mask is each adapter's number of projected modules."""

    measures = ProjectSpec
    makes = ApplySpec
    measured_input = "projection"
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


def _rules(knobs: Mapping[str, Setting]) -> tuple[float | None, int | None]:
    """The two knobs (threshold, modules); at most one may be set."""
    threshold, modules = knobs["apply.threshold"], knobs["apply.modules"]
    return (
        None if threshold is None else float(threshold),
        None if modules is None else int(modules),
    )


SAFE_LORA = SafeLora()
