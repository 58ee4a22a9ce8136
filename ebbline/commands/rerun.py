"""`ebbline rerun`: rerun one stage in this process, where a debugger works, from the request.json
of a failure.

The result goes into a new folder and never into the store, so the study does not change.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.workplace import workplace
from ebbline.tasks.errors import StoreError
from ebbline.tasks.stage import Request
from ebbline.tasks.worker import run_stages


def rerun(where: str, as_json: bool = False) -> int:
    """Rerun the stage of a request.json, given by path or by URL in a bucket. Returns 0 on success,
    else 1.

    Raises StoreError when the request is missing or cannot be read.
    """
    request = _of_bucket(where) if "://" in where else _of_folder(Path(where))
    (report,) = run_stages([request])
    if report.error is not None:
        print(report.traceback, file=sys.stderr)
        print(report.error, file=sys.stderr)
        if as_json:
            failure = {"error": report.error, "kind": report.error_type, "exit_code": 1}
            print(json.dumps(failure, indent=1))
        return 1
    if as_json:
        result = {"kind": request.kind, "key": request.key, "out": request.out}
        print(json.dumps({**result, "seconds": round(report.seconds, 3)}, indent=1))
        return 0
    print(f"{request.kind} {request.key[:12]} done in {report.seconds:.1f} s: {request.out}")
    return 0


def _of_folder(path: Path) -> Request:
    """The request. One of a store has the digests of its inputs' files, which its stage checks."""
    try:
        request = Request.from_json(path.read_text("utf-8"))
        if request.out.split("/")[-4:-2] == [request.kind, request.key]:
            request = workplace(request).prepare()
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not a stage's request"
        raise StoreError(
            f"cannot read the request {path}: {why}; copy the path from the failure's message"
        ) from error
    return replace(request, out=tempfile.mkdtemp(prefix="rerun-", dir=path.parent))


def _of_bucket(url: str) -> Request:
    root, *names = url.rsplit("/", 5)
    if len(names) < 5 or root.endswith("/"):
        raise StoreError(f"{url} is not the URL of a request; copy it from the failure's message")
    name = "/".join(names)
    text = Store(root).place.read(name)
    if text is None:
        raise StoreError(f"there is no request at {url}; copy the URL from the failure's message")
    prepared = workplace(Request.from_json(text.decode())).prepare()
    folder = Path(tempfile.mkdtemp(prefix="ebbline-rerun-"))
    for part in ("payload", "log"):
        (folder / part).mkdir()
    return replace(prepared, out=str(folder / "payload"), log=str(folder / "log"))
