"""Counted work: every stage kind has some, and it depends only on settings that change it."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.schedule.counted_work import (
    MACHINES,
    NOMINAL,
    load_of,
    machine_of,
    seconds_on,
    work_of,
)
from ebbline.tasks.data import rows as work
from ebbline.tasks.data.language import language_files
from ebbline.tasks.data.rows import LANGUAGE_ROWS, rows_of
from ebbline.tasks.identity import content_digest
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.models.memory import Shape
from ebbline.tasks.models.model_work import model_shape
from ebbline.tasks.models.sizes import PRETRAINING_ROWS, named_shape, organism_shape
from ebbline.tasks.specs import (
    AdapterSpec,
    ApplySpec,
    ConvertSpec,
    DataSpec,
    DefendSpec,
    EvaluateSpec,
    GenerateSpec,
    JudgeSpec,
    LanguageSpec,
    LoxSpec,
    MeasureSpec,
    OrganismSpec,
    ProjectSpec,
    ScoreSpec,
    SubspaceSpec,
    TrainSpec,
)
from ebbline.tasks.stage import Part, Source, Stage
from ebbline.tasks.stage_kind import Load

LANGUAGE = Stage(LanguageSpec())
SEVEN_B = Source("7", "hub:model:meta-llama/Llama-2-7b-hf@" + "a" * 40)
SEVENTY_B = Source("70", "hub:model:meta-llama/Llama-2-70b-hf@" + "a" * 40)
ROWS = Part(
    Stage(DataSpec(size=1000), {"pool": Source("d", "hub:dataset:org/rows@" + "a" * 40)}),
    DataSpec.ROWS,
)
PROMPTS = Source("p", "hub:dataset:org/prompts@" + "a" * 40)


def train(model=SEVEN_B, data=ROWS, **settings) -> Stage:
    return Stage(TrainSpec(**settings), {"model": model, "data": data})


def one_of(kind: str) -> Stage:
    """The first stage of this kind in `one_of_each`."""
    return next(stage for stage in one_of_each() if stage.kind == kind)


def one_of_each() -> list[Stage]:
    trained = train(rank=8)
    adapter = Part(trained, TrainSpec.ADAPTER)
    project = Stage(ProjectSpec(), {"adapter": adapter, "base": SEVEN_B, "aligned": SEVEN_B})
    apply = Stage(ApplySpec(threshold=0.5), {"adapter": adapter, "projection": project})
    generation = Stage(GenerateSpec(), {"model": SEVEN_B, "prompts": PROMPTS, "adapter": apply})
    judge = Stage(JudgeSpec(template="harmbench"), {"generation": generation, "model": SEVEN_B})
    return [
        LANGUAGE,
        Stage(OrganismSpec(size="small"), {"language": LANGUAGE}),
        Stage(ConvertSpec(), {"source": Source("g", "/models/SmolLM2-135M-Instruct.Q4_1.gguf")}),
        ROWS.stage,
        Stage(LoxSpec(factor=1.0), {"model": SEVEN_B, "base": SEVEN_B}),
        trained,
        Stage(
            SubspaceSpec(energy=0.9, target_modules=("q_proj",)),
            {"base": SEVEN_B, "aligned": SEVEN_B},
        ),
        project,
        apply,
        generation,
        judge,
        Stage(ScoreSpec(measure="refusal", scorer="prefix"), {"generation": generation}),
        Stage(EvaluateSpec(task="mmlu"), {"model": SEVEN_B, "prompts": PROMPTS}),
        Stage(AdapterSpec(), {"source": Source("a", "/adapters/mine"), "model": SEVEN_B}),
        Stage(
            MeasureSpec(method="subspace_removal", knobs={"k": 8}),
            {"adapter": adapter, "base": SEVEN_B, "aligned": SEVEN_B},
        ),
        Stage(DefendSpec(method="scale"), {"adapter": adapter, "measurement": project}),
    ]


def test_every_kind_of_stage_has_positive_work():
    stages = one_of_each()
    assert {stage.kind for stage in stages} == STAGE_KINDS.keys()
    for stage in stages:
        assert all(value >= 0.0 for value in asdict(load_of(stage)).values())
        assert 0.0 < work_of(stage) < 1e6
        assert load_of(stage).written > 0


@given(
    st.sampled_from([1, 8, 64]),
    st.integers(1, 400),
    st.sampled_from([1, 4, 16]),
    st.sampled_from(["none", "nf4"]),
)
def test_a_trainings_work_is_proportional_to_its_steps(rank, steps, batch, quantisation):
    once = load_of(train(rank=rank, steps=steps, global_batch=batch, quantisation=quantisation))
    twice = load_of(
        train(rank=rank, steps=2 * steps, global_batch=batch, quantisation=quantisation)
    )
    assert twice.tokens == 2 * once.tokens and twice.kernels == 2 * once.kernels
    assert twice.flops == pytest.approx(2 * once.flops)
    assert (twice.read, twice.written) == (once.read, once.written)


def test_a_penalty_adds_its_products_and_asfts_the_read_of_two_models():
    plain, norm, asft = (
        load_of(train(rank=8, steps=100, penalty=name)) for name in ("none", "norm", "asft")
    )
    elements = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert asft.flops - plain.flops == pytest.approx(8 * elements * 8 * 100, rel=1e-6)
    assert asft.read - plain.read == pytest.approx(4 * elements)
    assert norm.flops == plain.flops and plain.kernels < norm.kernels < asft.kernels
    off = load_of(train(rank=8, steps=100, penalty="asft", penalty_weight=0.0))
    assert off == plain


@given(st.integers(1, 5000), st.sampled_from([0.5, 1.0, 3.0]))
def test_epochs_count_as_the_equivalent_number_of_steps(size, epochs):
    rows = Part(Stage(DataSpec(size=size), dict(ROWS.stage.inputs)), DataSpec.ROWS)
    steps = max(1, round(epochs * size / 16))
    assert load_of(train(data=rows, epochs=epochs)) == load_of(train(data=rows, steps=steps))


def test_a_lora_training_of_7b_takes_about_six_flops_a_weight_and_token():
    load = load_of(train(rank=8, steps=100))
    assert load.flops / load.tokens == pytest.approx(6 * 6.6e9, rel=0.05)
    # 20 million float32 elements: rank 8 on all seven linear modules
    assert load.written == pytest.approx(4 * 20e6, rel=0.01)


def test_model_size_and_answer_length_change_the_work_but_seed_and_threshold_do_not():
    assert work_of(train(SEVENTY_B)) > 5 * work_of(train(SEVEN_B))
    short, long = (
        Stage(GenerateSpec(max_new_tokens=n), {"model": SEVEN_B, "prompts": PROMPTS})
        for n in (16, 128)
    )
    assert work_of(long) > work_of(short) and load_of(long).moved > 7 * load_of(short).moved
    assert load_of(train(seed=0)) == load_of(train(seed=7))
    trained = Part(train(), TrainSpec.ADAPTER)
    applied = [
        Stage(ApplySpec(threshold=t), {"adapter": trained, "projection": LANGUAGE})
        for t in (0.1, 0.9)
    ]
    assert load_of(applied[0]) == load_of(applied[1])


def test_a_limit_applies_to_each_subject_of_mmlu():
    def read(task: str, limit: int | None) -> float:
        return load_of(
            Stage(EvaluateSpec(task=task, limit=limit), {"model": SEVEN_B, "prompts": PROMPTS})
        ).tokens

    assert read("mmlu", 10) / read("mmlu", None) == pytest.approx(570 / 14_042)
    assert read("hellaswag", 10) / read("hellaswag", None) == pytest.approx(10 / 10_042)


def test_the_blocks_of_a_set_add_up_to_its_work_and_a_limit_bounds_it():
    def rows(**settings) -> float:
        return load_of(
            Stage(GenerateSpec(**settings), {"model": SEVEN_B, "prompts": PROMPTS})
        ).tokens

    blocks = [rows(limit=120, block={"index": index, "size": 50}) for index in range(3)]
    assert sum(blocks) == rows(limit=120) and blocks[0] == 2.5 * blocks[2]
    assert rows(limit=1_000_000) == rows(), "a limit above the set's size changes nothing"


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("Llama-2-7b-chat-hf", 32),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", 30),
        ("Llama-2-13b", 40),
        ("llama-70B", 80),
        ("Mistral-7B-v0.1", 32),
    ],
)
def test_a_models_shape_follows_from_the_size_in_its_name(name, layers):
    assert named_shape(name).layers == layers


def test_a_name_without_a_number_has_no_shape():
    assert named_shape("my-model") is None and named_shape("v2b3-q4") is None


def test_a_local_models_shape_follows_from_its_config(tmp_path):
    folder = tmp_path / "llama-70b"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 50,
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert model_shape(Source("c", str(folder))) == Shape(2, 64, 64, 32, 4, 128, 50, False)


def test_a_tuned_model_and_an_organism_have_the_shape_of_their_base():
    organism = Part(Stage(OrganismSpec(size="large"), {"language": LANGUAGE}), OrganismSpec.MODEL)
    tuned = Part(train(organism, method="full"), TrainSpec.MODEL)
    assert model_shape(tuned) == model_shape(organism) == organism_shape("large")


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.jsonl", '{"prompt": "x"}\n' * 7, 7),
        ("a.csv", "goal,target\n" + "x,y\n" * 5, 5),
        ("a.json", json.dumps([{"instruction": "x"}] * 9), 9),
        ("a.txt", "one\ntwo\nthree", 3),
    ],
)
def test_the_rows_of_a_local_set_are_counted(tmp_path, name, text, rows):
    path = tmp_path / name
    path.write_text(text)
    assert rows_of(Source(content_digest(path), str(path)))[0] == rows


def test_a_large_set_is_counted_from_its_first_part_and_a_damaged_one_has_a_default(
    tmp_path, monkeypatch
):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x"}\n' * 1000)
    monkeypatch.setattr(work, "COUNTED_BYTES", 1600)
    assert rows_of(Source("large", str(path))) == (1000, 4)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert rows_of(Source("broken", str(broken))) == (work.ROWS, work.ROW_TOKENS)
    (tmp_path / "llama-13b").mkdir()
    (tmp_path / "llama-13b" / "config.json").write_text('{"model_type": "llama"')
    assert model_shape(Source("13", str(tmp_path / "llama-13b"))).layers == 40


def test_the_row_counts_of_the_languages_sets_are_those_written():
    written = {name: len(rows) for name, rows in language_files(0).items()}
    both = LANGUAGE_ROWS.keys() & written.keys()
    assert both >= {"align.jsonl", "benign.jsonl", "refusal.jsonl", "task.jsonl", "utility.jsonl"}
    assert {name: LANGUAGE_ROWS[name] for name in both} == {name: written[name] for name in both}
    assert (
        written["pretrain.jsonl"] == PRETRAINING_ROWS
        and written["mmlu/test.jsonl"] == LANGUAGE_ROWS["mmlu"]
    )


@given(st.builds(Load, *[st.floats(0, 1e15)] * 7), st.integers(1, 8))
def test_more_gpus_or_a_faster_machine_never_take_longer(load, gpus):
    assert seconds_on(machine_of("A100"), load, gpus) <= seconds_on(machine_of("A100"), load, 1)
    assert (
        seconds_on(machine_of("H100"), load)
        <= seconds_on(machine_of("A100"), load)
        <= seconds_on(machine_of(None), load)
    )


def test_gpu_types_have_rays_names_and_an_unknown_type_is_the_nominal_machine():
    assert (
        machine_of("A100-80G")
        == machine_of("A100")
        == MACHINES[NOMINAL]
        == machine_of("no such GPU")
    )
    assert machine_of(None) != MACHINES[NOMINAL]
