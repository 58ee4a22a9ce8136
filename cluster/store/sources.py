"""Uploads models and data from the driver's machine to the bucket, once for each content, and
fetches them on workers.

STORE/sources/CONTENT/NAME      a file whose sha256 is CONTENT
STORE/sources/CONTENT/...       the files of a folder
STORE/sources/CONTENT.json      name -> sha256 of a folder's files; written last, so it marks a
                                complete upload
"""

import json
import logging
from pathlib import Path

from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.cache import MEND
from ebbline.tasks.errors import PinError, StoreError, UnstableValue
from ebbline.tasks.headers.hub import HUB
from ebbline.tasks.identity import digest_files, file_digest, folder_files
from ebbline.tasks.stage import Source

SOURCES = "sources"
_log = logging.getLogger(__name__)


def location_for_workers(store: Store, source: Source) -> str:
    """Where workers find a source: its own location if they can read it, else its URL in the store,
    after an upload if needed.

    Raises PinError when the folder does not match its pin.
    """
    if store.cache is None or source.location.startswith(HUB):
        return source.location
    path, name = Path(source.location), f"sources/{source.content}"
    if path.is_file():
        target = f"{name}/{path.name}"
        if path.name not in store.sizes(name):
            _require_pinned(path, file_digest(path), source)
            _log.info("uploading %s to %s", path, store.url(target))
            store.place.send(path, target)
        return store.url(target)
    if store.place.read(f"{name}.json") is None:
        files = folder_files(path)
        _require_pinned(path, digest_files(files), source)
        _log.info("uploading the %d files of %s to %s", len(files), path, store.url(name))
        uploaded = store.sizes(name)
        for file in files:
            if uploaded.get(file) != (path / file).stat().st_size:
                store.place.send(path / file, f"{name}/{file}")
        store.place.create(f"{name}.json", json.dumps(files).encode())
    return store.url(name)


def _require_pinned(path: Path, found: str, source: Source) -> None:
    if found != source.content:
        raise PinError(
            f"{path} does not match the study's pin; restore it, or pin the new content with "
            "`ebbline pin`"
        )


def fetch_source(store: Store, path: Path) -> Path:
    """Fetch a source into the cache of a worker's machine. `path` is its path there; the caller
    holds the entry.
    """
    assert store.cache is not None
    _, content, *name = path.relative_to(store.root).parts
    text = None if name else store.place.read(f"sources/{content}.json")
    files = {name[0]: content} if name else listed(content, text or b"")
    prefix = f"sources/{content}"
    folder = store.root / prefix
    store.cache.fetch(
        folder,
        files,
        lambda: store.sizes(prefix),
        lambda file, to: store.place.receive(f"{prefix}/{file}", to),
    )
    return path


def listed(content: str, text: bytes) -> dict[str, str]:
    """Name -> sha256 of an uploaded folder's files. Raises StoreError when its list is damaged."""
    try:
        files: dict[str, str] = json.loads(text)
        if digest_files(files) == content:
            return files
    except (ValueError, UnstableValue):
        pass
    raise StoreError(f"the list sources/{content}.json is missing or damaged; {MEND}")
