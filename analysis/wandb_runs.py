"""A study's results as W&B runs: one for each point, one for each training, one for the study. The only file with wandb.

What has been shown is in FOLDER/wandb/mirrored.json, so a restart goes on from there; run ids come from the study and the
point, so showing something twice changes nothing. Offline runs wait in FOLDER/wandb for `wandb sync`.

Invariants: W&B down, slow or absent raises nothing into the caller and holds `update` for a bounded time; rates, counts,
settings, hashes and reasons are shown, while prompts, completions, code, console output, files and artifacts never are
(hence the frontier is text in the study run's notes, and no W&B table, which would be a file).
"""

import csv
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from analysis.files import write_whole
from analysis.frontier import frontier, frontier_hypervolume
from analysis.tables import frontier_text, results_frame
from analysis.wording import NO_RESULT, without_paths
from cluster.store import Artifact
from sweeps.points import Result
from sweeps.study import Study
from tasks.identity import digest

Mode = Literal["online", "offline", "disabled"]
CURVE = "curve.csv"  # as tasks.train writes it; that module imports torch
_log = logging.getLogger(__name__)


def chosen_mode(environ: Mapping[str, str] = os.environ) -> Mode:
    """WANDB_MODE when it is set; otherwise online for a user who is logged in (key, netrc or token), else offline."""
    asked = environ.get("WANDB_MODE", "")
    if asked in ("disabled", "offline", "dryrun"):
        return "disabled" if asked == "disabled" else "offline"
    if asked:
        return "online"
    import wandb

    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.Error as error:
        _log.warning("W&B credentials are there but unusable (%s); runs are kept offline", error)
        return "offline"


@dataclass(frozen=True)
class Mirrored:
    """What one update did: runs shown, runs still to show, and why it stopped early if it did."""

    shown: int = 0
    left: int = 0
    error: str | None = None


@dataclass(frozen=True)
class _Page:
    """One W&B run to show. `stamp` changes when there is something new to show for the same id."""

    id: str
    stamp: str
    job_type: str
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Sequence[tuple[int, Mapping[str, float]]] = ()
    failed: bool = False


class Mirror:
    """Shows a study's results on W&B. `bound_s` is how long one update may go on opening runs."""

    def __init__(self, study: Study, folder: Path, mode: Mode, bound_s: float = 60.0, call_s: float = 20.0) -> None:
        self.study, self.folder, self.mode = study, folder, mode
        self.bound_s, self.call_s = bound_s, call_s
        self._cursor = folder / "wandb" / "mirrored.json"
        self._study_run: Any = None
        self._study_stamp = ""

    def update(self, results: Sequence[Result], trainings: Sequence[Artifact]) -> Mirrored:
        """Show what has not been shown yet. The first failure ends the update; the rest is shown by a later one."""
        if self.mode == "disabled":
            return Mirrored()
        until, count = time.monotonic() + self.bound_s, 0
        new: list[_Page] = []
        try:
            shown = self._shown()
            new = [page for page in self._pages(results, trainings) if shown.get(page.id) != page.stamp]
            for page in new:
                if time.monotonic() > until:
                    return Mirrored(count, len(new) - count, f"stopped after {self.bound_s:g} s")
                self._show(page)
                shown[page.id] = page.stamp
                self._remember(shown)
                count += 1
            self._show_study(results)
        except Exception as error:  # noqa: BLE001  # whatever W&B does wrong is its own affair, not the sweep's
            return Mirrored(count, len(new) - count, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")
        return Mirrored(count)

    def close(self) -> None:
        """End the study's own run; the others end as they are shown. Only what has ended counts as shown."""
        run, self._study_run = self._study_run, None
        try:
            if run is not None:
                run.finish()
                self._remember(self._shown() | {self.study.study: self._study_stamp})
        except Exception as error:  # noqa: BLE001  # as in update
            _log.warning("the study's run was not closed: %s", error)

    def _pages(self, results: Sequence[Result], trainings: Sequence[Artifact]) -> Iterator[_Page]:
        for artifact in trainings:
            history = list(_curve(artifact.file(CURVE)))
            yield _Page(
                id=f"{self.study.study}-{artifact.key[:12]}",
                stamp=artifact.content,
                job_type="training",
                name=f"train {artifact.key[:12]}",
                config={"key": artifact.key, "train": artifact.hashed.get("spec", {})},
                summary={"steps": len(history)},
                history=history,
            )
        for result in results:
            if result.status not in ("running", "out_of_budget"):
                yield self._point_page(result)

    def _point_page(self, result: Result) -> _Page:
        counts = {name: [m.successes, m.n, m.undecided, list(m.seeds)] for name, m in result.metrics.items()}
        config: dict[str, Any] = {"model": result.point.model, "point": result.number, "stages": dict(result.keys)}
        for axis, value in result.point.values:
            part, _, name = axis.partition(".")
            config.setdefault(part, {})[name] = value
        summary: dict[str, Any] = {"status": result.status, "reason": without_paths(result.reason)[:300], "seconds": result.seconds}
        for name, metric in result.metrics.items():
            shown = name.replace(".", "/")  # W&B reads a dot as nesting, and a slash as a section
            summary |= {shown: metric.value, f"{shown}_n": metric.n, f"{shown}_undecided": metric.undecided}
            summary[f"{shown}_low"], summary[f"{shown}_high"] = metric.interval
        return _Page(
            id=f"{self.study.study}-{result.point.id}",
            stamp=digest([result.status, result.reason, counts, dict(result.keys)]),
            job_type="point",
            name=f"{result.number} {result.point}",
            config=config,
            summary=summary | {"projected_share": result.projected_share},
            failed=result.status in NO_RESULT,
        )

    def _show(self, page: _Page) -> None:
        run = self._open(page.id, page.job_type, page.name, page.config)
        for step, values in page.history:
            run.log(dict(values), step=step)
        run.summary.update(dict(page.summary))
        run.finish(exit_code=int(page.failed))

    def _show_study(self, results: Sequence[Result]) -> None:
        """The frontier and its hypervolume, at the step that is the number of finished points."""
        objectives = self.study.objectives
        chosen = frontier(results, objectives)
        if not chosen:
            return
        finished = sum(result.status == "done" for result in results)
        stamp = digest([finished, [result.point.id for result in chosen]])
        if stamp in (self._study_stamp, self._shown().get(self.study.study)):
            return
        if self._study_run is None:
            config = {"question": self.study.question, "objectives": list(objectives), "seeds": list(self.study.seeds)}
            self._study_run = self._open(self.study.study, "study", self.study.study, config)
        hypervolume = frontier_hypervolume(results, objectives)
        self._study_run.log({"hypervolume": hypervolume, "finished": finished}, step=finished)
        self._study_run.summary.update({"frontier": [result.number for result in chosen]})
        self._study_run.notes = f"```\n{frontier_text(results_frame(results, objectives))}\n```"
        self._study_stamp = stamp

    def _open(self, id: str, job_type: str, name: str, config: Mapping[str, Any]) -> Any:
        import wandb

        settings = wandb.Settings(
            mode=self.mode,
            root_dir=str(self.folder),
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            allow_val_change=True,
            init_timeout=self.call_s,
            finish_timeout=self.call_s,
            finish_timeout_raises=True,
            x_service_wait=self.call_s,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ebbline"),
            id=id,
            name=name,
            group=self.study.study,
            job_type=job_type,
            config=dict(config),
            resume="allow",
            reinit="create_new",
            settings=settings,
        )

    def _shown(self) -> dict[str, str]:
        """Run id -> stamp. By mode: what was shown offline is new to a server that is reached later."""
        shown: dict[str, str] = self._all_shown().get(self.mode, {})
        return shown

    def _all_shown(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._cursor.read_text()) if self._cursor.exists() else {}
        return found

    def _remember(self, shown: Mapping[str, str]) -> None:
        text = json.dumps(self._all_shown() | {self.mode: dict(shown)}, indent=1, sort_keys=True)
        write_whole(self._cursor, lambda path: path.write_text(text))


def _curve(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, values) of a training; none when retention has dropped the file."""
    if path.exists():
        with path.open(newline="") as handle:
            for row in csv.DictReader(handle):
                step = int(row.pop("step"))
                yield step, {name: float(value) for name, value in row.items()}
