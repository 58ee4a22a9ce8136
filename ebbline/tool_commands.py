"""The commands that work without a study: Safe LoRA, measuring, prompt sets, the store. Each brings
what it needs when it runs.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ebbline.options import DEFAULT_HOME, HomeOption, JsonOption, explained

tool_app = typer.Typer()
prompts_app = typer.Typer(help="Look at prompt sets before they are used.", no_args_is_help=True)
store_app = typer.Typer(
    help="Look after the artifact store: what it holds, whether it is whole, what may go.",
    no_args_is_help=True,
)


@tool_app.command()
@explained
def project(
    adapter: Annotated[
        list[str],
        typer.Option(
            help="A PEFT LoRA adapter's folder; give several of one model to read it once."
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            help="The model before alignment: a folder, or ORG/NAME@COMMIT.", show_default=False
        ),
    ],
    aligned: Annotated[
        str,
        typer.Option(
            help="The model after alignment, which the adapter was trained on.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Where the projected adapter goes; a folder for each when there are several."
        ),
    ],
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Project modules whose cosine is at or below this; 0.5 if neither rule is given.",
            show_default=False,
        ),
    ] = None,
    modules: Annotated[
        int | None,
        typer.Option(help="Project exactly this many, those of lowest cosine.", show_default=False),
    ] = None,
    projector: Annotated[
        Literal["approximate", "exact"],
        typer.Option(help="C = V V^T / |V|, or onto V's column space."),
    ] = "approximate",
    energy: Annotated[
        float | None,
        typer.Option(
            help="Share of |V|^2 that the exact projector keeps; 0.9 if not given.",
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Keeps the exact projector's bases for the next time.", show_default=False
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="An HTML file with every module's cosine, in pictures.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Apply Safe LoRA to adapters by itself: no study, no store, no cluster. Writes ordinary PEFT
    adapters.
    """
    from ebbline.commands.project import progress_bar, require_reportable, tell
    from ebbline.commands.project import project as project_adapters

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


@tool_app.command()
@explained
def evaluate(
    model: Annotated[
        str, typer.Option(help="The model: a folder, or ORG/NAME@COMMIT.", show_default=False)
    ],
    suite: Annotated[
        str,
        typer.Option(
            help="refusal, over_refusal, task, or the name of an lm-eval task.", show_default=False
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            help="The prompt set, or the folder with an lm-eval task's data.", show_default=False
        ),
    ],
    adapter: Annotated[
        list[str] | None, typer.Option(help="A PEFT adapter; several share one load of the model.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Where everything goes. The same command continues there.")
    ] = Path("measured"),
    scorer: Annotated[
        str | None, typer.Option(help="The scorer that gives the rate.", show_default=False)
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="Scorers beside it.", show_default=False)
    ] = None,
    set_format: Annotated[
        str | None,
        typer.Option("--format", help="The set's format, where it is not plain from the file."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="How many: evenly spaced in a set, the first of a task."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length of an answer.", show_default=False)
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(help="Examples before each item of an lm-eval task.", show_default=False),
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template", help="Put lm-eval's items into the chat template."),
    ] = None,
    tokenizer: Annotated[
        Literal["model", "adapter"],
        typer.Option(help="Whose tokenizer and chat template are used."),
    ] = "model",
    chat_date: Annotated[
        str | None,
        typer.Option(
            help="The date for a chat template that writes one; 2024-07-26 if not given.",
            show_default=False,
        ),
    ] = None,
    quantisation: Annotated[
        Literal["none", "int8", "nf4"], typer.Option(help="How the model is loaded.")
    ] = "none",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="How the model is loaded.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts at once; halved when memory ends.")
    ] = 32,
    as_json: JsonOption = False,
) -> None:
    """Measure one suite on a model or its adapters by itself: no study, no store, no cluster."""
    from ebbline.commands.evaluate import chat_on, tell
    from ebbline.commands.evaluate import evaluate as measure
    from ebbline.commands.project import progress_bar

    settings = {
        "scorer": scorer,
        "also": tuple(also or ()),
        "format": set_format,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "shots": shots,
        "chat_template": chat_template,
    }
    with progress_bar() as progress:
        measured = measure(
            model,
            suite,
            prompts,
            out,
            adapters=adapter or [],
            settings=settings,
            quantisation=quantisation,
            dtype=dtype,
            chat=chat_on(chat_date),
            tokenizer=tokenizer,
            device=device,
            batch_size=batch_size,
            progress=progress,
        )
    tell(measured, as_json)


@tool_app.command()
@explained
def rescore(
    where: Annotated[
        str,
        typer.Argument(
            help="A study, or a folder with completions.sensitive.jsonl.", show_default=False
        ),
    ],
    scorer: Annotated[
        str, typer.Option(help="The scorer that gives the rate.", show_default=False)
    ],
    also: Annotated[
        list[str] | None, typer.Option(help="Scorers beside it.", show_default=False)
    ] = None,
    suite: Annotated[str, typer.Option(help="Which suite of the study.")] = "refusal",
    measure: Annotated[
        Literal["refusal", "over_refusal"],
        typer.Option(help="What a refusal means in a folder; a study's suite says it itself."),
    ] = "refusal",
    to: Annotated[
        Path | None, typer.Option(help="A CSV file for the rows.", show_default=False)
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Score stored completions again, without a model: another scorer, or several side by side."""
    from ebbline.commands.evaluate import generations_of, measure_of, tell_rows, write_rows
    from ebbline.commands.evaluate import rescore as score_again
    from ebbline.sweeps.study.view import StudyView
    from ebbline.tasks.specs import GenerateSpec, ScoreSpec

    if (Path(where) / GenerateSpec.COMPLETIONS).exists():
        generations = {Path(where).name: [Path(where)]}
    else:
        view = StudyView.open(home, where)
        measure, generations = measure_of(view.study, suite), generations_of(view, suite)
    rows = score_again(
        generations, ScoreSpec(measure=measure, scorer=scorer, also=tuple(also or ()))
    )
    if to is not None:
        write_rows(rows, to)
    tell_rows(rows, as_json)


@tool_app.command()
@explained
def rerun(
    request: Annotated[
        str,
        typer.Argument(
            help="The request.json that a failure names: a path, or a URL in a bucket.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Run one stage again in this process, to see how it fails; the store is left as it is."""
    from ebbline.commands.rerun import rerun as run_again

    if code := run_again(request, as_json):
        raise typer.Exit(code)


@prompts_app.command()
@explained
def check(
    file: Annotated[Path, typer.Argument(help="A prompt set.", show_default=False)],
    set_format: Annotated[
        str, typer.Option("--format", help="Its format, where it is not plain from the file.")
    ] = "auto",
    against: Annotated[
        Path | None, typer.Option(help="Another set that it must not overlap.", show_default=False)
    ] = None,
    similarity: Annotated[
        float, typer.Option(help="From which similarity on two prompts are near-copies.")
    ] = 0.5,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Show the texts of near-copies too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate and audit a prompt set: near-copies, categories, lengths, overlap. In counts and
    ids, without any text.
    """
    from ebbline.commands.audit import tell
    from ebbline.tasks.data.audit import audit
    from ebbline.tasks.data.prompts import named_format, read_prompts

    asked = read_prompts(file, named_format(set_format))
    other = None if against is None else read_prompts(against, "auto")
    tell(audit(asked, other, similarity), file, as_json, asked if show_text else None)


@store_app.command()
@explained
def du(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show how much lies in the store, by kind of stage and by study."""
    from ebbline.commands.store import show_usage
    from ebbline.sweeps.study.home import Home

    show_usage(Home(home), as_json)


@store_app.command()
@explained
def verify(
    home: HomeOption = DEFAULT_HOME,
    mend: Annotated[
        bool,
        typer.Option("--mend", help="Move damaged artifacts aside, so that they are made again."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every artifact again and compare it with its record. Exit code 1 when something is
    damaged.
    """
    from ebbline.commands.store import verify as verify_store
    from ebbline.sweeps.study.home import Home

    raise typer.Exit(verify_store(Home(home), mend, as_json))


@store_app.command()
@explained
def gc(
    home: HomeOption = DEFAULT_HOME,
    older_than_h: Annotated[
        float,
        typer.Option(
            "--older-than-h", min=0.0, help="Only what was not written for so many hours."
        ),
    ] = 24.0,
    keep_adapters: Annotated[
        Literal["all", "frontier", "none"],
        typer.Option(help="Whose adapters keep their tensors; the others keep their records."),
    ] = "all",
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove it. Without this, only say what would go.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say, or remove, what no study needs: cut-off attempts, old checkpoints and sources, artifacts
    that nothing refers to.
    """
    from ebbline.commands.store import collect_garbage
    from ebbline.sweeps.study.home import Home

    collect_garbage(Home(home), older_than_h, keep_adapters, yes, as_json)


@store_app.command("forget")
@explained
def forget_artifact(
    kind: Annotated[
        str, typer.Argument(help="The stage's kind, such as train.", show_default=False)
    ],
    key: Annotated[str, typer.Argument(help="Its key.", show_default=False)],
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Move one artifact aside, so that its stage is made again."""
    from ebbline.commands.store import forget
    from ebbline.sweeps.study.home import Home

    forget(Home(home), kind, key, as_json)
