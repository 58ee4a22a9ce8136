"""Compares a study with published tables: for each number, which conditions are the same.

Invariant: every verdict is computed from the study's settings and its suites' prompts. A number is
comparable only if all conditions that it depends on are known to be the same. A condition that a
paper does not state counts as unknown.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from ebbline.analysis.paper.card import model_origin
from ebbline.analysis.paper.published import PUBLISHED, Published
from ebbline.analysis.paper.used_values import value_of
from ebbline.analysis.results.collect import SuitePrompts
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import (
    Baselines,
    is_defended,
    undefended,
    usefulness_metric,
)
from ebbline.analysis.results.picks.floors import Floor, pick
from ebbline.analysis.results.wording import (
    axis_label,
    measured,
    metric_label,
    natural,
    percent,
    value_label,
)
from ebbline.sweeps.study.points import Result, brought, defence_of
from ebbline.sweeps.study.study import Model, Study
from ebbline.sweeps.study.suites import MultipleChoiceSuite, scorers_of
from ebbline.tasks.defences.defence import SHARE_COLUMN
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.measuring.metrics import DIRECTIONS
from ebbline.tasks.specs import ProjectSpec

T = TypeVar("T")
Verdict = Literal["same", "differs", "cannot be told"]
UNKNOWN: Final = "cannot be told"  # scripts read this text in `ebbline papers --json`
NOT_KNOWN = "withheld, or not known"
TRAINED = {
    "rows": "data.size",
    "rank": "train.rank",
    "learning_rate": "train.learning_rate",
    "epochs": "train.epochs",
    "batch": "train.global_batch",
}
"""A field of Published -> the axis of a study."""
LESSER = ("chat template", "system prompt", "max tokens", "target modules", "alpha")
"""Conditions that papers rarely state. If only these are unknown, a number is comparable as far as
is known.
"""

Comparable = Literal[
    "comparable", "comparable as far as is known", "not known to be comparable", "not comparable"
]


@dataclass(frozen=True)
class Fact:
    """One condition of a number: the verdict, its value in the paper and its value here."""

    what: str
    verdict: Verdict
    there: str
    here: str


@dataclass(frozen=True)
class PaperRow:
    """A published number and its counterpart in the study.

    `here` is the study's value in words, `model` the model that it comes from, and `facts` are the
    conditions that decide whether both are comparable.
    """

    published: Published
    model: str
    here: str
    facts: tuple[Fact, ...]

    def facts_with(self, verdict: Verdict) -> list[Fact]:
        return [fact for fact in self.facts if fact.verdict == verdict]

    @property
    def comparable(self) -> Comparable:
        if self.facts_with("differs"):
            return "not comparable"
        unknown = [fact.what for fact in self.facts_with(UNKNOWN)]
        if any(what not in LESSER for what in unknown):
            return "not known to be comparable"
        return "comparable as far as is known" if unknown else "comparable"


def beside_papers(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    prompts: Mapping[str, SuitePrompts],
) -> list[PaperRow]:
    """A row for each published number, with the study's closest model and suite.

    `prompts` are the prompts of the suites that have been measured. Points of `adapters` are left
    out: the study does not know how they were trained. So are trainings with a penalty, a moving
    average or LoX: no paper's number is of them.
    """
    trained = [result for result in finished(results) if _is_plain(study, result)]
    return [_row(published, study, trained, baselines, prompts) for published in PUBLISHED]


def _is_plain(study: Study, result: Result) -> bool:
    """Whether the study trained a point's adapter, with no defence in its training."""
    if brought(result.point) is not None or study.extrapolates(result.point.values):
        return False
    penalty, weight, decay = (
        value_of(study, result, f"train.{name}")
        for name in ("penalty", "penalty_weight", "ema_decay")
    )
    return not decay and (penalty == "none" or not weight)


def is_tiny(model: Model) -> bool:
    """Whether a model is one of ebbline's tiny models."""
    references = [model.aligned, model.base, model.unaligned]
    return any(each is not None and each.organism is not None for each in references)


def _row(
    published: Published,
    study: Study,
    done: Sequence[Result],
    baselines: Baselines,
    prompts: Mapping[str, SuitePrompts],
) -> PaperRow:
    found = []
    for model in sorted(study.models, key=natural):
        own = [result for result in done if result.point.model == model]
        for suite in _suites(published, study) or [""]:
            chosen = _chosen(published, study, own)
            facts = tuple(_facts(published, study, model, suite, chosen, prompts.get(suite)))
            found.append((facts, model, suite, chosen))
    facts, model, suite, chosen = max(
        found,
        key=lambda each: sum(
            (fact.verdict == "same") - (fact.verdict == "differs") for fact in each[0]
        ),
    )
    return PaperRow(
        published, model, _here(published, study, model, suite, chosen, baselines), facts
    )


def _suites(published: Published, study: Study) -> list[str]:
    """The suites of the study that measure the published metric."""
    if published.suite in ("refusal", "harm", "task"):
        return [
            name
            for name, entry in study.suites.items()
            if entry.measure.kind == published.suite and _metric(study, name, published)
        ]
    return [
        name
        for name, entry in study.suites.items()
        if isinstance(entry.measure, MultipleChoiceSuite)
        and published.suite is not None
        and published.suite in entry.measure.task
    ]


def _metric(study: Study, suite: str, published: Published) -> bool:
    return published.metric in study.suites[suite].measure.metrics()


def _chosen(published: Published, study: Study, own: Sequence[Result]) -> list[Result]:
    """The points to compare with a published number.

    For a fine-tuned number these are the undefended points. For a projected number they are those
    at its knob, or else the study's pick. Points that were trained as in the paper are preferred.
    """
    for what, axis in TRAINED.items():
        matching = [
            result for result in own if value_of(study, result, axis) == getattr(published, what)
        ]
        own = matching or own
    if published.state == "fine-tuned":
        return list(undefended(own).values())
    projected = [
        result for result in own if is_defended(result) and defence_of(result.point) is SAFE_LORA
    ]
    at_knob = [
        result
        for result in projected
        if published.knob is not None
        and value_of(study, result, SAFE_LORA.main_knob) == published.knob
    ]
    if at_knob or study.refusal_metric is None:
        return at_knob or projected
    found = pick(
        projected, [Floor(study.refusal_metric, study.refusal_floor)], usefulness_metric(study)
    )
    return [] if found is None else [found.result]


def _facts(
    published: Published,
    study: Study,
    model: str,
    suite: str,
    chosen: Sequence[Result],
    prompts: SuitePrompts | None,
) -> Iterator[Fact]:
    size = study.models[model]
    yield _measure(published, suite)
    yield _model(published, size)
    if published.state != "before":
        yield _method(published, study, chosen)
        yield _data(published, study)
        for what, axis in TRAINED.items():
            yield _setting(what, getattr(published, what), chosen, study, axis)
        modules = [tuple(sorted(_train(study, result, "target_modules"))) for result in chosen]
        there = (
            None if published.target_modules is None else tuple(sorted(published.target_modules))
        )
        yield _stated("target modules", there, modules, " ".join)
        alphas = [
            _train(study, result, "alpha_over_rank") * _train(study, result, "rank")
            for result in chosen
        ]
        yield _stated("alpha", published.alpha, alphas, value_label)
    if published.state == "projected":
        knob = SAFE_LORA.main_knob
        yield _setting(axis_label(knob), published.knob, chosen, study, knob)
    here = size.quantisation
    if published.quantisation is None:
        yield Fact("quantisation", UNKNOWN, NOT_KNOWN, here)
    else:
        yield Fact(
            "quantisation",
            "same" if published.quantisation == here else "differs",
            published.quantisation,
            here,
        )
    if suite:
        yield from _suite_facts(published, study, suite, prompts)


def _measure(published: Published, suite: str) -> Fact:
    there = f"{metric_label(published.metric)}{f' on {published.task}' if published.task else ''}"
    if published.metric == SHARE_COLUMN:
        return Fact("metric", UNKNOWN, f"{there}, of layers", f"{there}, of modules")
    if published.metric not in DIRECTIONS or not suite:
        return Fact("metric", "differs", there, "not measured")
    if not published.metric_told:
        here = f"{metric_label(published.metric)} ({suite})"
        return Fact(
            "metric",
            UNKNOWN,
            f"{there}, by likelihood or by normalised likelihood is not stated",
            here,
        )
    return Fact("metric", "same", there, f"{metric_label(published.metric)} ({suite})")


def _model(published: Published, size: Model) -> Fact:
    here = (
        "a tiny model of an invented language"
        if is_tiny(size)
        else model_origin(size.aligned, size.base)
    )
    there = published.repository or "not known"
    hub, tuned = size.aligned.hub, size.aligned.tuned or size.aligned.gguf
    if hub is None:
        differs = is_tiny(size) or tuned is not None
        return Fact(
            "model",
            "differs" if differs else UNKNOWN,
            there,
            here if differs else f"{here}; name it with `hub`",
        )
    name = hub.id.rpartition("/")[2].lower().removeprefix("meta-")
    if name == there.lower():
        return Fact("model", "same", there, hub.id)
    return Fact(
        "model",
        UNKNOWN if name.startswith(f"{there.lower()}-") else "differs",
        there,
        hub.id,
    )


def _method(published: Published, study: Study, chosen: Sequence[Result]) -> Fact:
    names = {"lora": "LoRA", "full": "all weights", None: "not known"}
    axis = "project.projector"
    used = {value_of(study, result, axis) for result in chosen}
    used |= set() if chosen else {study.fixed(next(iter(study.models)), axis)}
    projectors = sorted(str(each or ProjectSpec().projector) for each in used)
    projector = " or ".join(projectors)
    projected = published.state == "projected"
    there = names[published.method] + (", Safe LoRA" if projected else "")
    here = "LoRA" + (f", Safe LoRA, {projector} projector" if projected else "")
    if published.method != "lora":
        return Fact("method", UNKNOWN if published.method is None else "differs", there, here)
    return Fact("method", "differs" if projected and "exact" in projectors else "same", there, here)


def _data(published: Published, study: Study) -> Fact:
    data, there = study.data, published.data or NOT_KNOWN
    if data is None:
        return Fact("data", UNKNOWN, there, "no training in this study")
    pool = data.pool
    if pool.language is not None:
        return Fact("data", "differs", there, f"{pool.language} of an invented language")
    here = (
        pool.hub.id
        if pool.hub is not None
        else f"the file {pool.path.path.rpartition('/')[2]}"
        if pool.path is not None
        else "?"
    )
    if published.hub_data is not None and pool.hub is not None:
        same = (
            published.hub_data.replace("-", "_") in pool.hub.id.lower().replace("-", "_")
            and not data.settings.mix_share
        )
        return Fact("data", "same" if same else "differs", there, here)
    return Fact("data", UNKNOWN, there, here)


def _setting(
    what: str, there: int | float | None, chosen: Sequence[Result], study: Study, axis: str
) -> Fact:
    lengths = {value_of(study, result, "train.steps") for result in chosen} - {None}
    if axis == "train.epochs" and lengths:
        steps = " or ".join(sorted(map(str, lengths), key=natural))
        return Fact(
            what,
            UNKNOWN if there is None else "differs",
            value_label(there) if there else NOT_KNOWN,
            f"{steps} steps",
        )
    what = what.replace("_", " ")
    values = sorted({value_of(study, result, axis) for result in chosen}, key=str)
    here = ", ".join(value_label(value) for value in values) or "no such point"
    if there is None:
        return Fact(what, UNKNOWN, NOT_KNOWN, here)
    return Fact(what, "same" if values == [there] else "differs", value_label(there), here)


def _train(study: Study, result: Result, name: str) -> Any:
    return value_of(study, result, f"train.{name}")


def _stated(what: str, there: T | None, here: Sequence[T], label: Callable[[T], str]) -> Fact:
    """Compares the paper's value `there`, None if not stated, with the points' values `here`."""
    values = ", ".join(sorted({label(each) for each in here})) or "no such point"
    if there is None:
        return Fact(what, UNKNOWN, NOT_KNOWN, values)
    return Fact(what, "same" if set(here) == {there} else "differs", label(there), values)


def _suite_facts(
    published: Published, study: Study, suite: str, prompts: SuitePrompts | None
) -> Iterator[Fact]:
    measure = study.suites[suite].measure
    if isinstance(measure, MultipleChoiceSuite):
        yield Fact(
            "prompts",
            "same" if measure.task == published.task and measure.limit is None else "differs",
            published.task or "",
            measure.task,
        )
        yield Fact(
            "shots",
            "same" if measure.shots_given == published.shots else "differs",
            str(published.shots),
            str(measure.shots_given),
        )
        yield _stated("chat template", published.chat_template, [measure.chat_template], _yes_or_no)
        return
    language = study.suites[suite].prompts.language
    if language is not None:
        yield Fact(
            "prompts",
            "differs",
            published.prompts or published.task or NOT_KNOWN,
            f"{language} of an invented language",
        )
    elif published.prompts is None:
        yield Fact("prompts", UNKNOWN, published.task or NOT_KNOWN, suite)
    elif prompts is None:
        yield Fact("prompts", UNKNOWN, published.prompts, "not measured yet")
    else:
        there = f"{published.prompts}, {published.prompt_rows or 'an unknown number of'} rows"
        here = f"{prompts.format}, {prompts.asked} of {prompts.rows} rows asked"
        whole = prompts.asked == prompts.rows and published.prompt_rows in (None, prompts.rows)
        yield Fact(
            "prompts",
            "same" if prompts.format == published.prompts and whole else "differs",
            there,
            here,
        )
    scorers = scorers_of(measure)
    here = scorers[0] if scorers else str(getattr(measure, "scorer", ""))
    if published.scorer is None or published.scorer == "keywords":
        yield Fact("scorer", UNKNOWN, published.scorer or NOT_KNOWN, here)
    else:
        yield Fact(
            "scorer", "same" if published.scorer == here else "differs", published.scorer, here
        )
    yield _stated("chat template", published.chat_template, [True], _yes_or_no)
    yield _stated(
        "system prompt", published.system_prompt, [""], lambda prompt: prompt or "none given"
    )
    yield _stated("max tokens", published.max_tokens, [measure.max_new_tokens], str)


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _here(
    published: Published,
    study: Study,
    model: str,
    suite: str,
    chosen: Sequence[Result],
    baselines: Baselines,
) -> str:
    """The study's value. A tiny model's value is never compared with that of a real model."""
    if is_tiny(study.models[model]):
        return "not compared: a tiny model"
    if published.metric == SHARE_COLUMN:
        shares = sorted(result.changed_share or 0.0 for result in chosen)
        return _span([percent(share) for share in shares]) if shares else "no such point"
    if published.metric not in DIRECTIONS or not suite:
        return "not measured"
    name = f"{suite}.{published.metric}"
    if published.state == "before":
        metric = baselines.get(model, {}).get(name)
        return "not measured yet" if metric is None else f"{model}: {measured(metric)}"
    metrics = sorted(
        (result.metrics[name] for result in chosen if name in result.metrics),
        key=lambda metric: metric.value,
    )
    if not metrics:
        return "no such point"
    return (
        f"{model}: {measured(metrics[0])}"
        if len(metrics) == 1
        else f"{model}: {_span([percent(m.value) for m in metrics])}"
    )


def _span(values: Sequence[str]) -> str:
    return (
        values[0] if len(values) == 1 else f"{values[0]} to {values[-1]} over {len(values)} points"
    )
