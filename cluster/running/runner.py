"""The runner: looks up the key of each requested stage in the store, and runs what is missing.

A stage's key is known once its inputs are done, so keys are computed during the run. Stages with
equal keys run once. A stage whose inputs have the same content as before is found in the store.

Invariant: all lasting state is in the store. After a kill another runner continues without cleanup.
"""

import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ebbline.cluster.executors.executor import Capacity, Executor, Finished, Loss, Needs
from ebbline.cluster.profile import Profile
from ebbline.cluster.running.follow_ups import FollowUps
from ebbline.cluster.running.let_go import LetGo
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
from ebbline.tasks.stage import Part, Report, Stage, closure, key_payload, stage_of
from ebbline.tasks.training.micro_batch import halvings

__all__ = ["Failure", "Node", "Runner"]
# How often records of running batches are looked for: less often for many batches, and so seldom
# that the driver, whose turn grows with its study, works a fifth of the time at most.
LOOK_S, JOBS_A_LOOK, TURNS_A_LOOK = 0.02, 8, 4
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
        self._due: dict[Node, None] = {}  # new ones, and those below what has just settled
        self.running: dict[str, Running] = {}
        self.draining = False
        self._by_key: dict[str, list[Node]] = {}
        self._let_go = LetGo()
        self._reruns: set[str] = set()  # keys with a record, run again for their dropped files
        self._store_errors = Counter[str]()  # key -> number of StoreErrors
        self._hangs_checked_at = self._store_checked_at = float("-inf")
        self._waited_until = time.monotonic()
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
        self._follow_ups = FollowUps(store, self.running, self.nodes)

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
            counts = self.counts.setdefault(stage.kind, Counter())
            counts[node.counts_as] += 1
            before = self._let_go.take(stage.lineage)
            if before is not None:
                reused = self._let_go.reused(before)
                counts["reused" if reused else "done"] -= 1
                self._take_back(node, before, reused)
            for above in {above.lineage: above for above in stage.upstream()}.values():
                self._add(above, new).downstream.append(node)
            new.append(node)
        return node

    def _take_back(self, node: Node, key: str, reused: bool) -> None:
        """Settle the new node of a stage that was let go, unless its artifact was removed since."""
        artifact = self._whole_artifact(node.stage.kind, key)
        if artifact is not None:
            node.key = key
            self._by_key.setdefault(key, []).append(node)
            self._done([node], artifact, reused)

    def let_go(self, needed: Iterable[Stage]) -> list[str]:
        """Let go of the done stages that neither `needed` nor open stages read from, directly or
        not. Returns their lineages.
        """
        at_work = [key for item in self.running.values() for key in item.keys]
        nodes = [*self.unsettled(), *(node for key in at_work for node in self._by_key[key])]
        kept = {stage.lineage for stage in closure([*needed, *(node.stage for node in nodes)])}
        gone = {
            lineage: node
            for lineage, node in self.nodes.items()
            if node.state == "done" and lineage not in kept
        }
        for lineage, node in gone.items():
            self._let_go.add(node)
            del self.nodes[lineage]
            self._by_key[node.key].remove(node)
            if not self._by_key[node.key]:
                del self._by_key[node.key]
        for node in self.nodes.values():
            node.downstream = [each for each in node.downstream if each.stage.lineage not in gone]
        self.estimates.forget(gone)
        self._starter.forget(node.key for node in gone.values())
        return list(gone)

    def _move(self, node: Node, state: State, reused: bool | None = None) -> None:
        """Change a node's state, and `reused` unless None; update `counts`."""
        counts = self.counts[node.stage.kind]
        counts[node.counts_as] -= 1
        before, node.state = node.state, state
        node.reused = node.reused if reused is None else reused
        counts[node.counts_as] += 1
        if "ready" in (before, state):
            self._starter.ready.state_changed(node)
        if state in ("done", "failed"):
            self._due |= dict.fromkeys(node.downstream)

    def artifact(self, stage: Stage) -> Artifact | None:
        node = self.nodes.get(stage.lineage)
        if node is not None:
            return node.artifact
        key = self._let_go.key(stage.lineage)
        return None if key is None else self.store.find(stage.kind, key)

    def failure(self, stage: Stage) -> Failure | None:
        node = self.nodes.get(stage.lineage)
        return node.failure if node else None

    def settled(self, stage: Stage) -> bool:
        """Whether an added stage is done or failed."""
        node = self.nodes.get(stage.lineage)
        return stage.lineage in self._let_go if node is None else node.state in ("done", "failed")

    def knows(self, stage: Stage) -> bool:
        """Whether a stage was added."""
        return stage.lineage in self.nodes or stage.lineage in self._let_go

    def done(self) -> dict[str, bool]:
        """The key of each done stage, and whether its artifact existed before this run."""
        found = dict(self._let_go.keys())
        nodes = (node for node in self.nodes.values() if node.state == "done")
        return found | {node.key: node.reused for node in nodes}

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

    def start(self) -> None:
        """Start what fits now, without waiting for anything."""
        if not self.draining:
            self._start()

    def step(self, timeout_s: float = 0.5, started: Callable[[], None] = lambda: None) -> None:
        """Start what fits, wait at most `timeout_s`, and record finished stages.

        `started` is called after stages have started and before the wait, because the inline
        executor runs them during the wait.
        """
        if not self.draining and self._start():
            started()
        if not self.running:
            time.sleep(min(timeout_s, 0.05))  # without jobs the wait below returns at once
        for finished in self._finished(timeout_s):
            self._end_job(finished)
        self._record_committed()
        self._cancel_hung_jobs()
        self._update_states()

    def _finished(self, timeout_s: float) -> Sequence[Finished]:
        """The jobs that ended. Returns as soon as the current stage of a batch has a record: stages
        after it may start, and the batch may run for long.
        """
        batches = [item for item in self.running.values() if len(item.keys) > 1 or item.follow_ups]
        if not batches or self.timing.look_every_s > 0:
            return self.executor.finished(timeout_s)
        turn_s = max(0.0, time.monotonic() - self._waited_until)  # of the driver's other work
        every_s = max(LOOK_S, LOOK_S * len(batches) / JOBS_A_LOOK, TURNS_A_LOOK * turn_s)
        finished: Sequence[Finished] = ()
        for _ in range(max(1, math.ceil(timeout_s / every_s))):
            finished = self.executor.finished(min(timeout_s, every_s))
            if finished or any(map(self._has_committed, batches)):
                break
        self._waited_until = time.monotonic()
        return finished

    def _has_committed(self, item: Running) -> bool:
        """Whether the current stage of a job has a record."""
        at = next((key for key in item.keys if self._by_key[key][0].state == "running"), None)
        return (
            at is not None and self._whole_artifact(self._by_key[at][0].stage.kind, at) is not None
        )

    def remaining_s(self) -> float:
        """The expected seconds until all added stages are done: the longest chain, or all work
        divided by the GPUs, whichever is longer.
        """
        return self.timing.remaining_s(self.unsettled())

    def _update_states(self, new: Iterable[Node] = ()) -> None:
        """Move waiting stages to ready, to done if the store has them, or to failed if an upstream
        stage failed.

        Only `new` nodes are checked, and those below a node that has settled since the last call.
        """
        self._due |= dict.fromkeys(new)
        while self._due:
            # Follow-ups first: a stage with the same key, which is in no batch, then waits for them
            due, self._due = dict.fromkeys([*self._follow_ups.waiting(), *self._due]), {}
            for node in due:
                if node.state == "waiting":
                    self._update_state(node)

    def _update_state(self, node: Node) -> None:
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
            return
        contents = contents_of(node.stage, self.artifact)
        if contents is None:
            return
        node.key = digest(key_payload(node.stage.spec, contents))
        same_key = self._by_key.setdefault(node.key, [])
        if node not in same_key:
            same_key.append(node)
        artifact = self._whole_artifact(node.stage.kind, node.key)
        attempt = self._follow_ups.attempt(node)
        if artifact is None and self._waits_for_reruns(node):
            return  # it is checked again once its reruns are done
        if artifact is not None:
            # A record of another attempt was in the store before
            ran = attempt is not None and artifact.folder == attempt
            if ran:
                self._follow_ups.begin(node)
                self.estimates.learn([artifact])
            reused = self._let_go.reused(node.key) and all(each.reused for each in same_key[:-1])
            self._done([node], artifact, reused and not ran)
        elif attempt is not None and all(each.state == "waiting" for each in same_key):
            self._follow_ups.begin(node)
            self._move(node, "running")
            node.attempt = attempt
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
                    if each.state == "done":
                        self._move(each, "waiting")
                        self._unsettled[each.stage.lineage] = each
                        self._due[each] = None
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
        self._record_running(
            dict.fromkeys(node.key for node in self.unsettled() if node.state == "running")
        )

    def _record_running(self, keys: Iterable[str]) -> None:
        """Mark the stages of these keys as done whose record is in the store."""
        for key in keys:
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
            # All open stages: a group reports the progress of any of its members
            open_nodes = [self._by_key[key][0] for key in item.keys]
            open_nodes = [node for node in open_nodes if node.state == "running"]
            signal = (
                " ".join(node.key for node in open_nodes),
                {node.key: self.timing.last_progress(node) for node in open_nodes},
            )
            silent_s = now - item.signal_at
            if signal != item.signal or not self.executor.begun(item.job):
                item.signal, item.signal_at = signal, now
            elif silent_s > self.profile.hang_after_s:
                self.executor.cancel(item.job)
                loss = Loss(f"cancelled after {silent_s:.0f} s without progress")
                self._end_job(Finished(item.job, (), loss))

    def _end_job(self, finished: Finished) -> None:
        item = self.running.get(finished.job.id)
        if item is None:
            return  # cancelled before; its stages are ready or run in another job
        if item.follow_ups:  # before their reports are read, their keys must be known
            self._record_running(item.keys)
            self._update_states()
        del self.running[finished.job.id]
        now = time.monotonic()
        self._starter.ended(finished, now - item.started)
        for key in item.keys:
            self.timing.forget(self._by_key[key][0])
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
        for key in item.keys:
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
            self._reruns.discard(node.key)
            node.failure = Failure(reason, command, invalid_input=invalid_input)
            self._move(node, "failed")
