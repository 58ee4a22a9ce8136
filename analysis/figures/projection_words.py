"""The alternative texts of the projection's figures. `project --report` works without the extra
`sweep`, so this module imports none of its packages.
"""

from collections.abc import Collection, Mapping
from statistics import fmean

from ebbline.analysis.figures.projection import depth_and_type
from ebbline.tasks.defences import words
from ebbline.tasks.defences.gate import ModuleRow, cosines_by_module, share_steps

MOST_TYPES, MOST_CURVES = 8, 3


def map_words(rows: Mapping[str, ModuleRow], projected: Collection[str], what: str) -> str:
    text = words.map_sentence(rows, projected, what)
    types: dict[str, list[float]] = {}
    layers: dict[int, list[float]] = {}
    known = cosines_by_module(rows)
    for module in (module for module in rows if module in known):
        depth, kind = depth_and_type(module)
        types.setdefault(kind.rpartition(".")[2], []).append(known[module])
        if depth is not None:
            layers.setdefault(depth, []).append(known[module])
    if types and len(types) <= MOST_TYPES:
        text += (
            " Mean by type: "
            f"{', '.join(f'{kind} {fmean(found):.2f}' for kind, found in types.items())}."
        )
    if len(layers) > 1:
        means = {depth: fmean(found) for depth, found in layers.items()}
        lowest, highest = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        text += (
            f" Lowest mean in layer {lowest} ({means[lowest]:.2f}), highest in layer {highest} "
            f"({means[highest]:.2f})."
        )
    return text


def share_words(curves: Mapping[str, Mapping[str, ModuleRow]], what: str) -> str:
    """The values of the knob at which each curve reaches a quarter, a half and three quarters."""
    parts = [words.share_sentence(what)]
    for name, rows in list(curves.items())[:MOST_CURVES]:
        steps = share_steps(rows)
        passed = []
        for share in (0.25, 0.5, 0.75):
            at = next((value for value, reached in steps if reached >= share), None)
            passed += [] if at is None else [f"{share:.0%} from {at:.2f}"]
        parts.append(f"{name}: {', '.join(passed) or 'never a quarter'}.")
    if len(curves) > MOST_CURVES:
        parts.append(f"And {len(curves) - MOST_CURVES} more.")
    return " ".join(parts)
