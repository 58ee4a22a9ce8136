"""The stored completions of a suite by arm, and what each scorer says of them.

An arm is one state of one model: before fine-tuning, fine-tuned, or defended. A completion belongs
to the first arm that has its generation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.labelled.sheet import Measure
from ebbline.analysis.results.measurements import is_defended
from ebbline.analysis.results.tables import shipped
from ebbline.analysis.results.wording import natural
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.study.points import Result, StageName
from ebbline.sweeps.study.stages import stages_or_reason
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import HarmSuite, OverRefusalSuite, RefusalSuite
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.measuring.score import JUDGE, harm_of, verdicts_of
from ebbline.tasks.specs import GenerateSpec, JudgeSpec, ScoreSpec
from ebbline.tasks.stage import Stage


@dataclass(frozen=True)
class Generation:
    """A folder of completions, and those of the judges' verdicts on them, by input name."""

    key: str
    folder: Path
    judges: Mapping[str, Path]


Verdicts = Mapping[str, Mapping[str, str]]
"""Scorer -> id of a completion -> verdict."""


def judged_suite(study: Study, suite: str) -> RefusalSuite | OverRefusalSuite | HarmSuite:
    """A suite whose completions a person can label. Raises EvaluationError for another one."""
    measure = study.suites[suite].measure if suite in study.suites else None
    if not isinstance(measure, RefusalSuite | OverRefusalSuite | HarmSuite):
        able = [
            name
            for name, entry in study.suites.items()
            if isinstance(entry.measure, RefusalSuite | OverRefusalSuite | HarmSuite)
        ]
        raise EvaluationError(
            f"{study.study} has no suite {suite!r} of refusals or harm; it has {able}"
        )
    return measure


class Completions:
    """What the store has of one suite. `arms` maps an arm to its generations, `subjects` the
    aligned models and operating points to theirs.
    """

    def __init__(self, view: StudyView, suite: str, results: Sequence[Result]) -> None:
        self._measure = judged_suite(view.study, suite)
        self._suite, self._study = suite, view.study
        self._resolver = Resolver(view.home.store)
        self._verdicts: dict[str, Verdicts] = {}
        done = {result.number: result for result in finished(results)}
        stages = {
            number: stages_or_reason(view.graph, result.point)[0] for number, result in done.items()
        }
        before = {model: [suites[suite]] for model, suites in view.graph.baselines().items()}
        self.arms: dict[str, list[Generation]] = {}
        self.subjects: dict[str, list[Generation]] = {}
        taken: set[str] = set()
        for model in sorted(view.study.models, key=natural):
            own = [result for result in done.values() if result.point.model == model]
            states = {
                "before fine-tuning": list(before[model]),
                "fine-tuned": [s for r in own if not is_defended(r) for s in self._of(r, stages)],
                "defended": [s for r in own if is_defended(r) for s in self._of(r, stages)],
            }
            for state, scored in states.items():
                found = {each.key: each for each in self._generations(scored)}
                fresh = [each for key, each in found.items() if key not in taken]
                taken |= found.keys()
                if fresh:
                    self.arms[f"{model} {state}"] = fresh
            self.subjects[f"{model} before fine-tuning"] = list(self._generations(before[model]))
        for model, result in shipped(view.study, list(done.values())).items():
            self.subjects[f"{model} point {result.number}"] = list(
                self._generations(self._of(result, stages))
            )
        self.subjects = {name: found for name, found in self.subjects.items() if found}

    @property
    def measure(self) -> Measure:
        return self._measure.kind

    @property
    def scorers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self._measure.scorer, *self._measure.also)))

    def _of(self, result: Result, stages: Mapping[int, Mapping[str, Stage]]) -> Iterator[Stage]:
        """The suite's scores of a result, over the seeds and blocks that it has."""
        for name, stage in stages[result.number].items():
            if StageName.parse(name).part == self._suite and name in result.keys:
                yield stage

    def _generations(self, scored: Sequence[Stage] | Iterator[Stage]) -> Iterator[Generation]:
        for stage in scored:
            found: dict[str, Path] = {}
            key = ""
            for name, item in stage.inputs.items():
                artifact = self._resolver.artifact(item) if isinstance(item, Stage) else None
                if artifact is None:
                    break
                is_judge = name.startswith(JUDGE)
                file = JudgeSpec.VERDICTS if is_judge else GenerateSpec.COMPLETIONS
                found[name] = artifact.file(file).parent
                key = key if is_judge else artifact.key
            else:
                folder = found.pop(GENERATION)
                yield Generation(key, folder, found)

    def ids(self, generation: Generation) -> list[str]:
        return [row.id for row in read_completions(generation.folder)]

    def verdicts(self, generation: Generation) -> Verdicts:
        """What each scorer of the suite says, in the words that a person has for it."""
        if generation.key not in self._verdicts:
            rows = read_completions(generation.folder)
            spec = ScoreSpec(
                measure=self._measure.kind, scorer=self._measure.scorer, also=self._measure.also
            )
            inputs = {GENERATION: generation.folder, **generation.judges}
            found = verdicts_of(spec, rows, inputs)
            self._verdicts[generation.key] = {
                scorer: {
                    row.id: (harm_of(score) if self.measure == "harm" else score).verdict
                    for row, score in zip(rows, scores, strict=True)
                }
                for scorer, scores in found.items()
            }
        return self._verdicts[generation.key]


GENERATION = "generation"
