"""Cheap stages over small files, and helpers that run them."""

import time
from collections.abc import Sequence
from pathlib import Path

from ebbline.cluster.executors.executor import Executor, Finished, Job, Needs
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.identity import content_digest, digest
from ebbline.tasks.specs import DataSpec, Spec
from ebbline.tasks.stage import Part, Request, Source, Stage, key_payload


def source(path: Path) -> Source:
    return Source(content_digest(path), str(path))


def rows(size: int, pool: Source | Stage, seed: int = 0) -> Stage:
    """A stage that reads the first `size` rows of a file, or of another such stage's rows."""
    return Stage(
        DataSpec(size=size, seed=seed),
        {"pool": Part(pool, DataSpec.ROWS) if isinstance(pool, Stage) else pool},
    )


def submit(executor: Executor, batch: Sequence[Request], gpus: int) -> Job:
    """Start a batch on the first host with enough GPUs."""
    host = next(host.name for host in executor.capacity().hosts if host.gpus >= gpus)
    return executor.submit(batch, Needs(gpus), {host: gpus})


def settle(runner: Runner, turns: int = 200) -> None:
    """Step until all stages are settled; fails after `turns` steps."""
    for _ in range(turns):
        if all(node.state in ("done", "failed") for node in runner.nodes.values()):
            return
        runner.step(timeout_s=1.0)
    raise AssertionError({node.stage.kind: node.state for node in runner.nodes.values()})


def wait_for(executor: Executor, *jobs: Job, timeout_s: float = 120.0) -> list[Finished]:
    """The results of `jobs`, in their order. Jobs of earlier tests are ignored."""
    finished: dict[str, Finished] = {}
    deadline = time.monotonic() + timeout_s
    while not {job.id for job in jobs} <= finished.keys() and time.monotonic() < deadline:
        finished |= {done.job.id: done for done in executor.finished(1.0)}
    return [finished[job.id] for job in jobs]


def stored_request(store: Store, spec: Spec, inputs: dict[str, Path], **changes: object) -> Request:
    """A Request as the runner writes it; its attempt has begun in the store."""
    contents = {name: content_digest(path) for name, path in inputs.items()}
    key = digest(key_payload(spec, contents))
    attempt = store.begin(spec.KIND, key)
    return Request(
        key=key,
        kind=spec.KIND,
        spec=spec.model_dump(mode="json"),
        inputs={name: str(path) for name, path in inputs.items()},
        contents=contents,
        out=store.url(attempt / "payload"),
        log=store.url(attempt / "log"),
        scratch=store.url(store.scratch(key)),
        **changes,  # type: ignore[arg-type]
    )
