"""`make gpu-check` before a GPU is to be had: its models, its time boxes, and the whole script in
miniature, with nothing installed but what is carried.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ebbline.tasks.models.loading import load_model
from ebbline.tasks.models.memory import shape_of
from tests.benchmarks import gpu_check
from tests.benchmarks.gpu import models, wheels
from tests.benchmarks.gpu_check import PARTS, Outcome, check, result, shown, watched, why_not

ROOT = Path(__file__).parents[1]
H200 = {"gpu": "H200", "gpu_memory_gb": 139.8, "free_memory_gb": 139.0, "nf4": "", "versions": {}}
NAMES = [part.name for part in PARTS]


@pytest.mark.parametrize(
    ("changed", "left_s", "skipped", "reason"),
    [
        ({}, 540, [], ""),
        ({"free_memory_gb": 79.0}, 540, ["train-72b"], "it needs 80 GB, and 79.0 GB"),
        (
            {"nf4": "RuntimeError: no kernel"},
            540,
            [name for name in NAMES if name != "project"],
            "bitsandbytes cannot quantise here: RuntimeError: no kernel",
        ),
        ({}, 59, ["pack", "train-72b"], "59 s are left, and it needs"),
        ({}, -3, NAMES, "0 s are left"),
    ],
)
def test_a_part_that_cannot_run_here_is_skipped_with_the_reason(changed, left_s, skipped, reason):
    reasons = {part.name: why_not(part, H200 | changed, left_s) for part in PARTS}
    assert [name for name, why in reasons.items() if why] == skipped
    assert all(reason in reasons[name] for name in skipped)


def test_every_part_may_start_within_nine_minutes():
    assert sum(part.least_s for part in PARTS) + gpu_check.MACHINE_S < 9 * 60 - gpu_check.END_S
    assert all(part.least_s <= part.box_s for part in PARTS)


def test_a_part_that_fails_is_recorded_and_the_others_go_on(capsys):
    written: list[list[tuple[str, str]]] = []
    boxes = []
    left = iter([500.0, 400.0, 59.0, 20.0])

    def run(part, box_s):
        boxes.append(box_s)
        if part.name == "pack":
            return Outcome("pack", "failed", "ValueError: wrong")
        rows = [{"part": part.name, "what": "a step", "seconds": 2.0, "ratios": {"faster": 2.0}}]
        return Outcome(part.name, "measured", rows=rows)

    found = check(
        PARTS[:4],
        H200,
        lambda: next(left),
        run,
        lambda outcomes: written.append([(each.part, each.status) for each in outcomes]),
    )
    statuses = ["measured", "failed", "measured", "skipped"]
    assert [outcome.status for outcome in found] == statuses
    assert written[-1] == list(zip(NAMES[:4], statuses, strict=True))
    assert [len(each) for each in written] == [1, 2, 3, 4]  # a kill keeps what was measured
    assert boxes == [100, 150, 59]  # no longer than the time that is left
    content = result(H200 | {"miniature": False}, found, "make gpu-check", "abc")
    assert content["ratios"] == {"faster": 2.0} and content["rows"][0]["seconds"] == 2.0
    assert content["parts"][1]["reason"] == "ValueError: wrong"
    table = shown(json.loads(json.dumps(content)))
    assert "| train-7b | a step |" in table and "pack: failed, ValueError: wrong" in table
    assert "evaluate: skipped, 20 s are left" in table
    assert "3 of 4, nf4-step" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "box_s", "status", "reason", "rows"),
    [
        ("row(1); print('noise'); row(2)", 30, "measured", "", 2),
        ("row(1); say('error', 'ValueError: x'); sys.exit(1)", 30, "failed", "ValueError: x", 1),
        ("row(1); sys.exit(3)", 30, "failed", "its process ended with 3", 1),
        ("row(1); import os; os.kill(os.getpid(), 9)", 30, "failed", "ended with -9", 1),
        ("row(1); import time; time.sleep(60)", 1, "failed", "after its time box of 1 s", 1),
        ("row(1); print(MARK + '{\"row', end='')", 30, "measured", "", 1),  # cut off
    ],
)
def test_a_part_keeps_its_rows_however_its_process_ends(code, box_s, status, reason, rows):
    begin = (
        f"import json, sys; MARK = {gpu_check.MARK!r}\n"
        "def say(name, value):\n"
        "    print(MARK + json.dumps({name: value}), flush=True)\n"
        "def row(value): say('row', {'what': value})\n"
    )
    found = watched("pack", [sys.executable, "-S", "-c", begin + code], box_s)
    assert (found.status, len(found.rows)) == (status, rows)
    assert reason in found.reason and found.rows[0] == {"part": "pack", "what": 1}


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-2-7b", 6.74), ("qwen-7b", 7.72), ("qwen-14b", 14.17), ("qwen-72b", 72.29)],
)
def test_the_shapes_are_those_of_the_published_models(name, billions):
    shape = shape_of(LlamaConfig(**models.SHAPES[name]).to_dict())
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.model
def test_a_model_made_in_memory_is_built_as_one_that_is_read(tmp_path):
    made_folder = models.write_folder(tmp_path / "made", models.MINIATURE)
    made = models.random_nf4(made_folder, "nf4", "bfloat16", "cpu")
    read_folder = models.write_folder(tmp_path / "read", models.MINIATURE)
    LlamaForCausalLM(LlamaConfig.from_pretrained(read_folder)).save_pretrained(read_folder)
    read = load_model(read_folder, "nf4", "bfloat16", "cpu")

    def built(model) -> dict[str, object]:
        found: dict[str, object] = {"training": model.training, "cache": model.config.use_cache}
        for flag in ("is_quantized", "is_loaded_in_4bit", "quantization_method", "dtype"):
            found[flag] = getattr(model, flag)
        for name, module in model.named_modules():
            found[name] = type(module), getattr(module, "support_avx512bf16_for_cpu", None)
            found[f"{name} computes in"] = getattr(module, "compute_dtype", None)
        for name, parameter in model.named_parameters():
            state = getattr(parameter, "quant_state", None)
            found[name] = type(parameter), parameter.dtype, tuple(parameter.shape)
            if state is not None:
                own = state.quant_type, state.blocksize, state.dtype, tuple(state.shape)
                found[f"{name} scales"] = own, state.nested, state.state2.blocksize
        return found

    assert built(made) == built(read)
    buffers = dict(read.named_buffers())
    assert {name for name, _ in made.named_buffers()} == buffers.keys()
    for name, tensor in made.named_buffers():
        assert torch.equal(tensor, buffers[name]), name
    settings = (made.config.to_dict(), read.config.to_dict())
    assert {key for key in settings[0] if settings[0][key] != settings[1].get(key)} <= {
        "_name_or_path",
        "architectures",
    }


def only(names: Sequence[str], folder: Path) -> Path:
    """A folder of links to these installed distributions, and to nothing else."""
    folder.mkdir()
    for name in names:
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            place = Path(str(found.locate_file(top)))
            if place.exists() and not (folder / top).exists():
                (folder / top).symlink_to(place)
    return folder


@pytest.mark.process
def test_the_miniature_runs_with_nothing_but_what_is_carried(tmp_path):
    """Every part runs on the CPU, where Ray, pyarrow, pandas, lm-eval, datasets and the like do not
    exist. The process that starts the parts imports no torch.
    """
    names = sorted(wheels.with_needs(wheels.GIVEN) | set(wheels.carried()))
    assert not {"ray", "pyarrow", "pandas", "lm-eval", "datasets", "deepspeed"} & set(names)
    site = only(names, tmp_path / "site")
    out = tmp_path / "gpu.json"
    code = (
        "import sys; from tests.benchmarks import gpu_check; assert 'torch' not in sys.modules; "
        f"sys.exit(gpu_check.main(['--miniature', '--out', {str(out)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{site}", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert [(part["part"], part["status"]) for part in found["parts"]] == [
        (name, "measured") for name in NAMES
    ]
    assert found["machine"]["miniature"] and found["versions"]["bitsandbytes"]
    assert {row["part"] for row in found["rows"]} == set(NAMES)
    assert all(row["seconds"] > 0 for row in found["rows"])
    by_what = {(row["part"], row["what"]): row for row in found["rows"]}
    assert by_what["pack", "a pack of 2"]["largest_loss_difference"] < 1e-3
    assert by_what["nf4-step", "a new token of 3 rows, dequantised"]["equal_to_the_last_bit"]
    assert by_what["evaluate", "2 adapters, ebbline"]["base_loads"] == 1
    assert by_what["evaluate", "2 adapters, PEFT"]["equal_completions"] == 1
    assert by_what["evaluate", "2 adapters, PEFT"]["largest_log_likelihood_difference"] < 0.05
    assert by_what["project", "1 layers, 2 adapters, on the CPU"]["largest_cosine_difference"] == 0
    assert "tokens_per_s_pack_of_4_over_peft" in found["ratios"]
    assert "| pack | a pack of 4 |" in done.stdout


def test_without_a_gpu_nothing_is_measured_and_no_file_written(monkeypatch, tmp_path, capsys):
    facts = {"gpu": None, "nf4": "", "versions": {}}
    monkeypatch.setattr(
        gpu_check,
        "in_process",
        lambda name, box_s, memory_gb: Outcome(name, "measured", rows=[{"part": name, **facts}]),
    )
    assert gpu_check.main(["--out", str(tmp_path / "gpu.json")]) == 1
    assert not (tmp_path / "gpu.json").exists()
    assert "torch sees no CUDA device" in capsys.readouterr().out
