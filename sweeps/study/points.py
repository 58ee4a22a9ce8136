"""Points and Results: the rows of every table.

A Point is a model and one value for each axis. A Result is its outcome: metrics with intervals, or
the reason why it has none. A replicate is a Point with a seed; a Result pools its replicates and
keeps each one's value.

This module alone decides what two points share. Points share

    adapter_of        one training and one first stage of one defence: they differ only in the knobs
    without_defence   all settings but those of defences
    training_of       one training: they differ only in what changes its adapter afterwards
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.study.adapters.branches import ADAPTER, Branch
from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.in_use import AXIS, DEFENCES, KINDS, is_knob, owns
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.specs import AdapterSpec, LoxSpec, TrainSpec

_STAGE_NAME = re.compile(r"(?P<part>[^#\[]+)(#(?P<block>\d+))?\[seed=(?P<seed>\d+)\]")
# Stages that make a point's adapter; also prefixes of their axes. `lox` makes the model that is
# trained. Of an adapter from outside,
# `adapter` is its stage, and the axis with its name.
OF_TRAINING = ("data", LoxSpec.KIND, "train", ADAPTER)
Value = None | bool | int | float | str


@dataclass(frozen=True, slots=True)
class Point:
    """`values` maps an axis (`train.rank`) to its value, in the order of the axes' names."""

    model: str
    values: tuple[tuple[str, Value], ...]

    @staticmethod
    def of(model: str, values: Mapping[str, Value]) -> "Point":
        return Point(model, tuple(sorted(values.items())))

    @property
    def id(self) -> str:
        return digest({"model": self.model, "values": dict(self.values)})[:12]

    def __str__(self) -> str:
        return " ".join(
            [
                self.model,
                *(f"{axis.split('.')[-1]}={'none' if v is None else v}" for axis, v in self.values),
            ]
        )


def brought(point: Point) -> str | None:
    """The name of a point's adapter in `adapters`; None if the study trains it."""
    name = dict(point.values).get(ADAPTER)
    return None if name is None else str(name)


def defence_of(point: Point) -> Defence:
    """The defence of a point; Safe LoRA in a study that names none."""
    name = dict(point.values).get(AXIS)
    return SAFE_LORA if name is None else DEFENCES[str(name)]


def own_seeds(seeds: Sequence[int], point: Point) -> Sequence[int]:
    """Those of a study's seeds that a point has: an adapter from outside is measured once, under
    the first.
    """
    return seeds if brought(point) is None else seeds[:1]


def is_of(point: Point, branch: Branch) -> bool:
    """Whether a point belongs to a branch of the space."""
    return (
        point.model == branch.model
        and (brought(point) is None) != (ADAPTER in branch.axes)
        and defence_of(point) is branch.defence
    )


def adapter_stage(point: Point) -> str:
    """The kind of the stage that makes a point's adapter before the defence."""
    return TrainSpec.KIND if brought(point) is None else AdapterSpec.KIND


def adapter_of(point: Point) -> Point:
    """The point without its defence's knobs."""
    return _kept(point, lambda axis: not is_knob(axis))


def without_defence(point: Point) -> Point:
    """The point without its defence: neither its name nor its knobs and other settings."""
    return _kept(point, lambda axis: not owns(axis))


def training_of(point: Point) -> Point:
    """The point with only the settings that its training depends on."""
    return _kept(point, lambda axis: axis.partition(".")[0] in OF_TRAINING)


def _kept(point: Point, keep: Callable[[str], bool]) -> Point:
    return Point(point.model, tuple((axis, value) for axis, value in point.values if keep(axis)))


@dataclass(frozen=True)
class StageName:
    """The name of a stage in a point's results: `train[seed=0]`, `generate:refusal[seed=0]`,
    `refusal#2[seed=0]`.

    `part` is a stage kind, `KIND:SUITE`, or the suite alone for the stage with its metrics. `block`
    is the number of the block of a raced suite.
    """

    part: str
    seed: int
    block: int | None = None

    def __str__(self) -> str:
        return f"{self.part}{'' if self.block is None else f'#{self.block}'}[seed={self.seed}]"

    @staticmethod
    @lru_cache(4096)
    def parse(text: str) -> "StageName":
        found = _STAGE_NAME.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not the name of a stage")
        return StageName(
            found["part"],
            int(found["seed"]),
            None if found["block"] is None else int(found["block"]),
        )


def keys_of(keys: Mapping[str, str], part: str, seed: int) -> list[str]:
    """The key of a part's stage, or the keys of its blocks in order."""
    named = {StageName.parse(name): key for name, key in keys.items()}
    own = sorted(
        (name.block or 0, key)
        for name, key in named.items()
        if (name.part, name.seed) == (part, seed)
    )
    return [key for _, key in own]


Status = Literal["done", "running", "failed", "invalid", "skipped", "outdated"]
STATUSES: tuple[Status, ...] = ("done", "running", "failed", "invalid", "skipped", "outdated")
OUTDATED = "it was measured under keys that an upgrade, a change of the study or a removal replaced"
INVALID = "invalid: "  # prefix of the reason of an invalid point
_RERUN_BEFORE = re.compile(r"\bpython -m (?:tasks|cluster\.again) ")
_INVALID_BEFORE = "refused: "  # the prefix in homes of earlier versions


def current_reason(stored: str) -> str:
    """A stored reason as this version writes it. Earlier versions marked invalid points by another
    prefix, and named another command that reruns a stage.
    """
    if stored.startswith(_INVALID_BEFORE):
        stored = INVALID + stored.removeprefix(_INVALID_BEFORE)
    return current_command(stored)


def current_command(stored: str) -> str:
    """A text in which the commands that rerun a stage are those of this version."""
    return _RERUN_BEFORE.sub("ebbline rerun ", stored)


def ended(reason: str) -> Status:
    """The status of a point without metrics: `invalid` when its settings, data or model are, else
    `failed`.
    """
    return "invalid" if reason.startswith(INVALID) else "failed"


@dataclass(frozen=True)
class Confirmed:
    """What `ebbline confirm` measured of a point, on prompts that chose nothing.

    `adapters` has the metrics of each adapter of the study, by its training seed. `setting` has the
    metrics over the fresh seeds in `seeds`; it is empty for an adapter that the study did not
    train. `among` counts the points that were confirmed: each claim is corrected for them. `study`,
    `number` and `keys` say where the measurements are.
    """

    study: str
    number: int
    among: int
    adapters: Mapping[int, Mapping[str, Metric]]
    setting: Mapping[str, Metric] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """One point of a study: its metrics by full name (`refusal.refusal_rate`), pooled over seeds,
    or `reason` when it has none.

    `same_as` is the number of an earlier point with equal adapters, measured by the same stages. A
    `skipped` point was proposed when the budget ended; it continues when the budget is raised. An
    `outdated` one was measured, and the store lacks its stages under their present keys.

    `changed_share` is the share of modules that the defence changed.

    `keys` maps the name of a stage (`train[seed=0]`) to its key in the store. `seconds` is the run
    time of the stages, including stages shared with earlier points. `costs` maps the key of each of
    its stages, and of the stages above them, to its cost.

    `confirmed` is what was measured of it after the search; None before that.
    """

    number: int
    point: Point
    status: Status
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    reason: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    changed_share: float | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    same_as: int | None = None
    confirmed: Confirmed | None = None


_NO_COSTS: Mapping[str, Cost] = {}
_NO_KEYS: Mapping[str, str] = {}


def without_stages(result: Result) -> Result:
    """The result without the keys and costs of its stages, which are most of its memory."""
    return replace(result, keys=_NO_KEYS, costs=_NO_COSTS)


def distinct(results: Sequence[Result]) -> list[Result]:
    """The results in order of number. Of results with equal adapters only the first is kept.

    `same_as` may name a point that is not in `results`, such as one of another model.
    """
    first: dict[int, Result] = {}
    for result in sorted(results, key=lambda result: result.number):
        first.setdefault(result.number if result.same_as is None else result.same_as, result)
    return list(first.values())


def is_as_trained(result: Result) -> bool:
    """Whether a finished point's adapters are unchanged since their training: the defence changed
    no module, and no stage of another kind is between training and measuring.
    """
    suites = {name.rpartition(".")[0] for name in result.metrics}
    expected = {*OF_TRAINING, *KINDS, *suites}
    parts = {StageName.parse(name).part for name in result.keys}
    # `generate:refusal` serves a suite; the name of a stage that changes adapters has no colon.
    return not result.changed_share and all(part in expected or ":" in part for part in parts)
