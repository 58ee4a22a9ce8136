"""Pinning: the commit and content digest of everything that a study names from outside, written
into a copy of its file.

A local file or folder is pinned by its own bytes. A hub snapshot is pinned by its commit and the
hub's own file hashes, without downloading it.
"""

from collections.abc import Iterator
from pathlib import Path

from ebbline.sweeps.study.references import Hub, Local
from ebbline.sweeps.study.study import unpinned
from ebbline.sweeps.study.study_file import parse, source_of, with_pins
from ebbline.tasks.errors import EbblineError, PinError, StudyError
from ebbline.tasks.files import write_whole
from ebbline.tasks.identity import content_digest, digest


def pin_study(name: str, to: Path) -> Iterator[str]:
    """Write the study to `to` with every pin that can be found, yielding a line for each.

    Relative paths start at the new file's folder. Raises PinError, after writing the rest, for what
    could not be pinned; StudyError when `to` is there already and is another study's file.
    """
    source = source_of(name)
    text = source.read_text("utf-8")
    if to.exists() and to.resolve() != source.resolve():
        raise StudyError(
            f"{to} is there already; to pin what it still lacks, run `ebbline pin {to} --to {to}`"
        )
    pins, failed = {}, []
    for where, reference in unpinned(parse(to, text)):
        try:
            pins[where] = (
                hub_pin(reference, where) if isinstance(reference, Hub) else local_pin(reference)
            )
            yield (
                f"{where}: "
                f"{' '.join(f'{field} {value[:12]}' for field, value in pins[where].items())}"
            )
        except EbblineError as error:
            failed.append(f"  {where}: {error}")
    pinned = with_pins(text, pins)
    write_whole(to, lambda fresh: fresh.write_text(pinned, "utf-8"))
    if failed:
        raise PinError(
            f"{to} was written, but {len(failed)} of its references could not be pinned:\n"
            + "\n".join(failed)
            + f"\nMend them, then run `ebbline pin {to} --to {to}`."
        )


def local_pin(reference: Local) -> dict[str, str]:
    return {"sha256": content_digest(reference.located())}


def hub_pin(reference: Hub, where: str) -> dict[str, str]:
    """The commit that the hub gives now (or the one the file names) and the digest of its file
    hashes.
    """
    from httpx2 import HTTPError  # what huggingface_hub raises when the hub cannot be reached
    from huggingface_hub import HfApi  # only pinning and workers talk to the hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo_type = "model" if where.startswith("models.") else "dataset"
    try:
        look = HfApi().model_info if repo_type == "model" else HfApi().dataset_info
        info = look(reference.id, revision=reference.commit, files_metadata=True)
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PinError(
            f"the hub does not show {repo_type} {reference.id}: {reason} (gated models "
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
