"""`ebbline compare` of measurements: which are compared, what pairs them, what is an error."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.tasks.identity import folder_files
from ebbline.tasks.measuring.metrics import Metric, Sample, write_metrics, write_samples


def outcome(
    folder: Path,
    refused: int,
    of: int = 40,
    name: str = "refusal_rate",
    prompts: str = "a",
    **spec: object,
) -> Path:
    """What `ebbline evaluate` writes, with the first `refused` prompts refused."""
    for stage in ("generate", "metrics"):
        (folder / stage).mkdir(parents=True)
    record = {"rows": of, "asked": of, "sha256": prompts * 64, "chat": {"tokenizer": "model"}}
    (folder / "generate" / "prompts.json").write_text(json.dumps(record))
    write_metrics(folder / "metrics", [Metric(name, refused, of)])
    write_samples(
        folder / "metrics",
        [Sample(str(n), "", "refused", "", n < refused) for n in range(of)],
    )
    for stage, own in (("generate", {"limit": None, "dtype": "float32", **spec}), ("metrics", {})):
        mark = {"spec": own, "files": folder_files(folder / stage)}
        (folder / stage / "done.json").write_text(json.dumps(mark))
    return folder


def compared(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    return done.output


def test_the_same_prompts_are_paired_and_a_folder_is_compared_with_the_model(tmp_path):
    outcome(tmp_path / "model", 30)
    outcome(tmp_path / "adapter", 5, dtype="bfloat16")  # how a model is loaded asks nothing else
    text = compared(tmp_path)
    assert text.startswith("adapter against model\n") and "lower (paired, -62.5 points [" in text
    assert "McNemar's exact test" in text
    (found,) = json.loads(compared(tmp_path / "adapter", tmp_path / "model", "--json"))[
        "comparisons"
    ]
    assert found["before"] == "adapter" and found["not_comparable"] is None
    paired = found["metrics"]["refusal_rate"]["paired"]
    assert paired["prompts"] == 40 and paired["difference"] == 0.625


def test_p_values_of_all_measurements_are_corrected_together(tmp_path):
    """6 gains of 40 have p = 0.03 alone, and are no finding among twenty tries."""
    outcome(tmp_path / "model", 10)
    outcome(tmp_path / "one", 16)
    assert "higher (paired" in compared(tmp_path)
    for number in range(20):
        outcome(tmp_path / f"other-{number}", 10)
    text = compared(tmp_path)
    assert "higher (paired" not in text and text.count("not distinguishable (paired") == 21


@pytest.mark.parametrize(
    ("other", "reason"),
    [({"prompts": "b"}, "different prompts"), ({"limit": 3}, "limit none and 3")],
)
def test_other_prompts_or_settings_are_compared_by_intervals_alone(tmp_path, other, reason):
    one, two = outcome(tmp_path / "a", 30), outcome(tmp_path / "b", 5, **other)
    text = compared(one, two)
    assert f"not comparable: {reason}" in text.replace("the same prompts, measured with other "
                                                       "settings: ", "")  # fmt: skip
    assert "lower (by intervals)" in text


def test_what_cannot_be_compared_is_one_clear_error(tmp_path):
    one = outcome(tmp_path / "a", 30)
    assert "is one measurement; give another one" in compared(one)
    assert "quickstart holds no finished measurement" in compared(one, "quickstart")
    task = outcome(tmp_path / "task", 3, name="task_accuracy")
    assert "task measures task_accuracy, and a refusal_rate" in compared(one, task)
    assert "--home, --floor and --to are of studies" in compared(one, task, "--floor", "x=1")
    other = outcome(tmp_path / "b", 20)
    samples = other / "metrics" / "samples.jsonl"
    samples.write_text(samples.read_text().replace("true", "false"))
    assert "was changed since it was measured" in compared(one, other)
