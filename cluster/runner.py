"""The runner: takes wanted stages, looks each key up in the store, runs what misses, and knows what became of everything.

A stage's key is known once its inputs are done, so the graph resolves as it goes: stages that turn out to have the same
key run once, and a stage whose inputs came out as before is not run at all. The store is the only memory; a runner that
is killed leaves nothing that another would have to clean up before continuing.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.costs import Estimates, GpuTypes, Meter, Unmetered, gpu_types
from cluster.executor import Capacity, Executor, Finished, Host, Job, Loss, Needs
from cluster.losses import Losses
from cluster.needs import default_needs, resident
from cluster.profile import Profile
from cluster.resolver import contents_of
from cluster.scheduler import Busy, Placement, Work, impossible, place
from cluster.sources import offered
from cluster.store import Artifact, Store
from tasks.errors import ClusterLost, Differs, DiskFull, EbblineError, EndpointDown, Incomplete, StoreError, StudyError
from tasks.identity import digest
from tasks.stage import Input, Part, Request, Source, Stage, key_payload, stage_of

HEAR_EVERY_S = {True: 5.0, False: 0.0}  # how often a running stage's progress and record are looked up: in a bucket, in a folder
NO_FAULT: Mapping[str, type[EbblineError]] = {error.__name__: error for error in (DiskFull, EndpointDown, StoreError, Incomplete, Differs)}
State = Literal["waiting", "ready", "running", "done", "failed"]


@dataclass(frozen=True)
class Failure:
    """Why a stage has no artifact. `command` reproduces it in one process; `inherited` when the fault lay further up."""

    reason: str
    command: str = ""
    inherited: bool = False


@dataclass
class Node:
    """One stage on its way. `reused` is true when its artifact was there before this runner asked for it.

    `attempt` is the folder of its latest attempt. Nodes with the same key are twins: one runs, all get its artifact.
    """

    stage: Stage
    state: State = "waiting"
    key: str = ""
    artifact: Artifact | None = None
    failure: Failure | None = None
    reused: bool = False
    attempt: Path | None = None
    behind: list["Node"] = field(default_factory=list)


@dataclass
class _Running:
    job: Job
    started: float
    seconds: float
    said: tuple[str, Mapping[str, Any]]
    heard: float  # when what it says of itself last changed


class Runner:
    """Drives wanted stages to done or failed on one executor. `step` is the heartbeat; nothing happens between calls."""

    def __init__(
        self,
        store: Store,
        executor: Executor,
        needs_of: Callable[[Stage], Needs] | None = None,
        profile: Profile | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.store, self.executor, self.profile = store, executor, profile or Profile()
        self.estimates = Estimates(store)
        self.nodes: dict[str, Node] = {}
        self.running: dict[str, _Running] = {}
        self.draining = False
        self.refused: set[str] = set()  # keys that the meter would not let start just now
        self._by_key: dict[str, list[Node]] = {}
        self._again: set[str] = set()  # keys with a record whose dropped files are being made again
        self._heard: dict[Path, tuple[float, dict[str, Any]]] = {}
        self._losses = Losses(self.profile.tries, self.profile.backoff_s)
        self._cached: dict[str, set[str]] = {}
        self._hosts: dict[str, Host] = {}  # every one that was ever there
        self._ready_since: dict[str, float] = {}
        self._stuck_since: float | None = None
        self._listened = self._looked = float("-inf")
        self._needs_of = needs_of or default_needs
        self._meter = meter or Unmetered()

    def want(self, targets: Iterable[Stage]) -> None:
        """Add stages and all that they read from. Asking again for the same stage is free."""
        for target in targets:
            self._add(target)
        self._resolve()

    def _add(self, stage: Stage) -> Node:
        node = self.nodes.get(stage.lineage)
        if node is None:
            node = self.nodes[stage.lineage] = Node(stage)
            for above in stage.upstream():
                parent = self._add(above)
                if node not in parent.behind:
                    parent.behind.append(node)
        return node

    def artifact(self, stage: Stage) -> Artifact | None:
        node = self.nodes.get(stage.lineage)
        return node.artifact if node else None

    def failure(self, stage: Stage) -> Failure | None:
        return self.nodes[stage.lineage].failure

    def settled(self, stage: Stage) -> bool:
        return self.nodes[stage.lineage].state in ("done", "failed")

    @property
    def idle(self) -> bool:
        """True when nothing runs and nothing can start."""
        return not self.running and not any(node.state == "ready" for node in self.nodes.values())

    def open_seconds(self, stage: Stage) -> float | None:
        """The expected seconds until a wanted stage is settled, once it starts; None for one that is settled or not wanted."""
        node = self.nodes.get(stage.lineage)
        return None if node is None or node.state in ("done", "failed") else self._seconds(node)

    @property
    def starved(self) -> bool:
        """True when nothing runs, and the meter lets nothing start that is ready."""
        ready = {node.key for node in self.nodes.values() if node.state == "ready"}
        return not self.running and bool(ready) and ready <= self.refused

    def step(self, timeout_s: float = 0.5) -> None:
        """Start what fits, wait at most `timeout_s`, take in what was finished."""
        if not self.draining:
            self._start()
        if not self.running:
            time.sleep(min(timeout_s, 0.05))  # nothing to wait for: do not spin
        for finished in self.executor.finished(timeout_s):
            self._take_in(finished)
        look = time.monotonic() - self._looked >= HEAR_EVERY_S[self.store.cache is not None]
        self._looked = time.monotonic() if look else self._looked
        for key, nodes in self._by_key.items():
            if look and any(node.state == "running" for node in nodes):
                artifact = self._made(nodes[0].stage.kind, key)
                if artifact is not None:
                    self.estimates.learn([artifact])
                    self._done(nodes, artifact, reused=False)
        self._listen()
        self._resolve()

    def progress_of(self, node: Node) -> str:
        """What a running stage says of itself, such as `loss 0.31 (40/96)`; empty when it has said nothing."""
        said = self._said(node)
        return f"{said['note']} ({said['done']}/{said['total']})" if said else ""

    def _said(self, node: Node) -> dict[str, Any]:
        if node.attempt is None:
            return {}
        heard, said = self._heard.get(node.attempt, (-math.inf, {}))
        if time.monotonic() - heard >= HEAR_EVERY_S[self.store.cache is not None]:
            with suppress(ValueError):  # being replaced at this moment; the next look will find it
                said = json.loads(self.store.log(node.attempt, "progress.json") or b"{}")
            self._heard[node.attempt] = (time.monotonic(), said)
        return said

    def remaining_s(self) -> float:
        """The expected seconds until all wanted stages are done: the longest chain, or the work over the GPUs."""
        open_nodes = [node for node in self.nodes.values() if node.state not in ("done", "failed")]
        if not open_nodes:
            return 0.0
        chains = self._paths()
        work = sum(self._seconds(node) * self._needs_of(node.stage).gpus for node in open_nodes)
        return max([work / max(1, self.executor.capacity().gpus), *(chains[node.stage.lineage] for node in open_nodes)], default=0.0)

    def _resolve(self) -> None:
        """Move waiting stages on: to ready, to done if the store has them, to failed if something above them failed."""
        changed = True
        while changed:
            changed = False
            for node in [node for node in self.nodes.values() if node.state == "waiting"]:
                broken = next((a for a in node.stage.upstream() if self.nodes[a.lineage].state == "failed"), None)
                if broken is not None:
                    above = self.nodes[broken.lineage].failure or Failure("")
                    reason = above.reason if above.inherited else f"needs {broken.kind}, which failed: {above.reason}"
                    node.state, node.failure = "failed", Failure(reason, above.command, inherited=True)
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
                    changed = changed or len(self._again) > again
                    continue
                changed = True
                if artifact is not None:
                    self._done([node], artifact, reused=len(twins) == 1 or all(twin.reused for twin in twins[:-1]))
                else:
                    first = next((twin for twin in twins if twin.state != "waiting"), None)
                    node.state, node.failure = ("ready", None) if first is None else (first.state, first.failure)
                    node.attempt = node.attempt if first is None else first.attempt

    def _made(self, kind: str, key: str) -> Artifact | None:
        """The artifact of a key; None while files that retention dropped are being made again."""
        artifact = self.store.find(kind, key)
        if artifact is not None and key in self._again:
            if self.store.dropped(artifact):
                return None
            self._again.discard(key)
        return artifact

    def _needs_again(self, node: Node) -> bool:
        """Whether a stage that has to run must wait for files that retention dropped; has them made again."""
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
                for twin in self._by_key[above.key]:
                    twin.state = "waiting"
            waits = True
        return waits

    def _done(self, nodes: Iterable[Node], artifact: Artifact, reused: bool) -> None:
        for node in nodes:
            node.state, node.artifact, node.reused = "done", artifact, reused

    def _start(self) -> None:
        ready = {node.key: node for node in self.nodes.values() if node.state == "ready"}
        if not ready:
            return
        paths, now = self._paths(), time.monotonic()
        works = [
            Work(
                key,
                self._needs_of(node.stage),
                resident(node.stage),
                self._seconds(node),
                paths[node.stage.lineage],
                self._losses.shun(key),
                now - self._ready_since.setdefault(key, now),
            )
            for key, node in ready.items()
        ]
        capacity = self.executor.capacity()
        self.executor.expect(
            [(work.needs, work.seconds) for work in works]
            + [(self._needs_of(node.stage), self._seconds(node)) for node in self.nodes.values() if node.state == "running"]
        )
        self._check_possible(works, capacity, now)
        startable = {work.key: work for work in works if self._losses.may_start(work.key, now)}
        self.refused = set()
        refused = -1
        while refused < len(self.refused):  # what the meter refuses leaves its place to what is behind it
            refused = len(self.refused)
            for placement in self._places(startable.values(), capacity, now):
                if startable.keys() >= set(placement.keys):
                    started = self._start_batch(placement, ready, capacity, now)
                    for key in placement.keys[:started]:
                        del startable[key]
                    for key in placement.keys[started : started + 1]:
                        self._refuse(startable, startable[key])

    def _refuse(self, startable: dict[str, Work], dear: Work) -> None:
        """Leave out a stage that the meter does not let start, and with it all that need the same for as long or longer."""
        for work in [work for work in startable.values() if work.needs == dear.needs and work.seconds >= dear.seconds]:
            self.refused.add(work.key)
            del startable[work.key]

    def _places(self, works: Iterable[Work], capacity: Capacity, now: float) -> list[Placement]:
        busy = [Busy(item.job.hosts, max(1.0, item.seconds - (now - item.started))) for item in self.running.values()]
        cached = {host: frozenset(names) for host, names in self._cached.items()}
        return place(list(works), busy, self._losses.in_service(capacity), cached)

    def _start_batch(self, placement: Placement, ready: Mapping[str, Node], capacity: Capacity, now: float) -> int:
        """Start as much of a batch as the meter lets; returns how many of its stages that were."""
        gpus = gpu_types(placement.hosts, capacity)
        keys = self._affordable([ready[key] for key in placement.keys], gpus)
        if not keys:
            return 0
        batch = [self._request(ready[key], placement.needs.gpus, self._memory_gb(gpus)) for key in keys]
        job = self.executor.submit(batch, placement.needs, placement.hosts)
        seconds = sum(self._seconds(ready[key]) for key in keys)
        self.running[job.id] = _Running(job, now, seconds, (keys[0], {}), now)
        self._meter.started(job, gpus, seconds)
        for host in placement.hosts:
            self._cached.setdefault(host, set()).add(resident(ready[keys[0]].stage))
        for key in keys:
            del self._ready_since[key]
            for node in self._by_key[key]:
                node.state, node.attempt = "running", ready[key].attempt
        return len(keys)

    def _affordable(self, batch: Sequence[Node], gpus: GpuTypes) -> list[str]:
        """As much of a batch, from its start, as the meter lets start."""
        keys: list[str] = []
        seconds = 0.0
        for node in batch:
            seconds += self._seconds(node)
            if not self._meter.affords(gpus, seconds):
                break
            keys.append(node.key)
        return keys

    def _check_possible(self, works: Iterable[Work], capacity: Capacity, now: float) -> None:
        """Raise StudyError for what no host could ever hold, ClusterLost when the hosts that could have stayed away for long."""
        self._hosts |= {host.name: host for host in capacity.hosts}
        ever = Capacity(tuple(self._hosts.values()))
        staying = Capacity(tuple(host for host in capacity.hosts if not host.draining))
        stuck = [work for work in works if impossible(work, staying)]
        if not stuck or self.running:
            self._stuck_since = None
        for work in stuck:
            reason = impossible(work, ever)
            if reason and not capacity.grows:
                raise StudyError(f"{self._by_key[work.key][0].stage.kind} {work.key[:12]}: {reason}")
            if self.running:
                continue
            self._stuck_since = self._stuck_since or now
            if now - self._stuck_since > self.profile.hang_after_s:
                raise ClusterLost(
                    f"no host for {self._by_key[work.key][0].stage.kind} {work.key[:12]} ({work.gpus} GPUs) came within"
                    f" {self.profile.hang_after_s:.0f} s; bring one up, and the same command continues"
                )

    def _memory_gb(self, gpus: GpuTypes) -> float | None:
        """What the smallest of these GPUs holds, as far as the profile says."""
        known = [self.profile.gpus[name].memory_gb for name in gpus if name is not None and name in self.profile.gpus]
        return min((memory_gb for memory_gb in known if memory_gb is not None), default=None)

    def _request(self, node: Node, gpus: int, memory_gb: float | None) -> Request:
        attempt = self.store.begin(node.stage.kind, node.key)
        contents = contents_of(node.stage, self.artifact)
        if contents is None:
            raise RuntimeError(f"{node.stage.kind} {node.key[:12]} was started before its inputs were done")
        request = Request(
            key=node.key,
            kind=node.stage.kind,
            spec=node.stage.spec.model_dump(mode="json"),
            inputs={name: self._location(item) for name, item in node.stage.inputs.items()},
            contents=contents,
            out=self.store.url(attempt / "payload"),
            log=self.store.url(attempt / "log"),
            scratch=self.store.url(self.store.scratch(node.key)),
            gpus=gpus,
            device=self.executor.device if gpus else "cpu",
            threads=self.executor.threads,
            cache_gb=self.store.cache_gb,
            memory_gb=memory_gb,
            checkpoint_every_s=self.profile.checkpoint_every_s,
        )
        self.store.note(attempt, "request.json", request.to_json().encode())
        node.attempt = attempt
        return request

    def _location(self, item: Input) -> str:
        if isinstance(item, Source):
            return offered(self.store, item)
        stage = stage_of(item)
        artifact = None if stage is None else self.artifact(stage)
        if artifact is None:
            raise RuntimeError("an input is not done")
        return self.store.url(artifact.folder, "payload", *([item.path] if isinstance(item, Part) else []))

    def _listen(self) -> None:
        """Cancel jobs that gave no sign of life for `hang_after_s`: no progress, no stage finished, since they had begun."""
        now = time.monotonic()
        if now - self._listened < min(5.0, self.profile.hang_after_s / 4):
            return
        self._listened = now
        for item in list(self.running.values()):
            at = next((key for key in item.job.keys if self._by_key[key][0].state == "running"), "")
            said = (at, self._said(self._by_key[at][0]) if at else {})
            if said != item.said or not self.executor.begun(item.job):
                item.said, item.heard = said, now
            elif now - item.heard > self.profile.hang_after_s:
                self.executor.cancel(item.job)
                self._take_in(Finished(item.job, (), Loss(f"no sign of life for {now - item.heard:.0f} s, so it was cancelled")))

    def _take_in(self, finished: Finished) -> None:
        item = self.running.pop(finished.job.id, None)
        if item is None:
            return  # given up before; its stages have gone elsewhere since
        now = time.monotonic()
        reports = {report.key: report for report in finished.reports}
        # A lost batch was lost by the stage it was at, not by those behind it.
        charged = any(report.error for report in finished.reports)
        loss = finished.lost or Loss("no report")
        full = [report for report in finished.reports if report.error_type == DiskFull.__name__]
        if full and self.store.cache is not None:  # the disk of that machine, not the store's
            reports = {key: report for key, report in reports.items() if report not in full}
            charged, loss = False, Loss(str(full[0].error), "place")
        for key in finished.job.keys:
            nodes = self._by_key[key]
            artifact = self._made(nodes[0].stage.kind, key)
            report = reports.get(key)
            if artifact is not None:
                self.estimates.learn([artifact])
                self._done(nodes, artifact, reused=False)
                self._losses.succeeded(finished.job.hosts)
            elif report is not None and report.error_type is not None and report.error_type in NO_FAULT:
                raise NO_FAULT[report.error_type](str(report.error))  # a point that fails stays failed, and this is no fault of it
            elif report is not None and report.error is not None:
                self._fail(nodes, f"{nodes[0].stage.kind}: {report.error}")
            else:
                gave_up = None if charged else self._losses.count(key, loss, finished.job.hosts, now - item.started, now)
                charged = True
                if gave_up is not None:
                    self._fail(nodes, f"{nodes[0].stage.kind}: {gave_up}")
                else:
                    for node in nodes:
                        node.state = "ready"

    def _fail(self, nodes: list[Node], reason: str) -> None:
        attempt = next((node.attempt for node in nodes if node.attempt), None)
        command = ""
        if attempt is not None:
            command = f"python -m {'tasks' if self.store.cache is None else 'cluster.again'} {self.store.url(attempt)}/log/request.json"
        for node in nodes:
            node.state, node.failure = "failed", Failure(reason, command)

    def _seconds(self, node: Node) -> float:
        """The expected seconds from now: by its own progress when the stage runs and has said how far it is."""
        said = self._said(node) if node.state == "running" else {}
        if said.get("own", 0) > 1:  # the first took what comes before it, too
            return float(said["own_seconds"] * (said["total"] - said["done"]) / (said["own"] - 1))
        return self.estimates.seconds(node.stage.spec)

    def _paths(self) -> Mapping[str, float]:
        """Lineage -> seconds of the longest chain of open stages that starts there."""
        paths: dict[str, float] = {}

        def path(node: Node) -> float:
            lineage = node.stage.lineage
            if lineage not in paths:
                own = 0.0 if node.state in ("done", "failed") else self._seconds(node)
                paths[lineage] = own + max((path(below) for below in node.behind), default=0.0)
            return paths[lineage]

        for node in self.nodes.values():
            path(node)
        return paths
