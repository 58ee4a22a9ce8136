"""Starting a vLLM server of this process's own, and ending it.

It listens on the loopback interface, at a free port, and answers only requests with a key that is
drawn for it and given to it in its environment. It serves the model under a drawn name, so that no
other server can be taken for it. It ends when this process ends, in whatever way (`guard.py`).
"""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ebbline.tasks.errors import EndpointDown, EvaluationError, Leaving
from ebbline.tasks.measuring.served import guard
from ebbline.tasks.measuring.served.client import Client
from ebbline.tasks.measuring.served.place import ServerPlace
from ebbline.tasks.measuring.served.wanted import Wanted
from ebbline.tasks.models.weights import require_model_folder
from ebbline.tasks.stage import Context

LOG = "server.log"
START_S = 1800.0  # for weights from a slow disk, and kernels that are compiled
POLL_S = 0.2
PORTS = 3  # another process may take a free port before the server does
MOST_ADAPTERS = 8  # on the device at once; the server swaps others in


def started(
    wanted: Wanted, place: ServerPlace, ctx: Context
) -> "tuple[Client, str, ServerProcess]":
    """A vLLM server that is ready: its client, the model's name there, and its process. Raises
    EndpointDown if it does not start.
    """
    require_model_folder(wanted.model)
    log = ctx.log / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    name, key = f"ebbline-{secrets.token_hex(8)}", secrets.token_urlsafe(32)
    for attempt in range(PORTS):
        port = _free_port()
        process = ServerProcess(
            command(wanted, place, name, port, ctx), environment(place, key, ctx.device), log
        )

        def failed(reason: str, process: "ServerProcess" = process) -> EvaluationError:
            state = "does not answer" if process.is_running else "has ended"
            return EndpointDown(
                f"the server {wanted.backend} {state} ({reason}); its log is {log}. The same "
                "command continues"
            )

        client = Client(f"http://127.0.0.1:{port}", key, failed)
        try:
            if _is_up(process, client, name, wanted.backend, ctx):
                return client, name, process
            code = process.end()
        except BaseException:
            client.close()
            process.end()
            raise
        client.close()
        if attempt + 1 == PORTS or "ddress already in use" not in _tail(log):
            raise EndpointDown(
                f"the server {wanted.backend} did not start with {place.python} (exit code "
                f"{code}); its log is {log}. `ebbline doctor` tries that interpreter; the same "
                "command continues"
            )
    raise AssertionError("unreachable")


def _is_up(process: "ServerProcess", client: Client, name: str, backend: str, ctx: Context) -> bool:
    """Wait for the server. False if it ended."""
    began = time.monotonic()
    while process.is_running:
        if client.is_ready() and name in client.models():
            return True
        if ctx.leaving():
            raise Leaving("the machine is about to go; this stage had not begun")
        waited_s = time.monotonic() - began
        if waited_s > START_S:
            raise EndpointDown(
                f"the server {backend} was not ready after {START_S:.0f} s; its log is "
                f"{ctx.log / LOG}"
            )
        ctx.progress(0, 1, f"starting {backend}, {waited_s:.0f} s")
        time.sleep(POLL_S)
    return False


def command(wanted: Wanted, place: ServerPlace, name: str, port: int, ctx: Context) -> list[str]:
    """The command that starts the server; it holds no secret.

    The model's own decoding settings are not read, no code of its folder runs, and no prefixes are
    shared between requests.
    """
    words = [
        *(
            str(place.python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(wanted.model),
        ),
        *("--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", wanted.dtype, "--load-format", "safetensors", "--seed", "0"),
        *("--max-model-len", str(wanted.tokens), "--max-num-seqs", str(wanted.rows)),
        *("--generation-config", "vllm", "--no-enable-prefix-caching"),
        *("--disable-log-stats", "--disable-uvicorn-access-log", "--no-enable-log-requests"),
    ]
    if wanted.quantisation == "nf4":
        words += ["--quantization", "bitsandbytes"]
    if wanted.rank:
        words += ["--enable-lora", "--max-lora-rank", str(wanted.rank)]
        # Without the head: on a CPU vLLM 0.32 ends at the log-probabilities of two prompts at once
        # where a head may be adapted (punica_cpu.py, add_lora_logits)
        words += ["--lora-target-modules", *sorted(wanted.names)]
        words += ["--max-loras", str(max(1, min(MOST_ADAPTERS, wanted.adapters)))]
    if ctx.device == "cpu":
        words += ["--enforce-eager"]
    else:
        words += ["--gpu-memory-utilization", str(place.gpu_share)]
        words += ["--tensor-parallel-size", str(max(1, ctx.gpus))]
    return words


def environment(place: ServerPlace, key: str, device: str) -> dict[str, str]:
    """The server's environment: this process's, with its GPUs, and without Python's own settings,
    which are for another interpreter.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    fixed = {
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # Batch-invariant kernels: a completion does not depend on the requests beside it
    fixed |= (
        {"VLLM_CPU_KVCACHE_SPACE": str(place.cache_gb)}
        if device == "cpu"
        else {"VLLM_BATCH_INVARIANT": "1"}
    )
    return own | fixed


class ServerProcess:
    """A command under a guard: it ends when this process does."""

    def __init__(self, words: list[str], environ: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as handle:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", str(guard.__file__), *words],
                stdin=subprocess.PIPE,
                stdout=handle,
                stderr=handle,
                env=dict(environ),
                start_new_session=True,  # an interrupt at the terminal is this process's to handle
            )

    @property
    def pid(self) -> int:
        """The process ID of its guard."""
        return self._guard.pid

    @property
    def is_running(self) -> bool:
        return self._guard.poll() is None

    def end(self) -> int:
        """Its exit code, after it has ended."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            return self._guard.wait(3 * guard.GRACE_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            return self._guard.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _tail(log: Path) -> str:
    return log.read_text("utf-8", errors="replace")[-20000:]
