"""The live page as a person sees it: in a real browser, while a real study runs beside it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, expect

from ebbline.tasks.identity import content_digest
from tests.browser import LIMIT_MS, MISSING, chromium, launched, window
from tests.tiny import Pair, conversations, write_chats, write_lines

pytestmark = [pytest.mark.skipif(chromium() is None, reason=MISSING), pytest.mark.timeout(600)]

expect.set_options(timeout=LIMIT_MS)

# With a learning rate of 1e30 the loss becomes no number, so half of the points fail.
STUDY = """
study: tiny
question: What does the page show of <b>it</b>?
models:
  7b:
    base: {{path: {{path: {base}, sha256: {base_sha}}}}}
    aligned: {{path: {{path: {aligned}, sha256: {aligned_sha}}}}}
    quantisation: none
    dtype: float32
data:
  pool: {{path: {{path: {chats}, sha256: {chats_sha}}}}}
  settings: {{size: 48}}
train: {{epochs: 6, global_batch: 8, max_tokens: 64}}
axes:
  train.rank: [2, 4]
  train.learning_rate: [1e-2, 1e30]
  apply.threshold: [null, 0.2]
suites:
  refusal:
    prompts: {{path: {{path: {prompts}, sha256: {prompts_sha}}}}}
    measure: {{kind: refusal, max_new_tokens: 4}}
  task:
    prompts: {{path: {{path: {prompts}, sha256: {prompts_sha}}}}}
    measure: {{kind: task, max_new_tokens: 4}}
objectives: [refusal_rate, task_accuracy]
search: {{sampler: grid, order: in_turn, window: 2}}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Path:
    folder = tmp_path_factory.mktemp("study")
    rows = [
        {"id": str(i), "prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for i, turns in enumerate(conversations(16, 9))
    ]
    named = {
        "base": pair.base,
        "aligned": pair.aligned,
        "chats": write_chats(folder / "chats.jsonl", 48),
    }
    named["prompts"] = write_lines(folder / "prompts.jsonl", rows)
    path = folder / "tiny.yaml"
    path.write_text(
        STUDY.format(
            **named, **{f"{name}_sha": content_digest(place) for name, place in named.items()}
        )
    )
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


@contextmanager
def ebbline(*arguments: str) -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-m", "ebbline.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def served(study: Path, home: Path, port: int = 0) -> Iterator[str]:
    """The address of the page, as the command says it."""
    with ebbline(
        "dashboard", str(study), "--home", str(home), "--port", str(port), "--no-open"
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert "http://127.0.0.1:" in line, line + server.stdout.read()
        yield line.split()[1]


def run(study: Path, home: Path) -> "AbstractContextManager[subprocess.Popen[str]]":
    return ebbline("run", str(study), "--home", str(home), "--executor", "inline", "--no-wandb")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first test leaves, and the later ones look at."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def finished(study: Path, home: Path) -> Path:
    """The study's folder in that home, once it has been run to its end."""
    with run(study, home) as driver:
        printed, _ = driver.communicate()
        assert driver.returncode == 3, printed  # some of its points failed
    return home / "studies" / "tiny"


def test_the_page_does_not_call_a_study_empty_before_its_points_are_read(
    study: Path, home: Path, browser: Browser
) -> None:
    """Only here a browser has an answer without points that are on their way."""

    def early(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "changed": {}, "cursor": ""})

    with served(study, home) as url, window(browser) as opened:
        page = opened.context.new_page()
        page.route("**/data.json*", early)
        page.goto(url)
        expect(page.locator("#state")).not_to_have_text("loading")
        for part in ("#frontier-note", "#frontier-table"):
            assert page.locator(part).text_content() == "The points are being read."
        page.unroute("**/data.json*")
        expect(page.locator("#frontier-note")).to_have_text("No point has finished yet.")


def test_the_page_follows_a_study_as_it_runs(study: Path, home: Path, browser: Browser) -> None:
    """Only here the page is open while a study runs."""
    with served(study, home) as url, window(browser) as opened:
        page = opened.context.new_page()
        page.goto(url)
        expect(page.locator("#frontier-note")).to_have_text("No point has finished yet.")
        expect(page.locator("#state")).to_have_text("not running")
        assert page.locator("h1").inner_text() == "What does the page show of <b>it</b>?"
        seen, running = set(), set()
        with run(study, home) as driver:
            expect(page.locator("#state")).to_contain_text("has run for")
            while driver.poll() is None:
                seen.add(page.locator("#points").inner_text())
                running.add(page.locator("#work tbody").inner_text())
                page.wait_for_timeout(300)
            assert driver.returncode == 3, driver.stdout.read() if driver.stdout else ""
        assert len(seen) >= 3 and any("train 7b" in text for text in running), (seen, running)
        expect(page.locator("#points")).to_have_text("4 of 8 done, 4 failed")
        expect(page.locator("#state")).to_have_text("ended")
        assert opened.wrong == [] and opened.asked == {"127.0.0.1"}


def test_a_person_finds_each_point_its_stages_its_training_and_what_failed(
    study: Path, finished: Path, home: Path, browser: Browser
) -> None:
    """Only here a person's way through the finished page is gone."""
    with served(study, home) as url, window(browser) as opened:
        page = opened.context.new_page()
        page.goto(url)
        expect(page.locator("#points")).to_have_text("4 of 8 done, 4 failed")
        table = pd.read_parquet(finished / "results.parquet")
        assert set(map(int, page.evaluate("Object.keys(sections.points)"))) == set(
            table[table["status"] == "done"]["number"]
        )
        front = [
            int(re.sub(r"\D", "", text))
            for text in page.locator("#frontier-table button").all_text_contents()
        ]
        assert set(front) == set(pd.read_csv(finished / "frontier.csv")["number"])

        keys = {path.parent.name for path in (home / "store").glob("*/*/record.json")}
        hover = hovered(page, "#frontier .scatterlayer .points path")
        assert re.search(r"point \d+: 7b", hover) and "n = 16" in hover and "(95%: " in hover
        assert "seeds 0" in hover and "GPU-hours" in hover
        named = re.findall(r"(train|project|apply) ([0-9a-f]{12})", hover)
        assert [part for part, _ in named] == ["train", "project", "apply"] and {
            key for _, key in named
        } <= {key[:12] for key in keys}
        assert re.search(r"7b.*\d:\d\d, done", hovered(page, "#gantt .bars path"))
        buttons = {
            button.get_attribute("data-title")
            for button in page.locator("#frontier .modebar-btn").all()
        }
        assert "Zoom" in buttons and not [title for title in buttons if title and "loud" in title]

        page.locator("#frontier-details summary").press("Enter")  # by the keyboard alone
        page.locator("#frontier-table button").first.press("Enter")
        expect(page.locator("#point-head")).to_have_text(f"Point {front[0]}")
        page.locator("#point-body summary").press("Enter")
        shown = set(re.findall(r"\b[0-9a-f]{64}\b", page.locator("#point-body").inner_text()))
        assert shown and shown <= keys

        ended = (finished / "timeline.jsonl").read_text().splitlines()
        assert page.locator("#gantt .bars path").count() == len(ended) > 10
        assert (
            page.locator("#curve .js-line").count() == 1
            and page.locator("#training option").count() == 2
        )
        assert re.match(r"\d+ steps on cpu", page.locator("#curve-note").inner_text())
        page.locator("#training").select_option(index=[0, 1])
        expect(page.locator("#curve .scatterlayer .js-line")).to_have_count(2)
        page.locator("#curve-of").select_option("gradient_norm")
        expect(page.locator("#curve .ytitle")).to_have_text("gradient norm")
        by = page.locator("#curve-by option").all_inner_texts()
        assert by[0] == "training" and len(by) > 1, by
        page.locator("#curve-by").select_option(index=1)
        expect(page.locator("#curve .legendtext").first).to_contain_text(by[1])
        page.locator("#smoothing").fill("0.5")
        page.reload()  # what was selected stays
        expect(page.locator("#point-head")).to_have_text(f"Point {front[0]}")
        expect(page.locator("#curve .scatterlayer .js-line")).to_have_count(2)
        expect(page.locator("#curve .ytitle")).to_have_text("gradient norm")
        assert page.locator("#smoothing").input_value() == "0.5"
        assert page.locator("#curve-by").input_value() == by[1]
        expect(page.locator("#headline")).to_have_text("Finished: 4 of 8 points, 4 failed")
        page.locator("#point-body summary").press("Enter")
        assert "ebbline rerun " in page.locator("#point-body").inner_text()
        rows = page.locator("#failures tbody tr").all_inner_texts()
        assert rows and all("the loss became" in row and "ebbline rerun " in row for row in rows), (
            rows
        )

        with opened.context.expect_page() as came:
            page.locator("#optuna").click()
        other = came.value
        other.get_by_text("Hyperparameter Importance").first.wait_for()
        expect(other.locator("header")).to_contain_text("tiny")
        assert other.url == f"{url}dashboard/studies/1"
        other.wait_for_load_state("networkidle")
        assert opened.wrong == [] and opened.asked == {"127.0.0.1"}


def hovered(page: Page, what: str) -> str:
    """What a plot says where a person points at one of its marks."""
    mark = page.locator(what).first
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    label = page.locator(f"{what.split()[0]} .hoverlayer .hovertext")
    label.wait_for()
    return str(label.text_content())


def test_the_page_says_that_its_server_has_gone_and_goes_on_when_it_is_back(
    study: Path, tmp_path: Path, browser: Browser
) -> None:
    with window(browser, color_scheme="dark") as opened:
        page = opened.context.new_page()
        with served(study, tmp_path) as url:
            page.goto(url)
            expect(page.locator("#state")).to_have_text("not running")
        expect(page.locator("#problem")).to_contain_text("server does not answer")
        with served(study, tmp_path, int(url.rstrip("/").rpartition(":")[2])) as again:
            expect(page.locator("#problem")).to_be_hidden()
        assert again == url and opened.asked == {"127.0.0.1"}
