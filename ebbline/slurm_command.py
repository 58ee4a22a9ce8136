"""The command `ebbline slurm`. It imports what it needs when it runs."""

from typing import Annotated

import typer

from ebbline.options import DEFAULT_HOME, STUDY_PANEL, HomeOption, JsonOption, StudyName, explained

LONGEST_SETUP = 1_000_000  # characters
slurm_app = typer.Typer()


@slurm_app.command(
    rich_help_panel=STUDY_PANEL, short_help="Write and submit a Slurm job that runs it to its end"
)
@explained
def slurm(
    study: StudyName,
    run_options: Annotated[
        list[str] | None,
        typer.Argument(help="Further options of `ebbline run`, after `--`.", show_default=False),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit the script with sbatch too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the script, and write nothing.")
    ] = False,
    partition: Annotated[
        str | None, typer.Option(help="Slurm's partition.", show_default=False)
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="The account to charge.", show_default=False)
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="How many nodes; default: 1.", show_default=False)
    ] = None,
    gpus_per_node: Annotated[
        str | None,
        typer.Option(
            help="GPUs of each node: 4, or TYPE:4. Default: what the largest model takes.",
            show_default=False,
        ),
    ] = None,
    logical_gpus: Annotated[
        int | None,
        typer.Option(
            help="For a study on CPUs: logical GPUs of each node. Slurm is asked for none.",
            show_default=False,
        ),
    ] = None,
    cpus_per_node: Annotated[
        int | None,
        typer.Option(help="Cores of each node; default: 2 for each GPU, plus 2."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of each node, such as 64G.", show_default=False)
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="The time limit of one start, such as 24:00:00. The job requeues itself.",
            show_default=False,
        ),
    ] = None,
    lead: Annotated[
        int | None,
        typer.Option(
            help="Seconds before the time limit at which the run is interrupted; default: 300, "
            "at most a quarter of the time.",
            show_default=False,
        ),
    ] = None,
    requeues: Annotated[
        int | None,
        typer.Option(help="The most times that the job requeues itself; default: 100."),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="The Python of the nodes; default: this one.", show_default=False),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            help="A further option of sbatch: --sbatch=--constraint=a100. Repeatable.",
            show_default=False,
        ),
    ] = None,
    setup: Annotated[
        typer.FileText | None,
        typer.Option(
            help="A file with shell lines that come first, such as `module load cuda`.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a Slurm script that runs a study on all nodes of a job and requeues itself until the
    study is done. Options that stay the same belong into `slurm:` of HOME/cluster.yaml.
    """
    from ebbline.commands.slurm.submit import submit_study
    from ebbline.sweeps.study.view import StudyView

    flags = {
        "partition": partition,
        "account": account,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "logical_gpus": logical_gpus,
        "cpus_per_node": cpus_per_node,
        "memory": memory,
        "time": time,
        "lead_s": lead,
        "requeues": requeues,
        "python": python,
        "sbatch": tuple(sbatch or ()),
        "setup": None if setup is None else setup.read(LONGEST_SETUP + 1),
    }
    options = run_options or []
    view = StudyView.open(home, study, "--extend" in options)
    submit_study(view, flags, options, submit=submit, dry_run=dry_run, as_json=as_json)
