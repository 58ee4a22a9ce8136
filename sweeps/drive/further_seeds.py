"""Further seeds: which points get one more seed, and the runs of those seeds until they end.

The decision itself is in ebbline.sweeps.state.replicates. It compares all points of a model with
equal numbers of seeds.
"""

from collections import Counter
from collections.abc import Mapping

from ebbline.cluster.running.runner import Runner
from ebbline.sweeps.state.in_flight import PointInFlight
from ebbline.sweeps.state.outcome import Duplicates
from ebbline.sweeps.state.replicates import seeds_needed, seeds_of
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.stages import StageGraph, of_seeds, stages_or_reason

NEW_SHARE = 20  # further seeds are decided after 1/20 of the results are new


class FurtherSeeds:
    """The points that get further seeds. `max_seeds` has the seeds of each point, by number, after
    a further seed failed.
    """

    def __init__(self, graph: StageGraph, max_seeds: Mapping[int, int]) -> None:
        self._study, self._graph = graph.study, graph
        self.max_seeds = dict(max_seeds)
        self.in_flight: list[PointInFlight] = []
        # By model, the results since further seeds were last decided
        self._new_results = Counter[str]()

    def note(self, result: Result) -> None:
        """Count a new result."""
        self._new_results[result.point.model] += 1

    def remove_ended(self, runner: Runner) -> list[PointInFlight]:
        """Remove and return the points whose further seed has ended."""
        ended = [entry for entry in self.in_flight if entry.settled(runner)]
        for entry in ended:
            self.in_flight.remove(entry)
            self._new_results[entry.point.model] += 1
        return ended

    def is_due(self, results: int) -> bool:
        """Whether enough of the study's results are new: few rarely change the decision."""
        return self._new_results.total() >= results / NEW_SHARE

    def decide(self, results: Mapping[int, Result], duplicates: Duplicates, over: bool) -> None:
        """Add the points that need one more seed.

        Once no more points come (`over`), the decision for a model waits until its further seeds
        have ended.
        """
        waiting = {entry.point.model for entry in self.in_flight if over}
        sizes = set(self._new_results) - waiting
        for model in sizes:
            del self._new_results[model]
        considered = [
            duplicates.marked(result) for result in results.values() if result.point.model in sizes
        ]
        in_flight = {entry.number for entry in self.in_flight}
        for number, seeds in seeds_needed(self._study, considered, self.max_seeds).items():
            result = results[number]
            if seeds > seeds_of(result) and number not in in_flight:
                stages, _ = stages_or_reason(self._graph, result.point)
                self.in_flight.append(
                    PointInFlight(number, result.point, of_seeds(self._study, stages, seeds))
                )
