"""What is to be done about lost work: how often a stage was lost, where, when it may be tried
again, and hosts that only lose.

A loss that was the stage's (its process died, or hung) counts against `tries`, with a pause that
doubles each time. One that was its place's (the host went, or drains) does not count: it is tried
again at once. Neither may spin: a stage that is thrown out again and again before it could do
anything waits too, and then stops the run; a host that loses job after job gets no more.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ebbline.cluster.executors.executor import Capacity, Loss
from ebbline.tasks.errors import ClusterLost

SHORT_S = 60.0  # what a job that its place lost had to live for, not to count as thrown out
THROWN_OUT = 10
STRIKES = 3
_log = logging.getLogger(__name__)


@dataclass
class _Stage:
    lost: int = 0
    thrown_out: int = 0
    not_before: float = float("-inf")
    hosts: set[str] = field(default_factory=set)


class RetryPolicy:
    """What one run has lost, and what follows. Times are of one monotonic clock, in seconds."""

    def __init__(self, tries: int, backoff_s: float) -> None:
        self._tries, self._backoff_s = tries, backoff_s
        self._stages: dict[str, _Stage] = {}
        self._strikes: dict[str, set[str]] = {}

    def count(
        self, key: str, loss: Loss, hosts: Iterable[str], lived_s: float, now: float
    ) -> str | None:
        """Take in that a job was lost at this stage. Returns why it is not to be tried again, or
        None.

        Raises ClusterLost when its places threw it out THROWN_OUT times in a row.
        """
        stage = self._stages.setdefault(key, _Stage())
        stage.hosts |= set(hosts)
        self._strike(key, hosts)
        if loss.blame == "stage":
            stage.lost += 1
            if stage.lost >= self._tries:
                return f"lost {stage.lost} times ({loss.reason})"
            stage.not_before = now + self._backoff_s * 2 ** (stage.lost - 1)
            return None
        stage.thrown_out = stage.thrown_out + 1 if lived_s < SHORT_S else 0
        if stage.thrown_out >= THROWN_OUT:
            raise ClusterLost(
                f"{key[:12]} was thrown out by its host {THROWN_OUT} times in a row within "
                f"{SHORT_S:.0f} s (the last: {loss.reason});"
                " look at the cluster, and the same command continues"
            )
        if stage.thrown_out > 1:
            stage.not_before = now + self._backoff_s * 2 ** (stage.thrown_out - 2)
        return None

    def lost(self, key: str) -> int:
        """How often a stage was lost by its own fault."""
        return self._stages[key].lost if key in self._stages else 0

    def may_start(self, key: str, now: float) -> bool:
        return key not in self._stages or now >= self._stages[key].not_before

    def shun(self, key: str) -> frozenset[str]:
        """The hosts where a stage was lost."""
        return frozenset(self._stages[key].hosts) if key in self._stages else frozenset()

    def succeeded(self, hosts: Iterable[str]) -> None:
        """A stage was finished on these hosts: they work."""
        for host in hosts:
            self._strikes.pop(host, None)

    def in_service(self, capacity: Capacity) -> Capacity:
        """The capacity without hosts that only lose: those get no new work, as long as another host
        is left.
        """
        bad = {host for host, keys in self._strikes.items() if len(keys) >= STRIKES}
        if not any(
            host.name not in bad and not host.draining and host.gpus for host in capacity.hosts
        ):
            return capacity
        return replace(
            capacity,
            hosts=tuple(
                replace(host, draining=host.draining or host.name in bad) for host in capacity.hosts
            ),
        )

    def _strike(self, key: str, hosts: Iterable[str]) -> None:
        # By stage: one that is lost wherever it runs does not make its hosts bad.
        for host in hosts:
            keys = self._strikes.setdefault(host, set())
            if key not in keys:
                keys.add(key)
                if len(keys) == STRIKES:
                    _log.warning(
                        "%s lost %d stages in a row and finished none; it gets no more "
                        "while there are others",
                        host,
                        STRIKES,
                    )
