"""Pins: the references of a study without one, the check of the rows that a study names, and a copy
of a study file with the commit and the content digest of all outside content.

A pin of a local file or folder is the digest of its bytes. A pin of a hub snapshot is its commit
and the hub's file hashes; nothing is downloaded.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebbline.sweeps.study.reading.row_sets import row_sets
from ebbline.sweeps.study.reading.yaml_text import text_of
from ebbline.sweeps.study.references import Hub, Local
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import (
    differences_but_pins,
    parse,
    shipped,
    source_of,
    with_pins,
)
from ebbline.tasks.errors import DataError, EbblineError, EvaluationError, PinError, StudyError
from ebbline.tasks.files import write_whole
from ebbline.tasks.identity import digest
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
    text = text_of(source)
    if to.exists() and to.resolve() != source.resolve():
        if not update:
            raise StudyError(
                f"{to} exists; to add the pins that it lacks, run `ebbline pin {to} --to {to}`, "
                f"and to pin files that changed anew, add --update"
            )
        text = _text_to_update(source, to)
    study = parse(to, text, to if to.exists() else source)
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
    return text_of(to)


def require_rows(study: Study) -> None:
    """Raise DataError naming every set of rows on this machine that a stage could not read. Sets
    that are elsewhere are read when a stage needs them.
    """
    failed = []
    for each in row_sets(study):
        try:
            if each.reference.path is not None:
                each.read(each.reference.path.located())
        except (DataError, EvaluationError) as error:
            failed.append(f"  {each.where}: {error}")
        except PinError:
            continue  # pinning and planning name a missing file
    if failed:
        raise DataError(
            f"study {study.study!r} names rows that cannot be read:\n" + "\n".join(failed)
        )


def local_pin(reference: Local) -> dict[str, str]:
    return {"sha256": reference.content()}


def hub_pin(reference: Hub, where: str) -> dict[str, str]:
    """The digest of a hub snapshot's file hashes, and its commit: the one in the study file or the
    latest.
    """
    from httpx2 import HTTPError  # raised by huggingface_hub when the hub is unreachable
    from huggingface_hub import HfApi  # only pinning and workers talk to the hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    is_model = where.startswith(("models.", "adapters.", "judges."))
    repo_type = "model" if is_model else "dataset"
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


def require_pins(study: Study, source: str | None = None) -> None:
    """Raise PinError naming every reference without a pin. `source` is the study's file or its name
    on the command line.
    """
    missing = unpinned(study)
    if missing:
        lines = "\n".join(
            f"  {where}: {ref.id if isinstance(ref, Hub) else ref.path}" for where, ref in missing
        )
        raise PinError(
            f"study {study.study!r} names content without a pin, so later changes of the content "
            f"would go unnoticed:\n{lines}\n"
            f"Run `{pin_command(source or study.study)}`, which adds each commit and sha256."
        )


def pin_command(source: str) -> str:
    """The command that pins a study, with a new file for its result beside the study's own."""
    if source in shipped():
        return f"ebbline pin {source} --to my-{source}.yaml"
    path = Path(source)
    pinned = path.with_name(f"{path.stem}-pinned.yaml")
    return shlex.join(["ebbline", "pin", source, "--to", str(pinned)])
