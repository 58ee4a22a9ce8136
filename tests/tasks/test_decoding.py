"""Greedy is greedy, and a completion depends on its prompt alone.

No decoding setting comes from a model's files but the end tokens, in any backend. The bits of a
completion do not depend on the prompts beside it, on their order or on their number.
"""

import dataclasses
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import GenerationConfig

from ebbline.sweeps.study.suites import RefusalSuite, stages_of
from ebbline.tasks.data.batch_shape import BatchShape, rows_together, width_of
from ebbline.tasks.data.batches import even_threads, in_batches, rows_meet
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring import generate, judge
from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.measuring.lm_tasks.prefix_model import PrefixLM, require_greedy
from ebbline.tasks.models.adapters import with_adapter
from ebbline.tasks.models.decoding import NO_SETTING, only, settings_not_used, shipped
from ebbline.tasks.models.loading import Residents, load_model, load_tokenizer
from ebbline.tasks.specs import Decoding, GenerateSpec, JudgeSpec
from ebbline.tasks.stage import Source
from tests.tiny import context, conversations, fresh, word_tokenizer, write_lines

PROMPTS = [turns[0]["content"] for turns in conversations(40, seed=3)]
SPEC = GenerateSpec(max_new_tokens=12, max_tokens=128)
LONG = GenerateSpec(max_new_tokens=32, max_tokens=128)
# Each changes the completions of the tiny model where it is not put aside.
SHIPPED = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(10, 30))},
    {"begin_suppress_tokens": list(range(5, 40))},
    {"bad_words_ids": [[token] for token in range(10, 30)]},
    {"sequence_bias": [[[12], 50.0]]},
    {"forced_bos_token_id": 12},
    {"forced_eos_token_id": 12},
    {"exponential_decay_length_penalty": [1, 9.0]},
    {"do_sample": True, "temperature": 5.0, "top_k": 0},
    {"num_beams": 4},
    {"guidance_scale": 3.0},
    {"watermarking_config": {"bias": 50.0}},
    {"stop_strings": ["word1", "word2", "word3"]},
    {"max_time": 0.0},
    {"min_length": 30},
    {"max_length": 3},
    {"min_new_tokens": 11},
    {"prompt_lookup_num_tokens": 3},
    {"cache_implementation": "static"},
    {"cache_implementation": "quantized"},
    {"use_cache": False},
    {"prefill_chunk_size": 2},
    {"dola_layers": "high"},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"num_beam_groups": 2, "diversity_penalty": 1.0, "num_beams": 4},
    {"output_scores": True, "return_dict_in_generate": True},
]
# Nothing of greedy decoding reads these. They belong to sampling, to beams, to encoders, to an
# assistant, or to compilation, which the cache and `disable_compile` rule out.
NOT_READ = {
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "low_memory",
    "penalty_alpha",
    "dola_layers",
}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def loaded(pair):
    return load_model(pair.aligned, "none", "bfloat16", "cpu"), load_tokenizer(pair.aligned)


@pytest.fixture(scope="module")
def sensitive():
    """A random Llama in bfloat16 whose completions change with the width of the batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).bfloat16().eval(), tokenizer


@pytest.fixture(scope="module")
def whole(sensitive, tmp_path_factory):
    return complete(sensitive, PROMPTS, tmp_path_factory.mktemp("whole"), LONG)


@pytest.fixture(scope="module")
def plain(loaded, tmp_path_factory):
    return complete(loaded, PROMPTS, tmp_path_factory.mktemp("plain"))


def complete(loaded, prompts, folder, spec=SPEC):
    return generate.complete(*loaded, prompts, spec, context(folder))


def shipping(pair, folder, own):
    """A copy of the tiny model whose generation_config.json sets `own`."""
    shutil.copytree(pair.aligned, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    return folder


def generated(folder, model, adapter=None, **changes):
    prompts = write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    inputs = {"model": model, "prompts": prompts} | ({"adapter": adapter} if adapter else {})
    out = fresh(folder / "out")
    spec = GenerateSpec(max_new_tokens=12, max_tokens=128, **changes)
    generate.run(spec, inputs, out, context(folder / "ctx"))
    return out


def decoded_plainly(model, tokenizer, text, new=12):
    """Arg-max by hand, without a cache and without `generate`."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    start = len(ids)
    while len(ids) < start + new and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        with torch.inference_mode():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_every_setting_of_transformers_is_stated_or_without_effect_on_greedy_decoding():
    """A new version of transformers with a new setting fails here, until somebody decides."""
    settings_known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    stated = Decoding().model_dump().keys()
    assert stated <= settings_known
    assert settings_known - stated - NO_SETTING - NOT_READ == set()


def test_a_setting_that_is_not_greedy_is_invalid():
    for name, value in {"do_sample": True, "num_beams": 2, "repetition_penalty": 1.1}.items():
        with pytest.raises(ValidationError, match=name):
            GenerateSpec(decoding={name: value})
    assert Decoding.model_validate_json(Decoding().model_dump_json()) == Decoding()


@pytest.mark.model
@pytest.mark.parametrize("own", SHIPPED, ids=lambda own: "-".join(map(str, own)))
def test_no_shipped_setting_changes_a_completion(pair, plain, tmp_path, own):
    model = shipping(pair, tmp_path / "model", own)
    loaded = load_model(model, "none", "bfloat16", "cpu"), load_tokenizer(model)
    assert complete(loaded, PROMPTS, tmp_path) == plain


@pytest.mark.model
def test_a_repetition_penalty_changes_nothing_and_is_recorded(pair, plain, tmp_path):
    """The handed case. An adapter on the model makes no difference, and the model keeps its own
    settings.
    """
    own = {"repetition_penalty": 1.5, "temperature": 0.7, "stop_strings": ["a secret text"]}
    model = shipping(pair, tmp_path / "model", {**own, "eos_token_id": [2, 11]})
    out = generated(tmp_path, model)
    record = json.loads((out / GenerateSpec.DECODING).read_text())
    assert record == {
        "end_tokens": [2, 11],
        "not_used": {"repetition_penalty": 1.5, "temperature": 0.7, "stop_strings": "1 entries"},
    }
    texts = [row.completion for row in read_completions(out)]
    ended_at_11 = [text.partition("word4")[0].strip() for text, _, _ in plain]
    assert [text.partition("word4")[0].strip() for text in texts] == ended_at_11


@pytest.mark.model
def test_the_settings_of_a_model_with_an_adapter_are_put_aside_and_put_back(pair, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config).save_pretrained(
        tmp_path / "adapter"
    )
    found = []
    for name, own in {"plain": {}, "shipping": {"repetition_penalty": 1.5}}.items():
        folder = shipping(pair, tmp_path / name, own)
        model = load_model(folder, "none", "bfloat16", "cpu")
        before = model.generation_config
        with with_adapter(model, tmp_path / "adapter") as adapted:
            found.append(complete((adapted, load_tokenizer(folder)), PROMPTS, tmp_path / name))
        assert model.generation_config is before
        assert before.repetition_penalty == own.get("repetition_penalty")
    assert found[0] == found[1]


@pytest.mark.model
@settings(max_examples=40, deadline=None)
@given(own=st.lists(st.sampled_from(SHIPPED[:-1]), max_size=5))
def test_what_generate_resolves_has_no_setting_of_the_model(loaded, own):
    model = loaded[0]
    before = model.generation_config
    model.generation_config = GenerationConfig()
    for item in own:
        for name, value in item.items():
            setattr(model.generation_config, name, value)
    model.generation_config.custom_entry = 3
    try:
        with only(model, Decoding(), [2], 0, max_new_tokens=5) as explicit:
            resolved, rest = model._prepare_generation_config(explicit)
    finally:
        model.generation_config = before
    neutral = {**GenerationConfig._get_default_generation_params(), **explicit.to_diff_dict()}
    assert not rest and not hasattr(resolved, "custom_entry")
    for name, value in vars(resolved).items():
        if not name.startswith("_") and name != "transformers_version":
            assert value == neutral.get(name), name


@pytest.mark.model
def test_float32_completions_are_the_arg_max_by_hand_whatever_the_model_ships(pair, tmp_path):
    model = shipping(pair, tmp_path / "model", {"repetition_penalty": 1.5, "min_length": 40})
    loaded = load_model(model, "none", "float32", "cpu"), load_tokenizer(model)
    texts = [text for text, _, _ in complete(loaded, PROMPTS[:6], tmp_path)]
    assert texts == [decoded_plainly(*loaded, text) for text in PROMPTS[:6]]


@pytest.mark.model
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_completion_depends_on_its_prompt_alone(sensitive, whole, tmp_path_factory, data):
    """In bfloat16, bit for bit: any part of the set, in any order, with other prompts beside it,
    and with any number of threads.
    """
    chosen = data.draw(
        st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=40), label="prompts"
    )
    others = [
        f"word{n % 40} " * (n + 1) for n in data.draw(st.lists(st.integers(0, 30), max_size=5))
    ]
    prompts = [*(PROMPTS[index] for index in chosen), *others]
    order = data.draw(st.permutations(range(len(prompts))), label="order")
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from([1, 3]), label="threads"))
    try:
        found = complete(
            sensitive, [prompts[index] for index in order], tmp_path_factory.mktemp("run"), LONG
        )
    finally:
        torch.set_num_threads(before)
    back = dict(zip(order, found, strict=True))
    assert [back[place] for place in range(len(chosen))] == [whole[index] for index in chosen]


@pytest.mark.model
def test_work_shared_between_adapters_leaves_their_bits_equal(pair, tmp_path):
    """Adapters measured one after another on one loaded model, with shared tokens, against each
    alone.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapters = [None]
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config)
        model.save_pretrained(tmp_path / f"adapter{seed}")
        adapters.append(tmp_path / f"adapter{seed}")
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": text} for text in PROMPTS])
    shared = Residents()

    def text_of(adapter, residents, name):
        out = fresh(tmp_path / name)
        inputs = {"model": pair.aligned, "prompts": prompts}
        if adapter is not None:
            inputs["adapter"] = adapter
        generate.run(SPEC, inputs, out, context(tmp_path / f"{name}c", residents=residents))
        return (out / GenerateSpec.COMPLETIONS).read_text()

    together = [text_of(a, shared, f"t{i}") for i, a in enumerate([*adapters, *adapters[::-1]])]
    alone = [text_of(a, Residents(), f"a{i}") for i, a in enumerate(adapters)]
    assert together == [*alone, *alone[::-1]]
    assert len(set(alone)) == 3


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    new=st.integers(0, 512),
    size=st.sampled_from([1, 2, 8, 32, 256]),
    longest=st.sampled_from([None, 3000, 4000]),
)
@example(lengths=[15, 16, 31, 32, 64, 2048], new=12, size=32, longest=None)
@example(lengths=[2999, 3000, 3000], new=0, size=32, longest=3000)
def test_a_rows_shape_follows_from_its_length_alone(lengths, new, size, longest):
    shape = BatchShape(new, size, longest)
    encoded = [[7] * length for length in lengths]
    seen = []
    for width, chosen in shape.batches(encoded):
        rows = shape.rows(width)
        assert len(chosen) <= rows <= size and rows & (rows - 1) == 0
        assert rows == 1 or rows * (width + new) <= 16_384
        assert {width_of(lengths[index], longest) for index in chosen} == {width}
        assert len({lengths[index] == width for index in chosen}) == 1, "masked and unmasked"
        assert longest or all(lengths[index] < width for index in chosen)
        seen += chosen
    assert sorted(seen) == list(range(len(lengths)))


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    new=st.sampled_from([0, 64, 2000]),
    size=st.sampled_from([1, 4, 32]),
)
def test_every_batch_is_filled_to_the_shape_of_its_prompts(tokenizer, lengths, new, size):
    """A part of a set is run in the shapes of the whole set."""
    shape, ctx = BatchShape(new, size), SimpleNamespace(device="cpu", progress=lambda *_: None)

    def ask(batch):
        rows, width = batch["input_ids"].shape
        assert rows == rows_together(width, new, size)
        assert not batch["attention_mask"].bool().all(dim=1).any()
        tokens = batch["attention_mask"].sum(dim=1).tolist()
        assert {width_of(length) for length in tokens} == {width}
        return tokens

    encoded = [[7] * length for length in lengths]
    assert in_batches(ask, tokenizer, encoded, shape, "rows", ctx) == lengths


def test_7b_prompts_of_a_suite_fill_a_batch_and_long_ones_take_less_memory():
    assert rows_together(width_of(200), 64, 32) == 32
    assert rows_together(width_of(1000), 64, 32) == 8
    assert rows_together(width_of(100_000), 64, 32) == 1


@pytest.mark.model
def test_threads_are_a_power_of_two_while_a_batch_runs():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with even_threads():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.model
def test_a_batch_that_does_not_fit_is_never_halved(loaded, tmp_path, monkeypatch):
    sizes = []

    def too_large(self, input_ids, **_):
        sizes.append(len(input_ids))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(loaded[0]), "generate", too_large)
    with pytest.raises(EvaluationError, match="not halved.*set `batch_size: 16`, quantise"):
        complete(loaded, PROMPTS, tmp_path)
    alone = SPEC.model_copy(update={"batch_size": 1})
    with pytest.raises(EvaluationError, match="change the results; quantise the model"):
        complete(loaded, PROMPTS, tmp_path, alone)
    assert sizes == [32, 1]


@pytest.mark.model
def test_rows_that_meet_are_run_one_by_one(pair, tmp_path):
    """int8 searches the whole batch for outliers, and experts add up tokens of all rows."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = load_model(pair.aligned, "int8", "bfloat16", "cpu")
    loaded = model, load_tokenizer(pair.aligned)
    assert rows_meet(model)
    assert not rows_meet(load_model(pair.aligned, "nf4", "bfloat16", "cpu"))
    together = complete(loaded, PROMPTS[:6], tmp_path)
    assert together[::-1] == complete(loaded, PROMPTS[:6][::-1], tmp_path)
    assert together[2:3] == complete(loaded, PROMPTS[2:3], tmp_path)
    experts = MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    assert rows_meet(MixtralForCausalLM(experts))


@pytest.mark.model
def test_a_judges_own_settings_change_no_verdict(pair, tmp_path):
    rows = [
        {
            **dict.fromkeys(("category", "source", "label", "answer"), ""),
            "id": str(index),
            "prompt": text,
            "completion": text,
            "tokens": 1,
            "ended": True,
        }
        for index, text in enumerate(PROMPTS)
    ]
    write_lines(tmp_path / "gen" / GenerateSpec.COMPLETIONS, rows)
    asked = []

    def answers(own, name):
        model = shipping(pair, tmp_path / name, own)
        spec = JudgeSpec(template="yes-no", max_new_tokens=8)
        out = fresh(tmp_path / f"{name} out")
        inputs = {"generation": tmp_path / "gen", "model": model}
        judge.run(spec, inputs, out, context(tmp_path / f"{name} ctx"))
        return asked.pop()

    with pytest.MonkeyPatch.context() as patch:
        original = judge._answers

        def remember(*arguments):
            asked.append(original(*arguments))
            return asked[-1]

        patch.setattr(judge, "_answers", remember)
        assert answers({}, "plain") == answers({"repetition_penalty": 3.0}, "shipping")


@pytest.mark.model
def test_lm_evals_own_generation_is_greedy_too(pair, plain, tmp_path):
    texts = []
    for name, own in {"plain": {}, "shipping": {"repetition_penalty": 1.5}}.items():
        folder = shipping(pair, tmp_path / name, own)
        model, tokenizer = (
            load_model(folder, "none", "bfloat16", "cpu"),
            load_tokenizer(folder),
        )
        lm = PrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=8, backend="causal")
        requests = [
            SimpleNamespace(args=(text, {"until": ["word7"], "max_gen_toks": 12}))
            for text in PROMPTS
        ]
        texts.append(lm.generate_until(requests, disable_tqdm=True))
    assert texts[0] == texts[1] and len(set(texts[0])) > 10
    assert not any("word7" in text.split() for text in texts[0])


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample"),
        ({"temperature": 0.7}, "do_sample"),
        ({"num_beams": 4, "do_sample": False}, "num_beams"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
    ],
)
def test_a_task_that_asks_for_another_decoding_is_an_error(own, named):
    with pytest.raises(EvaluationError, match=f"sets .*{named}.* greedily"):
        require_greedy(own)


def test_a_task_may_state_greedy_decoding():
    require_greedy({"do_sample": False, "temperature": 0.0, "num_beams": 1, "top_p": 1.0})


@pytest.mark.model
def test_scores_follow_from_the_requests_alone(loaded):
    """bfloat16 log-likelihoods, bit for bit: before and after other work, in any order of asking,
    with three threads.
    """
    rng = random.Random(5)
    requests = []
    for _ in range(25):
        start = [1, *(rng.randrange(7, 47) for _ in range(rng.randint(3, 30)))]
        ends = [[rng.randrange(7, 47) for _ in range(rng.randint(1, 5))] for _ in range(4)]
        requests += [(None, start, end) for end in ends]
    model, tokenizer = loaded
    lm = PrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=8, backend="causal")
    first = lm._loglikelihood_tokens(requests)
    order = rng.sample(range(len(requests)), len(requests))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = lm._loglikelihood_tokens([requests[index] for index in order])
    finally:
        torch.set_num_threads(before)
    assert again == [first[index] for index in order]


def test_old_keys_in_config_json_count_as_shipped(pair, tmp_path):
    model = shipping(pair, tmp_path / "model", {})
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "repetition_penalty": 1.5}))
    assert settings_not_used(shipped(model), Decoding()) == {"repetition_penalty": 1.5}


def test_a_suites_batch_size_is_part_of_the_measurement():
    inputs = {"model": Source("m", "/m"), "prompts": Source("p", "/p")}

    def key(**own):
        stages = stages_of("s", RefusalSuite(**own), inputs, {}, {})
        return stages["generate:s"].lineage

    assert key() == key(batch_size=32) != key(batch_size=8)
    with pytest.raises(ValidationError, match="batch_size"):
        RefusalSuite(batch_size=5)


def test_a_context_cannot_change_a_batch():
    from ebbline.tasks.stage import Context

    assert "batch_size" not in {field.name for field in dataclasses.fields(Context)}
