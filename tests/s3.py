"""A server of the S3 protocol on the loopback, in a process of its own: `python -m tests.s3 PORT`.

moto looks whether an object exists and then writes it, in one thread a request: two creates could
both find nothing. S3 does not let that happen, so requests are taken one at a time here.
"""

import os
import socket
import sys
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

from tests.shared import in_background

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "tests-only-5f1c",
    "AWS_REGION": "us-east-1",
}


def main(port: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    application, one_at_a_time = DomainDispatcherApplication(create_backend_app), Lock()

    def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with one_at_a_time:
            return list(application(environ, start_response))

    run_simple("127.0.0.1", port, serve, threaded=True)


def start(place: Path) -> dict[str, Any]:
    """The run's server, once it answers, for tests.shared.server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = place / "log"
    process = in_background(
        [sys.executable, "-m", "tests.s3", str(port)], log, cwd=Path(__file__).parents[1]
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).read()
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"the S3 server did not start:\n{log.read_text()}") from None
            time.sleep(0.1)
    return {"pid": process.pid, "endpoint": f"http://127.0.0.1:{port}"}


def make_bucket(endpoint: str, name: str) -> None:
    with urllib.request.urlopen(
        urllib.request.Request(f"{endpoint}/{name}", method="PUT"), timeout=120
    ) as answer:
        answer.read()


def environment(endpoint: str) -> dict[str, str]:
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}


if __name__ == "__main__":
    os.environ.setdefault("MOTO_CALL_RESET_API", "false")
    main(int(sys.argv[1]))
