"""The text of a Slurm script that runs a study."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from ebbline.cluster.profile import SlurmSettings
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import shipped
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError

OWN_RUN_OPTIONS = ("--home", "--address", "--executor", "--gpus", "--json")


def for_study(settings: SlurmSettings, study: Study) -> SlurmSettings:
    """The settings with the number of GPUs and cores that the study needs, where none is given.

    Raises StudyError when a model's gang does not fit on the nodes.
    """
    models = study.models
    if not settings.gpus:
        most = max(
            -(-model.gpus // (settings.nodes if model.spread else 1)) for model in models.values()
        )
        settings = settings.model_copy(update={"gpus_per_node": str(most)})
    for name, model in models.items():
        here = settings.gpus * (settings.nodes if model.spread else 1)
        if model.gpus > here:
            where = f"{settings.nodes} nodes have" if model.spread else "a node has"
            raise StudyError(
                f"models.{name}.gpus is {model.gpus}, and {where} {here}: raise --gpus-per-node"
                + (" or --nodes" if model.spread else ", or write `spread: true`")
            )
    if settings.cpus_per_node is None:
        # As a Ray cluster on one machine: a core for each GPU's process, and spare ones
        settings = settings.model_copy(update={"cpus_per_node": 2 * settings.gpus + 2})
    return settings


def sbatch_options(settings: SlurmSettings, name: str, folder: Path) -> list[str]:
    """The options of sbatch, with `sbatch` of the settings last: sbatch uses the last value."""
    given = {
        "job-name": f"ebbline-{name}",
        "partition": settings.partition,
        "account": settings.account,
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": settings.cpus_per_node,
        "gpus-per-node": settings.gpus_per_node,
        "mem": settings.memory,
        "time": settings.time,
        "signal": f"B:USR1@{settings.lead}",
        "open-mode": "append",
        "output": _quoted(str(folder / "log").replace("%", "%%") + "/slurm-%j.log"),
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [*options, "--requeue", *settings.sbatch]


def _quoted(value: str) -> str:
    return f'"{value}"' if any(letter.isspace() for letter in value) else value


def script(
    view: StudyView, settings: SlurmSettings, path: Path, run_options: Sequence[str] = ()
) -> str:
    """The script's text. `path` is where it will be; `run_options` are further options of `ebbline
    run`.
    """
    for option in run_options:
        if option.partition("=")[0] in OWN_RUN_OPTIONS:
            raise StudyError(f"{option} cannot be given to the run: `ebbline slurm` sets it")
    python = settings.python or sys.executable
    source = view.source if view.source in shipped() else str(Path(view.source).resolve())
    # -P: a folder `datasets` where the job was submitted must not hide the package.
    run = [python, "-P", "-m", "ebbline", "run", source, "--home", str(view.home.root)]
    run += run_options
    ray = (
        [f"--logical-gpus={settings.gpus}"]
        if settings.logical_gpus is not None
        else [f"--gpus={settings.gpus}"]
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ebbline.commands.slurm", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a script, not a page; `quote` quotes for a shell
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template("job.sbatch").render(
        study=view.study.study,
        path=str(path),
        options=sbatch_options(settings, view.study.study, view.folder),
        setup=settings.setup.strip(),
        python=python,
        folder=str(view.folder),
        run=run,
        ray=ray,
        lead=settings.lead,
        requeues=settings.requeues,
    )
