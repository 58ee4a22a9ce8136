"""Policies of driving a study: the order of results, when it stops, and the seeds of each point."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ebbline.tasks.specs import Count, Frozen, Number, Positive

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
