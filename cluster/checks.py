"""Parts of `ebbline doctor`'s checks: what one found, and how it looks without waiting for ever or
importing what is heavy.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

CONNECT_S = 5.0
LONGEST_S = 60.0


@dataclass(frozen=True)
class Finding:
    """What one check saw. `remedy` is one line, and empty when all is well."""

    check: str
    verdict: Literal["ok", "warning", "problem"]
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class ExecutorCheck:
    """What the check of an executor found, and the types of GPU it would use; None when that is
    unknown.
    """

    findings: tuple[Finding, ...] = ()
    gpu_types: tuple[str, ...] | None = None


def run(command: Sequence[str], given: str = "") -> "subprocess.CompletedProcess[str] | str":
    """A command that ended well, or one line that says why not."""
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=LONGEST_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return one_line(error)
    if done.returncode == 0:
        return done
    return ((done.stderr or done.stdout).strip() or f"exit code {done.returncode}").splitlines()[-1]


def run_module(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON that a module of ours prints last, in a process of its own; `error` says why there
    is none.
    """
    done = run([sys.executable, "-P", "-m", module, *arguments])
    if isinstance(done, str):
        return {"error": done}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def unreachable(host: str, port: int) -> str:
    """Why nothing listens there; empty when something does."""
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        return f"{host}:{port} {one_line(error)}"
    return ""


def one_line(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
