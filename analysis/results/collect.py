"""Results: every point of a study with its metrics, read from the study's database and the store.

Invariant: no file lists the artifacts of a point. The keys of its stages are recomputed and looked
up in the store.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ebbline.analysis.results.defended.beside import defended
from ebbline.analysis.results.defended.labels import defence_label
from ebbline.analysis.results.defended.modules import (
    ModuleEffect,
    ModuleEffects,
    of_file,
    of_projection,
)
from ebbline.analysis.results.frontier import finished, shortlist
from ebbline.analysis.results.measurements import Subject, operating_point, refusal_metric
from ebbline.analysis.results.picks.confirmed import with_confirmations
from ebbline.analysis.results.statistics import Agreement, SamplesBySeed, pooled_agreement
from ebbline.analysis.results.wording import natural, settings_label
from ebbline.cluster.schedule.costs import Cost
from ebbline.cluster.store.artifacts import Artifact
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.drive.confirming import confirming_view
from ebbline.sweeps.state.outcome import costs_of, lasting_results, metrics_of, results_of
from ebbline.sweeps.state.result_cache import ResultCache
from ebbline.sweeps.state.spending import Spent, read_spent
from ebbline.sweeps.state.trials import Entry, Reader, read
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Result, defence_of, keys_of
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import scorers_of
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.defences.gate import ProjectedRows, projected_rows
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.measuring.metrics import METRICS, SAMPLES, Metric, read_metrics, read_samples
from ebbline.tasks.specs import DefendSpec, GenerateSpec, ScoreSpec
from ebbline.tasks.stage import Stage


def collect(view: StudyView) -> list[Result]:
    """All points proposed so far, in that order: done, failed, invalid, running or skipped.

    A failed point and an invalid one have a reason. A point that `ebbline confirm` has measured
    again has that, too.
    """
    results = _collected(view)
    confirming = confirming_view(view)
    if confirming is None:
        return results
    return with_confirmations(results, view.study, confirming.study, _collected(confirming))


def _collected(view: StudyView) -> list[Result]:
    entries, _ = read(view.study, view.database)
    results = results_of(
        view.study, entries, view.graph, Resolver(view.home.store), _cached(view, entries)
    )
    return _of_budget(results, read_spent(view.folder))


def _cached(view: StudyView, entries: Sequence[Entry]) -> dict[int, Result]:
    """The results that need not be read from the store and that no other point can change."""
    cached = ResultCache(view.study, view.home.store, view.folder).read(entries)
    return lasting_results(view.study, list(cached.values()))


def _of_budget(results: list[Result], spent: Spent) -> list[Result]:
    """The results, with unfinished points marked `skipped` if the budget stopped the run."""
    stopped = spent.stopped
    if stopped is None or stopped.by != "budget":
        return results
    return [
        replace(r, status="skipped", reason=stopped.reason) if r.status == "running" else r
        for r in results
    ]


class Follower:
    """The results of a study for a caller that reads them repeatedly.

    A result that can no longer change is computed once.
    """

    def __init__(self, view: StudyView) -> None:
        self._view = view.unlocated()
        self._points = Reader(view.study, view.database)
        self._kept: dict[int, Result] | None = None
        self._before: dict[str, dict[str, Metric]] = {}

    def look(self) -> list[Result]:
        """The current results, as by `collect`."""
        view = self._view
        if not view.database.exists:
            return []
        entries, _ = self._points.look()
        kept = _cached(view, entries) if self._kept is None else self._kept
        results = results_of(view.study, entries, view.graph, Resolver(view.home.store), kept)
        self._kept = lasting_results(view.study, results)
        return _of_budget(results, read_spent(view.folder))

    def before(self) -> dict[str, dict[str, Metric]]:
        """The aligned models' metrics, as by `baselines`."""
        if len(self._before) < len(self._view.study.models):
            self._before = baselines(self._view)
        return self._before


def projections(
    study: Study, results: Sequence[Result], home: Home
) -> dict[str, dict[str, ProjectedRows]]:
    """Model -> label -> the modules of one adapter that Safe LoRA projected.

    The operating point comes first, if there is one. A point with several seeds shows its first.
    Of many points, those of the shortlist are read.
    """
    refusal, found = refusal_metric(study), dict[str, dict[str, ProjectedRows]]()
    listed = shortlist(results, study.objectives)
    by_model: dict[str, list[Result]] = defaultdict(list)
    for result in finished(results):
        if defence_of(result.point) is SAFE_LORA:
            by_model[result.point.model].append(result)
    for model in sorted(by_model, key=natural):
        own = by_model[model]
        picked = operating_point(study, own, refusal) if refusal is not None else None
        first = own[0] if picked is None else picked.result
        shown: dict[str, ProjectedRows] = {}
        seen: set[str] = set()
        shortest = [
            each
            for each in listed
            if each.point.model == model and defence_of(each.point) is SAFE_LORA
        ]
        for result in [first, *shortest]:
            keys = {
                kind: result.keys[f"{kind}[seed={study.seeds[0]}]"]
                for kind in (SAFE_LORA.measures.KIND, SAFE_LORA.makes.KIND)
            }
            if keys[SAFE_LORA.measures.KIND] not in seen:
                seen.add(keys[SAFE_LORA.measures.KIND])
                measured, projected = (home.store.open(*item) for item in keys.items())
                label = f"point {result.number} ({settings_label(result.point)})"
                shown[label] = projected_rows(measured.file, projected.file)
        found[model] = shown
    return found


def module_effects(study: Study, results: Sequence[Result], home: Home) -> ModuleEffects:
    """What each defence did to the modules at its operating point, of a point's first seed. Empty
    for a study of Safe LoRA alone without controls, whose figures show it.
    """
    refusal, found = refusal_metric(study), dict[str, dict[str, ModuleEffect]]()
    if refusal is None or (not study.defences and not study.used_controls.settings):
        return found
    for model in sorted({result.point.model for result in finished(results)}, key=natural):
        for name, own in defended(results, model).items():
            picked = operating_point(study, own, refusal)
            if picked is None:
                continue
            point = picked.result
            defence, seed = defence_of(point.point), study.seeds[0]
            measured, made = (
                home.store.open(kind, point.keys[f"{kind}[seed={seed}]"])
                for kind in (defence.measures.KIND, defence.makes.KIND)
            )
            found[f"{model}, {defence_label(name)}, point {point.number}"] = (
                of_projection(projected_rows(measured.file, made.file))
                if defence is SAFE_LORA
                else of_file(made.file(DefendSpec.EFFECTS))
            )
    return found


@dataclass(frozen=True)
class SuitePrompts:
    """A suite's prompts: the file's format, its rows, how many were asked, and its digest.
    `repeats` counts the rows that repeat the prompt of an earlier row, which is asked once. `chat`
    is the sha256 of the chat template that the prompts were rendered with; empty where an earlier
    version measured them.
    """

    format: str
    rows: int
    asked: int
    sha256: str
    repeats: int = 0
    chat: str = ""

    def __str__(self) -> str:
        repeats = f" ({self.repeats} repeat an earlier prompt)" if self.repeats else ""
        return f"{self.format}, {self.rows} rows{repeats}, {self.asked} asked, sha256 {self.sha256}"


def prompt_sets(view: StudyView) -> dict[str, SuitePrompts]:
    """Suite -> its prompts, for the suites that an aligned model has answered."""
    resolver, found = Resolver(view.home.store), dict[str, SuitePrompts]()
    for suites in view.graph.baselines().values():
        for suite, stage in suites.items():
            generation = stage.inputs.get("generation")
            artifact = resolver.artifact(generation) if isinstance(generation, Stage) else None
            if artifact is not None:
                record = json.loads(artifact.file(GenerateSpec.PROMPTS).read_text())
                found[suite] = SuitePrompts(
                    record["format"],
                    record["rows"],
                    record["asked"],
                    record["sha256"],
                    record.get("repeats", 0),
                    record.get("chat", {}).get("sha256", ""),
                )
    return found


def costs_before(view: StudyView) -> dict[str, Cost]:
    """Key -> cost of each stage that makes or measures an aligned model before fine-tuning."""
    stages = [stage for suites in view.graph.baselines().values() for stage in suites.values()]
    return costs_of(stages, Resolver(view.home.store))


def keys_before(view: StudyView) -> dict[str, dict[str, str]]:
    """Model -> suite -> the key of the stage that measured the model before fine-tuning."""
    resolver = Resolver(view.home.store)
    return {
        model: {
            suite: artifact.key
            for suite, stage in suites.items()
            if (artifact := resolver.artifact(stage)) is not None
        }
        for model, suites in view.graph.baselines().items()
    }


def baselines(view: StudyView) -> dict[str, dict[str, Metric]]:
    """Model -> full metric name -> metric of the aligned model before fine-tuning.

    Only models measured so far.
    """
    resolver = Resolver(view.home.store)
    found = {
        model: metrics_of(view.study, suites, resolver)
        for model, suites in view.graph.baselines().items()
    }
    return {model: metrics for model, metrics in found.items() if metrics is not None}


class StoredEvidence:
    """The samples and verdicts of a study, as ebbline.analysis.results.measurements.Evidence.

    Each call reads the store: the samples of a whole study may not fit in memory.
    """

    def __init__(self, view: StudyView) -> None:
        self._study, self._store = view.study, view.home.store
        resolver = Resolver(self._store)
        self._aligned = {
            (model, suite): resolver.artifact(stage)
            for model, suites in view.graph.baselines().items()
            for suite, stage in suites.items()
            if suite in self._study.suites
        }

    def samples(self, subject: Subject, suite: str) -> SamplesBySeed:
        """Training seed -> samples; an aligned model has one replicate, under 0.

        Empty while a part is missing in the store.
        """
        return {
            seed: [
                sample
                for artifact in artifacts
                for sample in read_samples(artifact.file(SAMPLES).parent)
            ]
            for seed, artifacts in self._artifacts(subject, suite).items()
        }

    def agreement(self, subject: Subject, suite: str) -> Agreement | None:
        """The agreement of the suite's scorers.

        None when the suite has one scorer, or while a part is missing in the store. Raises Damaged
        for a file that differs from its record.
        """
        if len(set(scorers_of(self._study.suites[suite].measure))) < 2:
            return None
        found = self._artifacts(subject, suite).values()
        paths = [
            artifact.file(ScoreSpec.AGREEMENT) for artifacts in found for artifact in artifacts
        ]
        return (
            pooled_agreement([json.loads(path.read_text("utf-8")) for path in paths])
            if paths
            else None
        )

    def _artifacts(self, subject: Subject, suite: str) -> dict[int, list[Artifact]]:
        """Seed -> the artifacts that the subject's metrics count.

        Of a raced suite these are the first blocks, up to the number of samples in the metric.
        """
        if isinstance(subject, str):
            aligned = self._aligned.get((subject, suite))
            return {} if aligned is None else {0: [aligned]}
        uncounted = next(
            (
                metric.n
                for name, metric in subject.metrics.items()
                if name.rpartition(".")[0] == suite
            ),
            0,
        )
        seeds = [seed for seed in self._study.seeds if keys_of(subject.keys, suite, seed)]
        keys = [keys_of(subject.keys, suite, seed) for seed in seeds]
        found: dict[int, list[Artifact]] = {seed: [] for seed in seeds}
        for block in zip(*keys, strict=False):
            if uncounted <= 0:
                break
            for seed, key in zip(seeds, block, strict=True):
                artifact = self._store.open(self._study.kind_of(suite), key)
                found[seed].append(artifact)
                uncounted -= read_metrics(artifact.file(METRICS).parent)[0].n
        return found if uncounted == 0 and found and all(found.values()) else {}
