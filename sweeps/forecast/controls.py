"""The controls that a study is expected to run.

Controls stand near operating points, which depend on results. Before the last result, the middle
settings of each defence on one of its trainings replace them: as many controls, of other settings.
"""

from collections.abc import Sequence

from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.controls import ControlDraw, draws_of, draws_of_each, stages_of_draw
from ebbline.sweeps.state.outcome import lasting_results, results_of
from ebbline.sweeps.state.result_cache import ResultCache
from ebbline.sweeps.state.trials import read
from ebbline.sweeps.study.points import Point, Result, adapter_of, defence_of
from ebbline.sweeps.study.stages import StageGraph, of_seeds
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.stage import Stage


def expected_controls(
    view: StudyView, graph: StageGraph, points: Sequence[Point], to_come: bool
) -> dict[str, dict[str, Stage]]:
    """Label -> stages of each draw of a control. `points` are those of the study, and `to_come`
    says whether any of them has no result yet.
    """
    study = view.study
    if not study.used_controls.settings:
        return {}
    draws = _guessed(study, points) if to_come else _decided(view, graph)
    found = {}
    for draw in draws:
        try:
            stages = stages_of_draw(graph, draw)
        except StudyError:
            continue  # an invalid point; it has no result to stand beside
        own = of_seeds(study, stages, study.first_seeds) if to_come else stages
        drawn = "" if draw.draw is None else f" {draw.draw}"
        found[f"{draw.control}{drawn} of {draw.partner.point}"] = own
    return found


def _decided(view: StudyView, graph: StageGraph) -> list[ControlDraw]:
    entries, _ = read(view.study, view.database)
    cached = ResultCache(view.study, view.home.store, view.folder).read(entries)
    kept = lasting_results(view.study, list(cached.values()))
    resolver = Resolver(view.home.store)
    return draws_of(view.study, results_of(view.study, entries, graph, resolver, kept))


def _guessed(study: Study, points: Sequence[Point]) -> list[ControlDraw]:
    by_adapter: dict[tuple[str, str], dict[Point, list[Point]]] = {}
    for point in points:
        own = by_adapter.setdefault((point.model, defence_of(point).name), {})
        own.setdefault(adapter_of(point), []).append(point)
    partners = []
    for adapters in by_adapter.values():
        most = max(adapters.values(), key=len)
        knob = defence_of(most[0]).main_knob
        ordered = sorted(most, key=lambda point: _number(point, knob))
        middle = (len(ordered) - study.used_controls.settings) // 2
        chosen = ordered[max(0, middle) :][: study.used_controls.settings]
        partners += [Result(-1, point, "done", changed_share=1.0) for point in chosen]
    return draws_of_each(study, partners)


def _number(point: Point, knob: str) -> float:
    value = dict(point.values).get(knob)
    return float(value) if isinstance(value, int | float) else 0.0
