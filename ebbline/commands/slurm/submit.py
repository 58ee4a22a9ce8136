"""Write the Slurm script of a study, and submit it."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebbline.analysis.results.collect import collect
from ebbline.checks.study_checks import progress as checking
from ebbline.checks.study_checks import require_checked
from ebbline.cluster.profile import SlurmSettings
from ebbline.commands.slurm.queue import JOB, queued_job
from ebbline.commands.slurm.script import for_study, script
from ebbline.commands.status import ended_because
from ebbline.sweeps.search.searcher import check_written_points
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.study.pins import require_pins
from ebbline.sweeps.study.study_file import checked
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.files import write_whole

SCRIPT = "slurm.sbatch"


def with_flags(settings: SlurmSettings, flags: Mapping[str, Any]) -> SlurmSettings:
    """The profile's settings with the options of the command line, where they are given."""
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    kept = settings.model_dump(exclude_unset=True)
    for name, other in (("gpus_per_node", "logical_gpus"), ("logical_gpus", "gpus_per_node")):
        if name in given and other not in given:
            kept.pop(other, None)
    given["sbatch"] = (*settings.sbatch, *given.get("sbatch", ()))
    return checked(SlurmSettings, {**kept, **given}, "invalid settings for Slurm")


def submit_study(
    view: StudyView,
    flags: Mapping[str, Any],
    run_options: Sequence[str],
    *,
    submit: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the script that runs a study, or only print it; submit it if asked.

    A study that has ended gets a message instead. Raises StudyError when the study cannot run as it
    is, or when Slurm already has a job of it.
    """
    settings = for_study(with_flags(view.home.profile.slurm, flags), view.study)
    _require_ready(view, quiet=as_json)
    if (ended := _ended(view)) and not run_options:
        _print(as_json, {"ended": ended}, f"{view.study.study}: {ended}; there is nothing to run")
        return
    path = view.folder / SCRIPT
    text = script(view, settings, path, run_options)
    if dry_run:
        _print(as_json, {"script": text}, text.rstrip("\n"))
        return
    _require_no_job(view)
    (view.home.folder(view.study.study) / "log").mkdir(exist_ok=True)
    write_whole(path, lambda fresh: fresh.write_text(text))
    number = _sbatch(path) if submit else None
    if number is not None:
        (view.folder / JOB).write_text(f"{number}\n")
    log = view.folder / "log" / f"slurm-{number or 'JOB'}.log"
    lines = [f"wrote {path}", f"its nodes must all see {view.home.root}, on a shared file system"]
    if number is None:
        lines.append(f"submit it: {shlex.join(['sbatch', str(path)])}")
    else:
        follow = ["ebbline", "status", view.name, "--home", str(view.home.root), "--watch"]
        lines += [f"submitted as job {number}; its log: {log}", f"follow it: {shlex.join(follow)}"]
    _print(as_json, {"wrote": str(path), "job": number, "log": str(log)}, "\n".join(lines))


def _require_ready(view: StudyView, quiet: bool) -> None:
    """Find now what would end the run hours later, when the job has got its nodes."""
    check_written_points(view.study)
    require_pins(view.study)
    with checking(quiet) as now:
        require_checked(view.study, view.home, now)
    view.begun_as()


def _ended(view: StudyView) -> str:
    if not view.home.has_run(view.study.study):
        return ""
    return ended_because(view.study, view.home, collect(view), read_spent(view.folder))


def _require_no_job(view: StudyView) -> None:
    job, holder = queued_job(view.folder), view.home.holder(view.study.study)
    if job is not None:
        raise StudyError(
            f"{view.study.study!r} has a Slurm job: {job}. Let it end, or scancel {job.number}"
        )
    if holder is not None:
        raise StudyError(f"another driver holds study {view.study.study!r}: {holder}")


def _sbatch(path: Path) -> str:
    """Submit a script; returns the number of the job."""
    if shutil.which("sbatch") is None:
        raise StudyError(
            f"wrote {path}, but this machine has no sbatch; submit the script where Slurm's "
            "commands are: the cluster's login node"
        )
    done = subprocess.run(
        ["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise StudyError(f"sbatch did not accept {path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # NUMBER;CLUSTER on a federation


def _print(as_json: bool, found: Mapping[str, Any], text: str) -> None:
    print(json.dumps(found, indent=1) if as_json else text)
