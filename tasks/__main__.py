"""Run one stage from its request, as a worker would: `python -m tasks path/to/request.json`.

Every failure prints this command, so that it can be seen again in one process, under a debugger. What it makes goes into
a fresh folder beside the request and is not committed to the store.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

from tasks.stage import Request
from tasks.worker import run_stages


def main(path: Path) -> int:
    request = Request.from_json(path.read_text())
    out = path.parent / "rerun"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for report in run_stages([dataclasses.replace(request, out=str(out))]):
        if report.error is not None:
            print(report.traceback, file=sys.stderr)
            print(report.error, file=sys.stderr)
            return 1
        print(f"{request.kind} {request.key[:12]} done in {report.seconds:.1f} s: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
