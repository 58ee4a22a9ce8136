"""What a worker's machine is doing: its processors, its memory, and the GPUs of this process.

GPUs are read through NVIDIA's library (nvidia-ml-py), which a machine without GPUs need not have.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil

EVERY_S = 2.0
GB = 1024**3


class Usage:
    """Reads at most every EVERY_S seconds. `device` is the device of the stage."""

    def __init__(self, device: str) -> None:
        self._gpus = list(_own_gpus()) if device != "cpu" else []
        self._read_at = float("-inf")
        psutil.cpu_percent()  # the first call starts the count

    def read(self) -> Mapping[str, float] | None:
        """Percent of all processors and GB of host memory; of each GPU its utilisation in percent,
        GB, watts and degrees Celsius. None if the last reading was less than EVERY_S ago.
        """
        now = time.monotonic()
        if now - self._read_at < EVERY_S:
            return None
        self._read_at = now
        host = {
            "cpu_percent": psutil.cpu_percent(),
            "host_memory_gb": round(psutil.virtual_memory().used / GB, 3),
        }
        return host | {name: value for gpu in self._gpus for name, value in _read(*gpu)}


def _own_gpus() -> Iterator[tuple[int, Any]]:
    """(number, handle) of each GPU that this process may use; none without NVIDIA's library."""
    try:
        import pynvml
    except ImportError:  # an optional package
        return
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:  # no driver, as with GPUs of another maker
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(n) for n in range(count)]
    for number, name in enumerate(name.strip() for name in names if name.strip()):
        try:
            yield (
                number,
                pynvml.nvmlDeviceGetHandleByIndex(int(name))
                if name.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(name),
            )
        except pynvml.NVMLError:  # a number that the driver does not have
            continue


def _read(number: int, handle: Any) -> Iterator[tuple[str, float]]:
    """A value that a GPU does not have is left out."""
    import pynvml

    values: dict[str, Callable[[], Any]] = {
        "percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_gb": lambda: round(pynvml.nvmlDeviceGetMemoryInfo(handle).used / GB, 3),
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(
            handle, pynvml.NVML_TEMPERATURE_GPU
        ),
    }
    for name, value in values.items():
        try:
            yield f"gpu{number}_{name}", float(value())
        except pynvml.NVMLError:
            continue
