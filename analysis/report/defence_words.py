"""Whether the defences of a study do more than their controls, in sentences.

Invariants: a defence keeps more or fewer refusals than another set of adapters only if the 95%
interval of the difference leaves out 0. What has no control, or none that was run, is named by
ebbline.analysis.results.controls.means.control_notes.
"""

from collections.abc import Sequence

import pandas as pd

from ebbline.analysis.results.defended.advantage import Advantage
from ebbline.analysis.results.defended.beside import Against
from ebbline.analysis.results.defended.labels import control_label, defence_label
from ebbline.analysis.results.defended.modules import ModuleEffects, ratio_range
from ebbline.analysis.results.measurements import MOVES, Move, refusal_metric, usefulness_metric
from ebbline.analysis.results.tables import in_points
from ebbline.analysis.results.wording import counted_label, metric_label
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.controls.registry import CONTROLS
from ebbline.tasks.defences.safe_lora import SAFE_LORA

KEEPS: dict[Move, str] = {
    "higher": "more refusals than",
    "lower": "fewer refusals than",
    "not distinguishable": "not measurably more or fewer refusals than",
}


def control_sentences(study: Study, against: Sequence[Against]) -> list[str]:
    """A sentence for each defence and control: at equal usefulness, then at operating points. The
    control of equal norm comes first.
    """
    useful, sentences = usefulness_metric(study), []
    own = [each for each in against if each.is_control]
    for defence in dict.fromkeys(each.defence for each in own):
        controls = {each.other for each in own if each.defence == defence}
        for control in sorted(controls, key=_order):
            pairs = [each for each in own if (each.defence, each.other) == (defence, control)]
            parts = []
            found = [each.advantage for each in pairs if each.advantage is not None]
            if useful is not None and found:
                parts.append(
                    f"at equal {metric_label(useful)} {defence_label(defence)} keeps "
                    f"{_kept(found, control_label(control))}"
                )
            if any(each.at_point for each in pairs):
                than = "" if parts else f" against {control_label(control)}"
                at = "point" if len(pairs) == 1 else "points"
                whose = "its" if parts else f"{defence_label(defence)}'s"
                parts.append(f"at {whose} operating {at}{than} {_at_points(pairs)}")
            if parts:
                text = "; ".join(parts)
                sentences.append(f"{text[0].upper()}{text[1:]}.")
    return sentences


def rival_sentences(study: Study, against: Sequence[Against]) -> list[str]:
    """A sentence for each pair of defences, over equally many distinct adapters."""
    useful, sentences = usefulness_metric(study), []
    rivals = [each for each in against if not each.is_control]
    for one, other in dict.fromkeys((each.defence, each.other) for each in rivals):
        found = [
            each.advantage
            for each in rivals
            if (each.defence, each.other) == (one, other) and each.advantage is not None
        ]
        if found and useful is not None:
            sentences.append(
                f"At equal {metric_label(useful)} {defence_label(one)} keeps "
                f"{_kept(found, defence_label(other))}."
            )
    return sentences


def _kept(found: Sequence[Advantage], other: str) -> str:
    """How a defence compares at equal usefulness: the numbers of one model, or counts of models."""
    if len(found) == 1:
        if found[0].interval is None:
            return f"an unknown share of refusals beside {other}{_numbers(found[0])}"
        return f"{KEEPS[found[0].move]} {other}{_numbers(found[0])}{_of_whom(found)}"
    tested = [each for each in found if each.interval is not None]
    of, untested = len(found), len(found) - len(tested)
    if not tested:
        return f"an unknown share of refusals beside {other}: no model could be tested"
    rest = f"; {untested} of {of} could not be tested" if untested else ""
    moves = [each.move for each in tested]
    at = f"all {of} models" if not untested else f"all {len(tested)} models that could be tested"
    for move in MOVES:
        if moves.count(move) == len(tested):
            return f"{KEEPS[move]} {other} at {at}{_of_whom(tested)}"
    return (
        f"more refusals than {other} at {moves.count('higher')} and fewer at "
        f"{moves.count('lower')} of {of} models{rest}{_of_whom(tested)}"
    )


def _of_whom(found: Sequence[Advantage]) -> str:
    """Says where too few seeds support a claim about the settings."""
    return "" if all(each.is_about_setting for each in found) else ", for the measured adapters"


def _numbers(found: Advantage) -> str:
    draws = (
        f"; {len(found.by_draw)} draws, {in_points(min(found.by_draw))} to "
        f"{in_points(max(found.by_draw))}"
        if len(found.by_draw) > 1
        else ""
    )
    adapters = f"{found.adapters} adapter{'s' if found.adapters > 1 else ''} of each"
    return f" ({_points(found.difference, found.interval)}; {adapters}{draws})"


def _points(difference: float, interval: tuple[float, float] | None) -> str:
    known = (
        "its interval is not known"
        if interval is None
        else f"95% interval {in_points(interval[0])} to {in_points(interval[1])}"
    )
    return f"{in_points(difference)} points, {known}"


def _at_points(pairs: Sequence[Against]) -> str:
    """How a control compares at the operating points: with numbers for one model."""
    found = [each for each in pairs if each.at_point]
    names = list(found[0].at_point)
    if len(found) == 1:
        compared = found[0].at_point
        return " and ".join(
            f"{metric_label(name)} is {compared[name].move} "
            f"({_points(compared[name].difference, compared[name].interval)})"
            for name in names
        )
    parts = []
    for name in names:
        moves = [each.at_point[name].move for each in found]
        parts.append(f"{metric_label(name)} is {counted_label(moves, MOVES, 'model')}")
    return " and ".join(parts)


def against_cells(study: Study, against: Sequence[Against]) -> pd.DataFrame:
    """A row for each model, defence and what it is compared with: differences in points."""
    refusal, useful = refusal_metric(study), usefulness_metric(study)
    names = [name for name in (refusal, useful) if name is not None]
    rows = [
        [
            each.model,
            defence_label(each.defence),
            control_label(each.other) if each.is_control else defence_label(each.other),
            ""
            if each.advantage is None
            else _cell(each.advantage.difference, each.advantage.interval),
            "" if each.advantage is None else str(each.advantage.adapters),
            "" if each.point is None or not each.at_point else str(each.point.number),
            *(
                _cell(each.at_point[name].difference, each.at_point[name].interval)
                if name in each.at_point
                else ""
                for name in names
            ),
        ]
        for each in against
    ]
    equal = "" if useful is None else f"refusals at equal {metric_label(useful)}"
    columns = ["model", "defence", "against", equal, "adapters of each", "operating point"]
    return pd.DataFrame(rows, columns=[*columns, *map(metric_label, names)])


def _cell(difference: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return in_points(difference)
    return f"{in_points(difference)} [{in_points(interval[0])}, {in_points(interval[1])}]"


def _order(name: str) -> int:
    names = [control.name for control in CONTROLS]
    return names.index(name) if name in names else len(names)


def norm_note(study: Study, named: ModuleEffects) -> str:
    """That C is no projector, where Safe LoRA's approximate C was used. An axis of both projectors
    has no note, as the ratios of the two would be mixed.
    """
    if SAFE_LORA not in study.used_defences:
        return ""
    own = {label: each for label, each in named.items() if f", {SAFE_LORA.words.name}, " in label}
    fixed, _ = study.defence_specs(SAFE_LORA)
    exact = getattr(fixed, "projector", None) == "exact"
    varied = any(SAFE_LORA.axis("projector") in study.axes_of(model) for model in study.models)
    found = ratio_range(own)
    if exact or varied or found is None:
        return ""
    return (
        "The approximate C is no projector: its eigenvalues are the squared singular values of V, "
        "divided by ||V||_F. With V twice as long, C B would be twice as long. Here a projected "
        f"module keeps {found[0]:.3f} to {found[1]:.3f} of its update's length."
    )
