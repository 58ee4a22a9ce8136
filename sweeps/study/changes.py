"""What changed between two settings, and whether a study may become the other: `ebbline run STUDY
--extend` takes a changed study file that adds to it and takes nothing away.

Invariant: what a study may become this way keeps the meaning of every point that it has: the same
settings, the same measurements, and at least the same seeds. What may change: more values of an
axis, more sizes, seeds and points, how further points are chosen, and the words. Everything else is
refused by its path.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WORDS = ("question", "hypothesis")
CHOOSING = (
    "sampler",
    "seed",
    "warm_start",
    "transfer",
    "constraints",
)  # of `search`: which points come next
_Dump = Mapping[str, Any]


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """One line for each leaf that differs: `train.rank: 4 -> 8`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted({*before, *after}):
            path = f"{where}.{key}" if where else str(key)
            if key not in before or key not in after:
                yield f"{path}: {'added' if key in after else 'removed'}"
            else:
                yield from differences(before[key], after[key], path)
    elif before != after:
        yield f"{where}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refusals(before: _Dump, after: _Dump) -> Iterator[str]:
    """A line for each change that is no widening, `PATH: what is wrong`; both as
    ebbline.sweeps.study.study.lasting keeps a dumped study.
    """
    yield from _axes("axes", before["axes"], after["axes"])
    for name in before["models"]:
        if name not in after["models"]:
            yield f"models.{name}: a size that has points cannot be taken away"
            continue
        yield from _model(name, before, after)
    yield from _begins("seeds", before["seeds"], after["seeds"])
    yield from _search(before, after)
    yield from _replicates(before.get("replicates"), after.get("replicates"))
    open_ones = {"axes", "models", "seeds", "search", "replicates", *WORDS}
    yield from _same(
        "",
        {k: v for k, v in before.items() if k not in open_ones},
        {k: v for k, v in after.items() if k not in open_ones},
    )


def _model(name: str, before: _Dump, after: _Dump) -> Iterator[str]:
    old, new = before["models"][name], after["models"][name]
    own = {key: value for key, value in old.items() if key != "axes"}
    yield from _same(
        f"models.{name}", own, {key: value for key, value in new.items() if key != "axes"}
    )
    if old["axes"] != new["axes"]:
        yield from _axes(
            f"models.{name}.axes",
            {**before["axes"], **old["axes"]},
            {**after["axes"], **new["axes"]},
        )


def _axes(where: str, before: _Dump, after: _Dump) -> Iterator[str]:
    for axis in sorted({*before, *after}):
        if axis not in after:
            yield f"{where}.{axis}: an axis cannot be taken away, as the points differ in it"
        elif axis not in before:
            yield (
                f"{where}.{axis}: an axis cannot be added, as the points that are there have "
                "no value of it"
            )
        else:
            yield from _axis(f"{where}.{axis}", before[axis], after[axis])


def _axis(where: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, Mapping) != isinstance(after, Mapping):
        yield f"{where}: a list cannot become a range, nor a range a list"
    elif isinstance(before, Mapping):
        if any(before[part] != after[part] for part in ("step", "log")):
            yield f"{where}: only `low` and `high` of a range may change"
        elif after["low"] > before["low"] or after["high"] < before["high"]:
            yield (
                f"{where}: [{after['low']}, {after['high']}] is not around [{before['low']}, "
                f"{before['high']}]"
            )
        elif before["step"] is not None and not _on_steps(
            before["low"] - after["low"], before["step"]
        ):
            yield (
                f"{where}: low {after['low']} is no whole number of steps ({before['step']}) "
                f"below {before['low']}"
            )
    else:
        there = {json.dumps(value) for value in after}
        gone = [value for value in before if json.dumps(value) not in there]
        if gone:
            yield f"{where}: {json.dumps(gone[0])} is missing, which points may have"


def _on_steps(distance: float, step: float) -> bool:
    return abs(distance / step - round(distance / step)) < 1e-9


def _begins(where: str, before: Sequence[Any], after: Sequence[Any]) -> Iterator[str]:
    if list(after[: len(before)]) != list(before):
        yield f"{where}: must begin with {json.dumps(list(before))}; add behind it"


def _search(before: _Dump, after: _Dump) -> Iterator[str]:
    old, new = before["search"], after["search"]
    if new["points"] is not None and (old["points"] is None or new["points"] < old["points"]):
        yield f"search.points: {new['points']} is fewer than {old['points'] or 'the whole space'}"
    if new["sampler"] == "list" != old["sampler"]:
        yield (
            "search.sampler: 'list' would leave the points out that are there; give further "
            "points as values of the axes"
        )
    yield from _begins("search.list", old["list"], new["list"])
    for name in sorted({*old, *new} - {"points", "list", *CHOOSING}):
        yield from _same("search", {name: old.get(name)}, {name: new.get(name)})


def _replicates(before: _Dump | None, after: _Dump | None) -> Iterator[str]:
    if after is None or before == after:
        return  # every seed
    if before is None:
        yield (
            "replicates: fewer seeds than all would take replicates from the points that are there"
        )
    elif after["at_least"] < before["at_least"] or after["confidence"] < before["confidence"]:
        yield (
            "replicates: `at_least` and `confidence` may only rise, as points rest on their "
            "replicates"
        )


def _same(where: str, before: _Dump, after: _Dump) -> Iterator[str]:
    for line in differences(before, after, where):
        yield f"{line}; this would change what its points mean"
