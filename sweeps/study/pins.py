"""Pins: the references of a study without one, the check of the rows that a study names, and a copy
of a study file with the commit and the content digest of all outside content.

A pin of a local file or folder is the digest of its bytes. A pin of a hub snapshot is its commit
and the hub's file hashes; nothing is downloaded.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ebbline.sweeps.study.references import Data, DataRef, Hub, Local
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import (
    differences_but_pins,
    parse,
    source_of,
    with_pins,
)
from ebbline.sweeps.study.suites import require_prompts
from ebbline.tasks.data.conversations import read_conversations
from ebbline.tasks.errors import DataError, EbblineError, PinError, StudyError
from ebbline.tasks.files import write_whole
from ebbline.tasks.identity import content_digest, digest
from ebbline.tasks.specs import Frozen


def pin_study(name: str, to: Path, update: bool = False) -> Iterator[str]:
    """Write the study to `to` with every pin that can be computed; yield a line for each.

    With `update`, `to` may exist: its pins of local files and folders that changed are replaced,
    and nothing else of it. A pin of the hub stays, because it names a commit.

    Relative paths start at the new file's folder. Raises StudyError when `to` is another existing
    file, and DataError, before anything is written, for rows that a stage could not read. Raises
    PinError for references without a pin, after writing the others.
    """
    source = source_of(name)
    text = source.read_text("utf-8")
    if to.exists() and to.resolve() != source.resolve():
        if not update:
            raise StudyError(
                f"{to} exists; to add the pins that it lacks, run `ebbline pin {to} --to {to}`, "
                f"and to pin files that changed anew, add --update"
            )
        text = _text_to_update(source, to)
    study = parse(to, text)
    require_rows(study)
    pins, failed = {}, []
    for where, reference in references(study) if update else unpinned(study):
        try:
            pin = _pin(where, reference)
            if pin is None:
                continue
            pins[where] = pin
            before = f"{reference.sha256[:12]} -> " if reference.sha256 is not None else ""
            yield (
                f"{where}: "
                f"{' '.join(f'{field} {before}{value[:12]}' for field, value in pin.items())}"
            )
        except EbblineError as error:
            failed.append(f"  {where}: {error}")
    pinned = with_pins(text, pins)
    write_whole(to, lambda fresh: fresh.write_text(pinned, "utf-8"))
    if failed:
        raise PinError(
            f"{to} was written, but {len(failed)} of its references could not be pinned:\n"
            + "\n".join(failed)
            + f"\nCorrect them, then run `ebbline pin {to} --to {to}`."
        )


def _pin(where: str, reference: Local | Hub) -> dict[str, str] | None:
    """The pin that a reference lacks, or that replaces one of changed local content; else None."""
    if isinstance(reference, Hub):
        pinned = reference.sha256 is not None and reference.commit is not None
        return None if pinned else hub_pin(reference, where)
    found = local_pin(reference)
    return None if found["sha256"] == reference.sha256 else found


def _text_to_update(source: Path, to: Path) -> str:
    """The text of an existing pinned file. Raises StudyError when it is no copy of the source."""
    apart = differences_but_pins(to, source)
    if apart:
        lines = "\n".join(f"  {line}" for line in apart[:5])
        raise StudyError(
            f"{to} has other settings than {source}, and --update changes pins only:\n{lines}\n"
            f"To update its own pins, run `ebbline pin {to} --update`"
        )
    return to.read_text("utf-8")


def require_rows(study: Study) -> None:
    """Raise DataError naming every set of rows on this machine that a stage could not read. Sets
    that are elsewhere are read when a stage needs them.
    """
    sets: list[tuple[str, DataRef, Callable[[Path], object]]] = [
        (f"{where}.{name}", reference, read_conversations)
        for where, data in _training_data(study)
        for name, reference in (("pool", data.pool), ("mix", data.mix))
        if reference is not None
    ]
    sets += [
        (f"suites.{name}.prompts", entry.prompts, partial(require_prompts, entry.measure))
        for name, entry in study.suites.items()
    ]
    failed = []
    for where, reference, read in sets:
        try:
            if reference.path is not None:
                read(reference.path.located())
        except DataError as error:
            failed.append(f"  {where}: {error}")
        except PinError:
            continue  # pinning and planning name a missing file
    if failed:
        raise DataError(
            f"study {study.study!r} names rows that cannot be read:\n" + "\n".join(failed)
        )


def _training_data(study: Study) -> Iterator[tuple[str, Data]]:
    yield "data", study.data
    for name, model in study.models.items():
        for role, reference in (("aligned", model.aligned), ("unaligned", model.unaligned)):
            if reference is not None and reference.tuned is not None:
                yield f"models.{name}.{role}.tuned.data", reference.tuned.data


def local_pin(reference: Local) -> dict[str, str]:
    return {"sha256": content_digest(reference.located())}


def hub_pin(reference: Hub, where: str) -> dict[str, str]:
    """The digest of a hub snapshot's file hashes, and its commit: the one in the study file or the
    latest.
    """
    from httpx2 import HTTPError  # raised by huggingface_hub when the hub is unreachable
    from huggingface_hub import HfApi  # only pinning and workers talk to the hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo_type = "model" if where.startswith("models.") else "dataset"
    try:
        look = HfApi().model_info if repo_type == "model" else HfApi().dataset_info
        info = look(reference.id, revision=reference.commit, files_metadata=True)
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PinError(
            f"the hub gave no information about {repo_type} {reference.id}: {reason} (gated models "
            "need `hf auth login`)"
        ) from error
    files = {
        item.rfilename: item.lfs.sha256 if item.lfs else item.blob_id
        for item in info.siblings or []
    }
    if reference.file is not None:
        if reference.file not in files:
            raise PinError(f"{reference.id} at {info.sha} has no file {reference.file!r}")
        files = {reference.file: files[reference.file]}
    return {"commit": str(info.sha), "sha256": digest({"files": files})}


def unpinned(study: Study) -> list[tuple[str, Local | Hub]]:
    """(path in the study file, reference) of all outside content without a pin."""
    return [
        (where, ref)
        for where, ref in references(study)
        if ref.sha256 is None or (isinstance(ref, Hub) and ref.commit is None)
    ]


def references(study: Study) -> Iterator[tuple[str, Local | Hub]]:
    """(path in the study file, reference) of all outside content."""

    def walk(value: Any, where: str) -> Iterator[tuple[str, Local | Hub]]:
        if isinstance(value, Local | Hub):
            yield where, value
        elif isinstance(value, Frozen):
            for name in type(value).model_fields:
                yield from walk(getattr(value, name), f"{where}.{name}" if where else name)
        elif isinstance(value, dict):
            for name, item in value.items():
                yield from walk(item, f"{where}.{name}")

    yield from walk(study, "")


def require_pins(study: Study) -> None:
    """Raise PinError naming every reference without a pin."""
    missing = unpinned(study)
    if missing:
        lines = "\n".join(
            f"  {where}: {ref.id if isinstance(ref, Hub) else ref.path}" for where, ref in missing
        )
        raise PinError(
            f"study {study.study!r} names content without a pin, so later changes of the content "
            f"would go unnoticed:\n{lines}\n"
            f"Run `ebbline pin {study.study} --to my-{study.study}.yaml`, which adds each "
            "commit and sha256."
        )
