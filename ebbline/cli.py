"""The command line. `--help` imports neither torch, ray nor optuna: each command brings what it needs when it runs.

Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 3 the study ended with failed points,
4 another driver holds the study, 130 stopped on request (the same command continues).
"""

import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tasks.errors import EbblineError, StudyHeld

app = typer.Typer(
    name="ebbline",
    help="How far do a chat model's refusals ebb when it is fine-tuned, and what brings them back?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug's traceback in full, plain, and without locals: they may hold completions
)
StudyName = Annotated[str, typer.Argument(help="A study that ships (see `ebbline studies`) or a YAML file.", show_default=False)]
HomeOption = Annotated[Path, typer.Option("--home", envvar="EBBLINE_HOME", help="The folder that holds the store and all studies.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DEFAULT_HOME = Path("runs")


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an EbblineError into one message and an exit code; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EbblineError as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(4 if isinstance(error, StudyHeld) else 1) from None

    return wrapped


@app.command()
@_explained
def studies(as_json: JsonOption = False) -> None:
    """List the studies that ship."""
    from sweeps.study_file import parse, shipped

    rows = {name: parse(path).question for name, path in shipped().items()}
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for name, question in rows.items():
        print(f"{name:12} {question}")


@app.command()
@_explained
def validate(study: StudyName, as_json: JsonOption = False) -> None:
    """Check a study file: keys, types, ranges, and whether all it names is pinned."""
    from sweeps.search import check_written_points
    from sweeps.study import require_pins
    from sweeps.study_file import load

    loaded = load(study)
    check_written_points(loaded)
    require_pins(loaded)
    if as_json:
        print(loaded.model_dump_json(indent=1))
        return
    print(f"{loaded.study} is valid: {len(loaded.models)} models, axes {', '.join(loaded.axes)}, {len(loaded.suites)} suites")


@app.command()
@_explained
def pin(
    study: StudyName, to: Annotated[Path, typer.Option("--to", help="Where to write the pinned study file.", show_default=False)]
) -> None:
    """Fill in the commit and sha256 of every model and data set that a study names, in a copy of its file."""
    from sweeps.pins import pin_study

    for line in pin_study(study, to):
        print(line)
    print(f"wrote {to}; next: ebbline validate {to}")


@app.command()
@_explained
def plan(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    why: Annotated[int, typer.Option("--why", help="How many misses to explain.")] = 12,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would do: how many stages of each kind, how many are there, and what made each miss one."""
    from ebbline.show import print_plan
    from sweeps.home import Home
    from sweeps.plan import Planner
    from sweeps.plan import plan as make_plan
    from sweeps.search import finite, known_points, space
    from sweeps.study_file import load

    loaded, where = load(study), Home(home)
    points, unchosen = known_points(loaded, where.storage_url(loaded.study))
    planner = Planner(loaded, where)
    found = make_plan(planner, points, unchosen)
    most = make_plan(planner, space(loaded), 0) if unchosen and finite(loaded) else None
    print_plan(found, most, why, as_json)


@app.command()
@_explained
def run(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    executor: Annotated[Literal["ray", "inline"], typer.Option(help="Where stages run: a Ray cluster, or this process.")] = "ray",
    address: Annotated[str, typer.Option(help="Ray address: `local` starts one here, `auto` joins the one there is.")] = "local",
    gpus: Annotated[int | None, typer.Option(help="Logical GPUs of a local cluster without real ones.", show_default=False)] = None,
    wandb: Annotated[bool, typer.Option(help="Mirror to Weights & Biases (offline unless you are logged in).")] = True,
) -> None:
    """Run a study to its report. The same command continues one that was cut off, and runs nothing twice."""
    from ebbline.running import run_study
    from sweeps.home import Home
    from sweeps.study_file import load

    raise typer.Exit(run_study(load(study), study, Home(home), executor, address, gpus, wandb))


@app.command()
@_explained
def project(
    adapter: Annotated[list[str], typer.Option(help="A PEFT LoRA adapter's folder; give several of one model to read it once.")],
    base: Annotated[str, typer.Option(help="The model before alignment: a folder, or ORG/NAME@COMMIT.", show_default=False)],
    aligned: Annotated[str, typer.Option(help="The model after alignment, which the adapter was trained on.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the projected adapter goes; a folder for each when there are several.")],
    threshold: Annotated[
        float | None,
        typer.Option(help="Project modules whose cosine is at or below this; 0.5 if neither rule is given.", show_default=False),
    ] = None,
    modules: Annotated[int | None, typer.Option(help="Project exactly this many, those of lowest cosine.", show_default=False)] = None,
    projector: Annotated[Literal["approximate", "exact"], typer.Option(help="C = V V^T / |V|, or onto V's column space.")] = "approximate",
    energy: Annotated[
        float | None, typer.Option(help="Share of |V|^2 that the exact projector keeps; 0.9 if not given.", show_default=False)
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Keeps the exact projector's bases for the next time.", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option(help="An HTML file with every module's cosine, in pictures.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Apply Safe LoRA to adapters by itself: no study, no store, no cluster. Writes ordinary PEFT adapters."""
    from ebbline.projecting import progress_bar, require_reportable, tell
    from ebbline.projecting import project as project_adapters

    if report is not None:
        require_reportable(report)
    with progress_bar() as progress:
        projected = project_adapters(
            adapter,
            base,
            aligned,
            out,
            threshold=threshold,
            modules=modules,
            projector=projector,
            energy=energy,
            cache=cache,
            device=device,
            progress=progress,
        )
    tell(projected, report, as_json)


@app.command()
@_explained
def status(study: StudyName, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show how far a study is: who drives it, its points, and the frontier so far."""
    from analysis.results import collect
    from ebbline.show import print_status
    from sweeps.home import Home
    from sweeps.study_file import load

    loaded, where = load(study), Home(home)
    print_status(loaded, where.holder(loaded.study), collect(loaded, where), as_json)


@app.command()
@_explained
def report(study: StudyName, home: HomeOption = DEFAULT_HOME) -> None:
    """Write the tables, the figures and the report of what a study has so far."""
    from ebbline.running import write_outputs
    from sweeps.home import Home
    from sweeps.study_file import load

    for what, path in write_outputs(load(study), Home(home)).items():
        print(f"{what:9} {path}")


@app.command()
@_explained
def sync(study: StudyName, home: HomeOption = DEFAULT_HOME) -> None:
    """Bring the W&B mirror up to date, for a study whose run did not wait for it."""
    from ebbline.running import sync_mirror
    from sweeps.home import Home
    from sweeps.study_file import load

    raise typer.Exit(sync_mirror(study, load(study), Home(home)))


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
