"""The pace of a run: how long its stages take, relative to what earlier runs predict.

A machine that is shared, throttled or of another make than those measured before takes longer for
every stage by about the same factor. The measurements of a run show it after a few stages.
"""

import math
from collections import deque

LATEST = 50  # stages: an older one says little about a machine that has become slower since
ENOUGH = 5  # the fewest stages for a pace
NOTEWORTHY = 1.25  # a pace beyond this, or below its inverse, is worth a sentence


class Pace:
    """The pace of one run on one type of machine, from its latest stages."""

    def __init__(self) -> None:
        # (log of measured over predicted seconds, predicted seconds)
        self._ratios: deque[tuple[float, float]] = deque(maxlen=LATEST)

    def learn(self, predicted_s: float, measured_s: float) -> None:
        """Add a stage. Stages without a positive time are ignored."""
        if predicted_s > 0.0 and measured_s > 0.0:
            self._ratios.append((math.log(measured_s / predicted_s), predicted_s))

    @property
    def stages(self) -> int:
        """The number of stages that the factor rests on."""
        return len(self._ratios)

    @property
    def factor(self) -> float:
        """Measured over predicted seconds: the median, weighted by predicted seconds. 1 for fewer
        than ENOUGH stages.

        A median, as one stage that hung says nothing about the others. Weighted, as short stages
        consist of file accesses and imports.
        """
        if len(self._ratios) < ENOUGH:
            return 1.0
        half, passed = sum(weight for _, weight in self._ratios) / 2, 0.0
        for ratio, weight in sorted(self._ratios):
            passed += weight
            if passed >= half:
                return math.exp(ratio)
        raise AssertionError("the weights of all stages exceed half of them")


def pace_sentence(factor: float) -> str:
    """What to say of a pace; empty where predictions hold."""
    if 1 / NOTEWORTHY < factor < NOTEWORTHY:
        return ""
    return f"stages take {factor:.1f} times as long as earlier ones did"
