"""What a paper says of the defences of a study: before, during and after its trainings."""

from collections.abc import Iterator, Sequence

from ebbline.analysis.paper.origins import described
from ebbline.analysis.paper.used_values import is_varied, listed, used_values, value_of
from ebbline.analysis.report.provenance import Provenance
from ebbline.analysis.results.wording import value_label
from ebbline.sweeps.study.points import Result, Value, brought, defence_of
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.specs import ProjectSpec

_PENALTIES = {
    "asft": "||(I - C) B A||_F^2, C that of Safe LoRA (AsFT, arXiv 2506.08473)",
    "norm": "||B A||_F^2",
}


def before_and_during(study: Study, results: Sequence[Result]) -> Iterator[str]:
    """Sentences on LoX, penalties and moving averages, where a point's training has them."""
    trained = [result for result in results if brought(result.point) is None]

    def values(axis: str, among: Sequence[Result] = trained) -> list[Value]:
        return sorted({value_of(study, result, axis) for result in among})

    factors = values("lox.factor")
    if any(factors):
        directions = _or([*values("lox.directions")])
        yield (
            "Trainings began from the aligned model plus a factor times the leading "
            f"{directions} singular directions of its difference from {_subtracted(study)} "
            f"(LoX, arXiv 2506.15606), with a factor of {_or(factors)}"
            f"{'; 0 is the aligned model itself' if 0 in factors else ''}."
        )
    for name, formula in _PENALTIES.items():
        own = [r for r in trained if value_of(study, r, "train.penalty") == name]
        weights = values("train.penalty_weight", own)
        if any(weights):
            yield (
                f"The loss had the penalty lambda {formula}, summed over the modules, with lambda "
                f"{_or(weights)}{'; 0 is none' if 0 in weights else ''}."
            )
    if any(decays := values("train.ema_decay")):
        yield (
            "The adapter is the exponential moving average of A and of B over the steps "
            f"(arXiv 2508.12531), with a decay of {_or(decays)}"
            f"{'; 0 is no average' if 0 in decays else ''}."
        )


def _or(values: Sequence[Value]) -> str:
    return listed([value_label(value) for value in values], "or")


def defending(study: Study, results: Sequence[Result], provenance: Provenance) -> Iterator[str]:
    """Sentences on each defence that changes adapters after their training."""
    without = all(model.base is None and model.unaligned is None for model in study.models.values())
    used = [each for each in study.used_defences if not (without and each.reads_models)]
    if not any(each.kinds and each.main_knob for each in used):
        yield "No adapter was changed after its training."
        return
    for defence in used:
        yield from _of_defence(study, defence, results, provenance)


def _of_defence(
    study: Study, defence: Defence, every: Sequence[Result], provenance: Provenance
) -> Iterator[str]:
    results = [result for result in every if defence_of(result.point) is defence]
    if defence is SAFE_LORA:
        yield _projected(study, results)
    knobs = study.knobs(defence, {})
    used = {
        axis: used_values(results, axis, value)
        for axis, value in knobs.items()
        if axis == defence.main_knob or value is not None or is_varied(results, axis)
    }
    yield from defence.rules({**used, **_projector(study, defence, results)})
    if defence.method is not None and defence.method.reads_safety:
        yield from (
            f"The safety adapter of {name}: {described(f'models.{name}.safety', provenance)}."
            for name, model in study.models.items()
            if model.safety is not None
        )


def _projector(study: Study, defence: Defence, results: Sequence[Result]) -> dict[str, str]:
    """The projector behind the gate of a defence other than Safe LoRA, by axis."""
    first, _ = study.defence_specs(defence)
    if defence is SAFE_LORA or not defence.reads_models or not isinstance(first, ProjectSpec):
        return {}
    axes = {defence.axis("projector"): first.projector, defence.axis("energy"): first.energy}
    return {
        axis: used_values(results, axis, value)
        for axis, value in axes.items()
        if value is not None or is_varied(results, axis)
    }


def _projected(study: Study, results: Sequence[Result]) -> str:
    project = ProjectSpec.model_validate(study.defence_specs(SAFE_LORA)[0])
    projector = used_values(results, "project.projector", project.projector)
    energy = (
        f", holding {used_values(results, 'project.energy', project.energy)} of the energy"
        if project.energy is not None
        else ""
    )
    return (
        "Adapters were projected after training as in Safe LoRA [@hsu2024safelora]"
        f" with the {projector} projector{energy}, computed from the difference between "
        f"the aligned model and {_subtracted(study)}."
    )


def _subtracted(study: Study) -> str:
    others = [name for name, model in study.models.items() if model.unaligned is not None]
    if not others:
        return "the base"
    return (
        "its unaligned stand-in"
        if len(others) == len(study.models)
        else f"the base (for {listed(others)} an unaligned stand-in)"
    )
