"""The command `ebbline defend`. It imports what it needs when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ebbline.options import (
    TOOL_PANEL,
    BasesOption,
    DeviceOption,
    JsonOption,
    WideOption,
    explained,
)

defend_app = typer.Typer()


class _ListingCommand(TyperCommand):
    """`--method` without a name is an empty name, which lists the methods."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named: list[str] = []
        for index, each in enumerate(args):
            named.append(each)
            if each == "--method" and (args[index + 1 :] or ["-"])[0].startswith("-"):
                named.append("")
        return super().parse_args(ctx, named)


@defend_app.command(
    cls=_ListingCommand,
    rich_help_panel=TOOL_PANEL,
    short_help="Apply a defence and its controls to PEFT adapters",
)
@explained
def defend(
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="A PEFT LoRA adapter's folder. Repeatable: the models are then read once for all.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder for the new adapter; a subfolder for each of several.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Which defence. Without a name: list the defences and their knobs.",
            show_default=False,
        ),
    ] = "",
    knob: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, such as factor=0.5. Repeatable: each value has a subfolder of --out.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The model before alignment: a folder, or ORG/NAME@COMMIT.", show_default=False
        ),
    ] = None,
    aligned: Annotated[
        str | None,
        typer.Option(
            help="The model after alignment, which the adapter was trained on.", show_default=False
        ),
    ] = None,
    safety: Annotated[
        str | None,
        typer.Option(
            help="The safety adapter that safe_merge merges with.",
            show_default=False,
        ),
    ] = None,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Make the defence's controls too, a subfolder each."),
    ] = False,
    draws: Annotated[
        int, typer.Option(min=1, max=1000, help="How many draws of each random control.")
    ] = 3,
    cache: BasesOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    wide: WideOption = False,
) -> None:
    """Apply a post-hoc defence to adapters, without a study, store or cluster. Writes ordinary PEFT
    adapters.
    """
    from ebbline.commands.defended.listing import given_knobs, print_methods

    if not method:
        if adapter or out or knob:
            raise typer.BadParameter("name a method with --method, or give no other option")
        print_methods(as_json, wide)
        return
    if not adapter or out is None:
        raise typer.BadParameter("--adapter and --out are required")

    from ebbline.bars import progress_bar
    from ebbline.commands.defended.defend import defend as defend_adapters
    from ebbline.commands.defended.outcome import print_defended

    knobs = given_knobs(method, knob or [])
    with progress_bar("defending") as progress:
        defended = defend_adapters(
            adapter,
            out,
            method=method,
            base=base,
            aligned=aligned,
            safety=safety,
            knobs=knobs,
            controls=controls,
            draws=draws,
            cache=cache,
            device=device,
            progress=progress,
        )
    print_defended(defended, as_json)
