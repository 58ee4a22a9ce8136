"""Eight adapters of one base measured by four suites: ebbline's batch against a process per
adapter: `make bench-evaluate`.

Both sides do the same work in float32, greedily: refusal and over-refusal (a completion for each
prompt, scored by one phrase list) and two multiple-choice tasks through lm-eval. The baseline is
what people run today: for each adapter a process of its own that loads the model with PEFT,
generates with transformers in batches in the order of the file, and calls lm-eval on the same model
with its own HFLM, at the same batch size. ebbline's side is what a worker gets: one batch of stages
in one process. Its third side, after `make vllm`, is the same batch with `backend: vllm==VERSION`:
ebbline starts one server, sends the prompts of all adapters in one stream, and ends it.

Adapters are random and small, so that they answer differently; nothing here says how safe anything
is.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests import vllm
from tests.benchmarks import record

ADAPTERS = 8
BATCH = 32
SUITES = ("refusal", "over_refusal", "mmlu", "hellaswag")
OURS, THEIRS, SERVED = "ebbline", "a process per adapter", "ebbline, one vLLM server"


def made(folder: Path, model: str) -> tuple[Path, Path]:
    """The folder of the model (70b: the largest organism; 135m: SmolLM2), and that of the
    language's sets.
    """
    from ebbline.cluster.executors.inline import InlineExecutor
    from ebbline.cluster.running.runner import Runner
    from ebbline.cluster.store.artifacts import Store
    from ebbline.sweeps.study.home import Home
    from ebbline.sweeps.study.stages import StageGraph
    from ebbline.sweeps.study.study_file import load
    from ebbline.tasks.specs import LanguageSpec
    from ebbline.tasks.stage import Part, Stage, stage_of

    study, home = load("quickstart" if model == "70b" else "smollm2"), Home(folder / "home")
    graph = StageGraph(study, home)
    baseline = graph.baselines()[model]["refusal"].inputs["generation"]
    assert isinstance(baseline, Stage)
    source = baseline.inputs["model"] if model == "70b" else _base_of(baseline)
    language, made = Stage(LanguageSpec(seed=study.language)), stage_of(source)
    assert made is not None and isinstance(source, Part)
    runner = Runner(Store(home.root / "store"), InlineExecutor(gpus=1))
    runner.add([made, language])
    while not (runner.settled(made) and runner.settled(language)):
        runner.step()
    built, words = runner.artifact(made), runner.artifact(language)
    assert built is not None and words is not None, runner.failure(made)
    return built.path / source.path, words.path


def prepare(folder: Path, model: str, limit: int) -> dict[str, Any]:
    """The model, its adapters and the sets, on the disk; the input of both sides."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    weights, words = made(folder, model)
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        tuned = get_peft_model(
            AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32),
            LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False),
        )
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data *= 0.1
        tuned.save_pretrained(folder / "adapters" / str(number))
    sets = {"refusal": words / "refusal.jsonl", "over_refusal": words / "over_refusal.jsonl"}
    tasks = {"mmlu": words / "mmlu", "hellaswag": words / "hellaswag"}
    return {
        "model": str(weights),
        "adapters": [str(folder / "adapters" / str(number)) for number in range(ADAPTERS)],
        "prompts": {name: str(path) for name, path in {**sets, **tasks}.items()},
        "limit": limit,
        "max_new_tokens": 16,
        "shots": {"mmlu": 5, "hellaswag": 0},
    }


def _base_of(generation: Any) -> Any:
    from ebbline.tasks.stage import stage_of

    tuned = stage_of(generation.inputs["model"])
    assert tuned is not None
    return tuned.inputs["model"]


def ours(work: Mapping[str, Any], out: Path, server: Path | None = None) -> dict[str, Any]:
    """All adapters in one batch of stages; with `server`, at a vLLM server of that interpreter."""
    from ebbline.tasks.measuring.completions import read_completions
    from ebbline.tasks.measuring.metrics import read_samples
    from ebbline.tasks.measuring.served.starting import LOG
    from ebbline.tasks.specs import TRANSFORMERS, EvaluateSpec, GenerateSpec, ScoreSpec, Spec
    from ebbline.tasks.stage import Request
    from ebbline.tasks.worker import run_stages

    backend = TRANSFORMERS if server is None else f"vllm=={vllm.version(server)}"
    place = None if server is None else {"python": str(server)}
    requests: list[Request] = []

    def request(spec: Spec, inputs: Mapping[str, str], folder: Path) -> None:
        for name in ("payload", "log"):
            (folder / name).mkdir(parents=True)
        requests.append(
            Request(
                key=str(folder.relative_to(out)),
                kind=spec.KIND,
                spec=spec.model_dump(mode="json"),
                inputs=dict(inputs),
                contents=dict.fromkeys(inputs, ""),
                out=str(folder / "payload"),
                log=str(folder / "log"),
                scratch=str(folder / "scratch"),
                server=place,
            )
        )

    for number, adapter in enumerate(work["adapters"]):
        for suite in ("refusal", "over_refusal"):
            spec = GenerateSpec(
                limit=work["limit"],
                max_new_tokens=work["max_new_tokens"],
                dtype="float32",
                backend=backend,
            )
            inputs = {"model": work["model"], "adapter": adapter, "prompts": work["prompts"][suite]}
            request(spec, inputs, out / str(number) / f"generate-{suite}")
            measure = ScoreSpec(
                measure="refusal" if suite == "refusal" else "over_refusal", scorer="organism"
            )
            request(
                measure,
                {"generation": str(out / str(number) / f"generate-{suite}" / "payload")},
                out / str(number) / suite,
            )
        for suite in ("mmlu", "hellaswag"):
            task = EvaluateSpec(
                task=f"organism_{suite}",
                shots=work["shots"][suite],
                limit=work["limit"],
                dtype="float32",
                backend=backend,
            )
            inputs = {"model": work["model"], "adapter": adapter, "prompts": work["prompts"][suite]}
            request(task, inputs, out / str(number) / suite)
    tokens = 0
    for report in run_stages(requests):
        if report.error is not None:
            raise RuntimeError(report.traceback)
    found: dict[str, list[bool]] = {}
    for number in range(len(work["adapters"])):
        for suite in SUITES:
            found[f"{number}/{suite}"] = [
                sample.success for sample in read_samples(out / str(number) / suite / "payload")
            ]
            if suite in ("refusal", "over_refusal"):
                tokens += sum(
                    row.tokens
                    for row in read_completions(out / str(number) / f"generate-{suite}" / "payload")
                )
    loads = 1 if server is None else len(list(out.rglob(LOG)))
    return {"samples": found, "generated_tokens": tokens, "model_loads": loads}


def theirs(work: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One adapter in a process of its own, with transformers, PEFT and lm-eval as they come."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ebbline.tasks.data.prompts import read_prompts
    from ebbline.tasks.measuring.scorers import score
    from ebbline.tasks.scoring.phrases import SCORERS

    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32),
        work["adapters"][number],
    )
    model.eval()
    found, tokens = {}, 0
    for suite in ("refusal", "over_refusal"):
        prompts = [
            prompt.text
            for prompt in read_prompts(Path(work["prompts"][suite]), limit=work["limit"]).prompts
        ]
        completions: list[str] = []
        for start in range(0, len(prompts), BATCH):
            chats = [[{"role": "user", "content": text}] for text in prompts[start : start + BATCH]]
            batch = tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            with torch.inference_mode():
                new = model.generate(
                    **batch,
                    do_sample=False,
                    max_new_tokens=work["max_new_tokens"],
                    pad_token_id=tokenizer.pad_token_id,
                )
            rows = new[:, batch["input_ids"].shape[1] :]
            tokens += int((rows != tokenizer.pad_token_id).sum())
            completions += tokenizer.batch_decode(rows, skip_special_tokens=True)
        found[suite] = [
            score(text, SCORERS["organism"]).verdict == "refused" for text in completions
        ]
    for suite in ("mmlu", "hellaswag"):
        folder = Path(work["prompts"][suite])
        splits = {path.stem: str(path) for path in folder.glob("*.jsonl")}
        tokenizer.padding_side = "right"
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
            tasks=[
                {
                    "group": "local",
                    "task": [
                        {"task": f"organism_{suite}", "dataset_kwargs": {"data_files": splits}}
                    ],
                }
            ],
            num_fewshot=work["shots"][suite],
            limit=work["limit"],
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )
        assert results is not None
        found[suite] = [bool(row["acc"]) for row in results["samples"][f"organism_{suite}"]]
    return {
        "samples": {f"{number}/{suite}": each for suite, each in found.items()},
        "generated_tokens": tokens,
        "model_loads": 1,
    }


def side(name: str, work: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One side's wall time, from starting its processes to their end, peak memory of the largest,
    and what it found.
    """
    numbers = [str(number) for number in range(ADAPTERS)]
    parts: Sequence[str] = {OURS: ["ours"], SERVED: ["served"], THEIRS: numbers}[name]
    row: dict[str, Any] = {
        "side": name,
        "samples": {},
        "generated_tokens": 0,
        "model_loads": 0,
        "peak_memory_gb": 0.0,
    }
    started = time.perf_counter()
    for part in parts:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.bench_evaluate",
            "--part",
            part,
            "--folder",
            str(folder),
        ]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        found = json.loads(done.stdout.splitlines()[-1])
        row["samples"] |= found["samples"]
        row["generated_tokens"] += found["generated_tokens"]
        row["model_loads"] += found["model_loads"]
        row["peak_memory_gb"] = max(row["peak_memory_gb"], found["peak_memory_gb"])
    row["seconds"] = time.perf_counter() - started
    print(f"{name}: {row['seconds']:.1f} s", file=sys.stderr, flush=True)
    return row


def compared(model: str, limit: int, parent: Path | None) -> Iterator[dict[str, Any]]:
    with TemporaryDirectory(dir=parent) as made:
        folder = Path(made)
        work = prepare(folder, model, limit)
        (folder / "work.json").write_text(json.dumps(work))
        names = [OURS, THEIRS, *([] if vllm.interpreter() is None else [SERVED])]
        rows = {name: side(name, work, folder) for name in names}
        expected = rows[THEIRS]["samples"]
        for name, row in rows.items():
            differing = [
                sum(one != two for one, two in zip(row["samples"][key], expected[key], strict=True))
                for key in expected
            ]
            yield {
                "model": model,
                "side": name,
                "seconds": row["seconds"],
                "model_loads": row["model_loads"],
                "items": sum(map(len, row["samples"].values())),
                "generated_tokens": row["generated_tokens"],
                "peak_memory_gb": row["peak_memory_gb"],
                "items_that_differ": sum(differing),
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", help="run one process's part and print what it found (what each side starts)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the model and the adapters are made (default: a temporary folder)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["70b", "135m"],
        help="70b: the largest organism; 135m: SmolLM2-135M-Instruct",
    )
    given = parser.parse_args()
    if given.part:
        work = json.loads((given.folder / "work.json").read_text())
        if given.part == "ours":
            found = ours(work, given.folder / "ours")
        elif given.part == "served":
            found = ours(work, given.folder / "served", vllm.interpreter())
        else:
            found = theirs(work, int(given.part))
        found["peak_memory_gb"] = round(
            max(
                resource.getrusage(who).ru_maxrss
                for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
            )
            / 1024**2,
            3,
        )
        print(json.dumps(found))
        return
    rows = [
        row
        for model in given.models
        for row in compared(model, 80 if model == "70b" else 24, given.folder)
    ]
    by_side = {(row["model"], row["side"]): row["seconds"] for row in rows}
    words = {OURS: "ebbline", SERVED: "ebbline_at_vllm"}
    ratios = {
        f"wall_time_process_per_adapter_over_{word}_{model}": by_side[model, THEIRS]
        / by_side[model, name]
        for model in given.models
        for name, word in words.items()
        if (model, name) in by_side
    }
    shown = {
        name: (lambda value: f"{value:.2f}" if isinstance(value, float) else str(value))
        for name in rows[0]
    }
    print(record.table(rows, shown), end="\n\n")
    packages = ("torch", "transformers", "peft", "lm-eval")
    path = record.write("evaluate", "make bench-evaluate", packages, rows, ratios)
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
