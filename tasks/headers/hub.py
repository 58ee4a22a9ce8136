"""The local path of a pinned location: a folder, or a snapshot of the hub at its commit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ebbline.tasks.errors import EndpointDown, ModelError
from ebbline.tasks.paths import inside

HUB = "hub:"


def local_path(location: str, moving: Callable[[], None] = lambda: None) -> Path:
    """The local path of an input: the path itself, or a hub snapshot at its commit (downloaded
    once, then from the cache).

    `moving` is called while a download advances. Raises ModelError if the hub does not give the
    snapshot, EndpointDown if the hub does not answer.
    """
    if not location.startswith(HUB):
        return Path(location)
    from httpx2 import TransportError
    from huggingface_hub import snapshot_download  # only a study with hub models needs it
    from huggingface_hub.errors import LocalEntryNotFoundError
    from tqdm import tqdm

    class ReportingBar(tqdm):  # type: ignore[misc]  # tqdm is untyped
        def update(self, n: float | None = 1) -> Any:
            moving()
            return super().update(n)

    _, repo_type, name = location.split(":", 2)
    repo_id, _, rest = name.partition("@")
    commit, _, file = rest.partition("#")
    skip = ["*.bin", "*.pth", "*.pt", "*.gguf", "original/*"] if repo_type == "model" else None
    try:
        folder = snapshot_download(
            repo_id,
            revision=commit,
            repo_type=repo_type,
            ignore_patterns=skip,
            allow_patterns=file or None,
            tqdm_class=ReportingBar,
        )
    except (LocalEntryNotFoundError, TransportError) as error:
        raise EndpointDown(
            f"{repo_id} at {commit} is not on this machine, and the hub does not answer "
            f"({type(error).__name__}); once it answers, the same command continues"
        ) from error
    # The hub client raises it for a missing repository or commit, and without access
    except OSError as error:
        raise ModelError(
            f"{repo_id} at {commit} cannot be fetched from the hub: {type(error).__name__}: {error}"
        ) from error
    return inside(Path(folder), file, Path(location)) if file else Path(folder)
