"""No code that comes with data runs. Definitions of lm-eval tasks are plain YAML with known
settings, and templates are rendered in a sandbox. A planted marker file must never appear.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from lm_eval import utils

from ebbline.tasks.data.language import write_language
from ebbline.tasks.errors import EbblineError, EvaluationError
from ebbline.tasks.measuring.evaluate import require_questions
from ebbline.tasks.measuring.lm_tasks.definitions import TASK, read_index, use_sandbox
from ebbline.tasks.measuring.lm_tasks.local_rows import read_splits
from ebbline.tasks.measuring.lm_tasks.rows_cache import rows_cached
from ebbline.tasks.measuring.lm_tasks.sources import require_own_files, tasks_of
from tests.tasks.test_evaluate import YAML, items
from tests.tiny import write_lines

PLAIN = {**yaml.safe_load(YAML), "task": "tiny_choice"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A task folder with a module that leaves a marker when it is imported."""
    folder = tmp_path / "data"
    write_lines(folder / "test.jsonl", items(3))
    write_lines(folder / "dev.jsonl", items(2))
    (folder / "utils.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\ndef f(*a, **k): return ''\n"
    )
    return folder


def marker(folder: Path) -> Path:
    return folder.parent / "marker"


def attempt(folder: Path, name: str) -> Any:
    """Build a task as a stage does. None for an EvaluationError or a template's error."""
    use_sandbox()
    try:
        builds = dict(tasks_of(name, folder))
        return builds[name]()
    except (EvaluationError, TemplateError):
        return None


def shell(folder: Path) -> str:
    return "{{ cycler.__init__.__globals__.os.popen('touch " + str(marker(folder)) + "').read() }}"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("organism_mmlu", "mmlu"),
        ("organism_hellaswag", "hellaswag"),
        ("plain_sums", "plain/sums"),
    ],
)
def test_the_tasks_of_the_shipped_studies_are_taken(name, folder, tmp_path):
    write_language(tmp_path, seed=0)
    ((task, build),) = tasks_of(name, tmp_path / folder)
    assert task == name and len(build().test_docs()) > 0


@pytest.mark.parametrize(
    "text",
    [
        "task : zed\ndataset_path: json\ndoc_to_text: !function utils.f\n",
        "{task: zed, dataset_path: json, doc_to_text: !function utils.f}",
        "? task\n: zed\n? doc_to_text\n: !function utils.f\n",
        "'task': zed\nx: &f !function utils.f\ndoc_to_text: *f\n",
        "%TAG !e! tag:x,1:\n---\ntask: zed\ndoc_to_text: !e!function utils.f\n",
        "task: zed\ndoc_to_text: !<!function> utils.f\n",
        "task: zed\nprocess_docs: !!python/name:utils.f\n",
        "task: zed\nclass: utils.f\n",
        "class: utils.f\n",
        "task: zed\nprocess_results: utils.f\n",
        "task: zed\nfilter_list: [{name: a, filter: [{function: custom, filter_fn: utils.f}]}]\n",
        "task: zed\nmetric_list: [{metric: !function utils.f}]\n",
        "task: zed\nmetric_list: [{metric: unknown, hf_evaluate: true}]\n",
        "task: zed\nfewshot_config: {sampler: first_n, process_docs: utils.f}\n",
        "group: zed\ntask: [{task: tiny_choice, process_docs: utils.f}]\n",
        "group: zed\ntask: [{group: y, task: [{task: tiny_choice, class: utils.f}]}]\n",
        "task: ../zed\n",
        "task: zed\nunsafe_code: true\n",
        "task: zed\ninclude: /etc/hostname\n",
        'task: zed\ninclude: "a\\0b"\n',
        "task: zed\ninclude: [1]\n",
        "task: zed\ninclude: zed.yaml\n",
        "task: zed\ntask: other\n",
        "group: zed\ntask: [{group: zed, task: [!function utils.f]}]\n",
        "task: 2024-13-45\n",
        "task: !!binary aGk=\n",
        "task: !!bool x\n",
        "? [a]\n: b\n",
        "task: zed\nmetadata: " + "[" * 3000 + "]" * 3000 + "\n",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        )
        + "task: zed\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.slow  # one of them is a file with thousands of aliases
def test_a_definition_with_code_or_an_unknown_setting_is_an_error(folder, text, encoding):
    (folder / "tiny_choice.yaml").write_text(YAML)
    (folder / "zed.yaml").write_text(text, encoding)
    for name in ("zed", "tiny_choice"):  # also the ordinary task beside it
        with pytest.raises(EvaluationError, match=r"zed\.yaml"):
            tasks_of(name, folder)
    assert not marker(folder).exists()


def test_an_error_names_the_file_the_line_and_the_remedy(folder):
    (folder / "zed.yaml").write_text("task : zed\n\ndoc_to_text: !function utils.f\n")
    with pytest.raises(EvaluationError, match=r"zed\.yaml, line 3: .*!function.*runs no code"):
        read_index(folder)
    (folder / "zed.yaml").write_text("task: zed\nprocess_docs: utils.f\n")
    with pytest.raises(EvaluationError, match=r"zed\.yaml: .*`process_docs` .*into the rows"):
        read_index(folder)


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target", "doc_to_choice", "description"])
def test_a_template_cannot_leave_the_sandbox(folder, key):
    (folder / "zed.yaml").write_text(yaml.safe_dump({**PLAIN, "task": "zed", key: shell(folder)}))
    task = attempt(folder, "zed")
    if task is not None:  # a description is rendered with the requests
        with pytest.raises(TemplateError, match="unsafe"):
            task.build_all_requests(limit=1)
    assert not marker(folder).exists()


def test_includes_are_merged_as_in_lm_eval_and_anchors_are_written_out(folder):
    common = {key: value for key, value in PLAIN.items() if key not in ("task", "doc_to_target")}
    (folder / "common").write_text(yaml.safe_dump(common))
    (folder / "label").write_text("doc_to_target: '{{0}}'\ndescription: first\n")
    (folder / "zed.yaml").write_text(
        "include: [label, common]\ntask: zed\ndescription: &d own\nmetadata: {note: *d}\n"
    )
    (folder / "group.yaml").write_text("group: both\ntask: [{task: zed, description: group's}]\n")
    index = read_index(folder)
    assert index["zed"].cfg == {
        **common,
        "doc_to_target": "{{0}}",
        "task": "zed",
        "description": "own",
        "metadata": {"note": "own"},
    }
    assert attempt(folder, "zed").config.description == "own"
    ((_, build),) = tasks_of("both", folder)
    assert build().config.description == "group's"


def test_a_group_that_contains_itself_is_an_error(folder):
    (folder / "zed.yaml").write_text("group: zed\ntask: [zed]\n")
    with pytest.raises(EvaluationError, match="a group that contains itself"):
        tasks_of("zed", folder)


def test_every_allowed_setting_is_one_of_lm_evals_tasks():
    from dataclasses import fields

    from lm_eval.config.task import TaskConfig

    assert set(TASK) <= {field.name for field in fields(TaskConfig)}


@pytest.mark.slow  # it reads lm-eval's own definitions
def test_yaml_in_a_hub_snapshot_defines_nothing(folder, tmp_path):
    (folder / "zed.yaml").write_text("task : zed\ndoc_to_text: !function utils.f\n")
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / ("c" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    with pytest.raises(EvaluationError, match="has none called 'zed'"):
        tasks_of("zed", snapshot)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "place", ["https://example.org/a.parquet", "/etc/passwd", "../a.jsonl", "zip://a::b", "~/a"]
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_that_names_a_file_outside_the_data_set_is_an_error(tmp_path, place, card):
    configs = {"configs": [{"config_name": "x", "data_files": [{"split": "test", "path": place}]}]}
    text = yaml.safe_dump(configs)
    (tmp_path / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
    with pytest.raises(EvaluationError, match="names the data file"):
        require_own_files(tmp_path)


# The fuzzer: spellings of YAML with a call in it, and templates that look for a way out.

CALLS = [
    "!function utils.f",
    "!<!function> utils.f",
    "!!python/name:utils.f",
    "!!python/object/apply:os.system ['touch MARKER']",
    "!!python/object/new:utils.f []",
    "!!python/module:utils",
    "utils.f",
    "[!function utils.f]",
    "{a: !function utils.f}",
    "&x !function utils.f",
]
KEYS = [*TASK, "group", "class", "process_docs", "process_results", "custom_dataset", "include"]
KEYS += ["filter_list", "use_prompt", "dataset_kwargs", "doc_to_image", "generation_kwargs", "<<"]
SPELLINGS = ["{}: {}\n", "{} : {}\n", '"{}": {}\n', "'{}' : {}\n", "? {}\n: {}\n", "!!str {}: {}\n"]


@st.composite
def definitions(draw: st.DrawFn) -> str:
    pairs = [("task", "zed"), ("dataset_path", "json")] if draw(st.booleans()) else []
    values = st.sampled_from([*CALLS, "zed", "json", "[zed]", "0", "null", "common", "{}"])
    pairs += draw(st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=5))
    if draw(st.booleans()):
        return "{" + ", ".join(f"{key} : {value}" for key, value in pairs) + "}\n"
    spelt = [draw(st.sampled_from(SPELLINGS)).format(*pair) for pair in pairs]
    return draw(st.sampled_from(["", "---\n", "%YAML 1.1\n---\n", "\ufeff"])) + "".join(spelt)


@given(text=definitions(), included=definitions(), suffix=st.sampled_from([".yaml", ".YAML", ""]))
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.slow
def test_no_spelling_of_a_definition_runs_code(folder, text, included, suffix):
    (folder / "zed.yaml").write_text(text.replace("MARKER", str(marker(folder))))
    (folder / f"common{suffix}").write_text(included.replace("MARKER", str(marker(folder))))
    try:
        index = read_index(folder)
        for entry in index.values():
            json.dumps(entry.cfg)  # plain values alone reach lm-eval
    except EvaluationError:
        pass
    assert not marker(folder).exists()
    (folder / f"common{suffix}").unlink()


@pytest.mark.parametrize(
    "merges",
    [
        # each level has nine times as many values as the one before
        "".join(
            f"l{n}: &l{n} {{<<: [{','.join(['*l' + str(n - 1)] * 9)}]}}\n" for n in range(1, 12)
        ),
        f"x: {{<<: [{','.join(['*l0'] * 20_000)}]}}\n",
    ],
    ids=["deep", "wide"],
)
def test_merge_keys_that_write_out_too_much_are_an_error_at_once(folder, merges):
    (folder / "zed.yaml").write_text("l0: &l0 {a: 1, b: 2, c: 3}\n" + merges + "task: zed\n")
    with pytest.raises(EvaluationError, match=r"zed\.yaml, line \d+: over 10000 values by merge"):
        read_index(folder)


def test_rows_are_read_as_they_are_written(folder):
    texts = ["2020-01-01", "2020-01-01T00:00:00", "007", "1e3", "null", " a "]
    rows = [{**row, "question": text} for row, text in zip(items(6), texts, strict=True)]
    rows[0]["only here"] = True
    write_lines(folder / "test.jsonl", rows)
    read = read_splits({"test": folder / "test.jsonl"})["test"]
    assert [row["question"] for row in read] == texts
    assert [row["only here"] for row in read] == [True, *[None] * 5]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question": NaN}', r"jsonl:2 has NaN"),
        ('{"question": "a", "question": "b"}', r"jsonl:2 .*one key given twice"),
        ('{"question": 5}', "'question' have different types"),
    ],
)
def test_a_row_that_is_not_plain_is_an_error_without_its_text(folder, line, problem):
    (folder / "test.jsonl").write_text('{"question": "secret"}\n' + line + "\n")
    with pytest.raises(EbblineError, match=problem) as caught:
        read_splits({"test": folder / "test.jsonl"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["plain", "my[1]", "a*b"])
def test_a_folders_name_is_no_pattern(tmp_path, name):
    write_lines(tmp_path / "aXb" / "test.jsonl", items(9))
    write_lines(tmp_path / name / "test.jsonl", items(3))
    (tmp_path / name / "tiny.yaml").write_text(yaml.safe_dump(PLAIN))
    write_lines(tmp_path / name / "dev.jsonl", items(2))
    task = attempt(tmp_path / name, "tiny_choice")
    assert [dict(row) for row in task.dataset["test"]] == items(3)


@pytest.mark.slow  # it starts `datasets`
def test_the_rows_of_a_data_set_are_those_of_the_files_that_are_there_now(tmp_path, monkeypatch):
    """Its files are replaced with their time kept, as tar and rsync do."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, rows = tmp_path / "data", items(6)
    for part in (rows[:3], rows[3:]):
        os.utime(write_lines(folder / "test.jsonl", part), (1e9, 1e9))
        with rows_cached(folder):
            found = load_dataset(str(folder.resolve()), split="test")
        assert [dict(row) for row in found] == part


ROOTS = ["cycler", "lipsum", "joiner", "namespace", "range", "dict", "self", "''", "()", "1.0", "q"]
ROOTS += ["[]", "{}", "q.upper", "(q|string)", "cycler('a')", "namespace(a=q)", "[q]|map('upper')"]
STEPS = [
    ".__class__", ".__init__", ".__globals__", ".__builtins__", ".__subclasses__()", ".__mro__[1]",
    ".__base__", "|attr('__class__')", "|attr('__globals__')", "['__globals__']", ".os",
    "['os']", ".popen('touch MARKER').read()", ".system('touch MARKER')", ".__import__('os')",
    ".format", "('{0.__class__}')", ".format_map({})", "|first", "|last", "[0]", ".gi_frame",
    ".f_globals", ".__func__", ".__code__", ".__call__()", "|map(attribute='__class__')|list",
    ".eval(\"open('MARKER','w')\")", ".__self__", ".environment", "._module", ".append(1)",
    "|regex_replace('a', 'b')", "|selectattr('__class__')|list", "|groupby('__class__')",
]  # fmt: skip
SHAPES = [
    "{{{{ {} }}}}",
    "{{% set x = {} %}}{{{{ x }}}}",
    "{{% for x in [{0}] %}}{{{{ x }}}}{{% endfor %}}",
    "{{% if {} %}}a{{% endif %}}",
    "{{% with x = {} %}}{{{{ x }}}}{{% endwith %}}",
]


@given(
    root=st.sampled_from(ROOTS),
    steps=st.lists(st.sampled_from(STEPS), max_size=6),
    shape=st.sampled_from(SHAPES),
)
@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.slow
def test_no_template_reaches_a_module_or_runs_a_command(folder, root, steps, shape):
    use_sandbox()
    template = shape.format(root + "".join(steps)).replace("MARKER", str(marker(folder)))
    try:
        rendered = utils.apply_template(template, {"q": "word1"})
    except Exception:  # noqa: BLE001  # any error is fine, and no marker is
        rendered = ""
    assert not marker(folder).exists()
    assert "<module " not in rendered and "<class 'os" not in rendered


@pytest.mark.parametrize("numbers", [["7", "word1", "word2"], ["word1", "word2", "12"], ["5"] * 3])
def test_a_question_of_digits_alone_is_an_error_and_not_the_number_of_a_choice(folder, numbers):
    rows = [row | {"question": text} for row, text in zip(items(3), numbers, strict=True)]
    write_lines(folder / "test.jsonl", rows)
    (folder / "tiny_choice.yaml").write_text(YAML)
    task = attempt(folder, "tiny_choice")
    require_questions("tiny_choice", task)
    with pytest.raises(EvaluationError, match=r"tiny_choice has a question of digits alone"):
        task.build_all_requests()
    (folder / "tiny_choice.yaml").write_text(
        YAML.replace('"{{question}}"', '"Question: {{question}}"')
    )
    task = attempt(folder, "tiny_choice")
    require_questions("tiny_choice", task)
    task.build_all_requests()
