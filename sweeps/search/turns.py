"""Equal numbers of points for each defence of a study, so that none wins by being tried more often.

No defence has one point for each training. It takes its turn too, until each training has it.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from ebbline.sweeps.study.axes import count_of
from ebbline.sweeps.study.points import Point, defence_of
from ebbline.sweeps.study.study import Study


def whose_turn(study: Study, proposed: Sequence[Point]) -> str | None:
    """The defence with the fewest points among those that have points left; None if the study names
    none, or no point is left.
    """
    if not study.defences:
        return None
    counts = Counter(defence_of(point).name for point in proposed)
    left = [
        each.name
        for each in study.used_defences
        if (size := size_of(study, each.name)) is None or counts[each.name] < size
    ]
    return fewest(left, counts)


def fewest(names: Collection[str], counts: Counter[str]) -> str | None:
    """The first of these names with the smallest count."""
    return min(names, key=lambda name: counts[name], default=None)


def size_of(study: Study, defence: str) -> int | None:
    """The number of points with a defence; None with a range without a step."""
    total = 0
    for branch in study.branches:
        if branch.defence.name == defence:
            size = 1
            for values in branch.axes.values():
                count = count_of(values)
                if count is None:
                    return None
                size *= count
            total += size
    return total
