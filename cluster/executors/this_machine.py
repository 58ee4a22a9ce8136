"""The capacity of this machine: the GPUs that a process here may use, or logical GPUs if none.

CUDA_VISIBLE_DEVICES is read as CUDA reads it. Without NVIDIA's driver it means nothing.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ebbline.cluster.executors.choice import ExecutorOptions
from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, SLOTS, Capacity, Host

VISIBLE = "CUDA_VISIBLE_DEVICES"
_GPU = re.compile(r"GPU \d+: (?P<name>.*?) \(UUID: (?P<uuid>[^)]+)\)")
_PART = re.compile(r"\s+MIG .*\(UUID: (?P<uuid>[^)]+)\)")


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine. `parts` are the UUIDs of its MIG instances."""

    name: str
    uuid: str
    parts: tuple[str, ...] = ()


def capacity_here(options: ExecutorOptions) -> Capacity:
    """The capacity of an executor that uses this machine alone."""
    names = _own_gpus()
    if names is None:
        return Capacity((Host("here", options.logical_gpus, SLOTS),))
    # The same pattern as Ray's, so that types have Ray's names.
    found = re.search(r"(?:NVIDIA |Tesla )+([A-Z]+\d+[A-Za-z]*)", names[0]) if names else None
    return Capacity(
        (Host("here", len(names), SLOTS, {ACCELERATOR_TYPE: found[1]} if found else {}),)
    )


def _own_gpus() -> list[str] | None:
    """The names of the GPUs that a process here may use; None if there are none."""
    return list(visible_gpus().values()) or None


def visible_gpus() -> dict[str, str]:
    """The GPUs that a process here may use: their entries of CUDA_VISIBLE_DEVICES, and names."""
    if shutil.which("nvidia-smi") is None:
        return {}
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return chosen(os.environ.get(VISIBLE), parse_list(listed.stdout))


def parse_list(text: str) -> list[Gpu]:
    """The GPUs in the output of `nvidia-smi -L`."""
    gpus: list[Gpu] = []
    for line in text.splitlines():
        if found := _GPU.match(line):
            gpus.append(Gpu(found["name"], found["uuid"]))
        elif gpus and (found := _PART.match(line)):
            last = gpus.pop()
            gpus.append(Gpu(last.name, last.uuid, (*last.parts, found["uuid"])))
    return gpus


def chosen(setting: str | None, gpus: Sequence[Gpu]) -> dict[str, str]:
    """The entries of a value of CUDA_VISIBLE_DEVICES that name a GPU, with the GPU's name.

    As in CUDA, entries count up to the first that names none (`-1`, `NoDevFiles`, a number that is
    too large), and a device that is named twice hides all. Without a value, all GPUs count.
    """
    if setting is None:
        return {str(number): gpu.name for number, gpu in enumerate(gpus)}
    found: dict[str, str] = {}
    devices: set[str] = set()
    for entry in (part.strip() for part in setting.split(",")):
        named = _named(entry, gpus)
        if named is None:
            break
        device, name = named
        if device in devices:
            return {}
        devices.add(device)
        found[entry] = name
    return found


def _named(entry: str, gpus: Sequence[Gpu]) -> tuple[str, str] | None:
    """(UUID, name) of the device that an entry names: a number, or the beginning of one UUID."""
    if entry.isascii() and entry.isdigit():
        # Python rejects a number of thousands of digits.
        number = int(entry.lstrip("0")[:9] or "0")
        return (gpus[number].uuid, gpus[number].name) if number < len(gpus) else None
    # The older form of a MIG name: MIG-GPU-UUID/INSTANCE/INSTANCE.
    whole = entry.removeprefix("MIG-").partition("/")[0] if "/" in entry else entry
    if not whole.startswith(("GPU-", "MIG-")) or whole in ("GPU-", "MIG-"):
        return None
    matches = [
        (entry if "/" in entry else uuid, gpu.name)
        for gpu in gpus
        for uuid in (gpu.uuid, *gpu.parts)
        if uuid.startswith(whole)
    ]
    return matches[0] if len(matches) == 1 else None


@contextmanager
def only_visible(gpus: Mapping[str, str]) -> Iterator[None]:
    """Let Ray start with these GPUs. Without GPUs the variable is removed, because Ray rejects more
    logical GPUs than it lists.
    """
    before = os.environ.get(VISIBLE)
    if not gpus:
        os.environ.pop(VISIBLE, None)
    elif before is not None:
        os.environ[VISIBLE] = ",".join(gpus)
    try:
        yield
    finally:
        if before is not None:
            os.environ[VISIBLE] = before


@contextmanager
def patched_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside a `with`."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
