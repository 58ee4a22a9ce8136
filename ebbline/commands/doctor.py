"""`ebbline doctor`: test what a run needs, and print one line of remedy for each problem.

Every check has a time limit and removes what it creates. Checks that import torch, ray or wandb run
in their own process: `python -m ebbline.commands.doctor cuda|wandb` prints its finding as JSON.
"""

import json
import os
import platform
import shutil
import sys
import sysconfig
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ebbline.cluster.checks import Finding, one_line, run, run_module, unreachable
from ebbline.cluster.executors.choice import EXECUTORS, ExecutorKind
from ebbline.cluster.profile import Profile
from ebbline.cluster.store.bucket import Bucket
from ebbline.sweeps.study.database import shared_url, sqlite_url
from ebbline.sweeps.study.home import Home
from ebbline.tasks.errors import EvaluationError, StoreError, StudyError
from ebbline.tasks.measuring.served.client import Client
from ebbline.tasks.measuring.served.place import VERSION_OF_VLLM, ServerPlace, is_version

LOW_DISK_GB, LOW_MEMORY_GB = 20.0, 8.0
IMPATIENT = {"max_retries": 1, "retry_timeout": timedelta(seconds=10)}


def examine(home: Home, address: str | None) -> list[Finding]:
    """Run all checks in parallel. `address` is Ray's; None means the profile's."""
    profile = home.profile
    parts: list[Callable[[], Sequence[Finding]]] = [
        lambda: [_versions()],
        lambda: [_gpus()],
        lambda: [_compiler()],
        lambda: [_memory()],
        lambda: _disks(home),
        *(partial(_executor, kind, address or profile.address, profile) for kind in EXECUTORS),
        *(partial(_server, backend, place) for backend, place in profile.servers.items()),
        lambda: [_wandb()],
        lambda: [_hub()],
        lambda: [_store(home)],
        lambda: [_database(home)],
    ]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [finding for found in pool.map(lambda part: part(), parts) for finding in found]


def print_findings(findings: Sequence[Finding], as_json: bool) -> int:
    """Print the findings; the exit code is 1 when one is a problem."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.verdict:8} {finding.check:9} {finding.seen}")
            if finding.remedy:
                print(f"{'':18} -> {finding.remedy}")
    return 1 if any(finding.verdict == "problem" for finding in findings) else 0


def _versions() -> Finding:
    needed = [name for kind in EXECUTORS for name in kind.packages]
    packages = ["ebbline", *needed, "torch"]
    named = ", ".join(f"{name} {version(name)}" for name in packages)
    return Finding("versions", "ok", f"Python {platform.python_version()}, {named}")


def _gpus() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", "ok", "no GPU: stages run on the CPU")
    listed = run(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    )
    if isinstance(listed, str):
        return Finding(
            "gpu",
            "problem",
            f"nvidia-smi failed: {listed}",
            "reinstall NVIDIA's driver, or restart the machine",
        )
    seen = "; ".join(listed.stdout.strip().splitlines()) or "nvidia-smi lists no GPU"
    torch = run_module(__name__, "cuda")
    if torch.get("devices", 0) == 0:
        why = torch.get("error") or (
            f"torch {torch['torch']}, built for CUDA {torch['built_for'] or 'none'}, can "
            "use none of them"
        )
        remedy = (
            "install torch with CUDA: pip install --force-reinstall "
            f"torch=={version('torch').partition('+')[0]}; or install a newer NVIDIA driver"
        )
        return Finding("gpu", "problem", f"{seen}; {why}", remedy)
    return Finding("gpu", "ok", f"{seen}; torch can use {torch['devices']}")


def _compiler() -> Finding:
    """Whether a C++ compiler works. On GPUs, some libraries compile kernels on first use. Stages on
    a CPU need no compiler.
    """
    compiler = os.environ.get("CXX", "c++")
    where = "; libraries may need to compile GPU kernels"
    if shutil.which(compiler) is None:
        return Finding(
            "compiler",
            "warning",
            f"no C++ compiler {compiler!r}{where}",
            "on Debian: apt-get install g++",
        )
    command = [compiler, "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-x", "c++", "-"]
    tried = run(command, "#include <Python.h>\n#include <vector>\n")
    if isinstance(tried, str):
        remedy = (
            "on Debian: apt-get install g++ python3-dev; the headers must be in "
            f"{sysconfig.get_path('include')}"
        )
        return Finding(
            "compiler",
            "warning",
            f"{compiler} cannot compile against Python: {tried}{where}",
            remedy,
        )
    return Finding("compiler", "ok", f"{compiler} compiles against Python's headers")


def _memory() -> Finding:
    size_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    seen = f"{size_gb:.0f} GB of memory, {len(os.sched_getaffinity(0))} cores"
    if size_gb < LOW_MEMORY_GB:
        return Finding(
            "memory",
            "warning",
            seen,
            "a 7B model is loaded into memory before it moves to the GPU: use a machine with 32 GB",
        )
    return Finding("memory", "ok", seen)


def _disks(home: Home) -> list[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return [
        _disk("home", home.root, "give another --home, or set EBBLINE_HOME"),
        _disk("models", Path(HF_HUB_CACHE), "set HF_HOME to a folder on a larger disk"),
    ]


def _disk(check: str, folder: Path, remedy: str) -> Finding:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free_gb = shutil.disk_usage(existing).free / 1e9
    seen = f"{folder}: {free_gb:.0f} GB free"
    if not os.access(existing, os.W_OK) or free_gb < 1:
        verb = "is full" if os.access(existing, os.W_OK) else "cannot be written"
        return Finding(check, "problem", f"{seen}, {existing} {verb}", remedy)
    return (
        Finding(check, "warning", seen, remedy)
        if free_gb < LOW_DISK_GB
        else Finding(check, "ok", seen)
    )


def _executor(kind: ExecutorKind, address: str, profile: Profile) -> list[Finding]:
    """What an executor needs, and whether the profile prices its GPUs."""
    checked = kind.check(address)
    prices = [] if checked.gpu_types is None else _prices(checked.gpu_types, profile)
    return [*checked.findings, *prices]


def _server(backend: str, place: ServerPlace) -> list[Finding]:
    """Whether a server of the profile is there, in the version that its name states."""
    try:
        stated = _stated_version(place)
    except EvaluationError as error:
        return [Finding("server", "problem", f"{backend}: {error}", "correct HOME/cluster.yaml")]
    if stated is not None and not is_version(backend, stated):
        remedy = (
            f"name it {backend.partition('==')[0]}=={stated} in HOME/cluster.yaml and in suites"
        )
        return [Finding("server", "problem", f"{backend} is version {stated}", remedy)]
    unsaid = " (it states no version)" if stated is None else ""
    return [Finding("server", "ok", f"{backend} at {place.python or place.address}{unsaid}")]


def _stated_version(place: ServerPlace) -> str | None:
    """The version of a server, None if it states none. Raises EvaluationError if it is not
    there.
    """
    if place.address is not None:
        client = Client(place.address)
        try:
            client.models()
            return client.version()
        finally:
            client.close()
    done = run([str(place.python), "-c", VERSION_OF_VLLM])
    if isinstance(done, str):
        raise EvaluationError(f"{place.python}: {done}")
    return done.stdout.strip()


def _prices(types: Sequence[str], profile: Profile) -> list[Finding]:
    unpriced = [name for name in types if name not in profile.gpus and "other" not in profile.gpus]
    if unpriced:
        remedy = (
            "in HOME/cluster.yaml: gpus: "
            f"{{{', '.join(f'{name}: {{usd_per_hour: ...}}' for name in unpriced)}}}"
        )
        return [
            Finding(
                "prices",
                "warning",
                f"no price for {', '.join(unpriced)}: costs are in GPU-hours only",
                remedy,
            )
        ]
    if types:
        return [Finding("prices", "ok", f"the profile prices {', '.join(types)}")]
    logical = profile.gpus.get("other")
    priced = (
        f"; a logical GPU-hour costs ${logical.usd_per_hour:g}, the profile's `other`"
        if logical
        else " that has a price"
    )
    return [Finding("prices", "ok", f"no real GPU{priced}")]


def _wandb() -> Finding:
    mode = os.environ.get("WANDB_MODE", "")
    found = run_module(__name__, "wandb")
    if "error" in found:
        return Finding(
            "wandb",
            "warning",
            found["error"],
            "runs stay offline; `wandb login` repairs the credentials",
        )
    if mode in ("offline", "dryrun", "disabled"):
        return Finding("wandb", "ok", f"WANDB_MODE={mode}")
    if found["logged_in"]:
        return Finding(
            "wandb", "ok", "credentials found; runs are shown online (the login was not tested)"
        )
    seen = (
        f"not logged in, and WANDB_MODE={mode}"
        if mode
        else "not logged in: runs stay offline, in HOME/studies/NAME/wandb"
    )
    return Finding(
        "wandb",
        "problem" if mode else "warning",
        seen,
        "`wandb login` or WANDB_API_KEY; or WANDB_MODE=offline to stay offline",
    )


def _hub() -> Finding:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if get_token() is not None:
        return Finding(
            "hub",
            "ok",
            "token found (not tested)" + ("; HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else ""),
        )
    remedy = "`hf auth login` or HF_TOKEN, after accepting the model's licence on the hub"
    return Finding(
        "hub", "warning", "no token: gated models (Llama 2) cannot be downloaded", remedy
    )


def _store(home: Home) -> Finding:
    """Create an object in the store, try to create it twice, read it back and delete it, as a run
    does.
    """
    named = home.profile.store or ""
    place = Bucket(named, IMPATIENT) if "://" in named else home.store.place
    name, content = f"doctor/{uuid.uuid4().hex}", b"ebbline doctor"
    remedy = "check `store:` in HOME/cluster.yaml and the rights to that folder"
    if "://" in named:
        remedy = (
            "check `store:` in HOME/cluster.yaml, AWS_ENDPOINT_URL, AWS_REGION, and that the "
            "credentials may get, put and delete there"
        )
    try:
        place.create(name, content)
        try:
            twice, same = place.create(name, b"second"), place.read(name) == content
        finally:
            place.delete([name])
    except StoreError as error:
        return Finding("store", "problem", " ".join(str(error).split()), remedy)
    if twice:
        return Finding(
            "store",
            "problem",
            f"{place.at} lets two writers create one name",
            "use a store with conditional writes (If-None-Match)",
        )
    if not same:
        return Finding(
            "store", "problem", f"{place.at} returned other bytes than were written", remedy
        )
    return Finding("store", "ok", f"{place.at}: created once, read back, deleted")


def _database(home: Home) -> Finding:
    """Create, write, read and drop a table in the points' database."""
    from sqlalchemy import create_engine, make_url, text
    from sqlalchemy.exc import SQLAlchemyError

    scratch = home.root / f"doctor-{uuid.uuid4().hex[:8]}.db"
    remedy = (
        "check `storage:` in HOME/cluster.yaml: postgresql://USER@HOST/DATABASE, with the "
        "password in PGPASSWORD"
    )
    try:
        given = shared_url(home.profile.storage)
    except StudyError as error:
        return Finding("database", "problem", one_line(error), remedy)
    if given is None:
        remedy = (
            "SQLite needs a HOME that supports writes and locks; on network storage without "
            "locks use `storage: postgresql...`"
        )
    url = make_url(given or sqlite_url(scratch))
    seen = url.render_as_string(hide_password=True) if given else f"SQLite in {home.root}"
    if url.host:
        reason = unreachable(url.host, url.port or 5432)
        if reason:
            return Finding(
                "database",
                "problem",
                f"{seen} is not reachable: {reason}",
                f"start the server; or {remedy}",
            )
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    table = f"ebbline_doctor_{uuid.uuid4().hex[:8]}"
    try:
        if given is None:
            home.root.mkdir(parents=True, exist_ok=True)
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text(f"CREATE TABLE {table} (n INTEGER)"))
            connection.execute(text(f"INSERT INTO {table} VALUES (1)"))
            connection.execute(text(f"SELECT n FROM {table}")).scalar_one()
            connection.execute(text(f"DROP TABLE {table}"))
        engine.dispose()
    except (SQLAlchemyError, ImportError, OSError) as error:
        return Finding("database", "problem", f"{seen}: {one_line(error)}", remedy)
    finally:
        scratch.unlink(missing_ok=True)
    return Finding("database", "ok", f"{seen}: written and read back")


def _cuda() -> dict[str, Any]:
    import torch

    return {
        "devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "torch": torch.__version__,
        "built_for": torch.version.cuda,
    }


def _logged_in() -> dict[str, Any]:
    from ebbline.analysis.wandb.runs import chosen_mode

    os.environ.pop("WANDB_MODE", None)  # the finding is about the login alone
    return {"logged_in": chosen_mode() == "online"}


if __name__ == "__main__":
    probes: dict[str, Callable[[], dict[str, Any]]] = {
        "cuda": _cuda,
        "wandb": _logged_in,
    }
    print(json.dumps(probes[sys.argv[1]]()))
