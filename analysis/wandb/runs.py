"""A study's results as W&B runs: one for each of the first points and their trainings, and one for
the study (ebbline.analysis.wandb.pages).

Run ids come from the study, its home and the point, so showing something twice changes nothing, and
a restart goes on from what ebbline.analysis.wandb.memory remembers. Offline runs wait in
FOLDER/wandb for `ebbline sync`, or for `wandb sync`.

Invariants: W&B down, slow or absent raises nothing into the caller and holds `update` for a bounded
time. Rates, counts, settings, hashes, reasons and tables of these are shown; prompts, completions,
code, console output, the host's name and its paths never are. A table is a file of its run, no
artifact: what was kept offline is in one folder, and may be pushed from another machine.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebbline.analysis.results.costs import growth
from ebbline.analysis.results.frontier import finished, frontier, frontier_by_model
from ebbline.analysis.results.tables import NO_PRICES, frontier_text, results_frame
from ebbline.analysis.results.wording import metric_label
from ebbline.analysis.wandb.memory import Memory, Mode
from ebbline.analysis.wandb.pages import (
    RunPage,
    Table,
    pages,
    points_table,
    run_id,
    trainings_table,
)
from ebbline.cluster.profile import Profile
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.drive.live import host_names
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.identity import digest

CHARTS_EVERY = (
    1.25  # charts are drawn again once the finished points have grown by a quarter, and at the end
)
_log = logging.getLogger(__name__)


def project() -> str:
    """The W&B project that runs go to."""
    return os.environ.get("WANDB_PROJECT", "ebbline")


def chosen_mode(environ: Mapping[str, str] = os.environ) -> Mode:
    """WANDB_MODE when it is set; otherwise online for a user who is logged in (key, netrc or
    token), else offline.
    """
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


class Mirror:
    """Shows a study's results on W&B. `bound_s` is how long one update may go on opening runs."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        mode: Mode,
        home_id: str,
        profile: Profile = NO_PRICES,
        bound_s: float = 60.0,
        call_s: float = 20.0,
    ) -> None:
        self.study, self.folder, self.mode, self.profile = study, folder, mode, profile
        self.bound_s, self.call_s = bound_s, call_s
        self._home_id, self._id = home_id, run_id(study, home_id)
        self._memory = Memory(folder, mode)
        self._study_run: Any = None
        self._study_stamp = ""
        self._rows = self._memory.rows(self._id)  # of the study's growth, shown so far
        self._step: int | None = (
            # W&B's, of the latest of these in this run; a run that goes on counts by itself until
            # then
            None
        )
        self._charted, self._charted_as = (
            0,
            "",
        )  # how many points its charts have, and the stamp that they were drawn at
        self._results: Sequence[Result] = ()
        self._trainings: Sequence[Artifact] = ()

    def update(self, results: Sequence[Result], trainings: Sequence[Artifact]) -> Mirrored:
        """Show what has not been shown yet. The first failure ends the update; the rest is shown by
        a later one.
        """
        if self.mode == "disabled":
            return Mirrored()
        until, count = time.monotonic() + self.bound_s, 0
        new: list[RunPage] = []
        try:
            every = pages(
                self.study, results, trainings, self.profile, self._home_id, host_names(self.folder)
            )
            new = [page for page in every if not self._memory.knows(page.id, page.stamp)]
            for page in new:
                if time.monotonic() > until:
                    return Mirrored(count, len(new) - count, f"stopped after {self.bound_s:g} s")
                self._show(page)
                count += 1
            self._trainings = trainings
            self._show_study(results)
        # Whatever W&B does wrong is its own affair, not the sweep's
        except Exception as error:  # noqa: BLE001
            return Mirrored(
                count,
                len(new) - count,
                f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}",
            )
        return Mirrored(count)

    def close(self) -> None:
        """Draw the study's charts as they are now and end its run; the others end as they are
        shown. Only what has ended was shown.
        """
        run = self._study_run
        try:
            if run is not None:
                if self._charted_as != self._study_stamp:
                    self._chart()
                run.finish()
                self._memory.remember(self._id, self._study_stamp, self._rows, _folder_of(run))
        except Exception as error:  # noqa: BLE001  # as in update
            _log.warning("the study's run was not closed: %s", error)
        finally:
            self._study_run = None

    def _show(self, page: RunPage) -> None:
        run = self._open(page.id, page.job_type, page.name, page.config)
        for step, values in page.history[self._memory.rows(page.id) :]:
            run.log(dict(values), step=step)
        run.summary.update(dict(page.summary))
        if page.points:
            run.summary.update(
                {"points": _table(run, "points", points_table(page.points, self.profile))}
            )
        run.finish(exit_code=int(page.failed))
        self._memory.remember(page.id, page.stamp, len(page.history), _folder_of(run))

    def _show_study(self, results: Sequence[Result]) -> None:
        """How the hypervolume grew, point by point, and the frontier as it is; charts as they come
        due.
        """
        objectives = self.study.objectives
        chosen = frontier(results, objectives)
        if not chosen:
            return
        landed = len(finished(results))
        stamp = digest(
            [
                landed,
                [
                    [result.point.id, *(m.value for m in result.metrics.values())]
                    for result in chosen
                ],
            ]
        )
        if stamp == self._study_stamp or self._memory.knows(self._id, stamp):
            return
        if self._study_run is None:
            config = {
                "question": self.study.question,
                "objectives": list(objectives),
                "seeds": list(self.study.seeds),
            }
            self._study_run = self._open(self._id, "study", self.study.study, config)
            for name in ("finished", "hours", "gpu_hours", "usd"):
                self._study_run.define_metric(name, hidden=True)
                self._study_run.define_metric(f"hypervolume/over_{name}", step_metric=name)
        grown = list(growth(results, objectives, self.folder))
        for each in grown[self._rows :]:
            usd = each.cost.usd(self.profile)
            over: dict[str, float] = {
                "finished": each.finished,
                "hours": each.hours,
                "gpu_hours": each.cost.gpu_hours,
            }
            if usd is not None:
                over["usd"] = usd
            volumes = {f"hypervolume/over_{name}": each.hypervolume for name in over}
            self._study_run.log(
                {"hypervolume": each.hypervolume, **over, **volumes}, step=each.finished
            )
            self._step = each.finished
        self._study_run.summary.update(
            {"frontier": [result.number for result in chosen], "hypervolume": grown[-1].hypervolume}
        )
        self._study_run.notes = f"```\n{frontier_text(results_frame(results, objectives))}\n```"
        self._study_stamp, self._rows, self._results = stamp, max(self._rows, landed), results
        if landed >= CHARTS_EVERY * self._charted:
            self._chart()

    def _chart(self) -> None:
        """The table of all finished points; over the first two objectives also as a scatter plot,
        and each model's frontier as a line.
        """
        import wandb

        run, objectives = self._study_run, self.study.objectives
        table = points_table(self._results, self.profile, objectives)
        if len(objectives) < 2:
            run.log({"points_table": _table(run, "points_table", table)}, step=self._step)
        else:
            x, y = (metric_label(name) for name in objectives[:2])
            lines = [
                [result.metrics[objectives[0]].value, model, result.metrics[objectives[1]].value]
                for model, found in frontier_by_model(self._results, objectives[:2]).items()
                for result in sorted(found, key=lambda result: result.metrics[objectives[0]].value)
            ]
            fields = {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"}
            said = {"title": f"Frontier of each model: {y} against {x}", "xname": x}
            charts = {
                "points": wandb.plot.scatter(
                    _table(run, "points_table", table), x, y, f"Every point: {y} against {x}"
                ),
                "frontier": wandb.plot_table(
                    "wandb/lineseries/v0",
                    _table(run, "frontier_table", Table(list(fields), lines)),
                    fields,
                    string_fields=said,
                ),
            }
            run.log(charts, step=self._step)
        others = trainings_table(self._results, self._trainings, self.profile)
        if others.rows:
            run.log({"trainings_table": _table(run, "trainings_table", others)}, step=self._step)
        self._charted, self._charted_as = self._rows, self._study_stamp

    def _open(self, id: str, job_type: str, name: str, config: Mapping[str, Any]) -> Any:
        import wandb

        settings = wandb.Settings(
            mode=self.mode,
            root_dir=str(self.folder),
            host="",
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
        # What is pushed without `resume` is written from its first row on, so that a push that was
        # cut off and sent again changes nothing.
        adds = self.mode == "online" or self._memory.begun(id)
        return wandb.init(
            project=project(),
            id=id,
            name=name,
            group=self.study.study,
            job_type=job_type,
            config=dict(config),
            resume="allow" if adds else None,
            reinit="create_new",
            settings=settings,
        )


def _table(run: Any, key: str, table: Table) -> Any:
    """A W&B table that is bound to its run already: W&B then makes no artifact of it, which would
    hold a path of this machine.
    """
    import wandb

    made = wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)
    made.bind_to_run(run, key, "table")
    return made


def _folder_of(run: Any) -> str:
    """The name of the folder that W&B keeps a run in."""
    return Path(run.dir).parent.name
