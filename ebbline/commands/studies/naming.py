"""`ebbline study`: rename, copy and remove a study of a home."""

import json
import sys
from pathlib import Path

import typer

from ebbline.analysis.results.wording import size_label
from ebbline.analysis.wandb.memory import Memory
from ebbline.bars import progress_bar
from ebbline.cluster.store.retention import Survey
from ebbline.commands.store import all_needed, needs_of_studies
from ebbline.commands.studies.listing import folder_bytes
from ebbline.sweeps.drive.confirming import confirming_name
from ebbline.sweeps.state.home_studies import remove, rename, require_free, require_removable
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.reading.yaml_text import text_of
from ebbline.sweeps.study.study_file import (
    as_yaml,
    load,
    parse,
    shipped,
    source_of,
    with_absolute_paths,
    with_name,
)
from ebbline.tasks.errors import EbblineError, StudyError
from ebbline.tasks.files import write_whole


def rename_study(home: Home, old: str, new: str, as_json: bool) -> None:
    """Rename a study of the home, and the one that confirms its points; its study file stays as it
    is.
    """
    rename(home, old, new)
    if home.has_run(confirming_name(old)):
        rename(home, confirming_name(old), confirming_name(new))
    file = _file_of(home, new)
    differs = file is not None and _name_in(file) != new
    shown = (home.path(new) / "wandb").is_dir()
    if as_json:
        kept = str(file) if differs else None
        print(json.dumps({"study": new, "was": old, "file_with_another_name": kept}, indent=1))
        return
    print(f"{old} is now {new}, in {home.path(new)}; `ebbline run {new}` continues it")
    if differs:
        print(
            f"{file} still says another name, and running that file begins a study of that "
            f"name: write `study: {new}` there"
        )
    if shown:
        print(f"W&B keeps the runs named {old}; `ebbline sync {new}` shows the study as {new}, too")


def copy_study(
    home: Home, study: str, new: str, to: Path | None, frozen: bool, as_json: bool
) -> None:
    """Write a study file with a new name. The store is shared, so stages of both run once.

    The text is that of the study's file, with its comments, or the settings that the home's study
    has now with `frozen`. In another folder, or with `frozen`, the settings are written out, with
    absolute paths. Raises StudyError when the name or the file is taken.
    """
    require_free(home, new)
    source = Path(home.named(study)) if frozen else source_of(home.named(study))
    to = to or (Path() if source in shipped().values() else source.parent) / f"{new}.yaml"
    if to.suffix not in (".yaml", ".yml"):
        raise StudyError(f"{to}: the name of a study file ends in .yaml")
    if to.exists():
        raise StudyError(f"{to} exists; name another file with --to")
    begun = home.begun(study) if frozen else parse(source)
    if begun is None:
        raise StudyError(f"no study {study!r} in {home.root}, so it has no frozen settings")
    whole = with_absolute_paths(begun, source)
    kept = not frozen and (
        to.resolve().parent == source.resolve().parent or whole.model_dump() == begun.model_dump()
    )
    copied = (
        with_name(text_of(source), new)
        if kept
        else as_yaml(whole.model_copy(update={"study": new}))
    )
    parse(to, copied)
    write_whole(to, lambda fresh: fresh.write_text(copied, "utf-8"))
    if as_json:
        print(json.dumps({"wrote": str(to), "study": new, "comments": kept}, indent=1))
        return
    print(
        f"wrote {to}" + ("" if kept else " with all settings and absolute paths, without comments")
    )
    print(f"next: edit it, then `ebbline run {to}`; what both studies need runs once")


def remove_study(home: Home, name: str, yes: bool, as_json: bool) -> int:
    """Remove a study's folder, after a question unless `yes`. Returns 1 when the answer is no."""
    require_removable(home, name)
    size, freed = folder_bytes(home.path(name)), _freed(home, name)
    unsent = len(list(Memory(home.path(name), "offline").waiting()))
    later = (
        f"`ebbline store gc --yes` then frees {size_label(freed)}"
        if isinstance(freed, int)
        else f"what `ebbline store gc` then frees is not known: {freed}"
    )
    lines = [
        f"{home.path(name)}, {size_label(size)}: points, costs, tables, figures and report",
        f"Its artifacts stay in the store; {later}",
    ]
    if unsent:
        lines.append(f"{unsent} W&B runs were not pushed and are lost; `ebbline sync {name}` first")
    if not yes:
        if not sys.stdin.isatty():
            raise StudyError(
                f"removing {name!r} needs an answer, and there is no terminal to ask: add --yes"
            )
        print("\n".join(lines), file=sys.stderr)
        if not typer.confirm(f"Remove the study {name}?", err=True):
            print("nothing was removed", file=sys.stderr)
            return 1
    remove(home, name)
    if as_json:
        known = freed if isinstance(freed, int) else None
        print(json.dumps({"removed": name, "bytes": size, "gc_frees_bytes": known}, indent=1))
    else:
        print(f"removed {name} ({size_label(size)}); {later}")
    return 0


def _freed(home: Home, name: str) -> int | str:
    """The bytes of the artifacts that only this study needs, or why that is not known."""
    try:
        with progress_bar("looking") as progress:
            survey = Survey(home.store, progress)
            needed, unknown = needs_of_studies(home)
    except EbblineError as error:
        return str(error).splitlines()[0]
    if unknown:
        return f"it is unknown what {', '.join(sorted(unknown))} needs"
    if survey.owners - {home.known_id}:
        return "other homes use this store"
    others = all_needed(own for each, own in needed.items() if each != name)
    return survey.of(needed[name].keys - others.keys)


def _file_of(home: Home, name: str) -> Path | None:
    file = Path(home.named(name))
    return file if file.suffix in (".yaml", ".yml") and file.is_file() else None


def _name_in(file: Path) -> str | None:
    try:
        return load(str(file)).study
    except EbblineError:
        return None
