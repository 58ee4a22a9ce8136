"""What changed between two versions of a study, and whether `ebbline run STUDY --extend` accepts
it. An extension adds to a study and removes nothing.

Invariant: an extension keeps the meaning of every existing point: the same settings, the same
measurements, and at least the same seeds. It may add values of an axis, sizes, seeds and points. It
may change how further points are chosen, and the texts. Any other change is rejected, with its path
in the study file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ebbline.sweeps.study.policies import DEFAULT_WINDOW, Replicates, Search

TEXTS = ("question", "hypothesis")
CHOICE_OF_POINTS = (
    "sampler",
    "seed",
    "warm_start",
    "transfer",
    "constraints",
)  # fields of `search` that choose further points
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


def rejections(before: _Dump, after: _Dump) -> Iterator[str]:
    """A line for each change that an extension may not make, `PATH: what is wrong`.

    Both arguments are dumped studies, reduced by `lasting`.
    """
    yield from _axes("axes", before["axes"], after["axes"])
    for name in before["models"]:
        if name not in after["models"]:
            yield f"models.{name}: a size that has points cannot be removed"
            continue
        yield from _model(name, before, after)
    yield from _starts_with("seeds", before["seeds"], after["seeds"])
    yield from _search(before, after)
    yield from _replicates(before.get("replicates"), after.get("replicates"))
    yield from _adapters(before.get("adapters", {}), after.get("adapters", {}))
    if "defences" in before:
        yield from _defences(before["defences"], after.get("defences", {}))
    may_change = {"axes", "models", "seeds", "search", "replicates", "adapters", *TEXTS}
    may_change |= {"defences"} & before.keys()
    yield from _same(
        "",
        {k: v for k, v in before.items() if k not in may_change},
        {k: v for k, v in after.items() if k not in may_change},
    )


def revised(before: _Dump, after: _Dump) -> dict[str, Any]:
    """The stored study with those changes that `ebbline run STUDY --change` accepts besides the
    additions: further suites and judges, another `limit` of a suite, other content of a data set or
    prompt set, and fewer `search.points`.

    Existing points keep their numbers and settings; the stages that a change concerns run again.
    """
    found: dict[str, Any] = json.loads(json.dumps(before))
    for part in ("suites", "judges"):
        for name, new in after.get(part, {}).items():
            old = found.setdefault(part, {}).setdefault(name, new)
            if part == "suites" and "limit" in old["measure"] and "limit" in new["measure"]:
                old["measure"]["limit"] = new["measure"]["limit"]
            if part == "suites":
                _take_content(old["prompts"], new["prompts"])
    _take_content(found["data"], after["data"])
    for name, model in found["models"].items():
        for role in ("aligned", "unaligned"):
            old, new = model.get(role), after["models"].get(name, {}).get(role)
            if old and new and old.get("tuned") and new.get("tuned"):
                _take_content(old["tuned"]["data"], new["tuned"]["data"])
    points, fewer = found["search"]["points"], after["search"]["points"]
    if points is not None and fewer is not None and fewer < points:
        found["search"]["points"] = fewer
    return found


def _take_content(old: dict[str, Any], new: _Dump) -> None:
    """Replace the digests of local content below `old` by those below `new`."""
    for key, value in old.items():
        other = new.get(key) if isinstance(new, Mapping) else None
        if key == "path" and isinstance(value, dict) and isinstance(other, Mapping):
            value["sha256"] = other["sha256"]
        elif isinstance(value, dict) and isinstance(other, Mapping):
            _take_content(value, other)


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


def _adapters(before: _Dump, after: _Dump) -> Iterator[str]:
    for name in before:
        if name not in after:
            yield f"adapters.{name}: an adapter that has points cannot be removed"
        else:
            yield from _same(f"adapters.{name}", before[name], after[name])


def _defences(before: _Dump, after: _Dump) -> Iterator[str]:
    for name in before:
        where = f"defences.{name}"
        if name not in after:
            yield f"{where}: a defence that has points cannot be removed"
            continue
        for knob in sorted({*before[name], *after[name]}):
            old, new = before[name].get(knob), after[name].get(knob)
            if isinstance(old, Mapping | list) and isinstance(new, Mapping | list):
                yield from _axis(f"{where}.{knob}", old, new)
            elif old != new:
                yield (
                    f"{where}.{knob}: {_short(old)} -> {_short(new)}; this would change the "
                    "meaning of existing points"
                )


def _axes(where: str, before: _Dump, after: _Dump) -> Iterator[str]:
    for axis in sorted({*before, *after}):
        if axis not in after:
            yield f"{where}.{axis}: an axis cannot be removed, because existing points differ in it"
        elif axis not in before:
            yield (
                f"{where}.{axis}: an axis cannot be added, because existing points have no "
                "value of it"
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
                f"{where}: [{after['low']}, {after['high']}] does not contain "
                f"[{before['low']}, {before['high']}]"
            )
        elif before["step"] is not None and not _on_steps(
            before["low"] - after["low"], before["step"]
        ):
            yield (
                f"{where}: low {after['low']} is not a whole number of steps "
                f"({before['step']}) below {before['low']}"
            )
    else:
        kept = {json.dumps(value) for value in after}
        removed = [value for value in before if json.dumps(value) not in kept]
        if removed:
            yield f"{where}: {json.dumps(removed[0])} is missing; existing points may have it"


def _on_steps(distance: float, step: float) -> bool:
    return abs(distance / step - round(distance / step)) < 1e-9


def _starts_with(where: str, before: Sequence[Any], after: Sequence[Any]) -> Iterator[str]:
    if list(after[: len(before)]) != list(before):
        yield f"{where}: must begin with {json.dumps(list(before))}; append to it"


def _search(before: _Dump, after: _Dump) -> Iterator[str]:
    old, new = before["search"], after["search"]
    if new["points"] is not None and (old["points"] is None or new["points"] < old["points"]):
        yield f"search.points: {new['points']} is fewer than {old['points'] or 'the whole space'}"
    if new["sampler"] == "list" != old["sampler"]:
        yield (
            "search.sampler: 'list' would leave out existing points; add further "
            "points as values of the axes"
        )
    yield from _starts_with("search.list", old["list"], new["list"])
    for name in sorted({*old, *new} - {"points", "list", *CHOICE_OF_POINTS}):
        yield from _same("search", {name: old.get(name)}, {name: new.get(name)})


def _replicates(before: _Dump | None, after: _Dump | None) -> Iterator[str]:
    if after is None or before == after:
        return  # no `replicates` means every seed
    if before is None:
        yield (
            "replicates: existing points have every seed, and a policy would remove some of them"
        )
    elif after["at_least"] < before["at_least"] or after["confidence"] < before["confidence"]:
        yield (
            "replicates: `at_least` and `confidence` may only rise, because results use all "
            "replicates"
        )


def _same(where: str, before: _Dump, after: _Dump) -> Iterator[str]:
    for line in differences(before, after, where):
        yield f"{line}; this would change the meaning of existing points"


PLACEMENT = ("gpus", "labels", "spread")  # fields of a model that say where it runs


DRIVING = ("order", "stop")  # fields of `search` that say how a study is driven


FIRST_FIELDS = (
    "sampler",
    "points",
    "window",
    "seed",
    "first",
    "list",
)  # fields of `search` that every stored study has


def lasting(dump: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a dumped study that may not change once it has run.

    It leaves out the budget, the controls, the placement, `search.order`, `search.stop`, and the
    paths of pinned content. Of `confirm`, whose own study is frozen when it begins, it keeps what
    is held out of the search. Fields that earlier versions lacked are left out at their defaults. A
    missing sampler counts as tpe, the only default of earlier versions.
    """
    plain = {
        "replicates": Replicates().model_dump(mode="json"),
        "adapters": {},
        "subsets": None,
    }
    kept = {
        key: value
        for key, value in dump.items()
        if key not in ("budget", "controls", "confirm") and value != plain.get(key)
    }
    if held_out := _held_out(dump.get("confirm")):
        kept["confirm"] = held_out
    models = {
        name: {key: value for key, value in model.items() if key not in PLACEMENT}
        for name, model in dump["models"].items()
    }
    defaults = Search().model_dump(mode="json")
    came_later = {
        key: value
        for key, value in dump["search"].items()
        if key not in DRIVING and value != defaults.get(key)
    }
    search = {**came_later, **{key: dump["search"][key] for key in FIRST_FIELDS}}
    search |= {"sampler": search["sampler"] or "tpe", "window": search["window"] or DEFAULT_WINDOW}
    suites = {name: _without_new_fields(suite) for name, suite in dump["suites"].items()}
    without_paths: dict[str, Any] = _without_paths(
        {**kept, "models": models, "suites": suites, "search": search}
    )
    return without_paths


def _held_out(confirm: _Dump | None) -> dict[str, Any]:
    """The part of `confirm` that takes prompts from the search; empty if none does."""
    suites = {} if confirm is None else confirm["suites"]
    shares = {name: fresh.get("hold_out") for name, fresh in suites.items()}
    found = {name: {"hold_out": share} for name, share in shares.items() if share is not None}
    return {"suites": found} if found else {}


def _without_new_fields(suite: _Dump) -> dict[str, Any]:
    measure = dict(suite["measure"])
    if measure.get("race"):
        measure["race"] = {
            key: value for key, value in measure["race"].items() if (key, value) != ("error", None)
        }
    return {**suite, "measure": measure}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _without_paths(v)
            for k, v in value.items()
            if not (k == "path" and isinstance(v, str) and value.get("sha256"))
        }
    return [_without_paths(item) for item in value] if isinstance(value, list) else value
