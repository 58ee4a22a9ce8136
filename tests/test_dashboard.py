"""The live page's server: to whom it answers, what it lets nobody do."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from optuna.exceptions import StorageInternalError

from ebbline.analysis.dashboard.server import Server, serving
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.state.trials import opened
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from tests.analysis.test_live_page import small
from tests.sweeps.pretended import Pretended

LIMIT_S = (
    120.0  # on a busy machine an answer may take longer than the five seconds that httpx waits
)


def get(url: str, **headers: dict[str, str]) -> httpx.Response:
    return httpx.get(url, timeout=LIMIT_S, **headers)


@contextmanager
def served(found: Study, home: Home) -> Iterator[Server]:
    with serving(StudyView(found, home), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Home]:
    folder = tmp_path_factory.mktemp("finished")
    home = Home(folder / "100% odd signs, #1 & more")
    found = small(folder)
    drive(StudyView(found, home), lambda: Pretended(home.store))
    return found, home


@pytest.fixture(scope="module")
def url(finished: tuple[Study, Home]) -> Iterator[str]:
    with served(*finished) as server:
        yield server.url


def test_it_listens_on_the_loopback_alone(finished: tuple[Study, Home]) -> None:
    with serving(StudyView(*finished), 0) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1" and server.url.startswith(
            "http://127.0.0.1:"
        )


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
        ("evil.example:127.0.0.1", 421),
    ],
)
@pytest.mark.parametrize("path", ["", "data.json", "api/studies"])
def test_it_answers_only_to_the_loopback_s_names(
    url: str, path: str, host: str, status: int
) -> None:
    assert get(url + path, headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    "path",
    [
        "",
        "data.json",
        "api/studies",
        "api/studies/1/rename",
        "api/trials/1/tell",
        "api/studies/1/note",
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed_through_it(
    url: str, finished: tuple[Study, Home], method: str, path: str
) -> None:
    database = finished[1].folder("tiny") / "optuna.db"
    before = database.read_bytes()
    answer = httpx.request(method, url + path, timeout=LIMIT_S, content=b'{"state": "fail"}')
    assert answer.status_code == 405 and "edit its file" in answer.text
    assert database.read_bytes() == before


def test_the_database_is_opened_so_that_nothing_can_be_written(
    finished: tuple[Study, Home],
) -> None:
    _, home = finished
    storage = opened(home.database("tiny").to_read())
    number = storage.get_study_id_from_name("tiny")
    assert len(storage.get_all_trials(number)) == 6
    with pytest.raises(StorageInternalError) as failed:
        storage.set_study_user_attr(number, "mine", 1)
    assert "readonly database" in str(failed.value.__cause__)


def test_optuna_dashboard_reads_the_same_points_on_the_same_port(url: str) -> None:
    assert get(url + "points").headers["location"] == "/dashboard/studies/1"
    study = get(url + "api/studies/1").json()
    assert study["name"] == "tiny" and len(study["trials"]) == 6
    assert "bundle.js" in get(url + "dashboard/studies/1").text


def test_every_answer_keeps_scripts_from_elsewhere_out(url: str) -> None:
    for path in ("", "data.json", "plotly.js", "dashboard/studies/1", "api/studies", "nothing"):
        headers = get(url + path).headers
        rules = dict(
            rule.strip().partition(" ")[::2]
            for rule in headers["content-security-policy"].split(";")
            if rule.strip()
        )
        assert (
            rules["default-src"] in ("'none'", "'self'")
            and "http" not in headers["content-security-policy"]
        ), path
        assert (
            headers["x-frame-options"] == "DENY"
            and headers["cross-origin-resource-policy"] == "same-origin"
        )
    assert "unsafe" not in rules["script-src"]


def test_what_has_not_changed_is_not_sent_again(url: str) -> None:
    first = get(url + "plotly.js")
    again = get(url + "plotly.js", headers={"If-None-Match": first.headers["etag"]})
    assert (
        first.status_code == 200
        and len(first.content) > 1_000_000
        and (again.status_code, again.content) == (304, b"")
    )


def test_a_head_has_no_body(url: str) -> None:
    """Asked by hand: an HTTP client would not read one."""
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port), timeout=LIMIT_S) as asking:
        asking.sendall(b"HEAD / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        head, _, body = b"".join(iter(lambda: asking.recv(65536), b"")).partition(b"\r\n\r\n")
    assert b" 200 " in head.partition(b"\r\n")[0] and body == b""


def test_unknown_pages_points_and_keys_are_distinct_from_faults(url: str) -> None:
    assert get(url + "nothing").status_code == 404
    assert get(url + "point.json?number=99").status_code == 404
    assert get(url + f"curve.json?key={'0' * 64}").json()["steps"] == []
    assert get(url + "data.json?since=0abc.7").json()["fresh"] is True


@pytest.mark.parametrize(
    "page",
    [
        *(
            "point.json",
            "point.json?number=-1",
            "point.json?number=x",
            "point.json?number=1&number=2",
        ),
        *("point.json?number=%C2%B2", f"point.json?number={'9' * 5000}", "point.json?number="),
        *("curve.json?key=../../../etc/passwd", "curve.json?key=a%00b", "curve.json"),
        *("data.json?since=no.cursor", "data.json?since=a.%C2%B2", "data.json?" + "a=1&" * 100),
    ],
)
def test_a_malformed_parameter_is_a_bad_request(url: str, page: str) -> None:
    answer = get(url + page)
    assert answer.status_code == 400 and "malformed" in answer.text


@pytest.mark.slow
def test_before_a_study_was_run_there_are_no_points_to_look_at_in_optuna_dashboard(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path / "home")
    with served(small(tmp_path), home) as server:
        assert get(server.url).status_code == 200
        answer = get(server.url + "points")
        assert answer.status_code == 404 and "once it runs" in answer.text
        assert get(server.url + "api/studies").status_code == 404
        drive(StudyView(small(tmp_path), home), lambda: Pretended(home.store))
        assert get(server.url + "points").status_code == 302


def test_a_database_that_cannot_be_read_is_named_and_the_page_stays(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with served(small(tmp_path), home) as server:
        (home.folder("tiny") / "optuna.db").write_text(
            "no database at all, though as long as one that might be" * 9
        )
        answer = get(server.url + "points")
        assert answer.status_code == 503 and "is no database any more" in answer.text
        deadline = time.monotonic() + LIMIT_S
        while (
            not (data := get(server.url + "data.json").json())["error"]
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        assert "the points could not be read" in data["error"] and "optuna.db" in data["error"]


def test_a_taken_port_is_one_clear_error(finished: tuple[Study, Home]) -> None:
    with (
        serving(StudyView(*finished), 0) as server,
        pytest.raises(StudyError, match=rf"127\.0\.0\.1:{server.server_port}.*--port 0"),
    ):
        serving(StudyView(*finished), server.server_port)
