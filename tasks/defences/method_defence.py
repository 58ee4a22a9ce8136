"""A method of `ebbline.tasks.defences.methods` as a defence of a study, and the absence of a
defence. Imports no torch.

The first stage of a method that shares Safe LoRA's measurement is Safe LoRA's `project`, so both
share its artifact. That of a method which reads no model is `project` without models: it only
lists the modules. Any other has `measure`. The second stage is `defend`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from ebbline.tasks.defences.defence import Defence, Mask, Setting, Words
from ebbline.tasks.defences.gate import (
    File,
    Reading,
    cosines_by_module,
    projected_count,
    read_rows,
)
from ebbline.tasks.defences.methods.gated import rule_of
from ebbline.tasks.defences.methods.knobs import Knob, Values, shown
from ebbline.tasks.defences.methods.method import Method
from ebbline.tasks.defences.safe_lora import subspace_of
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.identity import digest
from ebbline.tasks.specs import (
    ApplySpec,
    DefendSpec,
    MeasureSpec,
    ProjectSpec,
    Spec,
    SubspaceSpec,
    TrainSpec,
)

NONE = "none"
"""The name of no defence."""


class MethodDefence(Defence):
    """A method with its knobs as axes, such as `scale.factor`.

    A mask of a gated method is each adapter's number of changed modules and a number for its other
    knobs. That of any other method is its strength and a number for its knobs.
    """

    method: Method
    measured_input = "measurement"
    adapter_folder = DefendSpec.ADAPTER

    def __init__(self, method: Method) -> None:
        self.name, self.method = method.name, method
        self._knobs = {knob.name: knob for knob in method.knobs}
        self._gated = method.shares_projection
        own = method.reads_models and not self._gated
        self.measures = MeasureSpec if own else ProjectSpec
        self.makes = DefendSpec
        self.reads_models = method.reads_models
        self.kinds = (SubspaceSpec.KIND, self.measures.KIND, DefendSpec.KIND)
        main = method.knobs[0] if method.knobs else None
        if self._gated:
            main = self._knobs.get("threshold", main)
        self.main_knob = "" if main is None else self.axis(main.name)
        knob = "setting" if main is None else main.name
        title = method.name.replace("_", " ")
        self.words = Words(
            name=title,
            knob=f"{title}: {knob}",
            short_knob=knob,
            along=f"{knob} of {title}",
            against=f"Against the {knob} of {title}: {method.formula}.",
        )

    @property
    def knob_names(self) -> tuple[str, ...]:
        return tuple(self._knobs)

    def axis(self, knob: str) -> str:
        return f"{self.name}.{knob}"

    def is_knob(self, axis: str) -> bool:
        prefix, _, knob = axis.partition(".")
        return prefix == self.name and knob in self._knobs and not self._knobs[knob].measured

    def owns(self, axis: str) -> bool:
        return axis.partition(".")[0] == self.name

    def specs(
        self, fixed: Mapping[str, Setting], largest: Mapping[str, Setting]
    ) -> tuple[Spec, Spec]:
        values = {name: fixed.get(name, knob.default) for name, knob in self._knobs.items()}
        made = {name: value for name, value in largest.items() if not self._knobs[name].measured}
        first, second = self._specs({**values, **made}, {**values, **largest})
        varied = {name: values[name] for name in made}
        return first, second.model_copy(update={"knobs": {**second.knobs, **varied}})

    def with_values(
        self, fixed: tuple[Spec, Spec], values: Mapping[str, Setting]
    ) -> tuple[Spec, Spec]:
        own = {self.axis(name): name for name in self._knobs}
        changes = {own[axis]: value for axis, value in values.items() if axis in own}
        first, second = fixed
        assert isinstance(second, DefendSpec)
        measured = first.knobs if isinstance(first, MeasureSpec) else first.model_dump()
        before = {name: second.knobs.get(name, measured.get(name)) for name in self._knobs}
        return self._specs({**before, **changes}, {**before, **changes, **measured})

    def _specs(self, values: Values, largest: Values) -> tuple[Spec, DefendSpec]:
        """The two stages' settings; `largest` has the largest value of each knob in the study."""
        filled = self.method.filled(
            {name: knob.checked(values[name]) for name, knob in self._knobs.items()}
        )
        second = {name: filled[name] for name, knob in self._knobs.items() if not knob.measured}
        return (
            self._first(filled, largest),
            DefendSpec(method=self.name, knobs=second),
        )

    def _first(self, filled: Values, largest: Values) -> Spec:
        if self.measures is MeasureSpec:
            read = {name: filled[name] for name, knob in self._knobs.items() if knob.measured}
            most = {
                name: largest[name]
                for name, knob in self._knobs.items()
                if knob.measured_to_largest
            }
            return MeasureSpec(method=self.name, knobs={**read, **most})
        if self._gated:
            return ProjectSpec.model_validate(
                {name: filled[name] for name in ("projector", "energy")}
            )
        return ProjectSpec()

    def checked(self, knob: str, value: Setting) -> None:
        self._named(knob).checked(value)

    def _named(self, knob: str) -> Knob:
        if knob not in self._knobs:
            raise ProjectionError(f"{self.name} has no knob {knob!r}")
        return self._knobs[knob]

    def shared(self, settings: Spec, train: TrainSpec) -> Spec | None:
        return subspace_of(settings, train) if isinstance(settings, ProjectSpec) else None

    def reading(self, file: File) -> Reading:
        rows = read_rows(file(ProjectSpec.COSINES))
        if self._gated:
            return np.sort(np.array(list(cosines_by_module(rows).values()), dtype=np.float64))
        return np.zeros(len(rows))

    def knobs(self, fixed: Spec, values: Mapping[str, Setting]) -> dict[str, Setting]:
        assert isinstance(fixed, DefendSpec)
        return {
            self.axis(name): values.get(self.axis(name), value)
            for name, value in fixed.knobs.items()
        }

    def _setting(self, knobs: Mapping[str, Setting]) -> dict[str, Setting]:
        return {axis.partition(".")[2]: value for axis, value in knobs.items()}

    def is_possible(self, knobs: Mapping[str, Setting]) -> bool:
        setting = self._setting(knobs)
        return not self._gated or None in rule_of(setting)

    def is_off(self, knobs: Mapping[str, Setting]) -> bool:
        return self.method.is_off(self._setting(knobs))

    def mask(self, knobs: Mapping[str, Setting], adapters: Sequence[Reading]) -> Mask | None:
        setting = self._setting(knobs)
        if not self.is_possible(knobs):
            return None
        if self.method.is_off(setting):
            return tuple(0.0 for _ in adapters)
        if not self._gated:
            return (self.method.strength(setting), _number_of(setting))
        counts = [projected_count(cosines, *rule_of(setting)) for cosines in adapters]
        possible = tuple(count for count in counts if count is not None)
        if len(possible) < len(counts):
            return None
        others = {k: v for k, v in setting.items() if k not in ("threshold", "modules")}
        return (*possible, _number_of(others)) if others and any(possible) else possible

    def share(self, mask: Mask, adapters: Sequence[Reading]) -> float:
        if not any(mask):
            return 0.0
        if not self._gated:
            return mask[0]
        return sum(mask[: len(adapters)]) / max(1, sum(len(cosines) for cosines in adapters))

    def edges(self, axis: str, adapters: Sequence[Reading]) -> Sequence[float] | None:
        knob = self._named(axis.partition(".")[2])
        if knob.kind == "count":
            return None
        return [float(edge) for edge in np.unique(np.concatenate(adapters))] if adapters else []

    def is_continuous(self, axis: str) -> bool:
        knob = self._named(axis.partition(".")[2])
        return knob.kind == "number" and not (self._gated and knob.name == "threshold")

    def rules(self, used: Mapping[str, str]) -> Sequence[str]:
        values = "; ".join(f"{axis.partition('.')[2]} {text}" for axis, text in used.items())
        stated = f" Settings: {values}." if values else ""
        return [f"{self.method.name}: {self.method.formula} ({self.method.source}).{stated}"]

    def which(self, knobs: Mapping[str, Setting]) -> str:
        return shown(cast(Values, self._setting(knobs)))

    def changed(self, measured_file: File, made_file: File) -> tuple[int, int]:
        chosen = json.loads(made_file(f"{DefendSpec.ADAPTER}/{DefendSpec.CHOSEN}").read_text())
        return len(chosen), len(read_rows(measured_file(ProjectSpec.COSINES)))


class NoDefence(Defence):
    """No defence: the adapter as it was trained. It is one point of each training."""

    name = NONE
    method = None
    measures = ProjectSpec
    makes = ApplySpec
    measured_input = "projection"
    reads_models = False
    kinds = (ProjectSpec.KIND, ApplySpec.KIND)
    main_knob = ""
    words = Words("no defence", "none", "none", "nothing", "No defence.")

    @property
    def knob_names(self) -> tuple[str, ...]:
        return ()

    def axis(self, knob: str) -> str:
        raise ProjectionError(f"{NONE} has no knob, so {knob!r} cannot be set")

    def is_knob(self, axis: str) -> bool:
        return False

    def owns(self, axis: str) -> bool:
        return False

    def specs(
        self, fixed: Mapping[str, Setting], largest: Mapping[str, Setting]
    ) -> tuple[Spec, Spec]:
        return ProjectSpec(), ApplySpec()

    def with_values(
        self, fixed: tuple[Spec, Spec], values: Mapping[str, Setting]
    ) -> tuple[Spec, Spec]:
        return fixed

    def checked(self, knob: str, value: Setting) -> None:
        self.axis(knob)

    def knobs(self, fixed: Spec, values: Mapping[str, Setting]) -> dict[str, Setting]:
        return {}

    def shared(self, settings: Spec, train: TrainSpec) -> Spec | None:
        return None

    def reading(self, file: File) -> Reading:
        return np.zeros(len(read_rows(file(ProjectSpec.COSINES))))

    def is_possible(self, knobs: Mapping[str, Setting]) -> bool:
        return True

    def is_off(self, knobs: Mapping[str, Setting]) -> bool:
        return True

    def mask(self, knobs: Mapping[str, Setting], adapters: Sequence[Reading]) -> Mask | None:
        return tuple(0.0 for _ in adapters)

    def share(self, mask: Mask, adapters: Sequence[Reading]) -> float:
        return 0.0

    def edges(self, axis: str, adapters: Sequence[Reading]) -> Sequence[float] | None:
        return ()

    def is_continuous(self, axis: str) -> bool:
        return False

    def rules(self, used: Mapping[str, str]) -> Sequence[str]:
        return []

    def which(self, knobs: Mapping[str, Setting]) -> str:
        return "no module"

    def changed(self, measured_file: File, made_file: File) -> tuple[int, int]:
        return 0, len(read_rows(measured_file(ProjectSpec.COSINES)))


def _number_of(setting: Mapping[str, Setting]) -> float:
    """A number that differs between settings."""
    return float(int(digest(dict(setting))[:12], 16))
