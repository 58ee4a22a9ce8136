"""Policies of a study: how points are chosen, their order and seeds, and when the study stops."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ebbline.sweeps.study.axes import AxisValue, distinct
from ebbline.sweeps.study.references import FreshPrompts
from ebbline.tasks.specs import Count, Frozen, Number, Positive, Seed

Order = Literal["as_they_land", "in_turn"]
DEFAULT_WINDOW = 4  # of `search.window`, in points


class Stop(Frozen):
    """Propose no further point once the hypervolume grew by less than the share `gain` over the
    last so many dollars, GPU-hours or points.

    Each stage counts once, for the first point that needs it, in the order in which points ended.
    Points in flight are finished.
    """

    gain: Annotated[Number, Field(gt=0.0, lt=1.0)]
    per_usd: Positive | None = None
    per_gpu_hour: Positive | None = None
    per_points: Count | None = None

    @model_validator(mode="after")
    def _per_one_thing(self) -> Self:
        given = [
            name
            for name in ("per_usd", "per_gpu_hour", "per_points")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"give one of per_usd, per_gpu_hour and per_points (given: {given or 'none'})"
            )
        return self

    def __str__(self) -> str:
        if self.per_usd is not None:
            return f"{self.gain:.3g} per ${self.per_usd:g}"
        if self.per_gpu_hour is not None:
            return f"{self.gain:.3g} per {self.per_gpu_hour:g} GPU-hours"
        return f"{self.gain:.3g} per {self.per_points} points"


class Replicates(Frozen):
    """How many of the study's seeds a point has.

    `all`: every seed. `near_frontier`: the first `at_least` seeds, then one more while it is
    uncertain, at `confidence`, whether another point of its size is better in every objective (see
    ebbline.sweeps.state.replicates).
    """

    policy: Literal["all", "near_frontier"] = "all"
    confidence: Annotated[Number, Field(gt=0.5, lt=1.0)] = 0.9
    at_least: Count = 1


class Controls(Frozen):
    """The controls of each defence (see ebbline.tasks.defences.controls), run after the search.

    `settings` is the number of settings of a defence that get controls: its operating point, then
    its measured neighbours on both sides. `draws` is the number of draws of a random control. In a
    study file, `false` is no setting, `true` the default, and a number is `settings`.
    """

    settings: Annotated[int, Field(ge=0, le=9)] = 3
    draws: Annotated[int, Field(ge=1, le=20)] = 3

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: object) -> object:
        if given is True:
            return {}
        if given is False:
            return {"settings": 0}
        return {"settings": given} if isinstance(given, int) else given


# A name becomes a file's name, so it does not end with a dot, which some file systems drop, and
# leaves room for the rest: they take at most 255 bytes.
Name = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?$", max_length=150)
]


class Constraints(Frozen):
    """Constraints of an operating point: with `refusal_floor`, the study's floor; `gpu_hours`
    limits the GPU-hours of one point.

    GPU-hours are estimated from the work and equal on every cluster, so that proposals do not
    depend on the speed of a machine.
    """

    refusal_floor: bool = False
    gpu_hours: Positive | None = None


Sampler = Literal["stage_aware", "gp", "tpe", "nsga2", "random", "grid", "list"]


SURROGATE_AXES = 12  # with more axes a Gaussian process needs more points than a study can afford


TPE_POINTS = 1000


Points = Annotated[int, Field(ge=1, le=1_000_000)]


class Search(Frozen):
    """How points are chosen: the points in `first`, then the sampler's (Study.sampler gives the
    default sampler).

    `warm_start` names studies of the same home. The search starts with their measurements, which do
    not count as points. With `transfer`, results of one size guide the search of the other sizes.

    With `order: as_they_land` the search learns each result as it ends. It proposes points while
    the cluster has free capacity, at most `window` in flight. With `in_turn` exactly `window`
    points are in flight, and proposal k depends on the results up to k - window only. The
    proposals are then a function of the study file. A run that is killed and continued loses no
    point in either order.
    """

    sampler: Sampler | None = None
    points: Points | None = None
    window: Points | None = None
    seed: Seed = 0
    first: tuple[dict[str, AxisValue], ...] = ()
    list: tuple[dict[str, AxisValue], ...] = ()
    warm_start: Annotated[tuple[Name, ...], AfterValidator(distinct)] = ()
    transfer: bool = False
    constraints: Constraints = Constraints()
    order: Order = "as_they_land"
    stop: Stop | None = None

    @property
    def in_turn(self) -> bool:
        return self.order == "in_turn"

    @property
    def effective_window(self) -> int:
        """The window w: point k may depend on the results of points up to k - w. It applies in
        turn, and to the rivals of a race in either order.
        """
        return self.window or DEFAULT_WINDOW


FRESH_SEEDS = (101, 102, 103, 104, 105)
FEWEST_FRESH = 3


class Confirm(Frozen):
    """What `ebbline confirm` measures the nominated points with: nothing of it may choose a point.

    `suites` maps a suite to other prompts for it, which no search and no training has, or to the
    share of its own prompts that is held out of the search. `seeds` are
    training seeds that the search does not use; at least FEWEST_FRESH, because a claim about a
    setting rests on them.
    """

    suites: Annotated[dict[Name, FreshPrompts], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=FEWEST_FRESH), AfterValidator(distinct)] = (
        FRESH_SEEDS
    )


class Budget(Frozen):
    """Limits of a study over all its runs: hours of driving, GPU-hours, dollars at the profile's
    prices, points.

    A stage starts only if it is expected to stay within the limits. Running stages finish. Limits
    may be raised between runs.
    """

    hours: Positive | None = None
    gpu_hours: Positive | None = None
    usd: Positive | None = None
    points: Count | None = None
