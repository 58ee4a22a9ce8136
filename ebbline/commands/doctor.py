"""`ebbline doctor`: what a run will need, tried for real, with one line of remedy for each thing
that is not there.

Nothing here waits without a limit, and nothing stays behind. What imports torch, ray or wandb runs
in a process of its own: `python -m ebbline.commands.doctor cuda|wandb` prints its finding as
JSON.
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
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.storage import shared_url, sqlite_url
from ebbline.tasks.errors import StoreError, StudyError

LOW_DISK_GB, LOW_MEMORY_GB = 20.0, 8.0
IMPATIENT = {"max_retries": 1, "retry_timeout": timedelta(seconds=10)}


def examine(home: Home, address: str | None) -> list[Finding]:
    """Every check, several at a time; `address` is Ray's, the profile's when None."""
    profile = home.profile
    parts: list[Callable[[], Sequence[Finding]]] = [
        lambda: [_versions()],
        lambda: [_gpus()],
        lambda: [_compiler()],
        lambda: [_memory()],
        lambda: _disks(home),
        *(partial(_executor, kind, address or profile.address, profile) for kind in EXECUTORS),
        lambda: [_wandb()],
        lambda: [_hub()],
        lambda: [_store(home)],
        lambda: [_database(home)],
    ]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [finding for found in pool.map(lambda part: part(), parts) for finding in found]


def tell(findings: Sequence[Finding], as_json: bool) -> int:
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
    asked = run(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    )
    if isinstance(asked, str):
        return Finding(
            "gpu",
            "problem",
            f"nvidia-smi says nothing: {asked}",
            "install NVIDIA's driver again, or restart the machine",
        )
    seen = "; ".join(asked.stdout.strip().splitlines()) or "nvidia-smi lists no GPU"
    torch = run_module(__name__, "cuda")
    if torch.get("devices", 0) == 0:
        why = torch.get("error") or (
            f"torch {torch['torch']}, built for CUDA {torch['built_for'] or 'none'}, can "
            "use none of them"
        )
        remedy = (
            "put CUDA's torch in: pip install --force-reinstall "
            f"torch=={version('torch').partition('+')[0]}; or a newer NVIDIA driver"
        )
        return Finding("gpu", "problem", f"{seen}; {why}", remedy)
    return Finding("gpu", "ok", f"{seen}; torch can use {torch['devices']}")


def _compiler() -> Finding:
    """No stage on a CPU needs one. On GPUs, libraries compile kernels of theirs on first use where
    their wheels lack them.
    """
    compiler = os.environ.get("CXX", "c++")
    where = "; libraries may want to compile GPU kernels"
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
            "on Debian: apt-get install g++ python3-dev; the headers belong in "
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
            "a 7B model is read into memory before it reaches the GPU: take a machine with 32 GB",
        )
    return Finding("memory", "ok", seen)


def _disks(home: Home) -> list[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return [
        _disk("home", home.root, "another --home, or EBBLINE_HOME"),
        _disk("models", Path(HF_HUB_CACHE), "HF_HOME on a larger disk"),
    ]


def _disk(check: str, folder: Path, remedy: str) -> Finding:
    there = folder
    while not there.exists():
        there = there.parent
    free_gb = shutil.disk_usage(there).free / 1e9
    seen = f"{folder}: {free_gb:.0f} GB free"
    if not os.access(there, os.W_OK) or free_gb < 1:
        verb = "is full" if os.access(there, os.W_OK) else "cannot be written"
        return Finding(check, "problem", f"{seen}, {there} {verb}", remedy)
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
                f"no price for {', '.join(unpriced)}: costs are told in GPU-hours only",
                remedy,
            )
        ]
    if types:
        return [Finding("prices", "ok", f"the profile prices {', '.join(types)}")]
    logical = profile.gpus.get("other")
    priced = (
        f"; hours of logical ones are told at ${logical.usd_per_hour:g}, the profile's `other`"
        if logical
        else " whose hours cost"
    )
    return [Finding("prices", "ok", f"no real GPU{priced}")]


def _wandb() -> Finding:
    asked = os.environ.get("WANDB_MODE", "")
    found = run_module(__name__, "wandb")
    if "error" in found:
        return Finding(
            "wandb",
            "warning",
            found["error"],
            "runs are kept offline; `wandb login` mends the credentials",
        )
    if asked in ("offline", "dryrun", "disabled"):
        return Finding("wandb", "ok", f"{asked}, by WANDB_MODE")
    if found["logged_in"]:
        return Finding(
            "wandb", "ok", "credentials are there; runs are shown online (not tried now)"
        )
    seen = (
        f"not logged in, and WANDB_MODE={asked}"
        if asked
        else "not logged in: runs are kept offline, in HOME/studies/NAME/wandb"
    )
    return Finding(
        "wandb",
        "problem" if asked else "warning",
        seen,
        "`wandb login` or WANDB_API_KEY; or WANDB_MODE=offline if this is meant",
    )


def _hub() -> Finding:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if get_token() is not None:
        return Finding(
            "hub",
            "ok",
            "a token is there (not tried now)"
            + ("; HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else ""),
        )
    remedy = "`hf auth login` or HF_TOKEN, after accepting the model's licence on the hub"
    return Finding("hub", "warning", "no token: gated models (Llama 2) cannot be fetched", remedy)


def _store(home: Home) -> Finding:
    """One object is created, refused a second time, read back and deleted, where the artifacts lie
    and as a run would do it.
    """
    named = home.profile.store or ""
    place = Bucket(named, IMPATIENT) if "://" in named else home.store.place
    name, content = f"doctor/{uuid.uuid4().hex}", b"ebbline doctor"
    remedy = "`store:` in HOME/cluster.yaml and the rights to that folder"
    if "://" in named:
        remedy = (
            "`store:` in HOME/cluster.yaml, AWS_ENDPOINT_URL, AWS_REGION, and credentials that "
            "may get, put and delete there"
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
            "a store with conditional writes (If-None-Match)",
        )
    if not same:
        return Finding("store", "problem", f"{place.at} gave back other bytes than it took", remedy)
    return Finding("store", "ok", f"{place.at}: created once, read back, deleted")


def _database(home: Home) -> Finding:
    """A table is made, written and read in the Optuna storage's database, and nothing of it
    stays.
    """
    from sqlalchemy import create_engine, make_url, text
    from sqlalchemy.exc import SQLAlchemyError

    scratch = home.root / f"doctor-{uuid.uuid4().hex[:8]}.db"
    remedy = (
        "`storage:` in HOME/cluster.yaml: postgresql://USER@HOST/DATABASE, with the password "
        "in PGPASSWORD"
    )
    try:
        given = shared_url(home.profile.storage)
    except StudyError as error:
        return Finding("database", "problem", one_line(error), remedy)
    if given is None:
        remedy = (
            "SQLite needs a HOME that can be written and locked; on network storage without "
            "locks use `storage: postgresql...`"
        )
    url = make_url(given or sqlite_url(scratch))
    seen = url.render_as_string(hide_password=True) if given else f"SQLite in {home.root}"
    if url.host:
        silent = unreachable(url.host, url.port or 5432)
        if silent:
            return Finding(
                "database",
                "problem",
                f"{seen} is not reachable: {silent}",
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

    os.environ.pop("WANDB_MODE", None)  # asked here is what it would be without
    return {"logged_in": chosen_mode() == "online"}


if __name__ == "__main__":
    probes: dict[str, Callable[[], dict[str, Any]]] = {
        "cuda": _cuda,
        "wandb": _logged_in,
    }
    print(json.dumps(probes[sys.argv[1]]()))
