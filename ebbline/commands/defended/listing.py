"""The list of defences, controls and knobs that `ebbline defend` prints. Imports no torch."""

import json
from collections.abc import Sequence

from ebbline.tables import print_table
from ebbline.tasks.defences.controls.registry import CONTROLS
from ebbline.tasks.defences.methods.knobs import Knob, Value
from ebbline.tasks.defences.methods.method import Method
from ebbline.tasks.defences.methods.registry import METHODS, method_named
from ebbline.tasks.errors import ProjectionError


def given_knobs(method: str, texts: Sequence[str]) -> dict[str, list[Value]]:
    """NAME=VALUE texts as knob -> its values. Raises ProjectionError, which names the text."""
    knobs = {knob.name: knob for knob in method_named(method).knobs}
    found: dict[str, list[Value]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ProjectionError(f"{text!r} is not NAME=VALUE, such as {next(iter(knobs))}=VALUE")
        if name.strip() not in knobs:
            raise ProjectionError(
                f"{method} has no knob {name.strip()!r}; its knobs are {', '.join(knobs)}"
            )
        found.setdefault(name.strip(), []).append(knobs[name.strip()].parsed(value))
    return found


def print_methods(as_json: bool, wide: bool) -> None:
    """List every defence with its knobs, needs and controls, and every control."""
    if as_json:
        methods = [_facts(method) for method in METHODS]
        controls = [
            {"name": each.name, "formula": each.formula, "question": each.question}
            for each in CONTROLS
        ]
        print(json.dumps({"methods": methods, "controls": controls}, indent=1))
        return
    print_table(
        ["method", "formula", "needs", "controls"],
        [
            [each.name, each.formula, each.needs, ", ".join(each.controls) or "none"]
            for each in METHODS
        ],
        wide,
    )
    print()
    print_table(
        ["method", "knob", "range", "default", "what it sets"],
        [
            [each.name, knob.name, knob.range, _default(knob), knob.what]
            for each in METHODS
            for knob in each.knobs
        ],
        wide,
    )
    print()
    print_table(
        ["control", "formula", "question"],
        [[each.name, each.formula, each.question] for each in CONTROLS],
        wide,
    )


def _facts(method: Method) -> dict[str, object]:
    return {
        "name": method.name,
        "formula": method.formula,
        "source": method.source,
        "needs": method.needs,
        "controls": list(method.controls),
        "knobs": [
            {
                "name": knob.name,
                "range": knob.range,
                "default": knob.default,
                "what": knob.what,
            }
            for knob in method.knobs
        ],
    }


def _default(knob: Knob) -> str:
    return knob.shown_default or ("" if knob.default is None else str(knob.default))
