"""A driver for tests that kill it. On the Ray cluster at an address it trains one adapter on a gang
and two on one GPU each.

`python -m tests.cluster.driver ADDRESS STORE MODEL ROWS` exits with 0 when all trainings are done,
1 when one failed, and 2 with a message on an EbblineError.
"""

import sys
from pathlib import Path

from ebbline.cluster.executors.executor import Needs
from ebbline.cluster.executors.ray_executor import RayExecutor
from ebbline.cluster.profile import Profile
from ebbline.cluster.running.runner import Runner
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.errors import EbblineError
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Stage
from tests.cluster.made import source

GANG_RANK = 4
STEPS = 30
PROFILE = Profile(backoff_s=0.1, checkpoint_every_s=0.1, hang_after_s=200.0)


def training(rank: int, model: Path, rows: Path, steps: int = STEPS) -> Stage:
    spec = TrainSpec(
        rank=rank, dtype="float32", learning_rate=2e-2, global_batch=8, steps=steps, max_tokens=32
    )
    return Stage(spec, {"model": source(model), "data": source(rows)})


def gang_of(size: int, stage: Stage) -> Needs:
    """The needs of a stage: `size` GPUs for the training of GANG_RANK, else one."""
    return Needs(size if isinstance(stage.spec, TrainSpec) and stage.spec.rank == GANG_RANK else 1)


def main(address: str, store: Path, model: Path, rows: Path) -> int:
    try:
        executor = RayExecutor(address)
        try:
            runner = Runner(Store(store), executor, lambda stage: gang_of(2, stage), PROFILE)
            runner.add(training(rank, model, rows) for rank in (GANG_RANK, 1, 2))
            while any(node.state not in ("done", "failed") for node in runner.nodes.values()):
                runner.step()
        finally:
            executor.close()
    except EbblineError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 2
    failures = [node.failure for node in runner.nodes.values() if node.failure]
    print(failures or "done", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:])))
