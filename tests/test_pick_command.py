"""`ebbline pick --export` on a small real study: what may leave, that it is what was measured, and
what its card says.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from ebbline.analysis.results.collect import collect
from ebbline.cli import app
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import content_digest, folder_files
from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.measuring.metrics import Metric, pooled
from tests.sweeps.made import study as made_study
from tests.tiny import Pair, conversations, write_chats, write_lines

FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "pick.json",
    "projected_modules.json",
]


def pinned(path: Path) -> dict[str, Any]:
    return {"path": {"path": str(path), "sha256": content_digest(path)}}


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> tuple[Path, Study, Home]:
    """A study of two seeds that was run to its end: without projection, and with every module
    projected.
    """
    folder = tmp_path_factory.mktemp("pick")
    asked = [
        {"prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for turns in conversations(6, 3)
    ]
    prompts = write_lines(folder / "prompts.jsonl", asked)
    changes = {
        "models": {
            "7b": {
                "base": pinned(pair.base),
                "aligned": pinned(pair.aligned),
                "quantisation": "none",
                "dtype": "float32",
            }
        },
        "data": {"pool": pinned(write_chats(folder / "chats.jsonl", 32)), "settings": {"size": 16}},
        "train": {
            "steps": 2,
            "global_batch": 8,
            "rank": 2,
            "learning_rate": 1e-2,
            "max_tokens": 64,
        },
        "axes": {"apply.threshold": [None, 1.0]},
        "seeds": [3, 4],
        "suites/refusal": {
            "prompts": pinned(prompts),
            "measure": {"kind": "refusal", "max_new_tokens": 4},
        },
        "suites/task": {
            "prompts": pinned(prompts),
            "measure": {"kind": "task", "max_new_tokens": 4},
        },
        "search": {"sampler": "grid", "window": 2},
        "refusal_floor": 0.0,  # models of random weights refuse nothing
    }
    study, home = made_study(folder, changes), Home(folder / "home")
    progress = drive(StudyView(study, home), InlineExecutor)
    assert [found.status for found in progress.results] == ["done"] * 2
    return folder / "study.yaml", study, home


def run(*arguments: object) -> CommandResult:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pick(driven: tuple[Path, Study, Home], *arguments: object) -> CommandResult:
    """`pick` of candidates: tests/test_confirm_command.py has confirmed ones."""
    return run("pick", driven[0], "--home", driven[2].root, "--accept-unsure", *arguments)


@pytest.fixture(scope="module")
def exported(driven: tuple[Path, Study, Home], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The projected adapter of the first seed."""
    to = tmp_path_factory.mktemp("export") / "deep" / "adapter"
    done = pick(driven, "--point", 1, "--export", to)
    assert done.exit_code == 0, done.output
    assert (
        "the adapter of seed 3, with its model card README.md. Nothing was uploaded." in done.output
    )
    return to


def test_the_exported_adapter_loads_in_peft_and_says_what_the_measured_one_says(
    driven: tuple[Path, Study, Home], exported: Path, pair: Pair
) -> None:
    _, study, home = driven
    point = collect(StudyView(study, home))[1]
    assert point.changed_share == 1.0
    stored = {
        seed: home.store.open("apply", point.keys[f"apply[seed={seed}]"]).path
        for seed in study.seeds
    }
    tokens = torch.arange(7, 27).reshape(2, 10)

    def logits(adapter: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(pair.aligned, dtype=torch.float32)
        with torch.no_grad():
            found: torch.Tensor = (
                PeftModel.from_pretrained(base, str(adapter)).eval()(tokens).logits
            )
        return found

    trained = home.store.open("train", point.keys["train[seed=3]"]).path / "adapter"
    assert torch.equal(logits(exported), logits(stored[3]))
    assert not torch.equal(logits(exported), logits(stored[4])) and not torch.equal(
        logits(exported), logits(trained)
    )
    assert sorted(folder_files(exported)) == FILES


def test_the_card_has_the_hubs_metadata_and_every_number_with_its_interval(
    driven: tuple[Path, Study, Home], exported: Path
) -> None:
    _, study, home = driven
    card = ModelCard.load(exported / "README.md")
    assert (card.data.library_name, card.data.base_model) == (
        "peft",
        "not-on-the-hub/tiny-7b-aligned",
    )
    point = collect(StudyView(study, home))[1]
    rows = re.findall(r"^\| (?:refusal rate|task accuracy), .*$", card.text, re.MULTILINE)
    assert len(rows) == 2
    for row in rows:
        assert row.count("95% interval") == 3, row  # the point, the seed alone, the aligned model
    assert (
        "| refusal rate, higher is better | 0.0% (95% interval 0.0% to 39.0%, n = 12, "
        "2 seeds sd 0.0)" in card.text
    )
    assert point.keys["apply[seed=3]"] in card.text and point.keys["apply[seed=4]"] not in card.text
    assert "100% of its modules: those with a cosine at or below 1." in card.text
    assert (
        "This is the adapter of seed 3, the first of the study's seeds that holds the "
        "floors by itself" in card.text
    )
    assert (
        "Named by hand, not picked as the best, among 2 different points" in card.text
        and "the one with most" not in card.text
    )
    assert "- Named by hand: if that was for its values, picked as the best of many" in card.text
    kept = json.loads((exported / "pick.json").read_text())
    assert (kept["maximised"], kept["named_by_hand"], kept["seed_asked_for"]) == (None, True, False)
    assert (
        kept["seed"] == 3
        and kept["weights_sha256"] == folder_files(exported)["adapter_model.safetensors"]
    )
    assert kept["settings_of_stages"]["train"]["seed"] == 3


def test_no_path_and_no_prompt_or_completion_leaves_with_an_adapter(
    driven: tuple[Path, Study, Home], exported: Path
) -> None:
    folder, _, home = driven[0].parent, driven[1], driven[2]
    rows = [
        row for artifact in home.store.all("generate") for row in read_completions(artifact.path)
    ]
    secrets = {
        " ".join(text.split())
        for row in rows
        for text in (row.prompt, row.completion)
        if len(text) >= 12
    }
    secrets |= {str(folder), str(folder.parent)}
    assert len(secrets) > 10
    for name in FILES:
        if not name.endswith(".safetensors"):
            text = " ".join(
                (exported / name).read_text("utf-8").split()
            )  # lines may be broken anywhere
            assert not [secret for secret in secrets if secret in text], name


def test_a_picked_adapter_is_called_the_one_with_most(
    driven: tuple[Path, Study, Home], tmp_path: Path
) -> None:
    done = pick(driven, "--export", tmp_path / "out")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        ", the one with most task accuracy" in text
        and "\nPicked among 2 different points" in text
        and "amed by hand" not in text
    )
    kept = json.loads((tmp_path / "out" / "pick.json").read_text())
    assert (kept["maximised"], kept["named_by_hand"]) == ("task.task_accuracy", False)


def test_the_card_states_the_projected_share_of_its_own_seed(
    driven: tuple[Path, Study, Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the seeds had other modules projected: what is counted must be of the seed's own stages.
    monkeypatch.setattr(
        "ebbline.shipping.changed_share",
        lambda point, artifacts: (
            0.25 if set(artifacts) == {"project[seed=4]", "apply[seed=4]"} else 1.0
        ),
    )
    assert pick(driven, "--point", 1, "--seed", 4, "--export", tmp_path / "four").exit_code == 0
    text = (tmp_path / "four" / "README.md").read_text()
    assert (
        "projected 25% of its modules" in text and "Over all seeds of the point it is 100%." in text
    )
    assert (
        json.loads((tmp_path / "four" / "pick.json").read_text())["projected_share_of_seed"] == 0.25
    )


def test_of_a_mean_the_card_gives_one_seed_no_interval(
    driven: tuple[Path, Study, Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = pooled(
        [Metric.of("task.rouge_l", scores) for scores in ([0.2, 0.4, 0.6], [0.3, 0.3, 0.9])]
    )
    found = [
        replace(each, metrics={**each.metrics, "task.rouge_l": mean})
        for each in collect(StudyView(driven[1], driven[2]))
    ]
    monkeypatch.setattr("ebbline.commands.pick.collect", lambda view: found)
    assert pick(driven, "--point", 1, "--seed", 4, "--export", tmp_path / "out").exit_code == 0
    (row,) = re.findall(
        r"^\| ROUGE-L .*$", (tmp_path / "out" / "README.md").read_text(), re.MULTILINE
    )
    point, alone = (cell.strip() for cell in row.split("|")[2:4])
    assert point.startswith("45.0% (95% interval ") and point.endswith(", n = 6, 2 seeds sd 7.1)")
    assert alone == (
        "50.0% (n = 3; its interval is not known, because the spreads of the seeds are "
        "stored together)"
    )


def test_nothing_is_overwritten(driven: tuple[Path, Study, Home], exported: Path) -> None:
    before = folder_files(exported)
    done = pick(driven, "--point", 0, "--export", exported)
    assert (
        done.exit_code == 1 and "is not an empty folder; give a new or empty folder" in done.output
    )
    assert folder_files(exported) == before and not list(exported.parent.glob(".*"))


def test_another_seed_is_exported_when_it_is_named(
    driven: tuple[Path, Study, Home], tmp_path: Path
) -> None:
    done = pick(driven, "--point", 1, "--seed", 4, "--export", tmp_path / "four", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["exported"]["seed"] == 4
    assert (
        "the adapter of seed 4, which was requested; it holds the floors by itself ("
        in (tmp_path / "four" / "README.md").read_text()
    )
    key = collect(StudyView(driven[1], driven[2]))[1].keys["apply[seed=4]"]
    assert (tmp_path / "four" / "adapter_model.safetensors").read_bytes() == (
        driven[2].store.open("apply", key).file("adapter_model.safetensors").read_bytes()
    )
    done = pick(driven, "--seed", 9, "--export", tmp_path / "nine")
    assert (
        done.exit_code == 1 and "--seed 9: point" in done.output and "the seeds 3, 4" in done.output
    )


def test_a_study_file_that_was_changed_since_exports_nothing(
    driven: tuple[Path, Study, Home], tmp_path: Path
) -> None:
    text = driven[0].read_text()
    changed = tmp_path / "changed.yaml"
    changed.write_text(
        text.replace("refusal_floor: 0.0", "refusal_floor: 0.0\nhypothesis: another")
    )
    done = run("pick", changed, "--home", driven[2].root, "--export", tmp_path / "deep" / "none")
    assert (
        done.exit_code == 1 and "was begun in" in done.output and not (tmp_path / "deep").exists()
    )


def test_below_a_floor_nothing_is_written_and_the_miss_is_printed(
    driven: tuple[Path, Study, Home], tmp_path: Path
) -> None:
    done = pick(driven, "--floor", "refusal_rate=0.5", "--export", tmp_path / "none")
    assert done.exit_code == 1
    assert "nothing was exported: point 0" in done.output and "No point of 7b does." in done.output
    assert "short by 50.0 points of refusal rate at least 50.0%" in done.output
    assert not list(tmp_path.iterdir())
    done = pick(driven, "--floor", "refusal_rate=0.5")
    assert (
        done.exit_code == 1
        and "7b: none of 2 different points holds that. The nearest is point 0" in done.output
    )


def test_what_retention_dropped_is_refused_with_the_commands_that_make_it_again(
    driven: tuple[Path, Study, Home], tmp_path: Path, exported: Path
) -> None:
    path, study, home = driven
    freed = run(
        "store", "gc", "--home", home.root, "--older-than-h", 0, "--keep-adapters", "none", "--yes"
    )
    assert freed.exit_code == 0, freed.output
    done = pick(driven, "--point", 1, "--export", tmp_path / "out")
    assert done.exit_code == 1 and not list(tmp_path.iterdir())
    key = collect(StudyView(study, home))[1].keys["apply[seed=3]"]
    commands = re.findall(r"^  ebbline (.+)$", done.output, re.MULTILINE)
    assert commands == [
        f"store forget apply {key} --home {home.root}",
        f"run {path} --home {home.root}",
    ]
    assert run(*commands[0].split()).exit_code == 0
    drive(StudyView(study, home), InlineExecutor)  # what `ebbline run` does, in this process
    done = pick(driven, "--point", 1, "--export", tmp_path / "out")
    assert done.exit_code == 0, done.output
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (exported / weights).read_bytes()
