"""Submits ready stages to the executor, and detects stages that no host can run.

The scheduler chooses hosts, and avoids those where a stage was lost. The meter rejects what the
budget cannot pay.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ebbline.cluster.executors.executor import Capacity, Finished, Host, Needs
from ebbline.cluster.executors.starts import WarmProcesses
from ebbline.cluster.running.nodes import Node, Running, Setup
from ebbline.cluster.running.ready_nodes import ReadyNodes
from ebbline.cluster.running.timing import Timing
from ebbline.cluster.schedule.costs import GpuTypes, gpu_types
from ebbline.cluster.schedule.estimates import load_record
from ebbline.cluster.schedule.needs import resident
from ebbline.cluster.schedule.packing import Packing, Shares
from ebbline.cluster.schedule.scheduler import (
    SHORTEST_BATCH_S,
    Busy,
    Placement,
    ReadyStage,
    impossible,
)
from ebbline.cluster.store.artifacts import Artifact, new_attempt
from ebbline.cluster.store.resolver import content_of, contents_of
from ebbline.cluster.store.sources import location_for_workers
from ebbline.cluster.store.workplace import request_out
from ebbline.tasks.errors import ClusterLost, StudyError
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.stage import FollowUp, Input, Part, Request, Source, Stage, stage_of

STARTS_A_BATCH = 10


class Starter:
    """Starts the stages of one run. `artifact` returns the artifact of an input's stage."""

    def __init__(
        self, setup: Setup, timing: Timing, artifact: Callable[[Stage], Artifact | None]
    ) -> None:
        self._setup, self._timing, self._artifact = setup, timing, artifact
        self.ready = ReadyNodes(timing, setup.retry_policy, self._ready_stage)
        self.hosts: dict[str, Host] = {}  # all hosts since the start of the run
        self.capacity: Capacity | None = None  # at the last start; None before the first
        self.stuck_since: float | None = None
        self.unpacked: set[str] = set()  # keys that run alone: lost in a pack, or rerun
        self._running: dict[str, Running] = {}
        self._packing = Packing(setup.profile, artifact)
        self._cached: dict[str, set[str]] = {}
        self._types: frozenset[str | None] = frozenset()  # of the cluster's GPUs
        self._warm = WarmProcesses()
        # Job -> its category of overhead (ebbline.cluster.executors.starts)
        self._starting: dict[str, tuple[str | None, int, bool]] = {}

    def forget(self, keys: Iterable[str]) -> None:
        """Forget what was found out about stages that are let go."""
        self._packing.forget(keys)

    def start(
        self, running: dict[str, Running], running_needs: Iterable[tuple[Needs, float]]
    ) -> dict[str, Path]:
        """Start stages that are ready and add their jobs to `running`. Returns the attempt of each
        started stage.

        `running_needs` has (needs, expected seconds) of running stages; it is read if the cluster
        can grow. Raises StudyError for a stage that no host can run, ClusterLost when its hosts
        have been absent for `hang_after_s`.
        """
        self._running, now = running, time.monotonic()
        capacity = self.capacity = self._setup.executor.capacity()
        self._setup.estimates.learn_gpu_type(capacity)
        self._types = frozenset(host.gpu_type for host in capacity.hosts)
        self.ready.update(now)
        if capacity.grows:
            self._setup.executor.expect(
                [(stage.needs, stage.seconds) for stage in self.ready.all()] + list(running_needs)
            )
        self._check_possible(capacity, now)
        attempts: dict[str, Path] = {}
        rejected = True
        # A rejected stage leaves its hosts free, so the rest is placed again.
        while rejected:
            rejected = False
            for placement in self._places(capacity, now):
                if all(key in self.ready.queue for key in placement.keys):
                    started = self._start_batch(placement, self.ready.nodes, capacity, now)
                    attempts |= started
                    for key in started:
                        self.ready.queue.remove(key)
                    for key in placement.keys[len(started) : len(started) + 1]:
                        self.ready.reject(self.ready.queue[key])
                        rejected = True
        return attempts

    def _ready_stage(self, node: Node, path_s: float, since: float) -> ReadyStage:
        return ReadyStage(
            node.key,
            self._setup.needs_of(node.stage),
            resident(node.stage),
            self._timing.seconds(node),
            path_s,
            self._setup.retry_policy.shun(node.key),
            -since,  # at the monotonic clock's time 0
            *self._pack(node, self._types),
        )

    def _places(self, capacity: Capacity, now: float) -> list[Placement]:
        busy = [
            Busy(item.job.hosts, max(1.0, item.seconds - (now - item.started)))
            for item in self._running.values()
        ]
        in_service = self._setup.retry_policy.in_service(capacity)
        return self.ready.queue.place(busy, in_service, self._cached, now, self._shortest_batch_s())

    def _shortest_batch_s(self) -> float:
        """A batch takes at least STARTS_A_BATCH times as long as a start; so idle workers share
        short stages where a start is cheap.
        """
        if not self._setup.executor.own_processes:
            return SHORTEST_BATCH_S
        estimates = self._setup.estimates
        return min(
            SHORTEST_BATCH_S, STARTS_A_BATCH * estimates.starts.seconds(estimates.gpu_type, 1)
        )

    def _start_batch(
        self, placement: Placement, ready: Mapping[str, Node], capacity: Capacity, now: float
    ) -> dict[str, Path]:
        """Start the first stages of a batch, as many as the meter allows. Returns their attempts in
        the batch's order.
        """
        gpus = gpu_types(placement.hosts, capacity)
        starting = (
            next(iter(gpus), None),
            placement.needs.gpus,
            self._warm.would_be_new(placement.hosts),
        )
        start_s = (
            self._setup.estimates.starts.seconds(*starting)
            if self._setup.executor.own_processes
            else 0.0
        )
        keys = self._affordable([ready[key] for key in placement.keys], gpus, start_s)
        if not keys:
            return {}
        attempts = {key: self._setup.store.begin(ready[key].stage.kind, key) for key in keys}
        memory_gb = self._memory_gb(gpus)
        batch, follow_ups = [], dict[str, str]()
        for key in keys:
            name, shares = self._pack(ready[key], frozenset(gpus))
            share = max((shares[gpu] for gpu in gpus), default=1.0) if name else 1.0
            after = self._follow_ups(ready[key]) if placement.needs.gpus <= 1 else {}
            follow_ups |= {lineage: each.attempt for lineage, each in after.items()}
            request = self._request(
                ready[key],
                attempts[key],
                placement.needs.gpus,
                memory_gb,
                name if share < 1 else "",
                share,
            )
            batch.append(replace(request, follow_ups=tuple(after.values())))
        job = self._setup.executor.submit(batch, placement.needs, placement.hosts)
        seconds = start_s + sum(self._timing.seconds(ready[key]) for key in keys)
        self._warm.start(job.id, placement.hosts)
        self._starting[job.id] = starting
        self._running[job.id] = Running(job, now, seconds, (keys[0], {}), now, follow_ups)
        budgeted_s = start_s + sum(self._timing.budgeted_s(ready[key]) for key in keys)
        self._setup.meter.started(job, gpus, budgeted_s)
        for host in placement.hosts:
            self._cached.setdefault(host, set()).add(resident(ready[keys[0]].stage))
        return attempts

    def _follow_ups(self, node: Node) -> dict[str, FollowUp]:
        """Lineage -> the stages that can run right after this one in its batch: all that they read
        beside its output is done.
        """
        return {
            below.stage.lineage: follow_up
            for below in node.downstream
            if kind_named(below.stage.kind).follows_its_input
            and below.state == "waiting"
            and self._setup.needs_of(below.stage) == Needs(0)
            and (follow_up := self._follow_up(below.stage, node.stage)) is not None
        }

    def _follow_up(self, stage: Stage, after: Stage) -> FollowUp | None:
        reads, inputs, contents = dict[str, str](), dict[str, str](), dict[str, str]()
        for name, item in stage.inputs.items():
            above = stage_of(item)
            if above is not None and above.lineage == after.lineage:
                reads[name] = item.path if isinstance(item, Part) else ""
                continue
            content = content_of(item, self._artifact)
            if content is None:
                return None
            inputs[name], contents[name] = self._location(item), content
        return FollowUp(
            kind=stage.kind,
            spec=stage.spec.model_dump(mode="json"),
            reads=reads,
            inputs=inputs,
            contents=contents,
            attempt=new_attempt(),
            load=load_record(self._setup.estimates.load(stage)),
        )

    def _pack(self, node: Node, types: frozenset[str | None]) -> tuple[str, Shares]:
        """(name of its pack, its share of a GPU by type); an empty name if it runs alone."""
        if node.key in self.unpacked or self._setup.needs_of(node.stage).gpus != 1:
            return "", {}
        return self._packing.of(node.stage, node.key, types)

    def ended(self, finished: Finished, held_s: float) -> None:
        """Record that a job ended `held_s` after its start. Its overhead is learnt if all its
        stages are done.
        """
        self._warm.end(finished.job.id)
        self.ready.reconsider()
        starting = self._starting.pop(finished.job.id, None)
        done = {report.key: report for report in finished.reports if report.error is None}
        if (
            starting is not None
            and self._setup.executor.own_processes
            and done.keys() >= set(finished.job.keys)
        ):
            self._setup.estimates.starts.learn(
                *starting, held_s - sum(report.seconds for report in done.values())
            )

    def _affordable(self, batch: Sequence[Node], gpus: GpuTypes, start_s: float) -> list[str]:
        """The keys of the first stages of a batch, as many as the meter allows."""
        keys: list[str] = []
        seconds = start_s
        for node in batch:
            seconds += self._timing.budgeted_s(node)
            if not self._setup.meter.affords(gpus, seconds):
                break
            keys.append(node.key)
        return keys

    def _check_possible(self, capacity: Capacity, now: float) -> None:
        """Raise StudyError for a stage that no host can run, ClusterLost when its hosts have been
        absent for `hang_after_s`.
        """
        self.hosts |= {host.name: host for host in capacity.hosts}
        ever = Capacity(tuple(self.hosts.values()))
        staying = Capacity(tuple(host for host in capacity.hosts if not host.draining))
        stuck = [stage for stage in self.ready.one_of_each_need() if impossible(stage, staying)]
        if not stuck or self._running:
            self.stuck_since = None
        for stage in stuck:
            reason = impossible(stage, ever)
            if reason and not capacity.grows:
                raise StudyError(f"{self._kind(stage)} {stage.key[:12]}: {reason}")
            if self._running:
                continue
            self.stuck_since = self.stuck_since or now
            if now - self.stuck_since > self._setup.profile.hang_after_s:
                raise ClusterLost(
                    f"no host for {self._kind(stage)} {stage.key[:12]} "
                    f"({stage.gpus} GPUs) appeared within"
                    f" {self._setup.profile.hang_after_s:.0f} s; start one, then run the same "
                    "command to continue"
                )

    def _kind(self, stage: ReadyStage) -> str:
        return self.ready.nodes[stage.key].stage.kind

    def _memory_gb(self, gpus: GpuTypes) -> float | None:
        """The smallest known memory among these GPU types; None if the profile has none."""
        known = [
            self._setup.profile.gpus[name].memory_gb
            for name in gpus
            if name is not None and name in self._setup.profile.gpus
        ]
        return min((memory_gb for memory_gb in known if memory_gb is not None), default=None)

    def _request(
        self, node: Node, attempt: Path, gpus: int, memory_gb: float | None, pack: str, share: float
    ) -> Request:
        contents = contents_of(node.stage, self._artifact)
        if contents is None:
            raise RuntimeError(
                f"{node.stage.kind} {node.key[:12]} started before its inputs were done"
            )
        request = Request(
            key=node.key,
            kind=node.stage.kind,
            spec=node.stage.spec.model_dump(mode="json"),
            inputs={name: self._location(item) for name, item in node.stage.inputs.items()},
            contents=contents,
            out=request_out(self._setup.store, attempt),
            log=self._setup.store.url(attempt / "log"),
            scratch=self._setup.store.url(self._setup.store.scratch(node.key)),
            gpus=gpus,
            device=self._setup.executor.device if gpus else "cpu",
            threads=self._setup.executor.threads,
            cache_gb=self._setup.store.cache_gb,
            memory_gb=memory_gb,
            checkpoint_every_s=self._setup.profile.checkpoint_every_s,
            pack=pack,
            pack_share=share,
            alone=node.key in self.unpacked,
            killed=self._setup.retry_policy.killed(node.key),
            load=load_record(self._setup.estimates.load(node.stage)),
            server=self._setup.profile.server_of(node.stage.spec),
        )
        self._setup.store.note(attempt, "request.json", request.to_json().encode())
        return request

    def _location(self, item: Input) -> str:
        if isinstance(item, Source):
            return location_for_workers(self._setup.store, item)
        stage = stage_of(item)
        artifact = None if stage is None else self._artifact(stage)
        if artifact is None:
            raise RuntimeError("an input is not done")
        return self._setup.store.url(
            artifact.folder, "payload", *([item.path] if isinstance(item, Part) else [])
        )
