"""The controls of a study in flight: requested once the search and further seeds have ended."""

import logging
from collections.abc import Sequence

from ebbline.cluster.running.runner import Runner
from ebbline.sweeps.state.controls import ControlDraw, draws_of, stages_of_draw
from ebbline.sweeps.state.in_flight import PointInFlight
from ebbline.sweeps.state.races.racing import Rivals
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.stages import StageGraph

_log = logging.getLogger(__name__)


class ControlsInFlight:
    """`in_flight` has the stages of each control that has not ended. `decided` is true once the
    results that get controls are known.
    """

    def __init__(self, graph: StageGraph) -> None:
        self._study, self._graph = graph.study, graph
        self._rivals = Rivals(graph.study)  # of a control there are none
        self._draws: dict[int, ControlDraw] = {}
        self.in_flight: list[PointInFlight] = []
        self.decided = not graph.study.used_controls.settings

    def decide(self, results: Sequence[Result]) -> None:
        """Add the controls of these results, which are all of the study."""
        self.decided = True
        for draw in draws_of(self._study, results):
            stages = stages_of_draw(self._graph, draw)
            entry = PointInFlight(draw.partner.number, draw.partner.point, stages)
            self._draws[id(entry)] = draw
            self.in_flight.append(entry)

    def step(self, runner: Runner) -> None:
        """Request the next stages, and remove the controls that have ended. A control that failed
        is tried again by the next run.
        """
        for entry in list(self.in_flight):
            entry.request_next(self._study, runner, self._rivals)
            if entry.requested and entry.settled(runner):
                self.in_flight.remove(entry)
                failure = entry.failure(runner)
                if failure is not None:
                    _log.warning("%s has no result: %s", self._draws[id(entry)], failure.reason)
