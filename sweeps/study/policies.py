"""How a study is driven, beside which points it has: when it stops by itself, and how many seeds a
point is worth.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ebbline.tasks.specs import Count, Frozen, Number, Positive

Order = Literal["as_they_land", "in_turn"]
REACH = 4  # of a window that is not given


class Stop(Frozen):
    """Ask for nothing more once the hypervolume grew by less than the share `gain` over the last so
    many dollars, GPU-hours or points.

    Counted are the stages that the points made, each once, in the order in which the points landed.
    What is in flight is finished.
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
    """How many of a study's seeds a point is run with.

    `all`: every seed. `near_frontier`: the first `at_least`, and one more as long as it is not
    certain, at `confidence`, whether another point of its size is better in every objective (see
    ebbline.sweeps.state.replicates).
    """

    policy: Literal["all", "near_frontier"] = "all"
    confidence: Annotated[Number, Field(gt=0.5, lt=1.0)] = 0.9
    at_least: Count = 1
