"""The runner: takes wanted stages, looks each key up in the store, runs what misses, and knows what
became of everything.

A stage's key is known once its inputs are done, so the graph resolves as it goes: stages that turn
out to have the same key run once, and a stage whose inputs came out as before is not run at all.
The store is the only memory; a runner that is killed leaves nothing that another would have to
clean up before continuing.
"""

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

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

__all__ = ["Failure", "Node", "Runner"]
INVALID_INPUT = (DataError.__name__, ModelError.__name__)
NO_FAULT: Mapping[str, type[EbblineError]] = {
    error.__name__: error for error in (DiskFull, EndpointDown, Incomplete, Differs)
}


class Runner:
    """Drives wanted stages to done or failed on one executor. `step` is the heartbeat; nothing
    happens between calls.
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
        self.counts: dict[
            str, Counter[str]
            # Kind -> how many of its nodes are in each state; `reused` are done and not by this run
        ] = {}
        self._unsettled: dict[
            str, Node
        ] = {}  # by lineage; may still hold some that have been settled since the last look
        self.running: dict[str, Running] = {}
        self.draining = False
        self._by_key: dict[str, list[Node]] = {}
        self._again: set[str] = set()  # keys with a record whose dropped files are being made again
        self._shut_out = Counter[
            str
        ]()  # how often the store could not be used from the place of a stage, by its key
        self._listened = self._looked = float("-inf")
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

    def want(self, targets: Iterable[Stage]) -> None:
        """Add stages and all that they read from. Asking again for the same stage is free."""
        new: list[Node] = []
        for target in targets:
            self._add(target, new)
        self._resolve(new)

    def _add(self, stage: Stage, new: list[Node]) -> Node:
        """The node of a stage; one that was not there, and those above it, are added to `new`,
        inputs first.
        """
        node = self.nodes.get(stage.lineage)
        if node is None:
            node = self.nodes[stage.lineage] = self._unsettled[stage.lineage] = Node(stage)
            self.counts.setdefault(stage.kind, Counter())[node.counts_as] += 1
            for above in {above.lineage: above for above in stage.upstream()}.values():
                self._add(above, new).behind.append(node)
            new.append(node)
        return node

    def _move(self, node: Node, state: State, reused: bool | None = None) -> None:
        """Change a node's state, and `reused` unless that is None; `counts` keeps up."""
        counts = self.counts[node.stage.kind]
        counts[node.counts_as] -= 1
        node.state, node.reused = state, node.reused if reused is None else reused
        counts[node.counts_as] += 1

    def artifact(self, stage: Stage) -> Artifact | None:
        node = self.nodes.get(stage.lineage)
        return node.artifact if node else None

    def failure(self, stage: Stage) -> Failure | None:
        return self.nodes[stage.lineage].failure

    def settled(self, stage: Stage) -> bool:
        return self.nodes[stage.lineage].state in ("done", "failed")

    def unsettled(self) -> list[Node]:
        """What is wanted and neither done nor failed: a few, where `nodes` has all that a study
        ever asked for.
        """
        self._unsettled = {
            lineage: node
            for lineage, node in self._unsettled.items()
            if node.state not in ("done", "failed")
        }
        return list(self._unsettled.values())

    @property
    def settlements(self) -> int:
        """How many of the wanted stages are done or failed."""
        return sum(
            counts[name] for counts in self.counts.values() for name in ("done", "reused", "failed")
        )

    @property
    def idle(self) -> bool:
        """True when nothing runs and nothing can start."""
        return not self.running and not any(node.state == "ready" for node in self.unsettled())

    def open_seconds(self, stage: Stage) -> float | None:
        """The expected seconds until a wanted stage is settled, once it starts; None for one that
        is settled or not wanted.
        """
        node = self.nodes.get(stage.lineage)
        return (
            None if node is None or node.state in ("done", "failed") else self.timing.seconds(node)
        )

    @property
    def refused(self) -> set[str]:
        """The keys that the meter would not let start just now."""
        return self._starter.refused

    @property
    def starved(self) -> bool:
        """True when nothing runs, and the meter lets nothing start that is ready."""
        ready = {node.key for node in self.unsettled() if node.state == "ready"}
        return not self.running and bool(ready) and ready <= self.refused

    @property
    def capacity(self) -> Capacity | None:
        """What there was when something was last to start; None before that, and asking does not
        make anybody look.
        """
        return self._starter.capacity

    def first_with(self, key: str) -> Node:
        """The first wanted stage that turned out to have this key."""
        return self._by_key[key][0]

    def step(self, timeout_s: float = 0.5, started: Callable[[], None] = lambda: None) -> None:
        """Start what fits, wait at most `timeout_s`, take in what was finished.

        `started` is called between the first two when something has started: an executor in this
        process runs it while it is waited for.
        """
        if not self.draining and self._start():
            started()
        if not self.running:
            time.sleep(min(timeout_s, 0.05))  # nothing to wait for: do not spin
        for finished in self.executor.finished(timeout_s):
            self._take_in(finished)
        look = time.monotonic() - self._looked >= self.timing.look_every_s
        self._looked = time.monotonic() if look else self._looked
        for key in dict.fromkeys(
            node.key for node in self.unsettled() if look and node.state == "running"
        ):
            nodes = self._by_key[key]
            artifact = self._made(nodes[0].stage.kind, key)
            if artifact is not None:
                self.estimates.learn([artifact])
                self._done(nodes, artifact, reused=False)
        self._listen()
        self._resolve()

    def remaining_s(self) -> float:
        """The expected seconds until all wanted stages are done: the longest chain, or the work
        over the GPUs.
        """
        return self.timing.remaining_s(self.unsettled())

    def _resolve(self, nodes: Iterable[Node] | None = None) -> None:
        """Move waiting stages on: to ready, to done if the store has them, to failed if something
        above them failed.

        `nodes` are those that may move, all that are unsettled when it is left out: what was just
        added can move nothing else.
        """
        looked_at = dict.fromkeys(self.unsettled() if nodes is None else nodes)
        changed = True
        while changed:
            changed = False
            for node in [node for node in looked_at if node.state == "waiting"]:
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
                        reason, above.command, inherited=True, invalid=above.invalid
                    )
                    self._move(node, "failed")
                    changed = True
                    continue
                contents = contents_of(node.stage, self.artifact)
                if contents is None:
                    continue
                node.key = digest(key_payload(node.stage.spec, contents))
                twins = self._by_key.setdefault(node.key, [])
                if node not in twins:
                    twins.append(node)
                artifact = self._made(node.stage.kind, node.key)
                again = len(self._again)
                if artifact is None and self._needs_again(node):
                    remade = {
                        twin.stage.lineage: twin
                        for key in self._again
                        for twin in self._by_key[key]
                    }
                    self._unsettled |= remade
                    looked_at |= dict.fromkeys(remade.values())
                    changed = changed or len(self._again) > again
                    continue
                changed = True
                if artifact is not None:
                    self._done(
                        [node],
                        artifact,
                        reused=len(twins) == 1 or all(twin.reused for twin in twins[:-1]),
                    )
                else:
                    first = next((twin for twin in twins if twin.state != "waiting"), None)
                    self._move(node, "ready" if first is None else first.state)
                    node.failure, node.attempt = (
                        (None, node.attempt) if first is None else (first.failure, first.attempt)
                    )

    def _made(self, kind: str, key: str) -> Artifact | None:
        """The artifact of a key; None while files that retention dropped are being made again."""
        artifact = self.store.find(kind, key)
        if artifact is not None and key in self._again:
            if self.store.dropped(artifact):
                return None
            self._again.discard(key)
        return artifact

    def _needs_again(self, node: Node) -> bool:
        """Whether a stage that has to run must wait for files that retention dropped; has them made
        again.
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
                self._again.add(above.key)
                self._starter.apart.add(
                    above.key
                )  # as it was made: what was made in a pack is never dropped
                for twin in self._by_key[above.key]:
                    self._move(twin, "waiting")
            waits = True
        return waits

    def _done(self, nodes: Iterable[Node], artifact: Artifact, reused: bool) -> None:
        for node in nodes:
            node.artifact = artifact
            self._move(node, "done", reused)

    def _start(self) -> bool:
        """Start what fits; whether anything has started."""
        ready = {node.key: node for node in self.unsettled() if node.state == "ready"}
        if not ready:
            return False
        also = [
            (self._setup.needs_of(node.stage), self.timing.seconds(node))
            for node in self.unsettled()
            if node.state == "running"
        ]
        attempts = self._starter.start(
            ready, self.running, self.timing.paths(self.unsettled()), also
        )
        for key, attempt in attempts.items():
            for node in self._by_key[key]:
                node.attempt = attempt
                self._move(node, "running")
        return bool(attempts)

    def _listen(self) -> None:
        """Cancel jobs that gave no sign of life for `hang_after_s`: no progress, no stage finished,
        since they had begun.
        """
        now = time.monotonic()
        if now - self._listened < min(5.0, self.profile.hang_after_s / 4):
            return
        self._listened = now
        for item in list(self.running.values()):
            at = next((key for key in item.job.keys if self._by_key[key][0].state == "running"), "")
            said = (at, self.timing.last_progress(self._by_key[at][0]) if at else {})
            if said != item.said or not self.executor.begun(item.job):
                item.said, item.heard = said, now
            elif now - item.heard > self.profile.hang_after_s:
                self.executor.cancel(item.job)
                self._take_in(
                    Finished(
                        item.job,
                        (),
                        Loss(f"no sign of life for {now - item.heard:.0f} s, so it was cancelled"),
                    )
                )

    def _take_in(self, finished: Finished) -> None:
        item = self.running.pop(finished.job.id, None)
        if item is None:
            return  # given up before; its stages have gone elsewhere since
        now = time.monotonic()
        self._starter.ended(finished, now - item.started)
        reports = {report.key: report for report in finished.reports}
        # A lost batch was lost by the stage it was at, not by those behind it.
        charged = any(report.error for report in finished.reports)
        loss = finished.lost or Loss("no report")
        # What one worker cannot read or write, another may: its network, its clock, its disk (with
        # a bucket; else it is the store's).
        there = {
            StoreError.__name__,
            *([DiskFull.__name__] if self.store.cache is not None else []),
        }
        shut_out = [report for report in finished.reports if report.error_type in there]
        if shut_out:
            self._check_store(shut_out[0])
            reports = {key: report for key, report in reports.items() if report not in shut_out}
            charged, loss = False, Loss(str(shut_out[0].error), "place")
        for key in finished.job.keys:
            nodes = self._by_key[key]
            artifact = self._made(nodes[0].stage.kind, key)
            report = reports.get(key)
            if artifact is not None:
                self.estimates.learn([artifact])
                self._done(nodes, artifact, reused=False)
                self._setup.retry_policy.succeeded(finished.job.hosts)
            elif (
                report is not None
                and report.error_type is not None
                and report.error_type in NO_FAULT
            ):
                raise NO_FAULT[report.error_type](
                    str(report.error)
                )  # a point that fails stays failed, and this is no fault of it
            elif report is not None and report.error is not None:
                self._fail(
                    nodes,
                    f"{nodes[0].stage.kind}: {report.error}",
                    invalid=report.error_type in INVALID_INPUT,
                )
            else:
                if loss.blame == "stage":
                    self._starter.apart.add(key)
                gave_up = None
                if not charged:
                    lasted = now - item.started
                    gave_up = self._setup.retry_policy.count(
                        key, loss, finished.job.hosts, lasted, now
                    )
                charged = True
                if gave_up is not None:
                    self._fail(nodes, f"{nodes[0].stage.kind}: {gave_up}")
                else:
                    for node in nodes:
                        self._move(node, "ready")

    def _check_store(self, report: Report) -> None:
        """Raise StoreError when a stage met it as often as one is tried: then it is not the place,
        and no fault of the stage.
        """
        self._shut_out[report.key] += 1
        if self._shut_out[report.key] >= self.profile.tries:
            raise StoreError(
                f"{report.error} (met {self._shut_out[report.key]} times; the same command "
                "continues)"
            )

    def _fail(self, nodes: list[Node], reason: str, invalid: bool = False) -> None:
        attempt = next((node.attempt for node in nodes if node.attempt), None)
        command = ""
        if attempt is not None:
            request = f"{self.store.url(attempt)}/log/request.json"
            command = f"ebbline rerun {shlex.quote(request)}"
        for node in nodes:
            node.failure = Failure(reason, command, invalid=invalid)
            self._move(node, "failed")
