"""The runner: looks up the key of each requested stage in the store, and runs what is missing.

A stage's key is known once its inputs are done, so keys are computed during the run. Stages with
equal keys run once. A stage whose inputs have the same content as before is found in the store.

Invariant: all lasting state is in the store. After a kill another runner continues without cleanup.
"""

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from ebbline.cluster.executors.executor import Capacity, Executor, Finished, Loss, Needs
from ebbline.cluster.profile import Profile
from ebbline.cluster.running.nodes import Failure, Node, Running, Setup, State
from ebbline.cluster.running.starter import Starter
from ebbline.cluster.running.timing import Timing
from ebbline.cluster.schedule.costs import Meter, Unmetered
from ebbline.cluster.schedule.estimates import Estimates
from ebbline.cluster.schedule.needs import default_needs
from ebbline.cluster.schedule.retry_policy import RetryPolicy
from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.cluster.store.resolver import contents_of
from ebbline.tasks.errors import (
    Damaged,
    DataError,
    Differs,
    DiskFull,
    EbblineError,
    EndpointDown,
    Incomplete,
    ModelError,
    StoreError,
)
from ebbline.tasks.identity import digest
from ebbline.tasks.stage import Part, Report, Stage, key_payload, stage_of
from ebbline.tasks.training.micro_batch import halvings

__all__ = ["Failure", "Node", "Runner"]
INVALID_INPUT = (DataError.__name__, ModelError.__name__)
# These errors stop the run: they are not the stage's fault, and a failed point stays failed.
STOPS_THE_RUN: Mapping[str, type[EbblineError]] = {
    error.__name__: error for error in (DiskFull, EndpointDown, Incomplete, Differs, Damaged)
}


class Runner:
    """Runs the added stages on one executor until each is done or failed. All work happens in calls
    of `step`.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        needs_of: Callable[[Stage], Needs] | None = None,
        profile: Profile | None = None,
        meter: Meter | None = None,
        estimates: Estimates | None = None,
    ) -> None:
        self.store, self.executor, self.profile = store, executor, profile or Profile()
        self.estimates = estimates or Estimates(store)
        self.nodes: dict[str, Node] = {}
        self.counts: dict[str, Counter[str]] = {}  # kind -> `Node.counts_as` -> number of nodes
        # By lineage; it may contain nodes that were settled since the last call of `unsettled`.
        self._unsettled: dict[str, Node] = {}
        self.running: dict[str, Running] = {}
        self.draining = False
        self._by_key: dict[str, list[Node]] = {}
        self._reruns: set[str] = set()  # keys with a record, run again for their dropped files
        self._store_errors = Counter[str]()  # key -> number of StoreErrors
        self._hangs_checked_at = self._store_checked_at = float("-inf")
        self._setup = Setup(
            store,
            executor,
            self.profile,
            needs_of or default_needs,
            meter or Unmetered(),
            self.estimates,
            RetryPolicy(self.profile.tries, self.profile.backoff_s),
        )
        self.timing = Timing(self._setup)
        self._starter = Starter(self._setup, self.timing, self.artifact)

    def add(self, targets: Iterable[Stage]) -> None:
        """Add stages and all their upstream stages. Stages that were added before are skipped."""
        new: list[Node] = []
        for target in targets:
            self._add(target, new)
        self._update_states(new)

    def _add(self, stage: Stage, new: list[Node]) -> Node:
        """The node of a stage. New nodes, of the stage and its upstream stages, are appended to
        `new`, inputs first.
        """
        node = self.nodes.get(stage.lineage)
        if node is None:
            node = self.nodes[stage.lineage] = self._unsettled[stage.lineage] = Node(stage)
            self.counts.setdefault(stage.kind, Counter())[node.counts_as] += 1
            for above in {above.lineage: above for above in stage.upstream()}.values():
                self._add(above, new).downstream.append(node)
            new.append(node)
        return node

    def _move(self, node: Node, state: State, reused: bool | None = None) -> None:
        """Change a node's state, and `reused` unless None; update `counts`."""
        counts = self.counts[node.stage.kind]
        counts[node.counts_as] -= 1
        before, node.state = node.state, state
        node.reused = node.reused if reused is None else reused
        counts[node.counts_as] += 1
        if "ready" in (before, state):
            self._starter.ready.state_changed(node)

    def artifact(self, stage: Stage) -> Artifact | None:
        node = self.nodes.get(stage.lineage)
        return node.artifact if node else None

    def failure(self, stage: Stage) -> Failure | None:
        return self.nodes[stage.lineage].failure

    def settled(self, stage: Stage) -> bool:
        return self.nodes[stage.lineage].state in ("done", "failed")

    def unsettled(self) -> list[Node]:
        """The nodes that are neither done nor failed: few, while `nodes` has all of a study's."""
        self._unsettled = {
            lineage: node
            for lineage, node in self._unsettled.items()
            if node.state not in ("done", "failed")
        }
        return list(self._unsettled.values())

    @property
    def settlements(self) -> int:
        """How many of the added stages are done or failed."""
        return sum(
            counts[name] for counts in self.counts.values() for name in ("done", "reused", "failed")
        )

    @property
    def idle(self) -> bool:
        """True when nothing runs and nothing can start."""
        return not self.running and not self._starter.ready.nodes

    def open_seconds(self, stage: Stage) -> float | None:
        """The seconds that a budget counts for the rest of a stage. None if it is settled or was
        not added.
        """
        node = self.nodes.get(stage.lineage)
        settled = node is None or node.state in ("done", "failed")
        return None if node is None or settled else self.timing.budgeted_s(node)

    @property
    def unaffordable(self) -> set[str]:
        """The keys of ready stages that the meter rejected, until a job ends."""
        return set(self._starter.ready.unaffordable)

    @property
    def starved(self) -> bool:
        """True when nothing runs and the meter rejects all ready stages."""
        ready = self._starter.ready
        return (
            not self.running
            and bool(ready.nodes)
            and ready.nodes.keys() <= ready.unaffordable.keys()
        )

    @property
    def capacity(self) -> Capacity | None:
        """The capacity at the last start of stages; None before the first. Reading it does not ask
        the executor.
        """
        return self._starter.capacity

    def first_with(self, key: str) -> Node:
        """The first node with this key."""
        return self._by_key[key][0]

    def step(self, timeout_s: float = 0.5, started: Callable[[], None] = lambda: None) -> None:
        """Start what fits, wait at most `timeout_s`, and record finished stages.

        `started` is called after stages have started and before the wait, because the inline
        executor runs them during the wait.
        """
        if not self.draining and self._start():
            started()
        if not self.running:
            time.sleep(min(timeout_s, 0.05))  # without jobs the wait below returns at once
        for finished in self.executor.finished(timeout_s):
            self._end_job(finished)
        self._record_committed()
        self._cancel_hung_jobs()
        self._update_states()

    def remaining_s(self) -> float:
        """The expected seconds until all added stages are done: the longest chain, or all work
        divided by the GPUs, whichever is longer.
        """
        return self.timing.remaining_s(self.unsettled())

    def _update_states(self, nodes: Iterable[Node] | None = None) -> None:
        """Move waiting stages to ready, to done if the store has them, or to failed if an upstream
        stage failed.

        Only `nodes` are checked; default: all unsettled nodes.
        """
        candidates = dict.fromkeys(self.unsettled() if nodes is None else nodes)
        changed = True
        while changed:
            changed = False
            for node in [node for node in candidates if node.state == "waiting"]:
                broken = next(
                    (a for a in node.stage.upstream() if self.nodes[a.lineage].state == "failed"),
                    None,
                )
                if broken is not None:
                    above = self.nodes[broken.lineage].failure or Failure("")
                    reason = (
                        above.reason
                        if above.inherited
                        else f"needs {broken.kind}, which failed: {above.reason}"
                    )
                    node.failure = Failure(
                        reason,
                        above.command,
                        inherited=True,
                        invalid_input=above.invalid_input,
                    )
                    self._move(node, "failed")
                    changed = True
                    continue
                contents = contents_of(node.stage, self.artifact)
                if contents is None:
                    continue
                node.key = digest(key_payload(node.stage.spec, contents))
                same_key = self._by_key.setdefault(node.key, [])
                if node not in same_key:
                    same_key.append(node)
                artifact = self._whole_artifact(node.stage.kind, node.key)
                before = len(self._reruns)
                if artifact is None and self._waits_for_reruns(node):
                    rerun = {
                        each.stage.lineage: each
                        for key in self._reruns
                        for each in self._by_key[key]
                    }
                    self._unsettled |= rerun
                    candidates |= dict.fromkeys(rerun.values())
                    changed = changed or len(self._reruns) > before
                    continue
                changed = True
                if artifact is not None:
                    self._done(
                        [node],
                        artifact,
                        reused=all(each.reused for each in same_key[:-1]),
                    )
                else:
                    first = next((each for each in same_key if each.state != "waiting"), None)
                    self._move(node, "ready" if first is None else first.state)
                    node.failure, node.attempt = (
                        (None, node.attempt) if first is None else (first.failure, first.attempt)
                    )

    def _whole_artifact(self, kind: str, key: str) -> Artifact | None:
        """The artifact of a key; None while a rerun restores its dropped files."""
        artifact = self.store.find(kind, key)
        if artifact is not None and key in self._reruns:
            if self.store.dropped(artifact):
                return None
            self._reruns.discard(key)
        return artifact

    def _waits_for_reruns(self, node: Node) -> bool:
        """Whether a stage must wait for input files that retention dropped. Schedules the reruns
        that restore them.
        """
        waits = False
        for item in node.stage.inputs.values():
            stage = stage_of(item)
            above = None if stage is None else self.nodes[stage.lineage]
            if above is None or above.artifact is None:
                continue
            if above.state == "done":
                needed = above.artifact.below(item.path if isinstance(item, Part) else "")
                if self.store.dropped(above.artifact).isdisjoint(needed):
                    continue
                self._reruns.add(above.key)
                # Only artifacts from stages outside packs are dropped, so they run unpacked again.
                self._starter.unpacked.add(above.key)
                for each in self._by_key[above.key]:
                    self._move(each, "waiting")
            waits = True
        return waits

    def _done(self, nodes: Iterable[Node], artifact: Artifact, reused: bool) -> None:
        for node in nodes:
            node.artifact = artifact
            self._move(node, "done", reused)

    def _start(self) -> bool:
        """Start what fits. Returns whether anything has started."""
        if not self._starter.ready.nodes:
            return False
        attempts = self._starter.start(self.running, self._running_needs())
        for key, attempt in attempts.items():
            for node in self._by_key[key]:
                node.attempt = attempt
                self._move(node, "running")
        return bool(attempts)

    def _running_needs(self) -> Iterator[tuple[Needs, float]]:
        """(needs, expected seconds) of the running stages."""
        for item in self.running.values():
            for key in item.job.keys:
                node = self._by_key[key][0]
                if node.state == "running":
                    yield self._setup.needs_of(node.stage), self.timing.seconds(node)

    def _record_committed(self) -> None:
        """Mark running stages as done whose record is in the store; their job may still run."""
        now = time.monotonic()
        if now - self._store_checked_at < self.timing.look_every_s:
            return
        self._store_checked_at = now
        for key in dict.fromkeys(node.key for node in self.unsettled() if node.state == "running"):
            nodes = self._by_key[key]
            artifact = self._whole_artifact(nodes[0].stage.kind, key)
            if artifact is not None:
                self.estimates.learn([artifact])
                self._done(nodes, artifact, reused=False)

    def _cancel_hung_jobs(self) -> None:
        """Cancel jobs without progress or a finished stage for `hang_after_s`. The time counts from
        when their processes exist.
        """
        now = time.monotonic()
        if now - self._hangs_checked_at < min(5.0, self.profile.hang_after_s / 4):
            return
        self._hangs_checked_at = now
        for item in list(self.running.values()):
            at = next((key for key in item.job.keys if self._by_key[key][0].state == "running"), "")
            signal = (at, self.timing.last_progress(self._by_key[at][0]) if at else {})
            silent_s = now - item.signal_at
            if signal != item.signal or not self.executor.begun(item.job):
                item.signal, item.signal_at = signal, now
            elif silent_s > self.profile.hang_after_s:
                self.executor.cancel(item.job)
                loss = Loss(f"cancelled after {silent_s:.0f} s without progress")
                self._end_job(Finished(item.job, (), loss))

    def _end_job(self, finished: Finished) -> None:
        item = self.running.pop(finished.job.id, None)
        if item is None:
            return  # cancelled before; its stages are ready or run in another job
        now = time.monotonic()
        self._starter.ended(finished, now - item.started)
        reports = {report.key: report for report in finished.reports}
        # Only the current stage of a lost batch is charged, not the stages after it.
        charged = any(report.error for report in finished.reports)
        loss = finished.lost or Loss("no report")
        # These errors may be the worker's (network, clock; with a bucket also its disk), so the
        # stage is retried elsewhere.
        retryable = {
            StoreError.__name__,
            *([DiskFull.__name__] if self.store.cache is not None else []),
        }
        without_store = [report for report in finished.reports if report.error_type in retryable]
        if without_store:
            self._check_store(without_store[0])
            reports = {
                key: report for key, report in reports.items() if report not in without_store
            }
            charged, loss = False, Loss(str(without_store[0].error), "place")
        for key in finished.job.keys:
            nodes = self._by_key[key]
            artifact = self._whole_artifact(nodes[0].stage.kind, key)
            report = reports.get(key)
            if artifact is not None:
                self.estimates.learn([artifact])
                self._done(nodes, artifact, reused=False)
                self._setup.retry_policy.succeeded(finished.job.hosts)
            elif (
                report is not None
                and report.error_type is not None
                and report.error_type in STOPS_THE_RUN
            ):
                raise STOPS_THE_RUN[report.error_type](str(report.error))
            elif report is not None and report.error is not None:
                self._fail(
                    nodes,
                    f"{nodes[0].stage.kind}: {report.error}",
                    invalid_input=report.error_type in INVALID_INPUT,
                )
            else:
                if loss.blame != "place":
                    self._starter.unpacked.add(key)
                gave_up = None
                if not charged:
                    lasted = now - item.started
                    gave_up = self._setup.retry_policy.count(
                        key,
                        loss,
                        finished.job.hosts,
                        lasted,
                        now,
                        attempt=nodes[0].attempt.name if nodes[0].attempt else "",
                        halvings=halvings(nodes[0].stage.spec),
                    )
                charged = True
                if gave_up is not None:
                    self._fail(nodes, f"{nodes[0].stage.kind}: {gave_up}")
                else:
                    for node in nodes:
                        self._move(node, "ready")

    def _check_store(self, report: Report) -> None:
        """Raise StoreError when a stage has failed with it `tries` times: then the cause is neither
        the host nor the stage.
        """
        self._store_errors[report.key] += 1
        if self._store_errors[report.key] >= self.profile.tries:
            raise StoreError(
                f"{report.error} ({self._store_errors[report.key]} times; run the same command to "
                "continue)"
            )

    def _fail(self, nodes: list[Node], reason: str, invalid_input: bool = False) -> None:
        attempt = next((node.attempt for node in nodes if node.attempt), None)
        command = ""
        if attempt is not None:
            request = f"{self.store.url(attempt)}/log/request.json"
            command = f"ebbline rerun {shlex.quote(request)}"
        for node in nodes:
            node.failure = Failure(reason, command, invalid_input=invalid_input)
            self._move(node, "failed")
