"""Generations of several settings, measured as a group: every artifact has the bytes that it has
alone, and a member that fails, or cannot join, does not change the others.
"""

import shutil
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ebbline.tasks.measuring import generate
from ebbline.tasks.measuring.grouped import decoding, generations, layers
from ebbline.tasks.measuring.grouped.requests import group_name, in_groups
from ebbline.tasks.models.loading import Residents
from ebbline.tasks.specs import ApplySpec, GenerateSpec, ScoreSpec
from ebbline.tasks.stage import Request
from ebbline.tasks.training.packs import in_packs
from ebbline.tasks.worker import run_stages
from tests.tiny import context, conversations, fresh, request, write_lines

ADAPTER = "adapter_model.safetensors"
SUITES = {"short": 4, "long": 7}  # name -> new tokens


def tuned(folder: Path, pair, **settings) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(settings))
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
        | settings
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, pair):
    """The model alone, an adapter, two settings of it with nested masks, another in bfloat16."""
    here = tmp_path_factory.mktemp("adapters")
    found = [None, tuned(here / "whole", pair)]
    for name, modules in (("some", ("q_proj",)), ("more", ("q_proj", "up_proj"))):
        shutil.copytree(found[1], here / name)
        tensors = load_file(here / name / ADAPTER)
        changed = {
            key: tensor * 0.25
            if "lora_B" in key and any(module in key for module in modules)
            else tensor
            for key, tensor in tensors.items()
        }
        save_file(changed, here / name / ADAPTER, metadata={"format": "pt"})
        found.append(here / name)
    other = tuned(here / "other", pair, r=8, target_modules=["v_proj", "down_proj"])
    half = {name: tensor.bfloat16() for name, tensor in load_file(other / ADAPTER).items()}
    save_file(half, other / ADAPTER, metadata={"format": "pt"})
    return [*found, other]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two sets, with prompts of several widths in the second."""
    here = tmp_path_factory.mktemp("prompts")
    texts = [turns[0]["content"] for turns in conversations(20, seed=5)]
    rows = {"short": texts[:10], "long": [text * (1 + n % 4) for n, text in enumerate(texts)]}
    return {
        name: write_lines(
            here / f"{name}.jsonl",
            [{"id": str(n), "prompt": text} for n, text in enumerate(own)],
        )
        for name, own in rows.items()
    }


def requests_of(folder, pair, prompts, adapters, **spec):
    """A request for each adapter and suite, by the name of its folder."""
    found = {}
    for number, adapter in enumerate(adapters):
        for suite, new_tokens in SUITES.items():
            inputs = {"model": pair.aligned, "prompts": prompts[suite]}
            inputs |= {"adapter": adapter} if adapter else {}
            settings = {"dtype": "float32", "max_new_tokens": new_tokens, "batch_size": 8, **spec}
            name = f"{number}-{suite}"
            found[name] = request(GenerateSpec(**settings), inputs, folder / name)
    return found


def alone(asked: Request, folder: Path, residents) -> dict[str, bytes]:
    """The artifact of a request that runs by itself."""
    out = fresh(folder)
    generate.run(
        GenerateSpec(**asked.spec),
        {name: Path(path) for name, path in asked.inputs.items()},
        out,
        context(folder.with_name("ctx"), residents=residents),
    )
    return files_in(out)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def require_equal(requests, tmp_path):
    residents = Residents()
    for name, asked in requests.items():
        expected = alone(asked, tmp_path / "alone" / name, residents)
        assert len(expected) == 3 and files_in(Path(asked.out)) == expected, name


@pytest.fixture
def passes(monkeypatch):
    """A list that grows with each forward pass."""
    calls, forward = [], LlamaForCausalLM.forward

    @wraps(forward)
    def counted(self, *args, **named):
        calls.append(1)
        return forward(self, *args, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_a_group_writes_the_bytes_that_each_member_writes_alone(
    tmp_path, pair, prompts, adapters, quantisation, dtype, passes
):
    settings = {"quantisation": quantisation, "dtype": dtype}
    requests = requests_of(tmp_path / "group", pair, prompts, adapters, **settings)
    reports = list(run_stages(requests.values()))
    together = len(passes)
    assert [report.error for report in reports] == [None] * len(requests)
    require_equal(requests, tmp_path)
    texts = {files_in(Path(asked.out))[GenerateSpec.COMPLETIONS] for asked in requests.values()}
    assert len(texts) == len(requests), "each setting answers otherwise"
    if dtype == "float32":
        assert {report.environment["grouped"] for report in reports} == {len(requests)}
        assert together < (len(passes) - together) / 2.5, "steps are shared"


def test_a_member_that_fails_has_its_own_error_and_the_others_are_measured(
    tmp_path, pair, prompts, adapters
):
    damaged, foreign = tmp_path / "damaged", tmp_path / "foreign"
    for folder, change in ((damaged, float("nan")), (foreign, None)):
        shutil.copytree(adapters[1], folder)
        tensors = load_file(folder / ADAPTER)
        name = sorted(tensors)[-1]
        if change is None:
            del tensors[name]
        else:
            tensors[name][0, 0] = change
        save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    chosen = [adapters[1], damaged, adapters[2], foreign]
    requests = requests_of(tmp_path / "group", pair, prompts, chosen)
    too_long = request(
        GenerateSpec(dtype="float32", max_new_tokens=5, batch_size=8, max_tokens=8),
        {"model": pair.aligned, "prompts": prompts["short"]},
        tmp_path / "group" / "too-long",
    )
    reports = {report.key: report for report in run_stages([*requests.values(), too_long])}
    for name, asked in requests.items():
        wrong = name[0] in "13"
        assert (reports[asked.key].error_type == "ModelError") == wrong, name
    assert "holds NaN or infinity" in reports[requests["1-long"].key].error
    assert "lacks" in reports[requests["3-short"].key].error
    assert reports[too_long.key].error_type == "DataError"
    good = {name: asked for name, asked in requests.items() if name[0] in "02"}
    assert all("grouped" in reports[asked.key].environment for asked in good.values())
    require_equal(good, tmp_path)


def test_an_adapter_that_is_more_than_lora_on_linear_layers_is_measured_alone(
    tmp_path, pair, prompts, adapters
):
    dora = tuned(tmp_path / "dora", pair, use_dora=True)
    head = tuned(tmp_path / "head", pair, target_modules=["q_proj"], modules_to_save=["lm_head"])
    moved = tuned(tmp_path / "moved", pair, init_lora_weights="pissa", r=2)
    chosen = [dora, moved, adapters[1], head]
    requests = requests_of(tmp_path / "group", pair, prompts, chosen)
    reports = {report.key: report for report in run_stages(requests.values())}
    assert [
        name for name, asked in requests.items() if "grouped" in reports[asked.key].environment
    ] == ["2-short", "2-long"]
    require_equal(requests, tmp_path)


@pytest.mark.parametrize("part", ["a linear layer", "another layer"])
def test_where_a_kernel_depends_on_the_rows_every_member_is_measured_alone(
    tmp_path, pair, prompts, adapters, monkeypatch, part
):
    linear, norm = layers.linear, LlamaRMSNorm.forward
    if part == "a linear layer":
        # In its first row only, so that the last rows, whose logits are compared, are equal

        def changed(rows, *rest):
            result = linear(rows, *rest)
            result[:1] *= 1 + (len(rows) > 8) / 1e6
            return result

        monkeypatch.setattr(layers, "linear", changed)
    else:
        monkeypatch.setattr(
            LlamaRMSNorm,
            "forward",
            lambda self, rows: norm(self, rows) * (1 + (len(rows) > 8) / 1e6),
        )
    requests = requests_of(tmp_path / "group", pair, prompts, adapters[:3], quantisation="nf4")
    reports = list(run_stages(requests.values()))
    assert [report.error for report in reports] == [None] * len(requests)
    assert not any("grouped" in report.environment for report in reports)
    require_equal(requests, tmp_path)


def test_a_wide_step_that_does_not_fit_in_memory_is_halved(
    tmp_path, pair, prompts, adapters, monkeypatch
):
    sizes, decode = [], decoding.Decoder.decode

    def little_memory(self, blocks):
        sizes.append(len(blocks))
        if len(blocks) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return decode(self, blocks)

    monkeypatch.setattr(decoding.Decoder, "decode", little_memory)
    requests = requests_of(tmp_path / "group", pair, prompts, adapters[:3])
    reports = list(run_stages(requests.values()))
    assert all("grouped" in report.environment for report in reports)
    assert max(sizes) > 4 and min(sizes) <= 4
    require_equal(requests, tmp_path)


def test_members_are_measured_alone_where_two_batches_do_not_fit_at_once(
    tmp_path, pair, prompts, adapters, monkeypatch
):
    """As of a 7B model: its group would have one batch, whose bits nothing is compared with."""
    monkeypatch.setattr(generations, "WIDE_BYTES", 1)
    requests = requests_of(tmp_path / "group", pair, prompts, adapters[:2])
    reports = list(run_stages(requests.values()))
    assert not any(report.error or "grouped" in report.environment for report in reports)
    require_equal(requests, tmp_path)


def test_members_are_written_a_portion_after_another_and_the_rest_leaves(
    tmp_path, pair, prompts, adapters, monkeypatch
):
    monkeypatch.setattr(generations, "WIDE_ROWS", 30)  # an adapter's prompts
    requests = requests_of(tmp_path / "group", pair, prompts, adapters)
    leaving = []
    reports = run_stages(requests.values(), leaving=lambda: bool(leaving))
    first = [next(reports), next(reports)]
    assert [report.error for report in first] == [None, None]
    leaving.append(True)
    assert {report.error_type for report in reports} == {"Leaving"}
    done = {report.key for report in first}
    require_equal({name: asked for name, asked in requests.items() if asked.key in done}, tmp_path)


def test_settings_with_nested_masks_are_neighbours():
    def loras(scales):
        return {
            str(module): layers.Lora(torch.ones(1, 2), torch.full((2, 1), scale), 1.0)
            for module, scale in enumerate(scales)
        }

    chain = [loras(scales) for scales in ([1, 1, 1], [2, 1, 1], [2, 1, 2], [2, 2, 2])]
    given_order = [chain[place] for place in (2, 0, 3, 1)]
    order = layers.nearest_order(given_order)
    assert order in ([1, 3, 0, 2], [2, 0, 3, 1])


# Which requests form a group. No model.


def planned(kind, name, inputs=(), model="m", gpus=0, **spec):
    spec = {"generate": GenerateSpec, "score": ScoreSpec, "apply": ApplySpec}[kind](**spec)
    return Request(
        key=name,
        kind=kind,
        spec=spec.model_dump(mode="json"),
        inputs={
            "model": model,
            **{f"in{n}": f"/s/{each}/payload/x" for n, each in enumerate(inputs)},
        },
        contents={},
        out=f"/s/{name}/payload",
        log="",
        scratch="",
        gpus=gpus,
    )


def names(groups):
    return [[one.key for one in group] for group in groups]


def score(name, of):
    return planned("score", name, [of], measure="refusal", scorer="prefix")


def test_an_adapter_is_applied_before_its_group_and_scored_after_it():
    batch = [
        planned("apply", "a1", threshold=0.1),
        planned("generate", "g1", ["a1"]),
        score("s1", "g1"),
        planned("apply", "a2", threshold=0.2),
        planned("generate", "g2", ["a2"], max_new_tokens=3),
        score("s2", "g2"),
    ]
    assert names(grouped(batch)) == [
        ["a1"],
        ["a2"],
        ["g1", "g2"],
        ["s1"],
        ["s2"],
    ]


def grouped(requests):
    taken = iter(requests)
    return in_groups(lambda: in_packs(taken))


def test_a_group_waits_for_what_it_reads_of_a_pack_a_gpu_or_a_later_request():
    one, two = (
        replace(planned("apply", name), pack="pack", pack_share=0.5) for name in ("t1", "t2")
    )
    reader, free = planned("generate", "g2", ["t2"]), planned("generate", "g1")
    assert names(grouped([free, one, two, reader])) == [["g1"], ["t1", "t2"], ["g2"]]
    on_gpu = planned("apply", "t2", gpus=1)
    assert names(grouped([free, on_gpu, reader])) == [["g1"], ["t2"], ["g2"]]
    first, later = planned("generate", "g3", ["g4"]), planned("generate", "g4", ["g3"])
    assert names(grouped([first, later])) == [["g3"], ["g4"]], "no request waits for ever"


def test_what_running_a_request_adds_runs_next():
    class Taken(list[Request]):
        def __iter__(self):
            return self

        def __next__(self) -> Request:
            if not self:
                raise StopIteration
            return self.pop(0)

    batch = Taken([planned("generate", "g1"), planned("apply", "t1")])
    found = []
    for group in grouped(batch):
        found.append([one.key for one in group])
        if found[-1] == ["g1"]:
            batch.append(score("s1", "g1"))
    assert found == [["g1"], ["s1"], ["t1"]]


@pytest.mark.parametrize(
    "other",
    [
        {"model": "other"},
        {"quantisation": "nf4"},
        {"dtype": "float32"},
        {"batch_size": 16},
        {"chat": {"date": "2024-01-01"}},
        {"tokenizer": "adapter"},
        {"quantisation": "int8"},
        {"backend": "vllm==0.32.0"},
        {"gpus": 2},
    ],
)
def test_generations_that_differ_in_more_than_adapter_and_prompts_form_no_group(other):
    batch = [planned("generate", "g1"), planned("generate", "g2", **other)]
    assert names(grouped(batch)) == [["g1"], ["g2"]]


@given(st.lists(st.tuples(st.sampled_from("agsx"), st.integers(0, 20), st.integers(0, 1))))
def test_every_request_runs_once_and_after_what_it_reads(drawn):
    batch = []
    for number, (letter, of, model) in enumerate(drawn):
        read = [batch[of % len(batch)].key] if batch and of % 3 else []
        kind, spec = {
            "a": ("apply", {"threshold": 0.1}),
            "g": ("generate", {}),
            "s": ("score", {"measure": "refusal", "scorer": "prefix"}),
            "x": ("generate", {"quantisation": "int8"}),
        }[letter]
        batch.append(planned(kind, f"n{number}", read, model=f"m{model}", **spec))
    found = list(grouped(batch))
    assert sorted(one.key for group in found for one in group) == sorted(one.key for one in batch)
    done: set[str] = set()
    for group in found:
        for one in group:
            read = {name.split("/")[2] for key, name in one.inputs.items() if key != "model"}
            assert read <= done, "what it reads has run"
        assert len({group_name(one) for one in group}) == 1
        done |= {one.key for one in group}
