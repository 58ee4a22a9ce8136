"""The commands that need no study: Safe LoRA, measuring, prompt sets, the store. Each imports what
it needs when it runs.
"""

import glob
from pathlib import Path
from typing import Annotated, Literal

import typer

from ebbline.options import (
    DEFAULT_HOME,
    TOOL_PANEL,
    BasesOption,
    DeviceOption,
    ForceOption,
    HomeOption,
    JsonOption,
    WideOption,
    explained,
    finite,
    require_new,
)

tool_app = typer.Typer()
prompts_app = typer.Typer(help="Check prompt sets before a study uses them.", no_args_is_help=True)
store_app = typer.Typer(
    help="Maintain the artifact store: list its contents, verify them, remove what nobody needs.",
    no_args_is_help=True,
)


@tool_app.command(rich_help_panel=TOOL_PANEL, short_help="Apply Safe LoRA to PEFT adapters")
@explained
def project(
    adapter: Annotated[
        list[str],
        typer.Option(
            help="A PEFT LoRA adapter's folder. Repeatable: the model is then read once for all."
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
            help="The folder for the projected adapter; with several, a subfolder for each."
        ),
    ],
    threshold: Annotated[
        list[float] | None,
        typer.Option(
            help="Project modules whose cosine is at or below this; default 0.5 without --modules. "
            "Repeatable: each value has a subfolder of --out.",
            show_default=False,
        ),
    ] = None,
    modules: Annotated[
        list[int] | None,
        typer.Option(
            help="Project exactly this many modules, lowest cosine first. Repeatable.",
            show_default=False,
        ),
    ] = None,
    projector: Annotated[
        Literal["approximate", "exact"],
        typer.Option(help="C = V V^T / |V|, or onto V's column space."),
    ] = "approximate",
    energy: Annotated[
        float | None,
        typer.Option(
            help="Share of |V|^2 that the exact projector keeps; default 0.9.",
            show_default=False,
        ),
    ] = None,
    cache: BasesOption = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write an HTML report with figures of every module's cosine.",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Apply Safe LoRA to adapters, without a study, store or cluster. Writes ordinary PEFT
    adapters.
    """
    from ebbline.bars import progress_bar
    from ebbline.commands.project import print_projected, require_reportable
    from ebbline.commands.project import project as project_adapters

    if report is not None:
        for file in (report, *report.parent.glob(f"{glob.escape(report.stem)}-*")):
            require_new(file, force)  # the pictures lie beside the page
        require_reportable(report)
    with progress_bar("projecting") as progress:
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
    print_projected(projected, report, as_json)


@tool_app.command(
    rich_help_panel=TOOL_PANEL, short_help="Measure one suite on a model or its adapters"
)
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
        list[str] | None,
        typer.Option(help="A PEFT adapter. Repeatable: the model is then loaded once for all."),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Beside the adapters, measure the model without one too.",
        ),
    ] = True,
    out: Annotated[
        Path, typer.Option(help="The output folder. The same command continues there.")
    ] = Path("measured"),
    scorer: Annotated[
        str | None, typer.Option(help="The scorer that gives the rate.", show_default=False)
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="A further scorer, for comparison. Repeatable.", show_default=False),
    ] = None,
    set_format: Annotated[
        str | None,
        typer.Option("--format", help="The set's format; default: detected from the file."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many prompts: evenly spaced in a set, the first ones of a task."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The longest answer, in tokens.", show_default=False)
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            help="Few-shot examples for each item of an lm-eval task.", show_default=False
        ),
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template", help="Format lm-eval's items with the chat template."),
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
    template: Annotated[
        Path | None,
        typer.Option(
            help="A chat template, a Jinja file, in place of the model's.", show_default=False
        ),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Set the chat template's switch for thoughts.",
            show_default=False,
        ),
    ] = None,
    quantisation: Annotated[
        Literal["none", "int8", "nf4"], typer.Option(help="Quantisation of the loaded model.")
    ] = "none",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Data type of the loaded model.")
    ] = "bfloat16",
    device: DeviceOption = "cpu",
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="The largest batch of prompts, a power of two; another size rounds differently.",
            show_default="32",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="What completes the prompts: transformers, or a server, NAME==VERSION.",
            show_default="transformers",
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Where that server lies: the Python of an environment with vLLM, or a URL.",
            show_default=False,
        ),
    ] = None,
    check_backend: Annotated[
        bool,
        typer.Option(
            "--check-backend",
            help="Let transformers complete the prompts too, and report each that differs.",
        ),
    ] = False,
    as_json: JsonOption = False,
    wide: WideOption = False,
) -> None:
    """Measure one suite on a model or its adapters, without a study, store or cluster."""
    from ebbline.bars import progress_bar
    from ebbline.commands.evaluate import chat_of
    from ebbline.commands.evaluate import evaluate as measure
    from ebbline.commands.measured.outcome import print_measured

    settings = {
        "scorer": scorer,
        "also": tuple(also or ()),
        "format": set_format,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "shots": shots,
        "chat_template": chat_template,
        "batch_size": batch_size,
        "backend": backend,
    }
    with progress_bar("measuring") as progress:
        measured = measure(
            model,
            suite,
            prompts,
            out,
            adapters=adapter or [],
            settings=settings,
            quantisation=quantisation,
            dtype=dtype,
            chat=chat_of(chat_date, template, thinking),
            tokenizer=tokenizer,
            baseline=baseline,
            device=device,
            server=server,
            check_backend=check_backend,
            progress=progress,
        )
    print_measured(measured, as_json, wide)


@tool_app.command(
    rich_help_panel=TOOL_PANEL, short_help="Score stored completions with other scorers"
)
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
        list[str] | None,
        typer.Option(help="A further scorer, for comparison. Repeatable.", show_default=False),
    ] = None,
    suite: Annotated[str, typer.Option(help="The suite of the study.")] = "refusal",
    measure: Annotated[
        Literal["refusal", "over_refusal"],
        typer.Option(help="What a folder's refusals measure; a study's suite defines its own."),
    ] = "refusal",
    to: Annotated[
        Path | None, typer.Option(help="Write the rows to this CSV file.", show_default=False)
    ] = None,
    force: ForceOption = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
    wide: WideOption = False,
) -> None:
    """Score stored completions with another scorer, or several side by side, without a model."""
    from ebbline.commands.measured.rescoring import (
        generations_of,
        measure_of,
        print_rows,
        write_rows,
    )
    from ebbline.commands.measured.rescoring import rescore as rescore_completions
    from ebbline.tasks.specs import GenerateSpec, ScoreSpec

    require_new(to, force)
    if (Path(where) / GenerateSpec.COMPLETIONS).exists():
        generations = {Path(where).name: [Path(where)]}
    else:
        from ebbline.sweeps.study.view import StudyView  # with a database: the extra `sweep`

        view = StudyView.open(home, where)
        measure, generations = measure_of(view.study, suite), generations_of(view, suite)
    rows = rescore_completions(
        generations, ScoreSpec(measure=measure, scorer=scorer, also=tuple(also or ()))
    )
    if to is not None:
        write_rows(rows, to)
    print_rows(rows, as_json, wide)


@tool_app.command(rich_help_panel=TOOL_PANEL, short_help="Rerun one failed stage here, to debug it")
@explained
def rerun(
    request: Annotated[
        str,
        typer.Argument(
            help="The request.json of a failed stage: a path, or a URL in a bucket.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Rerun one stage in this process, to debug its failure. The store does not change."""
    from ebbline.commands.rerun import rerun as rerun_stage

    if code := rerun_stage(request, as_json):
        raise typer.Exit(code)


@prompts_app.command()
@explained
def check(
    file: Annotated[Path, typer.Argument(help="A prompt set.", show_default=False)],
    set_format: Annotated[
        str, typer.Option("--format", help="The set's format; auto detects it from the file.")
    ] = "auto",
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another prompt set or training data, to check for overlap.", show_default=False
        ),
    ] = None,
    similarity: Annotated[
        float, typer.Option(help="The least similarity of two near-copies.")
    ] = 0.5,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Print the texts of near-copies too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate and audit a prompt set: near-copies, categories, lengths, overlap. Prints counts and
    ids, and no prompt text.
    """
    from ebbline.commands.audit import print_audit
    from ebbline.tasks.data.audit import audit, read_other
    from ebbline.tasks.data.prompts import named_format, read_prompts

    prompts = read_prompts(file, named_format(set_format))
    other = None if against is None else read_other(against)
    print_audit(audit(prompts, other, similarity), file, as_json, prompts if show_text else None)


@store_app.command()
@explained
def du(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show the store's size, by stage kind and by study."""
    from ebbline.commands.store import show_usage
    from ebbline.sweeps.study.home import Home

    show_usage(Home(home), as_json)


@store_app.command()
@explained
def verify(
    home: HomeOption = DEFAULT_HOME,
    mend: Annotated[
        bool,
        typer.Option("--mend", help="Quarantine damaged artifacts; the next run makes new ones."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare every artifact with its record. Exit code 1 when an artifact is damaged."""
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
            "--older-than-h",
            min=0.0,
            callback=finite,
            help="Only files not written for so many hours.",
        ),
    ] = 24.0,
    keep_adapters: Annotated[
        Literal["all", "frontier", "none"],
        typer.Option(help="Which adapters keep their tensors; the others keep their records."),
    ] = "all",
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove the files. Without this, only list them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List or remove what no study needs: interrupted attempts, old checkpoints and sources,
    unreferenced artifacts.
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
    """Quarantine one artifact, so that the next run reruns its stage."""
    from ebbline.commands.store import forget
    from ebbline.sweeps.study.home import Home

    forget(Home(home), kind, key, as_json)
