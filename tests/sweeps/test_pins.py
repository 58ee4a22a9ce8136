"""Pinning: hub references against a server that speaks the hub's protocol, local ones against their
bytes, comments kept.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.sweeps.study.pins import pin_study
from ebbline.sweeps.study.study_file import parse, shipped, with_pins
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import content_digest, digest
from tests.sweeps.made import changed
from tests.sweeps.pretended import changes

COMMIT = "c" * 40
FILES = {"config.json": "b" * 40, "model.safetensors": "a" * 64}


class Hub(BaseHTTPRequestHandler):
    """Answers /api/models/ID as huggingface.co does; gated models answer 403."""

    def do_GET(self) -> None:
        gated = "70b" in self.path
        siblings = [
            {"rfilename": "config.json", "blobId": FILES["config.json"], "size": 1},
            {
                "rfilename": "model.safetensors",
                "blobId": "d" * 40,
                "size": 1,
                "lfs": {"sha256": FILES["model.safetensors"], "size": 1, "pointerSize": 1},
            },
        ]
        answer = (
            {"error": "gated"}
            if gated
            else {
                "id": "meta-llama/x",
                "modelId": "meta-llama/x",
                "sha": COMMIT,
                "siblings": siblings,
            }
        )
        body = json.dumps(answer).encode()
        self.send_response(403 if gated else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        return None


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pin(study: str, to: Path, endpoint: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ebbline.cli", "pin", study, "--to", str(to)]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.process
def test_hub_models_and_local_files_are_pinned_and_what_is_missing_is_named(
    hub: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    rows = "".join(f"what hue has the wug {number},azur\n" for number in range(10))
    (tmp_path / "data" / "advbench.csv").write_text(f"goal,target\n{rows}")
    to = tmp_path / "study.yaml"
    done = pin("llama2", to, hub)
    assert done.returncode == 1, done.stdout + done.stderr
    for missing in (
        "models.70b.base.hub",
        "models.70b.aligned.hub",
        "data.pool.path",
        "suites.xstest.prompts.path",
    ):
        assert missing in done.stderr
    study = parse(to)
    for size in ("7b", "13b"):
        reference = study.models[size].base.hub
        assert reference is not None and (reference.commit, reference.sha256) == (
            COMMIT,
            digest({"files": FILES}),
        )
    advbench = study.suites["advbench"].prompts.path
    assert advbench is not None and advbench.sha256 is not None
    # Comments, order and everything without a new pin are unchanged.
    before, after = shipped()["llama2"].read_text().splitlines(), to.read_text().splitlines()
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 5


@pytest.mark.process
def test_an_unreachable_hub_is_named_without_a_traceback(tmp_path: Path) -> None:
    done = pin("llama2", tmp_path / "study.yaml", "http://127.0.0.1:9")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the hub gave no information about model meta-llama/Llama-2-7b-hf" in done.stderr


@pytest.mark.process
def test_another_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("study: mine\n")
    done = pin("llama2", tmp_path / "mine.yaml", "http://127.0.0.1:9")
    assert done.returncode == 1 and "exists; to add the pins that it lacks" in done.stderr
    assert (tmp_path / "mine.yaml").read_text() == "study: mine\n"


def test_pins_are_written_into_block_and_flow_mappings_with_or_without_the_field() -> None:
    text = "a: # kept\n  b: {path: x, sha256: null} # kept too\n  c:\n    path: y\n"
    pinned = with_pins(text, {"a.b": {"sha256": "1"}, "a.c": {"sha256": "2"}})
    assert (
        pinned
        == 'a: # kept\n  b: {path: x, sha256: "1"} # kept too\n  c:\n    sha256: "2"\n    path: y\n'
    )
    with pytest.raises(StudyError, match="has no a.d"):
        with_pins(text, {"a.d": {"sha256": "3"}})


LAID_OUT = """\
---
question: a plain text
  of two lines   # kept
models: {7b: {base: {hub: {id: org/base, sha256: ~}},   # aligned by hand
              aligned: &chat {hub: {id: org/chat}}}}
axes:
    train.learning_rate: [1e-4,  # the paper's
                          3.0e-04, .5]
    flags: [yes, on, 010, 1_000, null, ~, ]
list:
- one
-   two  # another indentation
nested:
    - [a,
       b]
again: *chat
empty:
folded: >-
  text

  more

# the end
"""


def test_pins_change_nothing_else_in_the_text_or_in_what_other_readers_load() -> None:
    pins = {
        "models.7b.base.hub": {"commit": "c1", "sha256": "s1"},
        "models.7b.aligned.hub": {"commit": "c2", "sha256": "s2"},
    }
    pinned = with_pins(LAID_OUT, pins)
    plain = pinned.replace('"s1"', "~")
    for added in ('commit: "c1", ', 'commit: "c2", ', 'sha256: "s2", '):
        assert plain.count(added) == 1
        plain = plain.replace(added, "")
    assert plain == LAID_OUT
    before, after = yaml.safe_load(LAID_OUT), yaml.safe_load(pinned)
    assert after["again"]["hub"] == {"id": "org/chat", **pins["models.7b.aligned.hub"]}
    before["models"]["7b"]["base"]["hub"] |= pins["models.7b.base.hub"]
    before["models"]["7b"]["aligned"]["hub"] |= pins["models.7b.aligned.hub"]
    assert after == before


def test_update_pins_anew_what_changed_on_this_machine_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    whole = changed(changes(tmp_path))
    whole["models"].pop("70b")
    hub = {"hub": {"id": "org/model", "commit": COMMIT, "sha256": "e" * 64}}
    whole["models"]["7b"]["aligned"] = hub
    path.write_text("# a comment\n" + yaml.safe_dump(whole, sort_keys=False))
    before = path.read_text()
    assert list(pin_study(str(path), path, update=True)) == [] and path.read_text() == before
    (tmp_path / "pool.jsonl").write_text('{"instruction": "Which marsh?", "output": "This."}')
    fresh = content_digest(tmp_path / "pool.jsonl")
    (line,) = pin_study(str(path), path, update=True)
    assert line.startswith("data.pool.path: sha256 ") and line.endswith(f" -> {fresh[:12]}")
    after = path.read_text()
    apart = list(zip(before.splitlines(), after.splitlines(), strict=True))
    assert len([pair for pair in apart if pair[0] != pair[1]]) == 1
    study = parse(path)
    assert study.data.pool.path is not None and study.data.pool.path.sha256 == fresh


def test_update_writes_over_a_pinned_copy_and_over_no_other_file(tmp_path: Path) -> None:
    source, to = tmp_path / "mine.yaml", tmp_path / "pinned.yaml"
    whole = changed(changes(tmp_path))
    source.write_text(yaml.safe_dump(whole, sort_keys=False))
    list(pin_study(str(source), to))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Which marsh?", "answer": "This."}')
    with pytest.raises(StudyError, match="exists; .* add --update"):
        list(pin_study(str(source), to))
    lines = list(pin_study(str(source), to, update=True))
    assert [line.partition(":")[0] for line in lines] == [
        "suites.refusal.prompts.path",
        "suites.task.prompts.path",
    ]
    to.write_text(to.read_text().replace("question: How far?", "question: How much further?"))
    kept = to.read_text()
    with pytest.raises(StudyError, match=r"(?s)question: .* `ebbline pin .*pinned\.yaml --update`"):
        list(pin_study(str(source), to, update=True))
    assert to.read_text() == kept


def test_pin_needs_a_place_for_a_study_that_ships() -> None:
    for arguments in (["pin", "quickstart"], ["pin", "quickstart", "--update"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2 and "--to" in done.output
