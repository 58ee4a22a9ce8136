"""Labels and sentences about Safe LoRA for figures, reports and papers. Imports no torch.

The callers only print these texts; no decision depends on them.
"""

from collections.abc import Collection, Mapping
from statistics import median

from ebbline.tasks.defences.gate import ModuleRow, cosines_by_module

QUANTITY = "cosine"
NO_QUANTITY = "no cosine"
MAPS, SHARES = "cosines", "projected-share"
"""The beginnings of the file names of its two figures."""
KNOB_USED = "threshold used"
SHARE_AXIS = "modules projected"


def measured_of(rows: Mapping[str, ModuleRow]) -> list[float]:
    """The cosines of an adapter's modules, ascending. Modules without one are left out."""
    return sorted(cosines_by_module(rows).values())


def lacking_label(count: int) -> str:
    return f"without a cosine: {count}"


def nothing_to_draw(title: str) -> str:
    return f"{title}: there is no module, so there are no cosines to draw"


def map_caption(what: str) -> str:
    return (
        f"{what}: the cosine of each module's projected with its unprojected update, by "
        "layer and module type. White dots:"
        " projected. Hatched: no cosine, so never projected. Blank: not adapted."
    )


def share_caption(what: str) -> str:
    return (
        f"{what}: the share of all modules that a threshold projects, which are those with a "
        "cosine at or below it."
    )


def map_sentence(rows: Mapping[str, ModuleRow], projected: Collection[str], what: str) -> str:
    """A description of the map of one adapter."""
    found = measured_of(rows)
    lacking = f", {len(rows) - len(found)} without a cosine" if len(found) < len(rows) else ""
    text = (
        f"Heat map of the cosines of {what}, module types by layers: {len(rows)} modules, "
        f"{len(set(projected))} of them projected{lacking}."
    )
    return f"{text} Cosines from {found[0]:.2f} to {found[-1]:.2f}." if found else text


def share_sentence(what: str) -> str:
    return f"Step curves: share of modules projected by threshold, {what}."


def spread_sentence(rows: Mapping[str, ModuleRow]) -> str:
    """The range and the median of one adapter's cosines, and the number of modules without one."""
    found = measured_of(rows)
    lacking, text = len(rows) - len(found), ""
    if found:
        text += f" Cosines from {found[0]:.4f} to {found[-1]:.4f}, median {median(found):.4f}."
    if lacking:
        some = f"{lacking} have no" if lacking > 1 else "One has no"
        text += f" {some if found else 'No module has'} cosine."
    return text


def range_phrase(rows: Mapping[str, ModuleRow]) -> str:
    """The range as `; cosines 0.1000 to 0.3000`; empty without cosines."""
    found = measured_of(rows)
    return f"; cosines {found[0]:.4f} to {found[-1]:.4f}" if found else ""
