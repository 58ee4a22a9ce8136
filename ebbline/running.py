"""`ebbline run`: drive a study under a screen, with the W&B mirror beside it."""

import signal
import subprocess
import time
from collections import Counter

from analysis import mirror
from analysis.costs import compared, told
from analysis.results import collect
from analysis.tables import frontier_text, results_frame
from analysis.wording import NO_RESULT, status_label
from cluster.executor import Executor, OnDemand
from ebbline.outputs import write_outputs
from ebbline.planning import draw, local_capacity, logical_gpus
from ebbline.show import Screen
from sweeps.drive import Progress, drive
from sweeps.forecast import forecast
from sweeps.home import Home
from sweeps.prediction import Prediction, keep, keep_end, predict
from sweeps.spending import read_spent
from sweeps.study import Study

MIRROR_WAIT_S = 20.0


class Interrupts:
    """Ctrl-C once drains: what runs is finished, nothing new starts. Twice stops now. Both can be continued."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Interrupts":
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: object) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        print("\nfinishing what runs; Ctrl-C again stops now. The same command continues later.")

    def stopping(self) -> bool:
        return self.count > 0


def run_study(study: Study, name: str, home: Home, executor: str, address: str, gpus: int | None, wandb: bool, extend: bool = False) -> int:
    """Drive a study to its end and print where its outputs are; returns the exit code (see ebbline.cli)."""
    folder = home.folder(study.study)
    mirrored: list[subprocess.Popen[bytes]] = []

    screen = Screen()

    def make_executor() -> Executor:
        # Called once this driver holds the study: one that is turned away starts no second mirror, and predicts nothing.
        if wandb:
            mirrored.append(mirror.start(name, home.root, folder / "log" / "mirror.log"))
        made = OnDemand(lambda: _executor(study, executor, address, gpus))
        screen.prediction = _predicted(study, home, made, executor, address, gpus)
        return made

    started = time.monotonic()
    print(f"{study.study}: {study.question}\n")
    try:
        with Interrupts() as interrupts, screen:
            progress = drive(study, home, make_executor, screen, interrupts.stopping, extend)
    except KeyboardInterrupt:
        print("stopped; the same command continues from what is in the store")
        _end(mirrored)
        return 130
    except BaseException:
        _end(mirrored)
        raise
    print(_told(progress, time.monotonic() - started))
    if screen.prediction is not None and not progress.stopped and any(counts["done"] for counts in progress.runner.counts.values()):
        spent = progress.spending.spent()
        keep_end(screen.prediction, spent, folder)
        print(compared(screen.prediction, spent, home.profile))
    outputs = write_outputs(study, home)
    results = collect(study, home)
    print()
    print(frontier_text(results_frame(results, study.objectives)))
    print()
    if not all(mirror.stop(process, MIRROR_WAIT_S) for process in mirrored):
        print(f"W&B has not taken everything yet; `ebbline sync {name}` continues (see {folder / 'log' / 'mirror.log'})")
    for what, path in outputs.items():
        print(f"{what:10} {path}")
    if progress.by in ("request", "budget"):
        return 130 if progress.by == "request" else 5
    return 3 if any(result.status in NO_RESULT for result in results) else 0


def _end(mirrored: "list[subprocess.Popen[bytes]]") -> None:
    for process in mirrored:
        mirror.stop(process, wait_s=0)


def _predicted(study: Study, home: Home, made: Executor, kind: str, address: str, gpus: int | None) -> Prediction | None:
    """What this run will take, kept and drawn beside the study's results; None when it has nothing to do."""
    folder = home.folder(study.study)
    alone = kind == "inline" or address == "local"  # a cluster of its own is not started to plan for it
    found = forecast(study, home, local_capacity(study, gpus) if alone else made.capacity(), serial=kind == "inline")
    prediction = predict(found, read_spent(folder))
    if prediction is not None:
        keep(prediction, folder)
        draw(study, found, home)
    return prediction


def _executor(study: Study, kind: str, address: str, gpus: int | None) -> Executor:
    gang, logical = max(model.gpus for model in study.models.values()), logical_gpus(study, gpus)
    if kind == "inline":
        from cluster.inline import InlineExecutor  # imported here, as only one of the two is needed

        return InlineExecutor(gpus=max(gang, logical))
    from cluster.ray_executor import RayExecutor

    return RayExecutor(address, logical)


def _told(progress: Progress, seconds: float) -> str:
    nodes = {node.key: node for node in progress.runner.nodes.values() if node.state == "done"}.values()
    ran = sum(not node.reused for node in nodes)
    counts = Counter(result.status for result in progress.results)
    line = f"{len(progress.results)} points this time, {ran} stages run and {len(nodes) - ran} found in the store, {seconds:.0f} s"
    line += f", {told(progress.spending.spent().cost, progress.spending.profile)} spent by all runs"
    without = "".join(f", {counts[status]} points {status_label(status)}" for status in NO_RESULT if counts[status])
    return line + without + (f"; {progress.stopped}" if progress.stopped else "")
