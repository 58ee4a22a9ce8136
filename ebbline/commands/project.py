"""`ebbline project`: apply Safe LoRA to PEFT adapters (project them onto the alignment subspace of
their model), without a study, store or cluster.

    from ebbline.commands.project import project
    project(["my-adapter"], "llama-2-7b", "llama-2-7b-chat", "safer-adapter", threshold=0.4)

The output is an ordinary PEFT adapter, with a `safe_lora.json` that records what was done to each
module. The weights of the two models are read once for all adapters. At most two of their modules
are in memory at a time.
"""

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file

from ebbline.tasks.defences.gate import NO_DIRECTION, ModuleRow, ProjectedRows
from ebbline.tasks.defences.project import Weights, as_saved, projections, row_of, write_adapter
from ebbline.tasks.defences.settings import Settings, each_checked, lowest_threshold_hint
from ebbline.tasks.defences.subspace import Bases
from ebbline.tasks.defences.words import range_phrase
from ebbline.tasks.errors import ModelError, ProjectionError
from ebbline.tasks.headers.files import adapters_in
from ebbline.tasks.headers.hub import local_path
from ebbline.tasks.models.adapter_file import Adapter, plain_lora, read_adapter_file
from ebbline.tasks.models.brought.fitted import fitted
from ebbline.tasks.models.weights import Checkpoint, opened, require_model_folder

RECORD = "safe_lora.json"
TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")  # of the Trainer: the same adapter, earlier
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


@dataclass(frozen=True)
class ProjectedAdapter:
    """One projected adapter: its folder, each module's row, the modules with B replaced by C B, and
    notes for the user.
    """

    adapter: str
    out: Path
    settings: Settings
    rows: Mapping[str, ModuleRow]
    projected: frozenset[str]
    notes: tuple[str, ...]


def project(
    adapters: Sequence[str | Path],
    base: str | Path,
    aligned: str | Path,
    out: str | Path,
    *,
    threshold: float | Sequence[float] | None = None,
    modules: int | Sequence[int] | None = None,
    projector: Literal["approximate", "exact"] = "approximate",
    energy: float | None = None,
    cache: str | Path | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, module: None,
) -> list[ProjectedAdapter]:
    """Safe LoRA (arXiv 2405.16833) on one or more adapters of one model; see
    ebbline.tasks.defences for the formulas.

    `base` and `aligned` are Hugging Face folders or hub ids at a commit (`ORG/NAME@COMMIT`). `out`
    becomes the projected adapter, or holds one folder for each of several. `threshold` or `modules`
    may be lists: each value has an outcome, in a folder such as `threshold-0.4`. With neither, the
    threshold is 0.5. `cache` keeps the exact projector's bases for later calls.
    `out` is written atomically.

    Raises ModelError for an adapter or model that Safe LoRA is not defined for, and ProjectionError
    when the projection fails.
    """
    adapters = [adapters] if isinstance(adapters, str | Path) else adapters
    rules = each_checked(str(base), str(aligned), threshold, modules, projector, energy)
    require_device(device)
    destination = new_destination(Path(out))
    require_cache(cache)
    files = [read_adapter_file(located(adapter)) for adapter in adapters]
    if not files:
        raise ProjectionError("no adapter was given")
    for file in files:
        plain_lora(file)
    names = [""] if len(files) == 1 else distinct_names([file.folder for file in files])
    bases = (
        None
        if rules[0].energy is None
        else Bases(rules[0].energy, None if cache is None else Path(cache), device)
    )
    source = Weights(Checkpoint(located(base)), Checkpoint(located(aligned)), bases)
    for model in (source.base, source.aligned):
        require_model_folder(model.folder)
    loaded = [fitted(file, source.aligned) for file in files]
    try:
        with scratch_beside(destination) as scratch:
            spool, fresh = scratch / "spool", scratch / "out"
            spool.mkdir()
            rows, spooled = _measured(loaded, source, spool, progress, device)
            results = []
            for number, (adapter, own, name) in enumerate(zip(loaded, rows, names, strict=True)):
                for rule in rules:
                    place = Path(name) / (rule.name if len(rules) > 1 else "")
                    to = fresh / place, destination / place
                    results.append(_written(adapter, own, rule, spooled, number, *to))
            fresh.replace(destination)
    except (OSError, SafetensorError) as error:
        raise ProjectionError(
            f"{destination} cannot be written: {error}. Free disk space or give another folder; "
            "nothing was written there"
        ) from error
    return results


@contextmanager
def scratch_beside(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination`. Removes the folders of killed runs on this machine
    first.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{destination.name}.{platform.node()}."
    for left in destination.parent.glob(f"{mine}*"):
        process = left.name.removeprefix(mine).partition(".")[0]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(left)
    with TemporaryDirectory(dir=destination.parent, prefix=f"{mine}{os.getpid()}.") as folder:
        yield Path(folder)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's process
    return True


def new_destination(out: Path) -> Path:
    """The output folder, which must be new or empty. Raises ProjectionError otherwise, before any
    work.
    """
    destination = out.resolve()
    if destination == Path.cwd():
        raise ProjectionError(f"{out} is the current folder; give a new folder")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ProjectionError(
            f"{out} exists and is not an empty folder. Give another folder, or remove it first"
        )
    above = next(folder for folder in destination.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ProjectionError(f"cannot create {out}: {above} is not a folder that you may write to")
    return destination


def require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # torch raises either one for a missing device
        raise ProjectionError(
            f"this machine cannot compute on {device!r} ({str(error).splitlines()[0]}); "
            "use cpu, or leave the device out"
        ) from error


def require_cache(cache: str | Path | None) -> None:
    """Raise ProjectionError for a cache of bases that is a file."""
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise ProjectionError(
            f"{cache} is a file; the cache of the exact projector's bases is a folder"
        )


def located(reference: str | Path) -> Path:
    """A local folder, or the snapshot of a hub id at its commit. Raises ModelError for a missing
    folder and for a hub id without a commit.
    """
    text = str(reference)
    if Path(text).exists():
        return Path(text)
    if _HUB_ID.fullmatch(text):
        return local_path(f"hub:model:{text}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.*)?", text) and not text.startswith("."):
        raise ModelError(
            f"there is no folder {text}. For a model on the hub, add its commit: "
            f"{text.partition('@')[0]}@ and the 40"
            " digits that its page shows under 'Files'. A bare name can change its content"
        )
    raise ModelError(f"there is no folder {text}")


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: the shortest endings of their paths that differ. Raises
    ProjectionError for a duplicate folder.
    """
    paths = [folder.resolve().parts[1:] for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["-".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    twice = [folder for folder, parts in zip(folders, paths, strict=True) if paths.count(parts) > 1]
    if twice:
        raise ProjectionError(f"{twice[0]} is given twice")
    return [f"{folder.name}-{number}" for number, folder in enumerate(folders, start=1)]


def _measured(
    adapters: Sequence[Adapter],
    source: Weights,
    spool: Path,
    progress: Callable[[int, int, str], None],
    device: str,
) -> tuple[list[dict[str, ModuleRow]], dict[str, Path]]:
    """Each adapter's rows, and module -> the file in `spool` with its C B: all of them may not fit
    into memory. A module's name is data, so the files have numbers.
    """
    rows: list[dict[str, ModuleRow]] = [{} for _ in adapters]
    spooled: dict[str, Path] = {}
    for module, found in projections(adapters, source, progress, device):
        for number, outcome in found.items():
            rows[number][module] = row_of(outcome)
        spooled[module] = spool / f"{len(spooled)}.safetensors"
        save_file(
            {
                str(number): as_saved(outcome, adapters[number], module)
                for number, outcome in found.items()
            },
            spooled[module],
        )
    return rows, spooled


def _written(
    adapter: Adapter,
    rows: Mapping[str, ModuleRow],
    settings: Settings,
    spooled: Mapping[str, Path],
    number: int,
    fresh: Path,
    out: Path,
) -> ProjectedAdapter:
    take, notes = settings.chosen(rows), tuple(_notes(adapter, rows))
    projected = {}
    for module in take:
        with opened(spooled[module]) as file:
            projected[module] = file.get_tensor(str(number))
    fresh.mkdir(parents=True)
    write_adapter(adapter, projected, fresh)
    record = {
        "settings": asdict(settings),
        "adapter": str(adapter.folder),
        "notes": list(notes),
        "modules": {
            module: {**asdict(rows[module]), "projected": module in take} for module in sorted(rows)
        },
    }
    (fresh / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False))
    return ProjectedAdapter(str(adapter.folder), out, settings, rows, take, notes)


def _notes(adapter: Adapter, rows: Mapping[str, ModuleRow]) -> list[str]:
    notes = []
    others = [
        name for name in adapters_in(adapter.folder) if not TRAINER_CHECKPOINT.fullmatch(name)
    ]
    if others:
        notes.append(
            f"{adapter.folder} has other adapters in subfolders; they were not projected: "
            f"{', '.join(others)}"
        )
    for reason in sorted({row.reason for row in rows.values() if row.reason}):
        affected = [module for module, row in rows.items() if row.reason == reason]
        effect = (
            "so there is no alignment direction and the update stays"
            if reason == NO_DIRECTION
            else "so there is nothing to project"
        )
        notes.append(
            f"in {len(affected)} of {len(rows)} modules {reason}, {effect} "
            f"({', '.join(affected[:3])}{', ...' if len(affected) > 3 else ''})"
        )
    return notes


def write_report(projected: Sequence[ProjectedAdapter], path: Path) -> dict[str, Path]:
    """Write one HTML report about all adapters and its figures. Returns name -> path."""
    from ebbline.analysis.report.projection_report import write_projection_report

    names = _labels(projected)
    adapters = {
        name: ProjectedRows(each.rows, each.projected)
        for name, each in zip(names, projected, strict=True)
    }
    rules = {each.settings.name: asdict(each.settings) for each in projected}.values()
    settings = {
        name: ", ".join(dict.fromkeys(str(each[name]) for each in rules))
        for name, value in asdict(projected[0].settings).items()
        if value is not None
    }
    notes = [
        f"{name}: {note}" if len(projected) > 1 else note
        for name, each in _once_each(projected)
        for note in each.notes
    ]
    drawn = sorted({value for each in projected for value in each.settings.drawn})
    try:
        return write_projection_report(path, adapters, settings, notes, drawn)
    except OSError as error:
        raise ProjectionError(
            f"the report cannot be written to {path}: {error}. The projected adapters are complete"
        ) from error


def _labels(projected: Sequence[ProjectedAdapter]) -> list[str]:
    """The name of each outcome: its folder, below that of its adapter where both are needed."""
    names = [each.out.name for each in projected]
    if len(set(names)) == len(names):
        return names
    return [f"{each.out.parent.name} {each.out.name}" for each in projected]


def _once_each(projected: Sequence[ProjectedAdapter]) -> list[tuple[str, ProjectedAdapter]]:
    """(adapter's name, its first outcome): the notes of one outcome hold for the others too."""
    first = {each.adapter: each for each in reversed(projected)}
    in_order = {each.adapter: first[each.adapter] for each in projected}
    names = [
        each.out.parent.name if len(projected) > len(first) else each.out.name
        for each in in_order.values()
    ]
    return list(zip(names, in_order.values(), strict=True))


def require_reportable(path: Path) -> None:
    """Raise ProjectionError, before any work, when a report cannot be written to `path`."""
    above = next(folder for folder in path.resolve().parents if folder.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise ProjectionError(
            f"no report can be written to {path}; give the path of an HTML file, such as "
            f"{path / 'projection.html'}"
        )


def print_projected(
    projected: Sequence[ProjectedAdapter], report: Path | None, as_json: bool
) -> None:
    """Print what was projected, with a hint where nothing was. Then write the report to `report`,
    if given.
    """
    if as_json:
        reports = (
            {}
            if report is None
            else {name: str(path) for name, path in write_report(projected, report).items()}
        )
        records = [
            json.loads((each.out / RECORD).read_text()) | {"out": str(each.out)}
            for each in projected
        ]
        print(json.dumps({"adapters": records, "reports": reports}, indent=1))
        return
    screen, errors = (
        Console(markup=False, highlight=False, soft_wrap=True),
        Console(stderr=True, markup=False, highlight=False, soft_wrap=True),
    )
    settings = projected[0].settings
    share = "" if settings.energy is None else f" at {settings.energy:.4g} of the energy"
    rules = dict.fromkeys(each.settings.rule for each in projected)
    screen.print(
        f"Safe LoRA, {settings.projector} projector{share}, {'; '.join(rules)}", markup=False
    )
    for each in projected:
        screen.print(
            f"{each.out}: {len(each.projected)} of {len(each.rows)} modules projected"
            f"{range_phrase(each.rows)}",
            markup=False,
        )
    for name, each in _once_each(projected):
        nothing = not any(one.projected for one in projected if one.adapter == each.adapter)
        if nothing and (hint := lowest_threshold_hint(each.rows)):
            errors.print(f"note: {hint}", markup=False)
        for note in each.notes:
            errors.print(
                f"note: {name + ': ' if len(projected) > 1 else ''}{note}",
                style="yellow",
                markup=False,
            )
    if report is not None:
        for name, path in write_report(projected, report).items():
            screen.print(f"{name:11} {path}", markup=False)
