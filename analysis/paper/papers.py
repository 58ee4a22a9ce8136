"""A study beside the published tables: for each number what is the same here, what is not, and what
cannot be told.

Invariant: every verdict is computed from the study's settings and from what its suites asked;
nothing is comparable by assertion. A number is comparable only when everything that it depends on
is known to be the same; what a paper does not say is counted, not passed over.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ebbline.analysis.paper.card import described
from ebbline.analysis.paper.published import PUBLISHED, Published
from ebbline.analysis.results.collect import SuitePrompts
from ebbline.analysis.results.floors import Floor, pick
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import (
    Baselines,
    is_projected,
    unprojected,
    usefulness_metric,
)
from ebbline.analysis.results.wording import (
    axis_label,
    measured,
    metric_label,
    natural,
    percent,
    value_label,
)
from ebbline.sweeps.study.points import Result, Value
from ebbline.sweeps.study.study import Model, Study
from ebbline.sweeps.study.suites import MultipleChoiceSuite, scorers_of
from ebbline.tasks.defences.in_use import DEFENCE
from ebbline.tasks.measuring.metrics import DIRECTIONS

T = TypeVar("T")
Verdict = Literal["same", "differs", "cannot be told"]
NOT_KNOWN = "withheld, or not known"
TRAINED = {
    "rows": "data.size",
    "rank": "train.rank",
    "learning_rate": "train.learning_rate",
    "epochs": "train.epochs",
    "batch": "train.global_batch",
}
"""A field of Published -> the axis that it is here."""
LESSER = ("chat template", "system prompt", "max tokens", "target modules", "alpha")
"""Facts that hardly a paper states: where nothing else is unknown, a number is comparable as far as
is known.
"""

Comparable = Literal[
    "comparable", "comparable as far as is known", "not known to be comparable", "not comparable"
]


@dataclass(frozen=True)
class Fact:
    """One thing that a number depends on: whether it is the same here, in the paper, and here."""

    what: str
    verdict: Verdict
    there: str
    here: str


@dataclass(frozen=True)
class PaperRow:
    """A published number, what the study has in its place (in words, and from which size), and the
    facts that decide.
    """

    published: Published
    model: str
    here: str
    facts: tuple[Fact, ...]

    def those(self, verdict: Verdict) -> list[Fact]:
        return [fact for fact in self.facts if fact.verdict == verdict]

    @property
    def comparable(self) -> Comparable:
        if self.those("differs"):
            return "not comparable"
        unknown = [fact.what for fact in self.those("cannot be told")]
        if any(what not in LESSER for what in unknown):
            return "not known to be comparable"
        return "comparable as far as is known" if unknown else "comparable"


def beside_papers(
    study: Study, results: Sequence[Result], baselines: Baselines, asked: Mapping[str, SuitePrompts]
) -> list[PaperRow]:
    """A row for each published number, beside the size and suite of the study that come nearest to
    it.

    `asked` is what the suites asked, of those that have been measured.
    """
    return [_row(published, study, finished(results), baselines, asked) for published in PUBLISHED]


def is_tiny(model: Model) -> bool:
    """Whether a size is one of ebbline's tiny models."""
    references = [model.aligned, model.base, model.unaligned]
    return any(each is not None and each.organism is not None for each in references)


def _row(
    published: Published,
    study: Study,
    done: Sequence[Result],
    baselines: Baselines,
    asked: Mapping[str, SuitePrompts],
) -> PaperRow:
    found = []
    for model in sorted(study.models, key=natural):
        own = [result for result in done if result.point.model == model]
        for suite in _suites(published, study) or [""]:
            chosen = _chosen(published, study, own)
            facts = tuple(_facts(published, study, model, suite, chosen, asked.get(suite)))
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
    """The suites that measure the same kind of thing."""
    if published.suite in ("refusal", "task"):
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
    """The points that stand where the number stands: unprojected ones, or at its knob; else
    the one that the study would ship.

    Of these the ones that were trained as the paper says, so far as there are such.
    """
    for what, axis in TRAINED.items():
        alike = [
            result for result in own if _value(study, result, axis) == getattr(published, what)
        ]
        own = alike or own
    if published.state == "fine-tuned":
        return list(unprojected(own).values())
    projected = [result for result in own if is_projected(result)]
    at = [
        result
        for result in projected
        if published.knob is not None and _value(study, result, DEFENCE.main_knob) == published.knob
    ]
    if at or study.refusal_metric is None:
        return at or projected
    found = pick(
        projected, [Floor(study.refusal_metric, study.refusal_floor)], usefulness_metric(study)
    )
    return [] if found is None else [found.result]


def _value(study: Study, result: Result, axis: str) -> Value:
    values = dict(result.point.values)
    value: Value = values[axis] if axis in values else study.fixed(result.point.model, axis)
    return value


def _facts(
    published: Published,
    study: Study,
    model: str,
    suite: str,
    chosen: Sequence[Result],
    asked: SuitePrompts | None,
) -> Iterator[Fact]:
    size = study.models[model]
    yield _measure(published, suite)
    yield _model(published, size)
    if published.state != "before":
        yield _method(published, study)
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
        knob = DEFENCE.main_knob
        yield _setting(axis_label(knob), published.knob, chosen, study, knob)
    here = size.quantisation
    if published.quantisation is None:
        yield Fact("quantisation", "cannot be told", NOT_KNOWN, here)
    else:
        yield Fact(
            "quantisation",
            "same" if published.quantisation == here else "differs",
            published.quantisation,
            here,
        )
    if suite:
        yield from _asking(published, study, suite, asked)


def _measure(published: Published, suite: str) -> Fact:
    there = f"{metric_label(published.metric)}{f' on {published.task}' if published.task else ''}"
    if published.metric == DEFENCE.words.share:
        return Fact("metric", "cannot be told", f"{there}, of layers", f"{there}, of modules")
    if published.metric not in DIRECTIONS or not suite:
        return Fact("metric", "differs", there, "not measured")
    if not published.metric_told:
        here = f"{metric_label(published.metric)} ({suite})"
        return Fact(
            "metric",
            "cannot be told",
            f"{there}, by likelihood or by normalised likelihood is not said",
            here,
        )
    return Fact("metric", "same", there, f"{metric_label(published.metric)} ({suite})")


def _model(published: Published, size: Model) -> Fact:
    here = (
        "a tiny one of an invented language"
        if is_tiny(size)
        else described(size.aligned, size.base)
    )
    there = published.repository or "not known"
    hub, tuned = size.aligned.hub, size.aligned.tuned or size.aligned.gguf
    if hub is None:
        known = is_tiny(size) or tuned is not None
        return Fact(
            "model",
            "differs" if known else "cannot be told",
            there,
            here if known else f"{here}; `hub` would name it",
        )
    name = hub.id.rpartition("/")[2].lower().removeprefix("meta-")
    if name == there.lower():
        return Fact("model", "same", there, hub.id)
    return Fact(
        "model",
        "cannot be told" if name.startswith(f"{there.lower()}-") else "differs",
        there,
        hub.id,
    )


def _method(published: Published, study: Study) -> Fact:
    names = {"lora": "LoRA", "full": "all weights", None: "not known"}
    projector = study.project.projector
    projected = published.state == "projected"
    there = names[published.method] + (", Safe LoRA" if projected else "")
    here = "LoRA" + (f", Safe LoRA, {projector} projector" if projected else "")
    if published.method != "lora":
        return Fact(
            "method", "cannot be told" if published.method is None else "differs", there, here
        )
    return Fact("method", "differs" if projected and projector == "exact" else "same", there, here)


def _data(published: Published, study: Study) -> Fact:
    pool, there = study.data.pool, published.data or NOT_KNOWN
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
            and not study.data.settings.mix_share
        )
        return Fact("data", "same" if same else "differs", there, here)
    return Fact("data", "cannot be told", there, here)


def _setting(
    what: str, there: int | float | None, chosen: Sequence[Result], study: Study, axis: str
) -> Fact:
    if axis == "train.epochs" and study.train.steps is not None:
        return Fact(
            what,
            "cannot be told" if there is None else "differs",
            value_label(there) if there else NOT_KNOWN,
            f"{study.train.steps} steps",
        )
    what = what.replace("_", " ")
    values = sorted({_value(study, result, axis) for result in chosen}, key=str)
    here = ", ".join(value_label(value) for value in values) or "no such point"
    if there is None:
        return Fact(what, "cannot be told", NOT_KNOWN, here)
    return Fact(what, "same" if values == [there] else "differs", value_label(there), here)


def _train(study: Study, result: Result, name: str) -> Any:
    return _value(study, result, f"train.{name}")


def _stated(what: str, there: T | None, here: Sequence[T], label: Callable[[T], str]) -> Fact:
    """A fact of which the paper says `there`, if anything, and which the points that stand in its
    place have as `here`.
    """
    told = ", ".join(sorted({label(each) for each in here})) or "no such point"
    if there is None:
        return Fact(what, "cannot be told", NOT_KNOWN, told)
    return Fact(what, "same" if set(here) == {there} else "differs", label(there), told)


def _asking(
    published: Published, study: Study, suite: str, asked: SuitePrompts | None
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
        yield Fact("prompts", "cannot be told", published.task or NOT_KNOWN, suite)
    elif asked is None:
        yield Fact("prompts", "cannot be told", published.prompts, "not measured yet")
    else:
        there = f"{published.prompts}, {published.prompt_rows or 'so many'} rows"
        here = f"{asked.format}, {asked.asked} of {asked.rows} rows asked"
        whole = asked.asked == asked.rows and published.prompt_rows in (None, asked.rows)
        yield Fact(
            "prompts",
            "same" if asked.format == published.prompts and whole else "differs",
            there,
            here,
        )
    scorers = scorers_of(measure)
    here = scorers[0] if scorers else str(getattr(measure, "scorer", ""))
    if published.scorer is None or published.scorer == "keywords":
        yield Fact("scorer", "cannot be told", published.scorer or NOT_KNOWN, here)
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
    """What the study has in the number's place. A tiny model's number is never set beside one of a
    real model.
    """
    if is_tiny(study.models[model]):
        return "not set beside it: a tiny model"
    if published.metric == DEFENCE.words.share:
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
