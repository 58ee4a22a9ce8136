"""`ebbline pick --export --with-base` on small real studies: the export loads with plain PEFT and
answers as the measured model does; and `pick` records its choice for the figures.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from ebbline.analysis.paper import card
from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.picks.choices import FILE, chosen
from ebbline.cli import app
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point
from ebbline.sweeps.study.references import Hub, ModelRef
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import content_digest
from ebbline.tasks.models import loading
from tests.sweeps.made import study as made_study
from tests.tiny import Pair, conversations, write_chats, write_lines

TOKENS = torch.arange(7, 27).reshape(2, 10)


def pinned(path: Path) -> dict[str, Any]:
    return {"path": {"path": str(path), "sha256": content_digest(path)}}


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> tuple[Path, Study, Home]:
    """A study of three sizes: one with a local aligned model, one whose aligned model is tuned, and
    one with LoX before, and AsFT's penalty and an average during its training.
    """
    folder = tmp_path_factory.mktemp("base")
    asked = [
        {"prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for turns in conversations(6, 3)
    ]
    prompts = write_lines(folder / "prompts.jsonl", asked)
    rows = pinned(write_chats(folder / "chats.jsonl", 32))
    train = {"steps": 2, "global_batch": 8, "learning_rate": 1e-2, "max_tokens": 64}
    tuned = {
        "data": {"pool": rows, "settings": {"size": 16}},
        "train": {"method": "full", **train},
    }
    loading = {"quantisation": "none", "dtype": "float32"}
    changes = {
        "models": {
            "local": {"base": pinned(pair.base), "aligned": pinned(pair.aligned), **loading},
            "tuned": {"base": pinned(pair.base), "aligned": {"tuned": tuned}, **loading},
            "lox": {
                "base": pinned(pair.base),
                "aligned": pinned(pair.aligned),
                "axes": {"lox.factor": [0.5]},
                "train": {"penalty": "asft", "penalty_weight": 0.1, "ema_decay": 0.5},
                **loading,
            },
        },
        "data": {"pool": rows, "settings": {"size": 16}},
        "train": {"rank": 2, **train},
        "axes": {"apply.threshold": [1.0]},
        "suites": {
            "refusal": {
                "prompts": pinned(prompts),
                "measure": {"kind": "refusal", "max_new_tokens": 4},
            }
        },
        "objectives": ["refusal_rate"],
        "refusal_floor": 0.0,  # models of random weights refuse nothing
    }
    study, home = made_study(folder, changes), Home(folder / "home")
    progress = drive(StudyView(study, home), InlineExecutor)
    assert {found.status for found in progress.results} == {"done"}
    return folder / "study.yaml", study, home


def pick(driven: tuple[Path, Study, Home], *arguments: object) -> CommandResult:
    words = ["pick", driven[0], "--home", driven[2].root, "--accept-unsure", *arguments]
    return CliRunner().invoke(app, [str(word) for word in words])


def snippet(folder: Path) -> str:
    (found,) = re.findall(r"```python\n(.+?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    return str(found)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("size", ["local", "tuned", "lox"])
def test_the_cards_snippet_loads_the_exported_adapter_and_base_as_they_were_measured(
    driven: tuple[Path, Study, Home], size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, study, home = driven
    to = tmp_path / "out"
    done = pick(driven, "--model", size, "--export", to, "--with-base")
    assert done.exit_code == 0 and "the aligned model in aligned/" in done.output, done.output
    lines = snippet(to).splitlines()
    assert len(lines) <= 6 and "PATH" not in snippet(to)
    monkeypatch.chdir(to)
    names: dict[str, Any] = {}
    exec(snippet(to), names)
    assert names["tokenizer"].chat_template
    result = next(each for each in collect(StudyView(study, home)) if each.point.model == size)
    item = StudyView(study, home).graph.stages_for(result.point)["train[seed=0]"].inputs["model"]
    source = getattr(item, "location", None) or next(
        artifact.path / "model"
        for artifact in home.store.all("lox" if size == "lox" else "train")
        if size == "lox" or artifact.hashed["spec"]["method"] == "full"
    )
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        str(home.store.open("apply", result.keys["apply[seed=0]"]).path),
    )
    assert torch.equal(logits(names["model"]), logits(expected))
    # what names the base is enough for PEFT's own loader
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(".")), logits(expected))
    assert json.loads(Path("adapter_config.json").read_text())["base_model_name_or_path"] == (
        "./aligned"
    )
    files = [path for path in to.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".jinja"}
    for path in files:
        if path.suffix != ".safetensors":
            assert str(driven[0].parent) not in path.read_text() and '_name_or_path": "/' not in (
                path.read_text()
            )


def test_without_the_base_the_adapter_and_card_name_it_alike(
    driven: tuple[Path, Study, Home], tmp_path: Path
) -> None:
    assert pick(driven, "--model", "tuned", "--export", tmp_path / "out").exit_code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "not-on-the-hub/tiny-tuned-aligned"
    assert "base_model: not-on-the-hub/tiny-tuned-aligned" in (
        (tmp_path / "out" / "README.md").read_text()
    )
    record = json.loads((tmp_path / "out" / "pick.json").read_text())["base"]
    assert record["base_model_name_or_path"] == config["base_model_name_or_path"]
    assert len(record["content_sha256"]) == 64


def test_an_adapter_of_a_lox_model_never_names_the_aligned_model_as_its_base(
    driven: tuple[Path, Study, Home], tmp_path: Path
) -> None:
    assert pick(driven, "--model", "lox", "--export", tmp_path / "out").exit_code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "not-on-the-hub/tiny-lox-lox"
    card_text = (tmp_path / "out" / "README.md").read_text()
    assert "the aligned model after LoX" in card_text and "| lox.factor | 0.5 |" in card_text
    _, study, _ = driven
    hub = ModelRef(hub=Hub(id="org/chat", commit="0" * 40, sha256="1" * 64))
    models = {**study.models, "lox": study.models["lox"].model_copy(update={"aligned": hub})}
    on_hub = study.model_copy(update={"models": models})
    plain, extrapolated = (Point.of("lox", {"lox.factor": factor}) for factor in (0.0, 0.5))
    assert card.hub_base(on_hub, plain) == hub.hub and card.hub_base(on_hub, extrapolated) is None


def test_a_copy_of_the_base_that_differs_from_its_record_is_not_exported(
    driven: tuple[Path, Study, Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(source: Path, to: Path) -> None:
        to.write_bytes(source.read_bytes() + (b" " if to.parent.name == "aligned" else b""))

    monkeypatch.setattr("shutil.copyfile", damaged)
    done = pick(driven, "--model", "local", "--export", tmp_path / "out", "--with-base")
    assert done.exit_code == 1 and "changed while it was copied" in done.output
    assert not list(tmp_path.iterdir())


def test_a_base_needs_an_export_and_one_on_the_hub_is_not_copied(
    driven: tuple[Path, Study, Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = pick(driven, "--model", "local", "--with-base")
    assert done.exit_code == 1 and "--with-base belongs to --export DIR" in done.output
    hub = Hub(id="org/chat", commit="0" * 40, sha256="1" * 64)
    monkeypatch.setattr("ebbline.base_model.hub_base", lambda study, model: hub)
    done = pick(driven, "--model", "local", "--export", tmp_path / "out", "--with-base")
    assert done.exit_code == 1 and "org/chat on the hub at 000" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_the_cards_snippet_quantises_as_the_measurement_did(
    driven: tuple[Path, Study, Home], quantisation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = driven[1]
    hub = Hub(id="org/chat", commit="0" * 40, sha256="1" * 64)
    size = study.models["local"].model_copy(
        update={
            "quantisation": quantisation,
            "dtype": "bfloat16",
            "aligned": ModelRef.model_construct(hub=hub),
        }
    )
    changed = study.model_copy(update={"models": {"local": size}})
    text = card._load(changed, Point("local", ()), False)
    (code,) = re.findall(r"```python\n(.+?)\n```", text, re.DOTALL)
    assert len(code.splitlines()) == 6
    assert f'"org/chat", revision="{"0" * 40}", dtype="bfloat16"' in code
    line = next(line for line in code.splitlines() if line.startswith("config = "))
    names: dict[str, Any] = {"BitsAndBytesConfig": BitsAndBytesConfig}
    exec(line, names)
    given: dict[str, Any] = {}

    def loaded(kind: object, folder: Path, **arguments: Any) -> torch.nn.Module:
        given.update(arguments)
        model: Any = torch.nn.Linear(1, 1)
        model.config = BitsAndBytesConfig()
        return model

    monkeypatch.setattr(loading, "load_whole", loaded)
    folder = Path(study.models["local"].aligned.path.path)  # type: ignore[union-attr]
    loading.load_model(folder, quantisation, "bfloat16", "cpu")  # type: ignore[arg-type]
    assert names["config"].to_dict() == given["quantization_config"].to_dict()


def test_a_pick_that_holds_the_studys_floor_is_recorded_and_marked(
    driven: tuple[Path, Study, Home],
) -> None:
    _, study, home = driven
    folder = home.folder(study.study)
    (folder / FILE).unlink(missing_ok=True)
    done = pick(driven, "--floor", "refusal_rate=0.5", "--model", "tuned")
    assert done.exit_code == 1 and not (folder / FILE).exists()
    done = pick(driven, "--model", "tuned")
    assert done.exit_code == 0 and "mark the pick from now on" in done.output
    results = collect(StudyView(study, home))
    assert [each.point.model for each in chosen(results, folder)] == ["tuned"]
    assert pick(driven, "--json").exit_code == 0
    assert {each.point.model for each in chosen(results, folder)} == {"local", "lox", "tuned"}
    (folder / FILE).write_text("{")
    assert chosen(results, folder) == []
