"""`ebbline sync` and `ebbline wandb-workspace`: a study on W&B.

`sync` updates the mirror and pushes the offline runs to the user's W&B server. `wandb-workspace`
creates the workspace and the report once, and stores their addresses.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ebbline.analysis.results.collect import collect
from ebbline.analysis.wandb import mirror
from ebbline.analysis.wandb.alerts import NEED_ONLINE
from ebbline.analysis.wandb.folder import write_pages
from ebbline.analysis.wandb.memory import Memory
from ebbline.analysis.wandb.push import Pushed, push
from ebbline.analysis.wandb.runs import chosen_mode
from ebbline.analysis.wandb.workspace import WorkspaceUrls, save_workspace
from ebbline.sweeps.drive.live import host_names, read_live
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.files import write_whole

MIRROR_WAIT_S = 3600.0


def sync_study(view: StudyView, at_once: int, as_json: bool) -> int:
    """Update the mirror, push the waiting runs and print the outcome. The exit code is 0 when no
    run is left that could be pushed.
    """
    view.home.require(view.study.study)
    folder = view.folder
    log = folder / "log" / "mirror.log"
    if chosen_mode() == "disabled":
        return _print_outcome(
            {"mode": "disabled"},
            as_json,
            "WANDB_MODE=disabled, so nothing is mirrored; unset it and run the same command",
            1,
        )
    live = read_live(folder)
    driven = live is not None and live.ended is None
    # The mirror of the last run may still show its rest
    with mirror.alone(folder, 0.0 if driven else MIRROR_WAIT_S) as free:
        pass
    shown = (
        mirror.stop(
            mirror.start(view.argument, view.home.root, log, "--offline"), wait_s=MIRROR_WAIT_S
        )
        if free
        else True
    )
    everything = (
        "W&B has everything"
        if free
        else "W&B has all finished points; the driver of this study mirrors the rest"
    )
    runs = list(Memory(folder, "offline").waiting())
    record: dict[str, object] = {
        "mirrored": shown,
        "waiting": len(runs),
        "pushed": 0,
        "left": len(runs),
    }
    if not shown:
        return _print_outcome(
            record,
            as_json,
            f"the mirror did not finish; see {log}, then run the same command",
            1,
        )
    if not runs:
        return _print_outcome(record, as_json, everything, 0)
    if chosen_mode() == "offline":
        alerts = f". {NEED_ONLINE}" if view.home.profile.wandb_alerts else ""
        reason = (
            "WANDB_MODE is offline" if os.environ.get("WANDB_MODE") else "you are not logged in"
        )
        remedy = (
            "`WANDB_MODE=online ebbline sync ...`"
            if os.environ.get("WANDB_MODE")
            else "`wandb login`, then the same command,"
        )
        return _print_outcome(
            record,
            as_json,
            f"{len(runs)} runs wait in {folder / 'wandb'}, as {reason}; {remedy} pushes them"
            f"{alerts}",
            0,
        )
    try:
        pushed = _push(folder, runs, at_once)
    except KeyboardInterrupt:
        return _print_outcome(
            record, as_json, "stopped; the same command pushes the remaining runs", 130
        )
    record |= {"pushed": pushed.pushed, "left": pushed.left}
    if pushed.left:
        where = folder / "log" / "sync.log"
        text = (
            f"{pushed.pushed} runs pushed, {pushed.left} left: {pushed.why} (see {where}). The "
            "same command pushes them"
        )
        return _print_outcome(record, as_json, text, 1)
    return _print_outcome(record, as_json, f"{everything}: {pushed.pushed} runs pushed", 0)


def sync_folder(view: StudyView, folder: Path, as_json: bool) -> None:
    """Write the study's pages as plain files, and print how many runs were new or had changed."""
    view.home.require(view.study.study)
    results = collect(view)
    trainings = mirror.trainings_of(results, view.home.store)
    home = view.home
    hosts = host_names(view.folder)
    written = write_pages(folder, view.study, results, trainings, home.profile, home.id, hosts)
    _print_outcome(
        {"folder": str(folder), "written": written},
        as_json,
        f"{written} runs were new or had changed; all are in {folder}",
        0,
    )


def make_workspace(view: StudyView, entity: str | None, as_json: bool) -> None:
    """Create or update the study's W&B workspace and report, and print their addresses.

    Raises StudyError without a W&B login, and when W&B rejects the request.
    """
    study, home = view.study, view.home
    if chosen_mode() != "online":
        raise StudyError(
            f"a workspace of {study.study!r} needs W&B's server, but WANDB_MODE is not online or "
            "you are not logged in;"
            f" `wandb login` (or WANDB_API_KEY), then `ebbline sync {study.study}` and this command"
        )
    path = view.folder / "wandb" / "workspace.json"
    before = WorkspaceUrls(**json.loads(path.read_text())) if path.exists() else None
    try:
        made = save_workspace(study, home.profile, entity, before)
    except StudyError as error:
        raise StudyError(
            f"{error}. If the earlier workspace or report was deleted on W&B, delete {path}"
            if before
            else str(error)
        ) from error
    write_whole(path, lambda fresh: fresh.write_text(json.dumps(asdict(made), indent=1)))
    if as_json:
        print(json.dumps(asdict(made), indent=1))
        return
    print(f"workspace  {made.workspace}\nreport     {made.report}")


def _push(folder: Path, runs: Sequence[Path], at_once: int) -> Pushed:
    """Push under a progress bar on standard error; scripts read standard output."""
    columns = (
        TextColumn("pushing to W&B"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("runs", total=len(runs))
        return push(
            folder,
            runs,
            at_once,
            lambda done: progress.update(task, completed=done),
            folder / "log" / "sync.log",
        )


def _print_outcome(record: Mapping[str, object], as_json: bool, text: str, code: int) -> int:
    # Scripts read the key `said`
    print(json.dumps({**record, "said": text}, indent=1) if as_json else text)
    return code
