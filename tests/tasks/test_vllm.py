"""A real vLLM server, which ebbline starts from an environment of its own: its tokens in float32
are those of transformers, for the model alone and for several adapters in one stream.
"""

import json
from pathlib import Path

import psutil
import pytest
import torch

from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.measuring.evaluate import ANSWERS
from ebbline.tasks.measuring.metrics import read_samples
from ebbline.tasks.measuring.served import server
from ebbline.tasks.models.loading import Residents
from ebbline.tasks.specs import EvaluateSpec, GenerateSpec
from ebbline.tasks.worker import run_stages
from tests import vllm
from tests.tasks.test_evaluate import YAML, items
from tests.tiny import conversations, request, word_tokenizer, write_lines

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(vllm.interpreter() is None, reason=vllm.MISSING),
    pytest.mark.timeout(1200),
]
# float32: the logits of 2 layers differ by rounding alone, in sums of at most 128 terms
TOLERANCE = 2e-5
NEW_TOKENS = {"short": 6, "long": 24}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama as `pair` has, with heads of a width that vLLM has kernels for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("served") / "model", word_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            initializer_range=0.1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What the model ships must not be used by either side
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 11], "repetition_penalty": 1.5, "do_sample": True})
    )
    return folder


@pytest.fixture(scope="module")
def adapters(model):
    """The model alone; four adapters, of several ranks, two with ranks and alphas of their own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = [None]
    for number, settings in enumerate(
        (
            {"r": 4},
            {"r": 8, "target_modules": ["v_proj", "down_proj"]},
            {"r": 12, "use_rslora": True},
            {"r": 4, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"up_proj": 32}},
        )
    ):
        torch.manual_seed(number + 1)
        config = {"lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
        folder = model.parent / f"adapter-{number}"
        get_peft_model(
            AutoModelForCausalLM.from_pretrained(model), LoraConfig(**(config | settings))
        ).save_pretrained(folder)
        found.append(folder)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory, model, adapters):
    """Everything measured by both backends, in one batch each: backend -> name -> its folder. Also
    the servers that were started, with the processes that they had.
    """
    here = tmp_path_factory.mktemp("measured")
    texts = [turns[0]["content"] for turns in conversations(12, seed=5)]
    sets = {
        name: write_lines(
            here / f"{name}.jsonl",
            [{"id": str(n), "prompt": text * (1 + n % repeat)} for n, text in enumerate(texts)],
        )
        for name, repeat in {"short": 1, "long": 4}.items()
    }
    choices = here / "choices"
    write_lines(choices / "test.jsonl", items(12, 1))
    write_lines(choices / "dev.jsonl", items(2, 1))
    (choices / "tiny_choice.yaml").write_text(YAML)
    python = vllm.interpreter()
    places = {
        "transformers": None,
        f"vllm=={vllm.version(python)}": {"python": str(python)},
    }
    found: dict[str, dict[str, Path]] = {}
    started: list[list[psutil.Process]] = []
    with pytest.MonkeyPatch.context() as patch:
        start = server.started

        def remember(*given):
            client, name, process = start(*given)
            guard = psutil.Process(process.pid)
            started.append([guard, *guard.children(recursive=True)])
            return client, name, process

        patch.setattr(server, "started", remember)
        for backend, place in places.items():
            requests, outs = [], {}
            for number, adapter in enumerate(adapters):
                own = {"adapter": adapter} if adapter else {}
                settings = {"dtype": "float32", "backend": backend, "batch_size": 8}
                for name, path in sets.items():
                    inputs = {"model": model, "prompts": path, **own}
                    spec = GenerateSpec(max_new_tokens=NEW_TOKENS[name], **settings)
                    folder = here / backend / f"{number}-{name}"
                    requests.append(request(spec, inputs, folder, server=place))
                    outs[folder.name] = folder / "payload"
                inputs = {"model": model, "prompts": choices, **own}
                folder = here / backend / f"{number}-choices"
                spec = EvaluateSpec(task="tiny_choice", shots=2, **settings)
                requests.append(request(spec, inputs, folder, server=place))
                outs[folder.name] = folder / "payload"
            for report in run_stages(requests, residents=Residents()):
                assert report.error is None, report.traceback
            found[backend.partition("==")[0]] = outs
    return found, started


def test_one_server_measures_all_and_leaves_no_process(measured):
    """Only here a real server is started and ended."""
    _, started = measured
    assert len(started) == 1 and len(started[0]) > 2
    assert [each for each in started[0] if each.is_running()] == []


def test_the_tokens_are_those_of_transformers(measured):
    found, _ = measured
    texts = set()
    for name, folder in found["transformers"].items():
        if not name.endswith("choices"):
            expected = read_completions(folder)
            assert read_completions(found["vllm"][name]) == expected, name
            texts |= {row.completion for row in expected}
    assert len(texts) > 60  # the adapters do differ


def test_a_completion_can_end_at_a_server(measured):
    found, _ = measured
    rows = [
        row
        for name, out in found["vllm"].items()
        if "choices" not in name
        for row in read_completions(out)
    ]
    assert {row.ended for row in rows} == {True, False}


def test_the_record_has_the_version_and_what_was_not_used(measured):
    found, _ = measured
    record = json.loads((found["vllm"]["0-short"] / GenerateSpec.DECODING).read_text())
    other = json.loads((found["transformers"]["0-short"] / GenerateSpec.DECODING).read_text())
    stated = record.pop("server")
    assert record == other and record["not_used"]["repetition_penalty"] == 1.5
    assert stated["backend"] == f"vllm=={stated['states_version']}"


def test_log_likelihoods_are_those_of_shared_prefixes(measured):
    found, _ = measured
    for number in range(5):
        name = f"{number}-choices"
        rows = [
            [json.loads(line) for line in (found[side][name] / ANSWERS).read_text().splitlines()]
            for side in ("transformers", "vllm")
        ]
        assert len(rows[0]) == 12
        for ours, theirs in zip(*rows, strict=True):
            own, served = ours.pop("logprobs"), theirs.pop("logprobs")
            assert ours == theirs
            # They are written with four digits
            assert served == pytest.approx(own, abs=TOLERANCE + 1e-4)
        assert read_samples(found["vllm"][name]) == read_samples(found["transformers"][name])
