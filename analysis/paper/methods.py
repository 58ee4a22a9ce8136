"""The methods section of a paper: training, data, measurements, repetitions, hardware and cost.

Invariants: every sentence follows from the study, its results or the stages' records. Nothing else
is stated. An unfinished study is described as unfinished. Citations use pandoc's `[@key]`;
ebbline.analysis.paper.citations has the entries.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ebbline.analysis.paper.citations import EBBLINE, PAPERS
from ebbline.analysis.paper.defending import before_and_during, defending
from ebbline.analysis.paper.origins import described
from ebbline.analysis.paper.used_values import is_varied, listed, used_values
from ebbline.analysis.report.answer import size_confound
from ebbline.analysis.report.provenance import Provenance
from ebbline.analysis.results.costs import cost_label, study_cost
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import Baselines
from ebbline.analysis.results.picks.confirmed import confirmed_words
from ebbline.analysis.results.wording import (
    NO_RESULT,
    metric_label,
    plain_markdown,
    status_label,
    value_label,
)
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.state.spending import Spent
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.reading.overlaps import Shared
from ebbline.sweeps.study.references import Data
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import MultipleChoiceSuite, TaskSuite, scorers_of
from ebbline.tasks.measuring.metrics import direction
from ebbline.tasks.specs import TrainSpec

_QUANTISED = {
    "nf4": "quantised to NF4 [@dettmers2023qlora]",
    "int8": "quantised to 8 bits [@dettmers2022llmint8]",
    "none": "not quantised",
}
_SAMPLERS = {
    "grid": "all combinations of the axes' values",
    "list": "given as a list",
    "random": "drawn at random",
    "tpe": "chosen by the tree-structured Parzen estimator of Optuna [@akiba2019optuna]",
    "nsga2": "chosen by the NSGA-II sampler of Optuna [@akiba2019optuna]",
    "gp": "chosen by ebbline's Gaussian-process search, by expected gain in hypervolume",
    "stage_aware": "chosen by ebbline's stage-aware search, by expected gain in hypervolume for "
    "its cost",
}


def methods(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    provenance: Provenance,
    before: Mapping[str, Cost],
    spent: Spent,
    profile: Profile,
    shared: Sequence[Shared] = (),
    tests: int = 0,
) -> str:
    """A Markdown text of short paragraphs.

    `before` maps stage keys to the cost of measuring the aligned models. `shared` says what each
    suite's prompts have in common with the training data. `tests` is the number of tests in the
    family of all comparisons.
    """
    parts = {
        "Models": _models(study, provenance),
        "Fine-tuning": _training(study, results, provenance),
        "Defences": defending(study, results, provenance),
        "Measurement": _measurement(study, results, baselines, provenance),
        "Contamination": _contamination(shared),
        "Points": _points(study, results),
        "Comparisons": _comparisons(tests),
        "Confirmation": _confirmation(study, results),
        "Seeds and intervals": _repeats(study, results),
        "Hardware and cost": _hardware(results, provenance, before, spent, profile),
        "Software": _software(provenance),
    }
    lines = [f"# Methods of the study {study.study}", "", _opening(study, results)]
    for title, sentences in parts.items():
        if text := " ".join(sentences):
            lines += ["", f"**{title}.** {text}"]
    return "\n".join(
        [*lines, "", "**To be stated by the authors.** " + " ".join(_open(study, provenance)), ""]
    )


def _opening(study: Study, results: Sequence[Result]) -> str:
    counts = Counter(result.status for result in results)
    rest = [
        f"{counts[status]} {status_label(status)}"
        for status in ("running", *NO_RESULT)
        if counts[status]
    ]
    text = (
        f"Written by ebbline [@{EBBLINE}] from its records. The question: "
        f"{plain_markdown(study.question)}"
    )
    if counts["running"] or counts["skipped"] or counts["outdated"]:
        text += (
            f" The study was not finished when this was written: {counts['done']} of "
            f"{len(results)} points are done, {', '.join(rest)}."
        )
    return (
        f"{text} It follows work on how fine-tuning weakens refusals "
        f"[{'; '.join(f'@{key}' for key in PAPERS[:2])}]."
    )


def _models(study: Study, provenance: Provenance) -> Iterator[str]:
    for name, model in study.models.items():
        roles = [
            role for role in ("base", "aligned", "unaligned") if getattr(model, role) is not None
        ]
        references = [
            f"{role} model: {described(f'models.{name}.{role}', provenance)}" for role in roles
        ]
        yield (
            f"{name}: {'; '.join(references)}; {_QUANTISED[model.quantisation]}, computed in "
            f"{model.dtype}."
        )


def _training(study: Study, results: Sequence[Result], provenance: Provenance) -> Iterator[str]:
    train, data = study.train, study.data
    if train is not None and data is not None:
        yield from _fine_tuning(study, train, data, results, provenance)
    for name in study.adapters:
        yield (
            f"The adapter {name} of {study.model_of(name)} was trained outside this study: "
            f"{described(f'adapters.{name}', provenance)}."
        )
    if any(each.kind == "train" and each.most_gpus > 1 for each in provenance.hardware):
        yield "Trainings on several GPUs at once used DeepSpeed with ZeRO-3 [@rajbhandari2020zero]."


def _fine_tuning(
    study: Study,
    train: TrainSpec,
    data: Data,
    results: Sequence[Result],
    provenance: Provenance,
) -> Iterator[str]:
    by_steps = [r for r in results if dict(r.point.values).get("train.steps") is not None]
    if by_steps and len(by_steps) < len(results) and train.steps is None:
        length = (
            f"{used_values(results, 'train.epochs', train.epochs)} epochs, or for "
            f"{used_values(by_steps, 'train.steps', None)} steps"
        )
    elif train.steps is not None or is_varied(results, "train.steps"):
        length = f"{used_values(results, 'train.steps', train.steps)} steps"
    else:
        length = f"{used_values(results, 'train.epochs', train.epochs)} epochs"
    yield (
        "Each aligned model was fine-tuned with LoRA adapters [@hu2021lora; @peft]"
        f" of rank {used_values(results, 'train.rank', train.rank)}"
        f" on {listed(train.target_modules)}"
        f" (alpha {used_values(results, 'train.alpha_over_rank', train.alpha_over_rank)} "
        "times the rank,"
        f" dropout {used_values(results, 'train.dropout', train.dropout)})."
        f" Training ran for {length}"
        f" of {used_values(results, 'train.global_batch', train.global_batch)} conversations"
        f" cut to {used_values(results, 'train.max_tokens', train.max_tokens)} tokens, with "
        "AdamW at a learning rate of"
        f" {used_values(results, 'train.learning_rate', train.learning_rate)}."
        " The schedule is a linear warm-up over"
        f" {used_values(results, 'train.warmup_share', train.warmup_share)} of the steps, "
        "then a cosine decay to zero."
    )
    for name, model in study.models.items():
        if model.train:
            settings = sorted(model.train.items())
            own = ", ".join(f"{field} {value_label(value)}" for field, value in settings)
            yield f"For {name} instead: {own}."
    yield from before_and_during(study, results)
    sizes = used_values(results, "data.size", data.settings.size)
    if confound := size_confound(study, results):
        yield confound
    yield (
        f"Each model was trained on {sizes} examples of {described('data.pool', provenance)}; "
        "a smaller set is a subset of a larger one with the same seed."
    )
    if data.mix is not None:
        share = used_values(results, "data.mix_share", data.settings.mix_share)
        yield (
            f"A share of {share} of them was replaced by examples of "
            f"{described('data.mix', provenance)}."
        )


def _contamination(shared: Sequence[Shared]) -> Iterator[str]:
    if shared:
        yield "Prompts and training data were compared in normalised words. " + " ".join(
            f"{each}." for each in shared
        )


def _comparisons(tests: int) -> Iterator[str]:
    if tests:
        yield (
            f"The p-values of all {tests} tests of the report are one family, corrected by "
            "Benjamini and Hochberg: trainings, defended points, the table before and after, and "
            "defences against controls and each other. No correction allows for the pick of a "
            "point; what was confirmed is a family of its own, stated below."
        )


def _confirmation(study: Study, results: Sequence[Result]) -> Iterator[str]:
    confirmed = [result for result in results if result.confirmed is not None]
    if not confirmed:
        yield (
            "No point was confirmed on prompts and training seeds that chose nothing: what the "
            "tables show are candidates."
        )
        return
    seeds = sorted({seed for each in confirmed if each.confirmed for seed in each.confirmed.seeds})
    yield (
        f"{len(confirmed)} nominated point{'s were' if len(confirmed) > 1 else ' was'} measured "
        "again on prompts that neither the search nor a training had read, "
        f"with the study's adapters and with {len(seeds)} fresh training seeds."
        " One-sided 95% bounds of the confirmed rates are corrected for the points confirmed "
        "(Bonferroni): exact binomial over prompts, and over the fresh seeds a t bound, the worse "
        "of both for a setting."
    )
    refusal = study.refusal_metric
    for result in confirmed if refusal is not None else ():
        yield f"Point {result.number}: {confirmed_words(result, refusal or '')}"


def _measurement(
    study: Study, results: Sequence[Result], baselines: Baselines, provenance: Provenance
) -> Iterator[str]:
    directions = {"maximise": "higher is better", "minimise": "lower is better"}
    objectives = [
        f"{metric_label(name)} ({directions[direction(name)]})" for name in study.objectives
    ]
    yield f"Objectives: {listed(objectives)}."
    for suite, entry in study.suites.items():
        measure = entry.measure
        counts = sorted(
            {
                m.n
                for row in [*(r.metrics for r in finished(results)), *baselines.values()]
                for name, m in row.items()
                if name.startswith(f"{suite}.")
            }
        )
        n = (
            f"{counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} samples"
            if counts
            else "not measured so far"
        )
        if isinstance(measure, MultipleChoiceSuite):
            paper = {"mmlu": "[@hendrycks2020mmlu]", "hellaswag": "[@zellers2019hellaswag]"}.get(
                measure.task, ""
            )
            yield (
                f"{suite}: task {measure.task} {paper} in lm-eval [@lmeval], "
                f"{measure.shots_given} shots, {n}."
            ).replace("  ", " ")
            continue
        prompts = provenance.prompts.get(suite)
        asked_prompts = (
            f"{prompts.asked} prompts ({prompts.format}, sha256 {prompts.sha256})"
            if prompts
            else "prompts that are not recorded"
        )
        scorers = [measure.scorer] if isinstance(measure, TaskSuite) else list(scorers_of(measure))
        kinds = [f"{scorer} (a judge)" if scorer in study.judges else scorer for scorer in scorers]
        also = f"; in addition {listed(kinds[1:])}" if kinds[1:] else ""
        rates = listed([name.replace("_", " ") for name in measure.metrics()])
        yield (
            f"{suite}: {rates} on {asked_prompts}, of greedy completions of at most "
            f"{measure.max_new_tokens} tokens, one for each prompt, without sampling or penalties,"
            f" by the scorer {kinds[0]}{also}; {n}."
        )
        split = study.split_of(suite)
        if split is not None and split.side == "search":
            yield (
                f"A share of {split.hold_out:g} of the prompts of {suite}, chosen by a hash of "
                "their texts within each category before the study began, was held out for the "
                "confirmation."
            )
        if prompts is not None and prompts.chat:
            yield (
                f"Its prompts were rendered as one user turn by a chat template with the sha256 "
                f"{prompts.chat}, without a system prompt but the template's own."
            )
        if measure.race is not None:
            yield (
                f"{suite} was measured in blocks of {measure.race.block} prompts and could "
                "stop early, so points rest on different numbers of prompts."
            )
            if measure.race.error is not None and measure.race.dominated:
                yield (
                    f"A point of {suite} that was stopped would be dominated over all prompts, "
                    f"with an error of at most {measure.race.error:g}."
                )
    for name in study.judges:
        where = study.judges[name].settings.endpoint
        what = (
            "an endpoint, whose answers may change"
            if where
            else described(f"judges.{name}.model", provenance)
        )
        yield f"The judge {name}: {what}."


def _points(study: Study, results: Sequence[Result]) -> Iterator[str]:
    counts = Counter(result.status for result in results)
    yield (
        f"{len(results)} points were proposed, {_SAMPLERS[study.sampler]}; {counts['done']} "
        "are done."
    )
    if study.search.first:
        yield f"{len(study.search.first)} of them were given in the study file, not chosen."
    without = [f"{counts[status]} {status_label(status)}" for status in NO_RESULT if counts[status]]
    if without:
        yield f"Without a result, and in no figure or table: {', '.join(without)}."
    same = sum(result.same_as is not None for result in results)
    if same:
        yield f"{same} have the answers of an earlier one and count once on the frontier."
    yield (
        "A frontier holds the points that no other point dominates in the objectives, computed "
        "with moocore [@moocore]."
    )


def _repeats(study: Study, results: Sequence[Result]) -> Iterator[str]:
    used = sorted({seeds_of(result) for result in finished(results)})
    if not used:
        yield "No point is done, so there are no repetitions."
        return
    most = (
        f"{used[0]} to {used[-1]} training seeds"
        if len(used) > 1
        else f"{used[0]} training seed{'' if used[0] == 1 else 's'}"
    )
    yield f"Each point rests on {most}."
    metrics = [metric for result in finished(results) for metric in result.metrics.values()]
    yield _drawn(study)
    means = (
        "; of means the normal one" if any(metric.squares is not None for metric in metrics) else ""
    )
    yield (
        f"Intervals are 95%: of rates Wilson's [@wilson1927]{means}. They cover the sampling "
        "of prompts, not of trainings."
    )


def _drawn(study: Study) -> str:
    """What a training seed draws."""
    if study.train is None:
        return "The adapters were trained outside this study."
    if study.subsets is None:
        return "A seed draws the rows of its data and its training."
    if study.subsets == 1:
        return "All seeds train on the same rows, so their spread is that of the training."
    return f"Training seeds are crossed with {study.subsets} subsets of the data."


def _hardware(
    results: Sequence[Result],
    provenance: Provenance,
    before: Mapping[str, Cost],
    spent: Spent,
    profile: Profile,
) -> Iterator[str]:
    if not provenance.hardware:
        yield "Nothing has run yet."
        return
    devices = "; ".join(f"{each.kind}: {each}" for each in provenance.hardware)
    yield f"By the stages' records: {devices}."
    if any(each.gpu_type is None for each in provenance.hardware):
        yield (
            "If no GPU type is named, a GPU-hour is an hour of a logical GPU, which may be a "
            "share of a CPU."
        )
    cost = study_cost(results, before, spent)
    yield (
        f"All stages behind the results took {cost_label(cost.stages, profile)}; without "
        f"shared stages they would have taken {cost_label(cost.alone, profile)}."
    )
    yield (
        f"The study's runs spent {cost_label(cost.spent, profile)} in {spent.driving_s / 3600:.3g} "
        "hours of run time."
    )


def _software(provenance: Provenance) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in provenance.packages.items())
    yield (
        f"ebbline {provenance.build}; Python {provenance.python}; {versions}. These are the "
        "versions installed where this text was written."
    )
    yield (
        "Models were run with Transformers [@wolf2020transformers], stages distributed with "
        "Ray [@moritz2018ray] unless run in one process."
    )


def _open(study: Study, provenance: Provenance) -> Iterator[str]:
    """Questions that no record answers."""
    if any(
        reference.organism is not None
        for model in study.models.values()
        for reference in (model.base, model.aligned)
        if reference
    ):
        yield (
            "Models called organisms are tiny and show the effect in an invented language: they "
            "are no evidence about real models."
        )
    if any(not pin.hub for pin in provenance.pins):
        yield (
            "The source and licence of local files: the records hold only the digest of their "
            "content."
        )
    yield (
        "The reasons for the fixed settings. Points picked as the best of many look "
        "better than they are."
    )
