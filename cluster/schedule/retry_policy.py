"""Decides when a lost stage is retried, on which hosts, and when to give up.

blame    examples                      what follows
stage    its process died or hung      counts against `tries`; the pause doubles each time
memory   its process was killed        does not count while its micro-batch can be halved, and is
                                       retried at once; then as `stage`
place    its host left or drains       does not count, and is retried at once; after repeated short
                                       lives with pauses, and then the run stops

A host that loses several stages in a row and finishes none gets no more work.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ebbline.cluster.executors.executor import Capacity, Loss
from ebbline.tasks.errors import ClusterLost

SHORT_S = 60.0  # a job that its host lost within this time counts as evicted
MOST_EVICTIONS = 10
STRIKES = 3
_log = logging.getLogger(__name__)


@dataclass
class _LostStage:
    """The losses of one stage."""

    lost: int = 0
    evicted: int = 0
    killed: list[str] = field(default_factory=list)
    not_before: float = float("-inf")
    hosts: set[str] = field(default_factory=set)


class RetryPolicy:
    """The losses of one run, and the retries. Times are seconds of one monotonic clock."""

    def __init__(self, tries: int, backoff_s: float) -> None:
        self._tries, self._backoff_s = tries, backoff_s
        self._stages: dict[str, _LostStage] = {}
        self._strikes: dict[str, set[str]] = {}

    def count(
        self,
        key: str,
        loss: Loss,
        hosts: Iterable[str],
        lived_s: float,
        now: float,
        attempt: str = "",
        halvings: int = 0,
    ) -> str | None:
        """Record that a job was lost at this stage after `lived_s`, in `attempt`. Its micro-batch
        can be halved `halvings` times. Returns None, or the reason to give up.

        Raises ClusterLost when its hosts evicted it MOST_EVICTIONS times in a row.
        """
        stage = self._stages.setdefault(key, _LostStage())
        stage.hosts |= set(hosts)
        self._strike(key, hosts)
        if loss.blame == "memory" and len(stage.killed) < halvings:
            stage.killed.append(attempt)
            return None
        if loss.blame != "place":
            stage.lost += 1
            if stage.lost >= self._tries:
                return f"lost {stage.lost} times ({loss.reason})"
            stage.not_before = now + self._backoff_s * 2 ** (stage.lost - 1)
            return None
        stage.evicted = stage.evicted + 1 if lived_s < SHORT_S else 0
        if stage.evicted >= MOST_EVICTIONS:
            raise ClusterLost(
                f"{key[:12]} was lost by its host {MOST_EVICTIONS} times in a row within "
                f"{SHORT_S:.0f} s (the last: {loss.reason}); repair the cluster, then run the same "
                "command to continue"
            )
        if stage.evicted > 1:
            stage.not_before = now + self._backoff_s * 2 ** (stage.evicted - 2)
        return None

    def lost(self, key: str) -> int:
        """How many losses of a stage count against `tries`."""
        return self._stages[key].lost if key in self._stages else 0

    def killed(self, key: str) -> tuple[str, ...]:
        """The attempts of a stage that were killed for memory; each halves its micro-batch."""
        return tuple(self._stages[key].killed) if key in self._stages else ()

    def may_start(self, key: str, now: float) -> bool:
        return key not in self._stages or now >= self._stages[key].not_before

    def shun(self, key: str) -> frozenset[str]:
        """The hosts where a stage was lost, which it should avoid."""
        return frozenset(self._stages[key].hosts) if key in self._stages else frozenset()

    def succeeded(self, hosts: Iterable[str]) -> None:
        """Record that a stage finished on these hosts, which clears their strikes."""
        for host in hosts:
            self._strikes.pop(host, None)

    def in_service(self, capacity: Capacity) -> Capacity:
        """The capacity with bad hosts marked as draining, if another host with GPUs is left."""
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
        # Distinct stages count: one stage that is lost everywhere does not make its hosts bad.
        for host in hosts:
            keys = self._strikes.setdefault(host, set())
            if key not in keys:
                keys.add(key)
                if len(keys) == STRIKES:
                    _log.warning(
                        "%s lost %d stages in a row and finished none; it gets no more work "
                        "while there are other hosts",
                        host,
                        STRIKES,
                    )
