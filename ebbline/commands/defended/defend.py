"""`ebbline defend`: apply a post-hoc defence and its controls to PEFT adapters, without a study,
store or cluster.

    from ebbline import defend
    defend(["my-adapter"], "safer-adapter", method="scale", knobs={"factor": 0.5})

Its checks, folders and errors are those of `ebbline project`. The output is an ordinary PEFT
adapter, with a `defence.json` that records what was done to each module. The two models are read
once, for all adapters, settings and controls.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from ebbline.commands.project import (
    TRAINER_CHECKPOINT,
    distinct_names,
    located,
    new_destination,
    require_cache,
    require_device,
    scratch_beside,
)
from ebbline.tasks.defences.computing.draws import GENERATOR
from ebbline.tasks.defences.computing.factors import Effect, effect
from ebbline.tasks.defences.computing.making import new_updates
from ebbline.tasks.defences.computing.measured import DefenceWeights, OnceBases, Spool, measure
from ebbline.tasks.defences.computing.writing import update_of, write_defended
from ebbline.tasks.defences.controls.control import Control
from ebbline.tasks.defences.controls.registry import DRAWS, controls_of
from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.knobs import Value, Values, folder_name, grid, shown
from ebbline.tasks.defences.methods.method import Measured, Method
from ebbline.tasks.defences.methods.registry import method_named
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.headers.files import adapters_in
from ebbline.tasks.models.adapter_file import Adapter, plain_lora, read_adapter_file
from ebbline.tasks.models.brought.fitted import fitted
from ebbline.tasks.models.weights import Checkpoint, require_model_folder

RECORD = "defence.json"
NOT_READ = "no model was read"
"""The reason for a module without a cosine, of a defence that reads no model."""
Given = Mapping[str, Value | Sequence[Value]]


@dataclass(frozen=True)
class Arm:
    """The defence itself, or one draw of one of its controls."""

    control: Control | None = None
    draw: int | None = None

    @property
    def label(self) -> str:
        """Its name, as a folder beside the others."""
        if self.control is None:
            return "defence"
        return self.control.name if self.draw is None else f"{self.control.name}-{self.draw}"


@dataclass(frozen=True)
class Inputs:
    """What was given beside the adapter, as the user wrote it."""

    base: str | None
    aligned: str | None
    safety: str | None


@dataclass(frozen=True)
class DefendedAdapter:
    """One outcome: its folder, setting and arm, each module's row, what changed, and notes."""

    adapter: str
    out: Path
    method: str
    setting: Values
    arm: Arm
    rows: Mapping[str, ModuleRow]
    effects: Mapping[str, Effect]
    notes: tuple[str, ...]

    @property
    def changed(self) -> frozenset[str]:
        """The modules with a new update."""
        return frozenset(self.effects)


def defend(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "safe_lora",
    base: str | Path | None = None,
    aligned: str | Path | None = None,
    safety: str | Path | None = None,
    knobs: Given | None = None,
    controls: bool = False,
    draws: int = DRAWS,
    cache: str | Path | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, module: None,
) -> list[DefendedAdapter]:
    """Apply one defence of ebbline.tasks.defences.methods to one or more adapters of one model.

    `knobs` gives a value or a list of values for each knob; every combination has an outcome, in a
    folder such as `factor-0.5`. `controls` adds the defence's controls, a folder each beside
    `defence`, with `draws` draws of the random ones. `safety` is the safety adapter that
    `safe_merge` merges with. The other arguments are those of `project`. `out` is written
    atomically.

    Raises ModelError for an adapter or model that a defence is not defined for, and ProjectionError
    for invalid knobs and when the computation fails.
    """
    adapters = [adapters] if isinstance(adapters, str | Path) else adapters
    chosen, given = method_named(method), knobs or {}
    settings = [chosen.filled(values) for values in grid(chosen.knobs, given)]
    for index, setting in enumerate(settings):
        if setting in settings[:index]:
            raise ProjectionError(f"the setting {shown(setting)} is given twice")
    inputs = Inputs(*(None if each is None else str(each) for each in (base, aligned, safety)))
    _require_inputs(chosen, inputs)
    arms = _arms(chosen, controls, draws)
    require_device(device)
    destination = new_destination(Path(out))
    require_cache(cache)
    loaded, source, other = _read(chosen, adapters, inputs, settings, arms, cache, device)
    names = [""] if len(loaded) == 1 else distinct_names([each.folder for each in loaded])
    varied = [name for name in given if _is_varied(name, settings)]
    try:
        with scratch_beside(destination) as scratch:
            spool_folder, fresh = scratch / "spool", scratch / "out"
            spool_folder.mkdir()
            rows, spool = _measured(loaded, source, spool_folder, progress, device)
            results = []
            for number, (adapter, own, name) in enumerate(zip(loaded, rows, names, strict=True)):
                making = _Making(chosen, adapter, number, own, spool, other, inputs)
                for setting, arm in itertools.product(settings, arms):
                    place = Path(name) / (folder_name(setting, varied) if varied else "")
                    place /= arm.label if len(arms) > 1 else ""
                    results.append(making.write(setting, arm, fresh / place, destination / place))
            fresh.replace(destination)
    except (OSError, SafetensorError) as error:
        raise ProjectionError(
            f"{destination} cannot be written: {error}. Free disk space or give another folder; "
            "nothing was written there"
        ) from error
    return results


def _measured(
    adapters: Sequence[Adapter],
    source: DefenceWeights | None,
    folder: Path,
    progress: Callable[[int, int, str], None],
    device: str,
) -> tuple[list[dict[str, ModuleRow]], Spool]:
    """As `measure`; without models, no module has a cosine and nothing is kept."""
    if source is not None:
        return measure(adapters, source, folder, progress, device)
    without = ModuleRow(None, None, NOT_READ)
    return [dict.fromkeys(adapter.modules, without) for adapter in adapters], Spool({})


def _is_varied(name: str, settings: Sequence[Values]) -> bool:
    return len({setting[name] for setting in settings}) > 1


def _require_inputs(method: Method, inputs: Inputs) -> None:
    """Raises ProjectionError for an input that the method lacks, and for one that it never reads.

    `aligned` is always taken: the adapter's names and shapes are checked with it.
    """
    for name, needed, given in (
        ("base", method.reads_models, inputs.base),
        ("aligned", method.reads_models, inputs.aligned),
        ("safety", method.reads_safety, inputs.safety),
    ):
        if needed and given is None:
            raise ProjectionError(f"{method.name} needs {method.needs}; {name} is missing")
        if given is not None and not needed and name != "aligned":
            raise ProjectionError(f"{method.name} does not read {name}; leave it out")


def _arms(method: Method, controls: bool, draws: int) -> list[Arm]:
    """The defence, and every draw of its controls. Raises ProjectionError without a control."""
    if not controls:
        return [Arm()]
    found = controls_of(method)
    if not found:
        raise ProjectionError(
            f"{method.name} has no control: it has neither a gate nor a projector. Run it without "
            "controls"
        )
    if draws < 1:
        raise ProjectionError(f"the number of draws must be an integer from 1, not {draws}")
    arms = [Arm()]
    for control in found:
        arms += [Arm(control, draw) for draw in range(draws)] if control.drawn else [Arm(control)]
    return arms


def _read(
    method: Method,
    adapters: Sequence[str | Path],
    inputs: Inputs,
    settings: Sequence[Values],
    arms: Sequence[Arm],
    cache: str | Path | None,
    device: str,
) -> tuple[list[Adapter], DefenceWeights | None, Adapter | None]:
    """The adapters, the models for a defence that reads them, and the safety adapter."""
    files = [read_adapter_file(located(adapter)) for adapter in adapters]
    if not files:
        raise ProjectionError("no adapter was given")
    plain = [plain_lora(file) for file in files]
    extra = None if inputs.safety is None else read_adapter_file(located(inputs.safety))
    other = None if extra is None else plain_lora(extra)
    if inputs.aligned is None:
        return plain, None, other
    aligned = Checkpoint(located(inputs.aligned))
    base = None if inputs.base is None else Checkpoint(located(inputs.base))
    for model in (base, aligned):
        if model is not None:
            require_model_folder(model.folder)
    loaded = [fitted(file, aligned) for file in files]
    other = None if extra is None else fitted(extra, aligned)
    if base is None:
        return loaded, None, other
    energy = cast(float | None, settings[0].get("energy"))
    bases = (
        None
        if energy is None
        else OnceBases(energy, None if cache is None else Path(cache), device)
    )
    rotations = sum(arm.control is not None and arm.control.rotates for arm in arms)
    source = DefenceWeights(
        base, aligned, bases, method=method, settings=settings, rotations=rotations
    )
    return loaded, source, other


@dataclass(frozen=True)
class _Making:
    """One adapter, ready for every setting and arm."""

    method: Method
    adapter: Adapter
    number: int
    rows: Mapping[str, ModuleRow]
    spool: Spool
    safety: Adapter | None
    inputs: Inputs

    def write(self, setting: Values, arm: Arm, fresh: Path, out: Path) -> DefendedAdapter:
        changed = new_updates(
            self.method, setting, self.rows, self._measured, arm.control, arm.draw or 0
        )
        fresh.mkdir(parents=True)
        stored = write_defended(self.adapter, changed, fresh)
        effects = {
            module: effect(update_of(self.adapter, module), new) for module, new in stored.items()
        }
        notes = tuple(_notes(self.adapter, self.rows))
        done = DefendedAdapter(
            str(self.adapter.folder),
            out,
            self.method.name,
            setting,
            arm,
            self.rows,
            effects,
            notes,
        )
        record = json.dumps(_record(done, self.method, self.inputs), indent=1, allow_nan=False)
        (fresh / RECORD).write_text(record)
        return done

    def _measured(self, module: str) -> Measured:
        safety = (
            update_of(self.safety, module)
            if self.safety is not None and module in self.safety.modules
            else None
        )
        kept = self.spool.kept(module, self.number)
        return Measured(module, update_of(self.adapter, module), kept, safety)


def _record(done: DefendedAdapter, method: Method, inputs: Inputs) -> dict[str, Any]:
    """The provenance of one outcome. A module's `effect` is that of its new update, without one for
    a module that keeps its own.
    """
    control = done.arm.control
    return {
        "settings": {
            "method": done.method,
            "knobs": dict(done.setting),
            "control": None if control is None else control.name,
            "draw": done.arm.draw,
            "generator": None if done.arm.draw is None else GENERATOR,
            **asdict(inputs),
        },
        "formula": method.formula if control is None else control.formula,
        "source": method.source,
        "adapter": done.adapter,
        "notes": list(done.notes),
        "modules": {
            module: {
                **asdict(row),
                "changed": module in done.effects,
                "effect": asdict(done.effects[module]) if module in done.effects else None,
            }
            for module, row in sorted(done.rows.items())
        },
    }


def _notes(adapter: Adapter, rows: Mapping[str, ModuleRow]) -> Iterator[str]:
    if others := [
        name for name in adapters_in(adapter.folder) if not TRAINER_CHECKPOINT.fullmatch(name)
    ]:
        yield (
            f"{adapter.folder} has other adapters in subfolders; they were left alone: "
            f"{', '.join(others)}"
        )
    for reason in sorted({row.reason for row in rows.values()} - {"", NOT_READ}):
        affected = [module for module, row in rows.items() if row.reason == reason]
        yield (
            f"in {len(affected)} of {len(rows)} modules {reason}, so the update stays "
            f"({', '.join(affected[:3])}{', ...' if len(affected) > 3 else ''})"
        )
