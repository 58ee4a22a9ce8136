"""What a worker's machine is doing, with and without GPUs."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from ebbline.tasks import usage
from tests.clock import Clock


class NoSuch(Exception):
    pass


def library(count: int) -> ModuleType:
    """NVIDIA's library with so many GPUs, of which none has a power meter."""

    def power(handle: int) -> int:
        raise NoSuch

    module: Any = ModuleType("pynvml")
    module.NVMLError, module.NVML_TEMPERATURE_GPU = NoSuch, 0
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: count
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=10 * handle)
    module.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=3 * 1024**3)
    module.nvmlDeviceGetPowerUsage = power
    module.nvmlDeviceGetTemperature = lambda handle, sensor: 50 + handle
    return module


def test_a_cpu_has_no_gpu_values_and_is_read_every_few_seconds(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(usage, "time", clock)
    read = usage.Usage("cpu").read
    assert (read() or {}).keys() == {"cpu_percent", "host_memory_gb"}
    assert read() is None
    clock.sleep(usage.EVERY_S)
    assert read() is not None


def test_only_the_gpus_of_this_process_are_read_and_a_missing_value_is_left_out(
    monkeypatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2")
    found = usage.Usage("cuda").read() or {}
    assert {name: value for name, value in found.items() if name.startswith("gpu")} == {
        "gpu0_percent": 50.0,
        "gpu0_memory_gb": 3.0,
        "gpu0_temperature_c": 55.0,
        "gpu1_percent": 20.0,
        "gpu1_memory_gb": 3.0,
        "gpu1_temperature_c": 52.0,
    }


def test_a_machine_without_the_library_has_no_gpu_values(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert not any(name.startswith("gpu") for name in usage.Usage("cuda").read() or {})
