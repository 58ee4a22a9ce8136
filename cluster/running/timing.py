"""Reads the progress of running stages, and predicts how long the open stages will take."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ebbline.cluster.running.nodes import Node, Setup
from ebbline.tasks.progress import PROGRESS, StageProgress

# How often the record of a running stage is looked for, and its progress read, by `in a bucket`.
LOOK_EVERY_S = {True: 5.0, False: 0.0}
READ_EVERY_S = {True: 5.0, False: 0.2}


class Timing:
    """The expected seconds of stages: from their own progress once they have reported some, else
    from the estimates.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._progress: dict[Path, tuple[float, dict[str, Any]]] = {}  # attempt -> (read at, it)

    @property
    def look_every_s(self) -> float:
        return LOOK_EVERY_S[self._setup.store.cache is not None]

    def last_progress(self, node: Node) -> dict[str, Any]:
        """The content of a stage's progress.json; empty before the first report."""
        if node.attempt is None:
            return {}
        read_at, progress = self._progress.get(node.attempt, (-math.inf, {}))
        if time.monotonic() - read_at >= READ_EVERY_S[self._setup.store.cache is not None]:
            with suppress(ValueError):  # the file is being replaced; the next call reads it
                progress = json.loads(self._setup.store.log(node.attempt, PROGRESS) or b"{}")
            self._progress[node.attempt] = (time.monotonic(), progress)
        return progress

    def forget(self, node: Node) -> None:
        """Forget the progress of an attempt that has ended."""
        if node.attempt is not None:
            self._progress.pop(node.attempt, None)

    def progress_of(self, node: Node) -> StageProgress | None:
        """The progress of a running stage; None before its first report."""
        progress = self.last_progress(node)
        return StageProgress.of(progress) if progress else None

    def seconds(self, node: Node) -> float:
        """The expected seconds from now until a stage ends, once it runs."""
        left_s = self._own_seconds(node)
        return (
            self._setup.estimates.seconds(node.stage, self._setup.needs_of(node.stage))
            if left_s is None
            else left_s
        )

    def budgeted_s(self, node: Node) -> float:
        """The seconds that a budget counts for the rest of a stage (see Estimates.budgeted)."""
        left_s = self._own_seconds(node)
        return (
            self._setup.estimates.budgeted(node.stage, self._setup.needs_of(node.stage))
            if left_s is None
            else left_s
        )

    def expected_s(self, node: Node, elapsed_s: float) -> float:
        """The expected total seconds of a stage that has run for `elapsed_s`."""
        left_s = self._own_seconds(node)
        return self.seconds(node) if left_s is None else elapsed_s + left_s

    def paths(
        self,
        nodes: Iterable[Node],
        known: dict[str, float] | None = None,
        own_s: Mapping[str, float] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Lineage -> seconds of the longest chain of open stages that starts there. It has the
        downstream stages too; those in `known` are not computed again, and new ones are added.
        `own_s` has the seconds of stages, by lineage, as far as the caller has computed them.
        """
        paths = {} if known is None else known

        def path(node: Node) -> float:
            lineage = node.stage.lineage
            if lineage not in paths:
                if node.state in ("done", "failed"):
                    own = 0.0
                else:
                    own = own_s[lineage] if lineage in own_s else self.seconds(node)
                paths[lineage] = own + max((path(below) for below in node.downstream), default=0.0)
            return paths[lineage]

        for node in nodes:
            path(node)
        return paths

    def remaining_s(self, nodes: Iterable[Node]) -> float:
        """The expected seconds until `nodes` are done: the longest chain, or all work divided by
        the GPUs, whichever is longer.
        """
        nodes = list(nodes)
        if not nodes:
            return 0.0
        own_s = {node.stage.lineage: self.seconds(node) for node in nodes}  # most of the time
        chains = self.paths(nodes, own_s=own_s)
        work = sum(
            own_s[node.stage.lineage] * self._setup.needs_of(node.stage).gpus for node in nodes
        )
        gpus = max(1, self._setup.executor.capacity().gpus)
        return max([work / gpus, *(chains[node.stage.lineage] for node in nodes)], default=0.0)

    def _own_seconds(self, node: Node) -> float | None:
        """The seconds that a running stage has left, by the mean of its own steps. The first step
        is not counted, because it includes the setup. None before its second step.
        """
        if node.state != "running":
            return None
        progress = self.last_progress(node)
        own, left = progress.get("own", 0), progress.get("total", 0) - progress.get("done", 0)
        return float(progress["own_seconds"] * left / (own - 1)) if own > 1 else None
