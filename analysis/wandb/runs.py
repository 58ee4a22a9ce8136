"""Writes a study's results as W&B runs: the first points, their trainings, and the study itself.

Run ids come from the study, its home and the point, so showing a run twice changes nothing. A
restart continues from ebbline.analysis.wandb.memory. Offline runs wait in FOLDER/wandb for
`ebbline sync` or `wandb sync`. ebbline.analysis.wandb.pages makes the content.

Invariants: if W&B is down, slow or absent, nothing is raised and `update` takes a bounded time.
Only rates, counts, settings, hashes, reasons and tables of these are shown, never prompts,
completions, code, console output, the host's name or its paths. A table is a file of its run, not
an artifact, so offline runs are in one folder and can be pushed from another machine.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ebbline.analysis.results.costs import growth
from ebbline.analysis.results.frontier import finished, frontier
from ebbline.analysis.results.tables import NO_PRICES, frontier_text, results_frame
from ebbline.analysis.results.wording import without_paths
from ebbline.analysis.wandb.alerts import alerts_due
from ebbline.analysis.wandb.charts import bound, folder_of, study_charts
from ebbline.analysis.wandb.live import STEADY, LiveRun, LiveTraining, step_values
from ebbline.analysis.wandb.memory import LOST, Memory, Mode
from ebbline.analysis.wandb.pages import (
    RunPage,
    live_page,
    pages,
    points_table,
    run_id,
    trainings_without_run,
    uses,
)
from ebbline.analysis.wandb.service import stop_service
from ebbline.cluster.profile import Profile
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.drive.live import host_names, read_live
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.identity import digest

LIVE_RUNS = 32  # the most trainings at work whose steps are shown as they come
LOST_AFTER = 3  # updates without a training that has not ended until it counts as lost
FLUSH_S = 2.0  # how long W&B's client keeps a row before it writes or sends it
TAG_CHARACTERS = 64  # W&B takes no longer tag
CHARTS_EVERY = 1.25  # the growth of finished points that redraws the charts, besides the end
# W&B drops an alert of the same title that comes sooner; it reads 0 as its default of a minute
ALERTS_APART = timedelta(milliseconds=1)
STEPS_A_POINT, STEP_S = 1_000_000, 5.0  # 57 days between two points
STATUS_S = 60.0  # the most between two rows of the status; at once where a count changes
_log = logging.getLogger(__name__)


def project() -> str:
    """The W&B project of the runs."""
    return os.environ.get("WANDB_PROJECT", "ebbline")


def chosen_mode(environ: Mapping[str, str] = os.environ) -> Mode:
    """WANDB_MODE if set; else online for a logged-in user (key, netrc or token), or offline."""
    mode = environ.get("WANDB_MODE", "")
    if mode in ("disabled", "offline", "dryrun"):
        return "disabled" if mode == "disabled" else "offline"
    if mode:
        return "online"
    import wandb

    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.Error as error:
        _log.warning("the W&B credentials are invalid (%s); runs are kept offline", error)
        return "offline"


@dataclass(frozen=True)
class Mirrored:
    """The outcome of one update: runs shown, runs left, and the error if it stopped early."""

    shown: int = 0
    left: int = 0
    error: str | None = None


class Mirror:
    """Shows a study's results on W&B.

    An update opens no run after `bound_s` seconds. `call_s` is the timeout of one call of W&B.
    """

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
        self._status: Mapping[str, float] = {}
        self._study_stamp = ""
        self._rows = self._memory.rows(self._id)  # rows of the study's growth shown so far
        self._step = 0  # W&B's step of the latest row of the study's run
        self._grown_hours = 0.0  # when the latest point finished, in hours of driving
        self._counted: tuple[Mapping[str, float], float] = {}, float("-inf")  # latest status row
        self._controls: Callable[[], Sequence[ControlResult]] = tuple
        # The number of points in the charts, and the stamp of their content.
        self._charted, self._charted_as = 0, ""
        self._live: dict[str, LiveRun] = {}  # id -> the run of a training at work
        self._results: Sequence[Result] = ()
        self._trainings: Sequence[Artifact] = ()

    def update(
        self,
        results: Sequence[Result],
        trainings: Sequence[Artifact],
        live: Sequence[LiveTraining] = (),
        status: Mapping[str, float] = MappingProxyType({}),
        controls: Callable[[], Sequence[ControlResult]] = tuple,
    ) -> Mirrored:
        """Shows new results, the new steps of trainings at work, and the `status` of the drive. The
        first failure ends the update; later updates show the rest. `controls` reads the controls'
        results, for charts that are due.
        """
        if self.mode == "disabled":
            return Mirrored()
        until, count = time.monotonic() + self.bound_s, 0
        new: list[RunPage] = []
        try:
            every = pages(
                self.study, results, trainings, self.profile, self._home_id, host_names(self.folder)
            )
            new = [page for page in every if not self._memory.was_shown(page.id, page.stamp)]
            self._follow(live, results, trainings)
            for page in new:
                if time.monotonic() > until:
                    return Mirrored(count, len(new) - count, f"stopped after {self.bound_s:g} s")
                self._show(page)
                count += 1
            self._trainings, self._controls = trainings, controls
            self._show_study(results, status)
            self._send_alerts(results)
        # A failure of W&B must not stop the sweep
        except Exception as error:  # noqa: BLE001
            return Mirrored(
                count,
                len(new) - count,
                f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}",
            )
        return Mirrored(count)

    def close(self) -> None:
        """Draws the study's final charts and ends its run; the other runs have ended already."""
        run = self._study_run
        try:
            for id in list(self._live):
                self._end_lost(id, self._results)
            if run is not None:
                if self._charted_as != self._study_stamp:
                    self._chart()
                run.finish()
                self._memory.remember(self._id, self._study_stamp, self._rows, folder_of(run))
        except Exception as error:  # noqa: BLE001  # as in update
            _log.warning("the study's run was not closed: %s", error)
        finally:
            self._study_run = None

    def _forget(self) -> None:
        """Forgets the open runs, whose service was stopped: they are opened again, and continue
        after the last row that was shown.
        """
        self._memory = Memory(self.folder, self.mode)
        self._live, self._study_run, self._study_stamp = {}, None, ""
        self._rows, self._step, self._grown_hours = self._memory.rows(self._id), 0, 0.0
        self._charted, self._charted_as, self._counted = 0, "", ({}, float("-inf"))

    def _follow(
        self,
        live: Sequence[LiveTraining],
        results: Sequence[Result],
        trainings: Sequence[Artifact],
    ) -> None:
        """Shows the new steps of the trainings at work, and ends the runs of those that were lost.

        A training that ended well stays open for `_show`. At most LIVE_RUNS are open at once; the
        others are shown when they end.
        """
        hidden = trainings_without_run(results, self.profile)
        for training in live:
            id = run_id(self.study, self._home_id, training.key[:12])
            if training.key in hidden or self._memory.has_ended(id):
                continue
            if id not in self._live:
                if len(self._live) >= LIVE_RUNS:
                    continue
                run = self._open(live_page(training, id))
                self._live[id] = LiveRun(run, training.key, self._memory.rows(id))
                self._memory.opened(folder_of(run))
            self._live[id].show([(step.step, step_values(step)) for step in training.steps])
        ended = {artifact.key for artifact in trainings}
        at_work = {training.key for training in live} | ended
        for id, shown in list(self._live.items()):
            if shown.key in at_work:
                continue
            shown.absent += 1
            if shown.absent >= LOST_AFTER:  # an ended training is in `trainings` by then
                self._end_lost(id, results)

    def _end_lost(self, id: str, results: Sequence[Result]) -> None:
        """Ends the run of a training that was lost or has failed. A retry continues the run."""
        lost = self._live.pop(id)
        reason = next(
            (result.reason for result in results if result.reason and uses(result, lost.key)), ""
        )
        status = "failed" if reason else "crashed"
        why = without_paths(reason, host_names(self.folder)) or "lost; the next attempt continues"
        lost.run.summary.update({"status": status, "reason": why[:300]})
        lost.run.finish(exit_code=1)
        self._memory.remember(id, LOST, lost.rows, folder_of(lost.run))

    def _show(self, page: RunPage) -> None:
        shown = self._live.pop(page.id, None)
        if shown is None:
            shown = LiveRun(self._open(page), page.id, self._memory.rows(page.id))
        run = shown.run
        shown.show(page.history)
        run.summary.update(dict(page.summary))
        if page.points:
            run.summary.update(
                {"points": bound(run, "points", points_table(page.points, self.profile))}
            )
        run.finish(exit_code=int(page.failed))
        self._memory.remember(page.id, page.stamp, len(page.history), folder_of(run))

    def _show_study(self, results: Sequence[Result], status: Mapping[str, float]) -> None:
        """Shows the drive's status, the growth of the hypervolume and the frontier; redraws the
        charts if due.
        """
        self._status = status
        self._show_growth(results)
        counts = {
            name: value
            for name, value in status.items()
            if name not in STEADY and name.startswith("status/")
        }
        before, at = self._counted
        now = time.monotonic()
        if counts == before and (now - at < STATUS_S or not status.get("status/at_work")):
            return
        if status.get("status/at_work") or self._study_run is not None:
            self._open_study()
            self._log(status)
            self._study_run.summary.update(dict(status))
            self._counted = counts, now

    def _show_growth(self, results: Sequence[Result]) -> None:
        """Shows the hypervolume after each new point, and the frontier."""
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
        if stamp == self._study_stamp or self._memory.was_shown(self._id, stamp):
            return
        self._open_study()
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
            volumes = {f"hypervolume/over_{name}": each.corrected for name in over}
            row = {"hypervolume": each.hypervolume, **over, **volumes}
            at = each.finished * STEPS_A_POINT
            if at > self._step:  # otherwise the server has it, from a mirror that was killed
                self._study_run.log(row, step=at, commit=True)
                self._step = at
            self._grown_hours = each.hours
        shown = {"frontier": [result.number for result in chosen], **self._status}
        self._study_run.summary.update(shown | {"hypervolume": grown[-1].hypervolume})
        self._study_run.notes = f"```\n{frontier_text(results_frame(results, objectives))}\n```"
        self._study_stamp, self._rows, self._results = stamp, max(self._rows, landed), results
        if landed >= CHARTS_EVERY * self._charted:
            self._chart()

    def _send_alerts(self, results: Sequence[Result]) -> None:
        """Sends what the profile asks for, each event once: it is recorded first."""
        if self.mode != "online" or not self.profile.wandb_alerts:
            return
        due = alerts_due(
            self.study,
            results,
            read_live(self.folder),
            self.profile.wandb_alerts,
            self._memory.alerts,
            host_names(self.folder),
        )
        for alert in due:
            self._open_study()
            self._memory.alert(alert.events)
            self._study_run.alert(alert.title, alert.text, alert.level, ALERTS_APART)

    def _open_study(self) -> None:
        if self._study_run is not None:
            return
        config = {
            "question": self.study.question,
            "objectives": list(self.study.objectives),
            "seeds": list(self.study.seeds),
        }
        self._study_run = self._open(RunPage(self._id, "", "study", self.study.study, config, {}))
        self._study_run.define_metric("status/*", step_metric="hours")
        # Of a run that continues: W&B's step after its last row
        self._step = max(self._step, int(self._study_run.step) - 1)
        for name in ("finished", "hours", "gpu_hours", "usd"):
            self._study_run.define_metric(name, hidden=True)
            self._study_run.define_metric(f"hypervolume/over_{name}", step_metric=name)

    def _chart(self) -> None:
        """Shows the charts and tables of all finished points."""
        charts = study_charts(
            self._study_run,
            self.study,
            self._results,
            self._trainings,
            self._controls(),
            self.profile,
        )
        self._log(charts)
        self._charted, self._charted_as = self._rows, self._study_stamp

    def _log(self, values: Mapping[str, Any]) -> None:
        """A row of the study's history after all others.

        W&B's step is STEPS_A_POINT for each finished point, and within it the driving time. So it
        grows over restarts and over offline runs of one study that are pushed later.
        """
        within = int(max(0.0, self._status.get("hours", 0.0) - self._grown_hours) * 3600 / STEP_S)
        at = self._rows * STEPS_A_POINT + min(STEPS_A_POINT - 1, within)
        self._step = max(self._step + 1, at)
        self._study_run.log(dict(values), step=self._step, commit=True)

    def _open(self, page: RunPage) -> Any:
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
            # so that another process sees a step within seconds
            x_transaction_log_flush_interval=FLUSH_S,
            x_file_stream_transmit_interval=FLUSH_S,
        )
        # Without `resume` a push writes from the first row, so a repeated push changes nothing.
        resumes = self.mode == "online" or self._memory.begun(page.id)
        try:
            return wandb.init(
                project=project(),
                id=page.id,
                name=page.name,
                group=self.study.study,
                job_type=page.job_type,
                tags=[tag[:TAG_CHARACTERS] for tag in page.tags if tag],
                notes=page.notes or None,
                config=dict(page.config),
                resume="allow" if resumes else None,
                reinit="create_new",
                settings=settings,
            )
        except Exception:
            # W&B's service keeps the id of a run that it could not begin, and always refuses it
            stop_service()
            self._forget()
            raise
