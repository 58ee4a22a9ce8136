"""Whether the defences of a study do more than their controls, in sentences.

Invariants: a defence keeps more or fewer refusals than another set of adapters only if the 95%
interval of the difference leaves out 0. What has no control, or none that was run, is named by
ebbline.analysis.results.controls.means.control_notes.
"""

from collections.abc import Sequence

from ebbline.analysis.report.answer import how_found
from ebbline.analysis.results.defended.advantage import Advantage
from ebbline.analysis.results.defended.beside import Against
from ebbline.analysis.results.defended.labels import control_label, defence_label
from ebbline.analysis.results.defended.modules import ModuleEffects, ratio_range
from ebbline.analysis.results.measurements import Comparison, Move, usefulness_metric
from ebbline.analysis.results.tables import in_points
from ebbline.analysis.results.wording import metric_label
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.controls.registry import CONTROLS
from ebbline.tasks.defences.safe_lora import SAFE_LORA

KEEPS: dict[Move, str] = {
    "higher": "more refusals than",
    "lower": "fewer refusals than",
    "not distinguishable": "neither measurably more nor measurably fewer refusals than",
}


def control_sentences(study: Study, against: Sequence[Against]) -> list[str]:
    """A sentence for each defence with controls: equal usefulness, then its operating points."""
    useful, sentences = usefulness_metric(study), []
    for defence in dict.fromkeys(each.defence for each in against if each.is_control):
        own = [each for each in against if each.is_control and each.defence == defence]
        controls = sorted({each.other for each in own}, key=_order)
        name, parts = defence_label(defence), []
        if useful is not None and any(each.advantage for each in own):
            kept = [_kept([each for each in own if each.other == control]) for control in controls]
            parts.append(
                f"at equal {metric_label(useful)} {name} keeps {', and '.join(filter(None, kept))}"
            )
        at_points = [
            _at_point([each for each in own if each.other == control]) for control in controls
        ]
        if any(at_points):
            parts.append(f"at its operating point {'; '.join(filter(None, at_points))}")
        if parts:
            text = "; ".join(parts)
            sentences.append(f"{text[0].upper()}{text[1:]}.")
    return sentences


def rival_sentences(study: Study, against: Sequence[Against]) -> list[str]:
    """A sentence for each pair of defences and model, over equally many distinct adapters."""
    useful = usefulness_metric(study)
    return [
        f"{each.model}: at equal {metric_label(useful)} {defence_label(each.defence)} keeps "
        f"{KEEPS[each.advantage.move]} {defence_label(each.other)}{_numbers(each.advantage)}."
        for each in against
        if not each.is_control and each.advantage is not None and useful is not None
    ]


def _kept(own: Sequence[Against]) -> str:
    """How one control compares at equal usefulness, over the models."""
    found = [each.advantage for each in own if each.advantage is not None]
    if not found:
        return ""
    control = control_label(own[0].other)
    if len(found) == 1:
        return f"{KEEPS[found[0].move]} {control}{_numbers(found[0])}"
    moves: tuple[Move, ...] = ("higher", "lower", "not distinguishable")
    counts = [(move, sum(each.move == move for each in found)) for move in moves]
    of = len(found)
    if max(count for _, count in counts) == of:
        move = max(counts, key=lambda each: each[1])[0]
        return f"{KEEPS[move]} {control} at all {of} models"
    listed = ", ".join(f"{KEEPS[move]} it at {count} of {of}" for move, count in counts if count)
    return f"against {control}: {listed} models"


def _numbers(found: Advantage) -> str:
    interval = (
        "its interval is not known"
        if found.interval is None
        else f"95% interval {in_points(found.interval[0])} to {in_points(found.interval[1])}"
    )
    draws = (
        f"; {len(found.by_draw)} draws, {in_points(min(found.by_draw))} to "
        f"{in_points(max(found.by_draw))}"
        if len(found.by_draw) > 1
        else ""
    )
    adapters = f"{found.adapters} adapter{'s' if found.adapters > 1 else ''} of each"
    return f" ({in_points(found.difference)} points, {interval}; {adapters}{draws})"


def _at_point(own: Sequence[Against]) -> str:
    """How one control compares at the operating points: by metric, with numbers for one model."""
    found = [each for each in own if each.at_point]
    if not found:
        return ""
    names = list(found[0].at_point)
    control = control_label(own[0].other)
    if len(found) == 1:
        parts = [
            f"{metric_label(name)} is {_than(found[0].at_point[name])}{_how(found[0], name)}"
            for name in names
        ]
        return f"{' and '.join(parts)} {control}"
    parts = []
    for name in names:
        moves = [each.at_point[name].move for each in found]
        higher, lower = moves.count("higher"), moves.count("lower")
        parts.append(f"{metric_label(name)} is higher at {higher} and lower at {lower}")
    return f"{' and '.join(parts)} of {len(found)} models than with {control}"


def _than(comparison: Comparison) -> str:
    if comparison.move == "not distinguishable":
        return "not distinguishable from that of"
    return f"{comparison.move} than with"


def _how(each: Against, name: str) -> str:
    how = how_found([each.at_point[name]])
    return f" ({how})" if how else ""


def _order(name: str) -> int:
    names = [control.name for control in CONTROLS]
    return names.index(name) if name in names else len(names)


def norm_note(study: Study, named: ModuleEffects) -> str:
    """That C is no projector, where Safe LoRA's approximate C was used."""
    found = ratio_range(named)
    if SAFE_LORA not in study.used_defences or found is None:
        return ""
    return (
        "The approximate C is no projector: its eigenvalues are the squared singular values of V, "
        "divided by ||V||_F. With V twice as long, C B would be twice as long. Here a projected "
        f"module keeps {found[0]:.3f} to {found[1]:.3f} of its update's length."
    )
