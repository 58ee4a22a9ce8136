"""Building blocks of `ebbline doctor`'s checks: findings, commands with a timeout, connections.

Heavy imports happen in a process of their own.
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
    """The result of one check. `remedy` is one line; it is empty when the verdict is ok."""

    check: str
    verdict: Literal["ok", "warning", "problem"]
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class ExecutorCheck:
    """The findings on an executor, and its GPU types (None: unknown)."""

    findings: tuple[Finding, ...] = ()
    gpu_types: tuple[str, ...] | None = None


def run(command: Sequence[str], stdin: str = "") -> "subprocess.CompletedProcess[str] | str":
    """Run a command. Returns the completed process, or a one-line reason if it failed."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=LONGEST_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return one_line(error)
    if done.returncode == 0:
        return done
    return ((done.stderr or done.stdout).strip() or f"exit code {done.returncode}").splitlines()[-1]


def run_module(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module of this package in a new process. Returns the JSON on its last line of output,
    or `{"error": reason}`.
    """
    done = run([sys.executable, "-P", "-m", module, *arguments])
    if isinstance(done, str):
        return {"error": done}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def unreachable(host: str, port: int) -> str:
    """The reason why `host:port` accepts no connection; empty when it accepts one."""
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        return f"{host}:{port} {one_line(error)}"
    return ""


def one_line(error: BaseException) -> str:
    """The type and message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
