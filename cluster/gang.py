"""A gang: one batch on several processes at once, through Ray Train, with torch.distributed and DeepSpeed inside.

Ray Train reserves the gang's GPUs in one placement group (all or nothing), starts the processes and joins them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.executor import MemberFailed, run_batch
from tasks.stage import Report, Request


def run_gang(requests: Sequence[Request], gpus: int, scratch: str) -> tuple[Report, ...]:
    """Run a batch on `gpus` processes, one GPU each; rank 0 commits. Returns rank 0's reports.

    A gang that runs out of memory is started again with half the micro-batch, for the stage it was at and those behind it; it goes
    on from its checkpoint.
    """
    while True:
        reports = _run_once(requests, gpus, scratch)
        short = next((report for report in reports if report.smaller is not None), None)
        if short is None:
            return reports
        keys = [request.key for request in requests]
        requests = [replace(request, micro_batch=short.smaller) for request in requests[keys.index(short.key) :]]


def _run_once(requests: Sequence[Request], gpus: int, scratch: str) -> tuple[Report, ...]:
    cuda = requests[0].device != "cpu"
    outcome = _Outcome.remote()  # type: ignore[attr-defined]  # ray.remote hides the class
    trainer = TorchTrainer(
        _member,
        train_loop_config={"requests": [request.to_json() for request in requests], "outcome": outcome},
        scaling_config=ScalingConfig(num_workers=gpus, use_gpu=True, resources_per_worker={"GPU": 1, "CPU": 1}),
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        run_config=RunConfig(
            name=f"gang-{requests[0].key[:12]}-{requests[0].micro_batch or 0}",
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        # The members' own reports say more; without any, the gang was lost and Ray's error is what there is.
        if not ray.get(outcome.get.remote()):
            raise
    reports: tuple[Report, ...] = ray.get(outcome.get.remote())
    return reports


@ray.remote(num_cpus=0)
class _Outcome:
    """Carries rank 0's reports, or the first failed member's, out of the gang: Ray Train's own results hold metrics only."""

    def __init__(self) -> None:
        self.reports: tuple[Report, ...] = ()

    def put(self, reports: tuple[Report, ...]) -> None:
        self.reports = self.reports or reports

    def get(self) -> tuple[Report, ...]:
        return self.reports


def _member(config: dict[str, Any]) -> None:
    context = get_context()
    requests = [Request.from_json(text) for text in config["requests"]]
    try:
        reports = run_batch(requests, context.get_world_rank(), context.get_world_size())
    except MemberFailed as failure:
        ray.get(config["outcome"].put.remote((failure.report,)))
        raise
    if context.get_world_rank() == 0:
        ray.get(config["outcome"].put.remote(reports))
