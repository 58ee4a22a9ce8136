"""Run one stage of a bucket's store again on this machine, as a worker would: `python -m cluster.again URL/log/request.json`.

Every failure prints this command (a folder's store needs only `python -m tasks`). What the stage makes goes into a fresh
folder, and nothing is committed.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from cluster.store import Store
from cluster.workplace import workplace
from tasks.errors import EbblineError, StoreError
from tasks.stage import Request
from tasks.worker import run_stages


def main(url: str) -> int:
    root, name = url.rsplit("/", 5)[0], "/".join(url.rsplit("/", 5)[1:])
    text = Store(root).place.read(name)
    if text is None:
        raise StoreError(f"there is no request at {url}")
    work = workplace(Request.from_json(text.decode()))
    folder = Path(tempfile.mkdtemp(prefix="ebbline-again-"))
    for part in ("payload", "log"):
        (folder / part).mkdir()
    here = replace(work.prepared(), out=str(folder / "payload"), log=str(folder / "log"))
    (report,) = run_stages([here])
    if report.error is not None:
        print(report.traceback, file=sys.stderr)
        print(report.error, file=sys.stderr)
        return 1
    print(f"{here.kind} {here.key[:12]} done in {report.seconds:.1f} s: {folder / 'payload'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except EbblineError as error:
        sys.exit(f"error: {error}")
