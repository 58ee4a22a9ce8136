"""What running stages say of their progress, and how long everything that is open will take."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebbline.cluster.running.nodes import Node, Setup
from ebbline.tasks.progress import PROGRESS, StageProgress

LOOK_EVERY_S = {
    True: 5.0,
    False: 0.0,
}  # how often a running stage's progress and record are looked up: in a bucket, in a folder


class Timing:
    """Seconds that stages are expected to take: by their own progress once they have said how far
    they are, by the estimates until then.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._heard: dict[Path, tuple[float, dict[str, Any]]] = {}

    @property
    def look_every_s(self) -> float:
        return LOOK_EVERY_S[self._setup.store.cache is not None]

    def last_progress(self, node: Node) -> dict[str, Any]:
        """What a stage has last said of its progress; empty when it has said nothing."""
        if node.attempt is None:
            return {}
        heard, said = self._heard.get(node.attempt, (-math.inf, {}))
        if time.monotonic() - heard >= self.look_every_s:
            with suppress(ValueError):  # being replaced at this moment; the next look will find it
                said = json.loads(self._setup.store.log(node.attempt, PROGRESS) or b"{}")
            self._heard[node.attempt] = (time.monotonic(), said)
        return said

    def progress_of(self, node: Node) -> StageProgress | None:
        """How far a running stage is; None when it has said nothing."""
        said = self.last_progress(node)
        return StageProgress.of(said) if said else None

    def seconds(self, node: Node) -> float:
        """The expected seconds from now: by its own progress when the stage runs and has said how
        far it is.
        """
        left_s = self._own_seconds(node)
        return (
            self._setup.estimates.seconds(node.stage, self._setup.needs_of(node.stage))
            if left_s is None
            else left_s
        )

    def expected_s(self, node: Node, elapsed_s: float) -> float:
        """The expected seconds in all of a stage that has run for `elapsed_s`: by its own progress,
        once it has said how far it is.
        """
        left_s = self._own_seconds(node)
        return self.seconds(node) if left_s is None else elapsed_s + left_s

    def paths(self, nodes: Iterable[Node]) -> Mapping[str, float]:
        """Lineage -> seconds of the longest chain of open stages that starts at each of `nodes`."""
        paths: dict[str, float] = {}

        def path(node: Node) -> float:
            lineage = node.stage.lineage
            if lineage not in paths:
                own = 0.0 if node.state in ("done", "failed") else self.seconds(node)
                paths[lineage] = own + max((path(below) for below in node.behind), default=0.0)
            return paths[lineage]

        for node in nodes:
            path(node)
        return paths

    def remaining_s(self, nodes: Iterable[Node]) -> float:
        """The expected seconds until `nodes` are done: the longest chain, or the work over the
        GPUs.
        """
        nodes = list(nodes)
        if not nodes:
            return 0.0
        chains = self.paths(nodes)
        work = sum(self.seconds(node) * self._setup.needs_of(node.stage).gpus for node in nodes)
        gpus = max(1, self._setup.executor.capacity().gpus)
        return max([work / gpus, *(chains[node.stage.lineage] for node in nodes)], default=0.0)

    def _own_seconds(self, node: Node) -> float | None:
        said = self.last_progress(node) if node.state == "running" else {}
        if said.get("own", 0) > 1:  # the first took what comes before it, too
            return float(said["own_seconds"] * (said["total"] - said["done"]) / (said["own"] - 1))
        return None
