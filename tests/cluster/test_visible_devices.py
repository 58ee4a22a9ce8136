"""CUDA_VISIBLE_DEVICES is read as CUDA reads it. A machine without GPUs runs, whatever it says."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.executors import this_machine
from ebbline.cluster.executors.choice import ExecutorOptions
from ebbline.cluster.executors.this_machine import (
    VISIBLE,
    Gpu,
    capacity_here,
    chosen,
    only_visible,
    parse_list,
    patched_environment,
)

LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-8932f937-d72c-4106-c12f-20bd9faed9f6)
  MIG 1g.5gb      Device  0: (UUID: MIG-33a5c2c0-1111-5555-9999-aaaaaaaaaaaa)
  MIG 1g.5gb      Device  1: (UUID: MIG-44b6d3d1-1111-5555-9999-aaaaaaaaaaaa)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-8977aaaa-d72c-4106-c12f-20bd9faed9f6)
"""
WEIRD = ["", "-1", "NoDevFiles", "none", "void", ",", " ", "GPU-", "MIG-", "0x1", "٣", "a,b"]


def test_nvidias_list_gives_gpus_and_their_mig_instances():
    first, second = parse_list(LISTED)
    assert first.name == second.name == "NVIDIA A100-SXM4-40GB"
    assert (len(first.parts), second.parts) == (2, ())
    assert parse_list("No devices found.") == []


@pytest.mark.parametrize(
    ("setting", "count"),
    [
        (None, 2),
        ("0", 1),
        ("1,0", 2),
        ("0,9", 1),  # CUDA stops at the first entry that names no device
        ("9,0", 0),
        ("0,-1,1", 1),
        ("0,0", 0),  # a device that is named twice hides all
        ("0, 1", 2),
        ("GPU-8932f937", 1),
        ("GPU-89", 0),  # ambiguous
        ("GPU-8932f937,0", 0),
        ("MIG-33a5c2c0-1111-5555-9999-aaaaaaaaaaaa,MIG-44b6d3d1-1111-5555-9999-aaaaaaaaaaaa", 2),
        ("MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/0", 1),
        ("MIG-GPU-ffffffff/1/0", 0),
        ("9" * 5000, 0),
        ("0" * 5000 + "1", 1),
        *((setting, 0) for setting in WEIRD),
    ],
)
def test_a_value_of_the_variable_names_as_many_devices_as_in_cuda(setting, count):
    assert len(chosen(setting, parse_list(LISTED))) == count


@given(
    setting=st.none() | st.text() | st.lists(st.integers(-2, 9).map(str)).map(",".join),
    count=st.integers(0, 8),
)
def test_no_value_names_more_devices_than_there_are_or_than_it_lists(setting, count):
    gpus = [Gpu("NVIDIA A100", f"GPU-{number}") for number in range(count)]
    found = chosen(setting, gpus)
    assert len(found) <= count
    assert setting is None or len(found) <= len(setting.split(","))


@pytest.mark.parametrize("setting", [*WEIRD, "0", "0,1", "GPU-8932f937", "MIG-33a5c2c0"])
def test_without_a_driver_the_variable_means_nothing_and_ray_does_not_see_it(monkeypatch, setting):
    monkeypatch.setenv(VISIBLE, setting)
    monkeypatch.setattr(this_machine.shutil, "which", lambda name: None)
    assert capacity_here(ExecutorOptions("local", gang=1, gpus=3)).gpus == 3
    with only_visible({}):
        assert VISIBLE not in os.environ
    assert os.environ[VISIBLE] == setting


def test_with_some_devices_hidden_the_capacity_is_that_of_the_others(monkeypatch):
    gpus = parse_list(LISTED)
    monkeypatch.setattr(this_machine, "visible_gpus", lambda: chosen("1,9", gpus))
    monkeypatch.setenv(VISIBLE, "1,9")
    (host,) = capacity_here(ExecutorOptions("local", gang=4)).hosts
    assert (host.gpus, host.gpu_type) == (1, "A100")
    with only_visible(this_machine.visible_gpus()):
        assert os.environ[VISIBLE] == "1"
    monkeypatch.setattr(this_machine, "visible_gpus", lambda: chosen("-1", gpus))
    (host,) = capacity_here(ExecutorOptions("local", gang=4)).hosts
    assert (host.gpus, host.gpu_type) == (4, None)  # logical GPUs, on the CPU


def test_variables_that_ray_starts_with_are_this_process_s_no_longer(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with patched_environment({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["DS_ACCELERATOR"]) == ("1", "cpu")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "DS_ACCELERATOR" not in os.environ


@pytest.mark.cluster
@pytest.mark.parametrize("setting", ["", "-1", "0", "NoDevFiles", "GPU-1234"])
def test_a_local_cluster_on_a_cpu_machine_starts_with_any_value(monkeypatch, setting):
    from ebbline.cluster.executors.ray_executor import RayExecutor

    monkeypatch.setenv(VISIBLE, setting)
    monkeypatch.setattr(this_machine.shutil, "which", lambda name: None)
    executor = RayExecutor("local", logical_gpus=2)
    try:
        assert executor.device == "cpu" and executor.capacity().gpus == 2
        assert os.environ[VISIBLE] == setting
    finally:
        executor.close()
