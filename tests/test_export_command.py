"""`ebbline export` of a small real study: what it writes, what it leaves out, and that its bundle
runs the study again elsewhere.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pypdf
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from ebbline.analysis.figures.drawing import FINE_PT
from ebbline.analysis.paper import export
from ebbline.analysis.paper.bundle_keys import check_bundle
from ebbline.analysis.paper.citations import cited, library
from ebbline.analysis.report import provenance
from ebbline.analysis.report.provenance import Build
from ebbline.analysis.results.collect import collect
from ebbline.cli import app
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.changes import lasting
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import as_yaml, load, parse, shipped
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import content_digest, digest, folder_files
from ebbline.tasks.measuring.completions import read_completions
from tests.latex import compiled, needs_latex
from tests.sweeps.made import written
from tests.tiny import Pair, conversations, write_chats, write_lines

WIDTHS = {
    "neurips/frontier": 5.5,
    "neurips/thresholds": 5.5,
    "acl/frontier": 3.03,
    "acl/thresholds": 3.03,
}
WIDTHS |= {"acl/frontier-wide": 6.3, "acl/thresholds-wide": 6.3}


def pinned(path: Path) -> dict[str, Any]:
    return {"path": {"path": str(path), "sha256": content_digest(path)}}


def driven(file: Path, home: Home) -> None:
    progress = drive(StudyView(load(str(file)), home), InlineExecutor)
    assert {result.status for result in progress.results} == {"done"}


def ebbline(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> dict[str, Path]:
    """What the study names from outside, by the places that its bundle gives them."""
    folder = tmp_path_factory.mktemp("sources")
    asked = [
        {"prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for turns in conversations(6, 3)
    ]
    prompts, chats = (
        write_lines(folder / "prompts.jsonl", asked),
        write_chats(folder / "chats.jsonl", 32),
    )
    return {
        "files/base": pair.base,
        "files/aligned": pair.aligned,
        "files/prompts.jsonl": prompts,
        "files/chats.jsonl": chats,
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]) -> Path:
    """A study of four points, chosen by TPE as they land, with a second seed where the frontier is
    not certain.
    """
    base, aligned, prompts, chats = (
        pinned(sources[f"files/{name}"])
        for name in ("base", "aligned", "prompts.jsonl", "chats.jsonl")
    )
    changes = {
        "study": "small_one",
        "models": {
            "7b": {"base": base, "aligned": aligned, "quantisation": "none", "dtype": "float32"}
        },
        "data": {"pool": chats, "settings": {"size": 16}},
        "train": {"steps": 2, "global_batch": 8, "learning_rate": 1e-2, "max_tokens": 64},
        "axes": {"train.rank": [2, 4], "apply.threshold": [None, 1.0]},
        "suites/refusal": {"prompts": prompts, "measure": {"kind": "refusal", "max_new_tokens": 4}},
        "suites/task": {"prompts": prompts, "measure": {"kind": "task", "max_new_tokens": 4}},
        "seeds": [0, 1],
        "replicates": {"policy": "near_frontier"},
        "search": {"sampler": "tpe", "points": 4},
        "budget": {"gpu_hours": 100.0},
    }
    changes["objectives"] = ["refusal_rate", "task_accuracy"]
    return written(tmp_path_factory.mktemp("study"), changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, file: Path) -> Home:
    found = Home(tmp_path_factory.mktemp("home"))
    driven(file, found)
    return found


@pytest.fixture(scope="module", autouse=True)
def one_build() -> Iterator[None]:
    """An export tells its commit, and a checkout may move on while tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "build", lambda: Build("0.1.0", "0123456789" * 4))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, file: Path, home: Home) -> Path:
    to = tmp_path_factory.mktemp("paper") / "small"
    done = ebbline("export", file, "--to", to, "--home", home.root)
    assert done.exit_code == 0 and "4 points done" in done.output, done.output
    return to


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """The bundle as another machine would have it, without what its user must bring."""
    return Path(shutil.copytree(exported / "bundle", tmp_path / "elsewhere"))


def brought(bundle: Path, sources: dict[str, Path]) -> Path:
    for place, source in sources.items():
        (bundle / place).parent.mkdir(exist_ok=True)
        shutil.copytree(source, bundle / place) if source.is_dir() else shutil.copy(
            source, bundle / place
        )
    return bundle


def test_it_says_in_json_what_it_wrote_and_the_same_results_give_the_same_bytes(
    exported: Path, file: Path, home: Home, tmp_path: Path
) -> None:
    done = ebbline(
        "export",
        file,
        "--to",
        tmp_path / "again",
        "--style",
        "neurips",
        "--home",
        home.root,
        "--json",
    )
    summary, files = json.loads(done.output), folder_files(tmp_path / "again")
    assert sorted(summary["files"]) == sorted(files) and summary["points"] == {"done": 4}
    assert {each["place"]: each["what"] for each in summary["bring"]} == {
        "files/aligned": "a model",
        "files/base": "a model",
        "files/chats.jsonl": "data",
        "files/prompts.jsonl": "a prompt set",
    }
    both = folder_files(exported)
    lists = ("export.json", "README.md")  # what they list are the styles
    assert {name: both[name] for name in files if name not in lists} == {
        name: files[name] for name in files if name not in lists
    }
    assert {
        "neurips/frontier.png",
        "data/results.parquet",
        "bundle/keys.json",
        "methods.md",
    } <= set(files)


def test_every_font_of_every_pdf_is_embedded_and_its_page_is_as_wide_as_the_column(
    exported: Path,
) -> None:
    assert {
        path.relative_to(exported).with_suffix("").as_posix() for path in exported.rglob("*.pdf")
    } == set(WIDTHS)
    for name, width in WIDTHS.items():
        page = pypdf.PdfReader(exported / f"{name}.pdf").pages[0]
        fonts = [font.get_object() for font in page["/Resources"]["/Font"].values()]  # type: ignore[index]
        own = [
            font["/DescendantFonts"][0].get_object() if "/DescendantFonts" in font else font
            for font in fonts
        ]
        assert own and all("/FontFile2" in font["/FontDescriptor"] for font in own), name
        assert float(page.mediabox.width) == pytest.approx(72 * width, abs=0.1)


def test_no_letter_is_too_small_to_read_at_the_size_of_print(exported: Path) -> None:
    for name in WIDTHS:
        sizes: set[float] = set()
        pypdf.PdfReader(exported / f"{name}.pdf").pages[0].extract_text(
            visitor_text=lambda text, user, matrix, font, size, sizes=sizes: (
                sizes.add(size * abs(matrix[0] or matrix[1])) if text.strip() else None
            )
        )
        assert sizes and min(sizes) >= FINE_PT - 0.01, name


def test_svg_needs_no_font_and_nothing_from_outside(exported: Path) -> None:
    for name in WIDTHS:
        text = (exported / f"{name}.svg").read_text()
        assert "<text" not in text and "<image" not in text
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))


@needs_latex
@pytest.mark.parametrize("style", ["neurips", "acl"])
def test_a_paper_with_all_of_it_compiles_without_a_warning(
    style: str, exported: Path, tmp_path: Path
) -> None:
    shown = "".join(
        rf"\begin{{figure{star}}}\includegraphics{{{exported}/{style}/{path.stem}.pdf}}\end{{figure{star}}}"
        for path in sorted((exported / style).glob("*.pdf"))
        for star in ["*" if path.stem.endswith("-wide") else ""]
    )
    tables = rf"\input{{{exported}/{style}/frontier}}\input{{{exported}/{style}/before-after}}"
    end = (
        rf"\input{{{exported}/methods}}\nocite{{*}}"
        rf"\bibliographystyle{{plain}}\bibliography{{{exported}/references}}"
    )
    log = compiled(style, shown + tables + end, tmp_path, bibliography=True)
    assert "Overfull" not in log and "undefined" not in log and "Warning" not in log


def test_methods_cite_only_what_the_references_hold_and_say_what_was_done(exported: Path) -> None:
    text, references = (
        (exported / "methods.md").read_text(),
        (exported / "references.bib").read_text(),
    )
    keys = re.findall(r"^@\w+\{([^,]+),", references, re.MULTILINE)
    assert cited(text) and set(cited(text)) <= set(keys) <= {*library(), "ebbline"}
    assert {
        "lermen2023lora",
        "gade2023badllama",
        "hsu2024safelora",
        "akiba2019optuna",
        "peft",
    } <= set(keys)
    assert "dettmers2023qlora" not in keys and "lmeval" not in keys, (
        "nothing was quantised, and nothing measured by lm-eval"
    )
    for phrase in (
        "rank 2 or 4",
        "for 2 steps of 8",
        "4 points were proposed",
        "at most the threshold: none or 1",
        "a local copy with the sha256",
    ):
        assert phrase in text
    assert re.search(
        r"Each point rests on (1 training seed|1 to 2 training seeds|2 training seeds)\.", text
    )
    assert (
        "logical GPU" in text
        and "CPU, 1 machine" in text
        and "They cover the sampling of prompts, not of trainings." in text
    )


def test_no_prompt_no_completion_and_no_path_of_the_machine_is_in_it(
    exported: Path, home: Home, sources: dict[str, Path], file: Path
) -> None:
    rows = [
        row for artifact in home.store.all("generate") for row in read_completions(artifact.path)
    ]
    secrets = {
        plain(text) for row in rows for text in (row.prompt, row.completion) if len(text) > 12
    }
    places = {str(path.parent) for path in (*sources.values(), file, home.root, exported)} | {
        str(Path.home()) + "/"
    }
    assert len(secrets) > 6
    texts = [
        path
        for path in exported.rglob("*")
        if path.is_file() and path.suffix not in (".png", ".pdf")
    ]
    assert {path.suffix for path in texts} >= {
        ".bib",
        ".csv",
        ".json",
        ".md",
        ".parquet",
        ".svg",
        ".tex",
        ".yaml",
    }
    for path in texts:
        text = plain(path.read_bytes().decode("utf-8", errors="replace").replace(r"\_", "_"))
        assert not [secret for secret in secrets | places if secret in text], path
    assert not list((exported / "bundle").rglob("files")), "nothing from outside is copied"


def plain(text: str) -> str:
    """A text without its line breaks: LaTeX and Markdown are broken where a line is full."""
    return " ".join(text.split())


def test_only_an_untouched_export_of_the_same_study_is_replaced(
    file: Path, home: Home, exported: Path, tmp_path: Path
) -> None:
    def message_of(to: Path) -> str:
        before = folder_files(to)
        done = ebbline("export", file, "--to", to, "--home", home.root, "--style", "acl")
        assert done.exit_code == 1 and folder_files(to) == before
        return done.output

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "is not an export of ebbline" in message_of(tmp_path / "mine")
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    (changed / "methods.md").write_text("I wrote this myself")
    assert "was changed after the export (methods.md)" in message_of(changed)
    added = Path(shutil.copytree(exported, tmp_path / "added"))
    (added / "paper.tex").write_text("mine")
    assert "(paper.tex)" in message_of(added)
    for field, value, what in (
        ("study", "another", "the study 'another'"),
        ("home", "0" * 32, "from another home"),
    ):
        other = Path(shutil.copytree(exported, tmp_path / field))
        mark = json.loads((other / "export.json").read_text())
        (other / "export.json").write_text(json.dumps({**mark, field: value}))
        assert what in message_of(other)


def test_an_export_that_fails_leaves_the_old_one_and_nothing_else(
    file: Path, home: Home, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = Path(shutil.copytree(exported, tmp_path / "paper"))

    def broken(*arguments: object) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "before_after_table", broken)
    done = ebbline("export", file, "--to", to, "--home", home.root)
    assert done.exit_code == 1 and "no space left on device" in plain(done.output)
    assert [path.name for path in tmp_path.iterdir()] == ["paper"] and folder_files(
        to
    ) == folder_files(exported)


def test_what_cannot_be_exported_is_an_error_before_anything_is_written(
    file: Path, home: Home, tmp_path: Path
) -> None:
    to = tmp_path / "paper"
    for arguments, message in (
        (("export", file, "--to", to, "--home", tmp_path / "empty"), "has not been run in"),
        (
            ("export", "--check", tmp_path, "--home", home.root),
            "cannot be read as the keys of a bundle",
        ),
    ):
        done = ebbline(*arguments)
        assert done.exit_code == 1 and message in done.output
    changed = tmp_path / "study.yaml"
    changed.write_text(file.read_text().replace("steps: 2", "steps: 3"))
    done = ebbline("export", changed, "--to", to, "--home", home.root)
    assert done.exit_code == 1 and "is not what" in done.output and "train.steps" in done.output
    assert ebbline("export", file, "--home", home.root).exit_code == 2 and not to.exists()


def test_the_bundle_is_the_study_point_by_point(exported: Path, file: Path, home: Home) -> None:
    study, again = load(str(file)), parse(exported / "bundle" / "study.yaml")
    assert (
        again.sampler == "list"
        and len(again.search.list) == 4
        and again.budget == type(again.budget)()
    )
    assert study.model_copy(update={"search": again.search, "budget": again.budget}).model_dump(
        exclude=PATHS
    ) == again.model_dump(exclude=PATHS)
    begun = Study.model_validate_json((exported / "bundle" / "study.json").read_text())
    assert digest(lasting(begun.model_dump(mode="json"))) == digest(
        lasting(study.model_dump(mode="json"))
    )
    pins = dict(
        line.split("==")
        for line in (exported / "bundle" / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert (
        pins["torch"] == torch.__version__.partition("+")[0]
        and {"optuna", "peft", "moocore"} <= set(pins)
        and "pytest" not in pins
    )


PATHS = {"models": True, "data": {"pool"}, "suites": {"refusal": {"prompts"}, "task": {"prompts"}}}


def test_the_bundle_s_study_gives_the_same_keys_in_another_home(
    bundle: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    other = Home(tmp_path / "other")
    before = ebbline("export", "--check", bundle, "--home", other.root)
    assert before.exit_code == 1 and "run the bundle's study to its end" in before.output
    lacking = ebbline(
        "run", bundle / "study.yaml", "--home", other.root, "--executor", "inline", "--no-wandb"
    )
    assert (
        lacking.exit_code == 1
        and "there is no file or folder at" in lacking.output
        and "files/" in lacking.output
    )
    brought(bundle, sources)
    done = ebbline(
        "run", bundle / "study.yaml", "--home", other.root, "--executor", "inline", "--no-wandb"
    )
    assert done.exit_code == 0, done.output
    keys = json.loads((bundle / "keys.json").read_text())
    again = collect(StudyView(parse(bundle / "study.yaml"), other))
    assert [dict(result.keys) for result in again] == [point["keys"] for point in keys["points"]]
    assert len(keys["stages"]) >= 20 and all(point["keys"] for point in keys["points"])
    after = ebbline("export", "--check", bundle, "--home", other.root, "--json")
    check = json.loads(after.output)
    assert after.exit_code == 0 and check["same"] and check["stages"]["same"] == len(keys["stages"])


def test_a_file_that_is_not_what_the_bundle_pins_is_refused(
    bundle: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    brought(bundle, sources)
    (bundle / "files/prompts.jsonl").write_text('{"prompt": "another", "answer": "one"}\n')
    done = ebbline(
        "run",
        bundle / "study.yaml",
        "--home",
        tmp_path / "other",
        "--executor",
        "inline",
        "--no-wandb",
    )
    assert done.exit_code == 1 and "differs from its pin" in done.output


def test_the_check_names_the_first_stage_that_came_out_otherwise(
    bundle: Path, home: Home, tmp_path: Path
) -> None:
    """A training that the other machine computed otherwise: its adapter differs, under the same
    key.
    """
    other = Home(Path(shutil.copytree(home.root, tmp_path / "other")))
    original = next(iter(home.store.all("train")))
    shutil.rmtree(other.store.root / "train" / original.key)
    attempt = other.store.begin("train", original.key)
    shutil.copytree(original.path, attempt / "payload", dirs_exist_ok=True)
    weights = next((attempt / "payload").rglob("*.safetensors"))
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights)
    other.store.commit(attempt, original.hashed, original.provenance)
    found = check_bundle(bundle, other)
    assert (
        found.differ == 1
        and found.absent > 0
        and found.same > 0
        and 0 < found.points_same < found.points
    )
    assert (
        "(project)" in found.first
        and "its input adapter has other content" in found.first
        and "compare with constraints.txt" in found.first
    )
    done = ebbline("export", "--check", bundle, "--home", other.root)
    assert done.exit_code == 1 and "the first difference: project" in done.output


def test_the_check_sees_other_measurements_under_the_same_key(
    bundle: Path, home: Home, tmp_path: Path
) -> None:
    keys = json.loads((bundle / "keys.json").read_text())
    last = next(stage for stage in reversed(keys["stages"]) if stage["metrics"])
    last["metrics"] = "0" * 64
    (bundle / "keys.json").write_text(json.dumps(keys))
    found = check_bundle(bundle, home)
    assert (found.differ, found.absent) == (
        1,
        0,
    ) and "its metrics from the same inputs differ" in found.first


def test_the_check_says_when_the_bundle_s_study_was_changed(bundle: Path, home: Home) -> None:
    file = bundle / "study.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    found = check_bundle(bundle, home)
    assert "(train)" in found.first and "study.yaml leads to another stage now" in found.first


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_study_that_is_written_as_yaml_is_read_as_the_same_study(
    name: str, tmp_path: Path
) -> None:
    study = load(name)
    (tmp_path / "again.yaml").write_text(as_yaml(study))
    assert parse(tmp_path / "again.yaml").model_dump() == study.model_dump()
