"""The runner: takes wanted stages, looks each key up in the store, runs what misses, and knows what became of everything.

A stage's key is known once its inputs are done, so the graph resolves as it goes: stages that turn out to have the same
key run once, and a stage whose inputs came out as before is not run at all. The store is the only memory; a runner that
is killed leaves nothing that another would have to clean up before continuing.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster.costs import Estimates
from cluster.executor import Capacity, Executor, Finished, Host, Job, Loss, Needs
from cluster.losses import Losses
from cluster.profile import Profile
from cluster.scheduler import Busy, Work, place
from cluster.store import Artifact, Store
from tasks.errors import ClusterLost, DiskFull, EbblineError, EndpointDown, StudyError
from tasks.identity import digest
from tasks.specs import ApplySpec, EvaluateSpec, GenerateSpec, JudgeSpec, OrganismSpec, ProjectSpec, ScoreSpec, SubspaceSpec, TrainSpec
from tasks.stage import Input, Part, Request, Source, Stage, key_payload, stage_of

NO_FAULT: Mapping[str, type[EbblineError]] = {error.__name__: error for error in (DiskFull, EndpointDown)}
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


def contents_of(stage: Stage, artifact: Callable[[Stage], Artifact | None]) -> dict[str, str] | None:
    """The content digest of each input, or None while one of them is not made."""
    contents: dict[str, str] = {}
    for name, item in stage.inputs.items():
        if isinstance(item, Source):
            contents[name] = item.content
            continue
        found = artifact(stage_of(item) or stage)
        if found is None:
            return None
        contents[name] = found.content_of(item.path) if isinstance(item, Part) else found.content
    return contents


class Resolver:
    """Which stages of a graph are in the store already, without running anything."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._found: dict[str, Artifact | None] = {}

    def hashed(self, stage: Stage) -> dict[str, object] | None:
        """What the stage's key hashes; None while an input is not made."""
        contents = contents_of(stage, self.artifact)
        return None if contents is None else key_payload(stage.spec, contents)

    def key(self, stage: Stage) -> str | None:
        payload = self.hashed(stage)
        return None if payload is None else digest(payload)

    def artifact(self, stage: Stage) -> Artifact | None:
        if stage.lineage not in self._found:
            key = self.key(stage)
            self._found[stage.lineage] = None if key is None else self.store.find(stage.kind, key)
        return self._found[stage.lineage]


class Runner:
    """Drives wanted stages to done or failed on one executor. `step` is the heartbeat; nothing happens between calls."""

    def __init__(
        self, store: Store, executor: Executor, needs_of: Callable[[Stage], Needs] | None = None, profile: Profile | None = None
    ) -> None:
        self.store, self.executor, self.profile = store, executor, profile or Profile()
        self.estimates = Estimates(store)
        self.nodes: dict[str, Node] = {}
        self.running: dict[str, _Running] = {}
        self.draining = False
        self._by_key: dict[str, list[Node]] = {}
        self._losses = Losses(self.profile.tries, self.profile.backoff_s)
        self._cached: dict[str, set[str]] = {}
        self._hosts: dict[str, Host] = {}  # every one that was ever there
        self._stuck_since: float | None = None
        self._listened = float("-inf")
        self._needs_of = needs_of or default_needs

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

    def step(self, timeout_s: float = 0.5) -> None:
        """Start what fits, wait at most `timeout_s`, take in what was finished."""
        if not self.draining:
            self._start()
        if not self.running:
            time.sleep(min(timeout_s, 0.05))  # nothing to wait for: do not spin
        for finished in self.executor.finished(timeout_s):
            self._take_in(finished)
        for key, nodes in self._by_key.items():
            if any(node.state == "running" for node in nodes):
                artifact = self.store.find(nodes[0].stage.kind, key)
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
        try:
            said: dict[str, Any] = json.loads((node.attempt / "log" / "progress.json").read_text()) if node.attempt else {}
        except (OSError, ValueError):
            return {}  # being replaced at this moment; the next look will find it
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
                changed = True
                node.key = digest(key_payload(node.stage.spec, contents))
                twins = self._by_key.setdefault(node.key, [])
                twins.append(node)
                artifact = self.store.find(node.stage.kind, node.key)
                if artifact is not None:
                    self._done([node], artifact, reused=len(twins) == 1 or all(twin.reused for twin in twins[:-1]))
                else:
                    node.state, node.failure = twins[0].state if len(twins) > 1 else "ready", twins[0].failure

    def _done(self, nodes: Iterable[Node], artifact: Artifact, reused: bool) -> None:
        for node in nodes:
            node.state, node.artifact, node.reused = "done", artifact, reused

    def _start(self) -> None:
        ready = {node.key: node for node in self.nodes.values() if node.state == "ready"}
        if not ready:
            return
        paths = self._paths()
        works = [
            Work(
                key,
                self._needs_of(node.stage),
                resident(node.stage),
                self._seconds(node),
                paths[node.stage.lineage],
                self._losses.shun(key),
            )
            for key, node in ready.items()
        ]
        capacity = self.executor.capacity()
        now = time.monotonic()
        self.executor.expect(
            [(work.needs, work.seconds) for work in works]
            + [(self._needs_of(node.stage), self._seconds(node)) for node in self.nodes.values() if node.state == "running"]
        )
        self._check_possible(works, capacity, now)
        busy = [Busy(item.job.hosts, max(1.0, item.seconds - (now - item.started))) for item in self.running.values()]
        cached = {host: frozenset(names) for host, names in self._cached.items()}
        startable = [work for work in works if self._losses.may_start(work.key, now)]
        for placement in place(startable, busy, self._losses.in_service(capacity), cached):
            batch = [self._request(ready[key], placement.needs.gpus) for key in placement.keys]
            job = self.executor.submit(batch, placement.needs, placement.hosts)
            seconds = sum(self._seconds(ready[key]) for key in placement.keys)
            self.running[job.id] = _Running(job, now, seconds, (placement.keys[0], {}), now)
            for host in placement.hosts:
                self._cached.setdefault(host, set()).add(resident(ready[placement.keys[0]].stage))
            for key in placement.keys:
                for node in self._by_key[key]:
                    node.state = "running"

    def _check_possible(self, works: Iterable[Work], capacity: Capacity, now: float) -> None:
        """Raise StudyError for what no host could ever hold, ClusterLost when the hosts that could have stayed away for long."""
        self._hosts |= {host.name: host for host in capacity.hosts}
        ever = [replace(host, draining=False) for host in self._hosts.values()]
        stuck = [work for work in works if impossible(work.needs, capacity.hosts)]
        if not stuck or self.running:
            self._stuck_since = None
        for work in stuck:
            reason = impossible(work.needs, ever)
            if reason and not capacity.grows:
                raise StudyError(f"{self._by_key[work.key][0].stage.kind} {work.key[:12]} {reason}")
            if self.running:
                continue
            self._stuck_since = self._stuck_since or now
            if now - self._stuck_since > self.profile.hang_after_s:
                raise ClusterLost(
                    f"no host for {self._by_key[work.key][0].stage.kind} {work.key[:12]} ({work.gpus} GPUs) came within"
                    f" {self.profile.hang_after_s:.0f} s; bring one up, and the same command continues"
                )

    def _request(self, node: Node, gpus: int) -> Request:
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
            out=str(attempt / "payload"),
            log=str(attempt / "log"),
            scratch=str(self.store.scratch(node.key)),
            gpus=gpus,
            device=self.executor.device if gpus else "cpu",
            threads=self.executor.threads,
            checkpoint_every_s=self.profile.checkpoint_every_s,
        )
        (attempt / "log" / "request.json").write_text(request.to_json())
        node.attempt = attempt
        return request

    def _location(self, item: Input) -> str:
        if isinstance(item, Source):
            return item.location
        stage = stage_of(item)
        artifact = None if stage is None else self.artifact(stage)
        if artifact is None:
            raise RuntimeError("an input is not done")
        return str(artifact.path / item.path if isinstance(item, Part) else artifact.path)

    def _listen(self) -> None:
        """Cancel jobs that gave no sign of life for `hang_after_s`: no progress, no stage finished, since they were started."""
        now = time.monotonic()
        if now - self._listened < min(5.0, self.profile.hang_after_s / 4):
            return
        self._listened = now
        for item in list(self.running.values()):
            at = next((key for key in item.job.keys if self._by_key[key][0].state == "running"), "")
            said = (at, self._said(self._by_key[at][0]) if at else {})
            if said != item.said:
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
        for key in finished.job.keys:
            nodes = self._by_key[key]
            artifact = self.store.find(nodes[0].stage.kind, key)
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
        command = f"python -m tasks {attempt / 'log' / 'request.json'}" if attempt else ""
        for node in nodes:
            node.state, node.failure = "failed", Failure(reason, command)

    def _seconds(self, node: Node) -> float:
        """The expected seconds from now: by its own progress when the stage runs and has said how far it is."""
        said = self._said(node) if node.state == "running" else {}
        if said.get("done"):
            return float(said["seconds"] * (said["total"] - said["done"]) / said["done"])
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


def impossible(needs: Needs, hosts: Iterable[Host]) -> str | None:
    """Why none of these hosts can ever hold this work, or None. Those that drain do not count."""
    staying = [host for host in hosts if not host.draining]
    if needs.gpus == 0:
        return None if any(host.cpus for host in staying) else "needs a CPU, and no host has one to spare"
    most = (sum if needs.spread else max)([host.gpus for host in staying] or [0])
    if needs.gpus <= most:
        return None
    return f"needs {needs.gpus} GPUs at once, and there are {most}; give the model fewer `gpus`, or the cluster more"


def default_needs(stage: Stage) -> Needs:
    """One GPU for stages that run a model or factorise its weights, none for those that move rows and tensors."""
    if isinstance(stage.spec, JudgeSpec):
        return Needs(int(stage.spec.endpoint is None))
    return Needs(int(isinstance(stage.spec, OrganismSpec | TrainSpec | SubspaceSpec | GenerateSpec | EvaluateSpec)))


def resident(stage: Stage) -> str:
    """What a stage needs in memory: stages with the same answer belong in one batch."""
    spec = stage.spec
    if isinstance(spec, JudgeSpec) and spec.endpoint is not None:
        return spec.endpoint
    if isinstance(spec, TrainSpec) and spec.method == "full":
        return stage.lineage  # it trains a copy of its own
    if isinstance(spec, TrainSpec | GenerateSpec | JudgeSpec | EvaluateSpec):
        return f"{stage.inputs['model'].lineage}/{spec.quantisation}/{spec.dtype}"
    if isinstance(spec, ApplySpec | ProjectSpec | ScoreSpec):
        return spec.KIND
    return stage.lineage
