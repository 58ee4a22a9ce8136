"""`ebbline dashboard`: a study's live page and optuna-dashboard of its points, on one local port.

Invariants: it listens only on the loopback and answers only to the loopback's names, so no other
site can read it through the browser. It accepts only GET and HEAD, and opens the points' database
read-only. The page loads nothing from other addresses.
"""

import gzip
import hashlib
import json
import logging
import re
import threading
import webbrowser
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from http import HTTPStatus
from importlib.resources import files
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from ebbline.analysis.dashboard.live_page import LivePage
from ebbline.analysis.report.page import template
from ebbline.sweeps.state.trials import caching, reaching
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import EbblineError, StudyError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

HOST, PORT = "127.0.0.1", 8765
NAMES = ("127.0.0.1", "localhost", "[::1]")
OPTUNA = (
    "/dashboard",
    "/api/",
    "/static/",
    "/csv/",
    "/favicon.ico",
)  # the paths of optuna-dashboard
HEADERS = {
    # Plotly adds its own style sheet to the page. Scripts come only from this server; none is
    # evaluated from text.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
# Path -> its parameter: name, default, form
PARAMETERS = {
    "/data.json": ("since", "", re.compile(r"(?:[A-Za-z0-9-]{1,40}\.[0-9]{1,18})?")),
    "/curve.json": ("key", "", re.compile(r"[0-9a-f]{64}")),
    "/point.json": ("number", "", re.compile(r"[0-9]{1,18}")),
}
LONGEST_QUERY = 200  # characters
Answer = tuple[HTTPStatus, str, bytes]
_log = logging.getLogger(__name__)


class Server(ThreadingMixIn, WSGIServer):
    """Serves several browsers at once; `url` is the address of the page."""

    daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class Site:
    """The pages as a WSGI application."""

    def __init__(self, view: StudyView) -> None:
        self.page = LivePage(view)
        self._database = view.database
        self._index = (
            template("dashboard/live_page.html")
            .render(study=view.study, about=self.page.about())
            .encode()
        )
        self._optuna_lock = threading.Lock()
        self._optuna_app: WSGIApplication | None = None
        self._number = 0  # the study's id in Optuna's storage
        self._paths: dict[str, Callable[[dict[str, str]], Answer]] = {
            "/": lambda query: (HTTPStatus.OK, "text/html; charset=utf-8", self._index),
            "/live_page.js": lambda query: (
                HTTPStatus.OK,
                "text/javascript; charset=utf-8",
                self._script,
            ),
            "/plotly.js": lambda query: (
                HTTPStatus.OK,
                "text/javascript; charset=utf-8",
                self._plotly,
            ),
            "/data.json": lambda query: _as_json(self.page.since(query["since"])),
            "/curve.json": lambda query: _as_json(self.page.curve(query["key"])),
            "/point.json": self._point,
            "/points": self._to_optuna,
        }

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", "/"), environ["REQUEST_METHOD"]
        if _host_name(environ) not in NAMES:
            text = f"This page answers only to the names {HOST} and localhost."
            return _send(environ, start_response, _text(text, HTTPStatus.MISDIRECTED_REQUEST))
        if method not in ("GET", "HEAD"):
            reason = "This page is read-only. To change a study, edit its file and run it."
            return _send(
                environ, start_response, _as_json({"reason": reason}, HTTPStatus.METHOD_NOT_ALLOWED)
            )
        try:
            query = _query(path, environ.get("QUERY_STRING", ""))
        except ValueError as error:
            return _send(environ, start_response, _text(str(error), HTTPStatus.BAD_REQUEST))
        try:
            if path.startswith(OPTUNA) and self._optuna is not None:
                return self._optuna(environ, _guarded(start_response))
            answer = (
                self._paths[path](query)
                if path in self._paths
                else _text("There is no such page.", HTTPStatus.NOT_FOUND)
            )
        except EbblineError as error:  # such as an unreachable database
            answer = _text(str(error), HTTPStatus.SERVICE_UNAVAILABLE)
        return _send(environ, start_response, answer)

    def _point(self, query: dict[str, str]) -> Answer:
        number = query["number"]
        found = self.page.point(int(number))
        return _as_json(
            found or {"reason": f"there is no point {number}"},
            HTTPStatus.OK if found else HTTPStatus.NOT_FOUND,
        )

    def _to_optuna(self, query: dict[str, str]) -> Answer:
        if self._optuna is None:
            return _text(
                "This study has no points yet. Reload this page once it runs.",
                HTTPStatus.NOT_FOUND,
            )
        return HTTPStatus.FOUND, f"/dashboard/studies/{self._number}", b""

    @property
    def _optuna(self) -> "WSGIApplication | None":
        """optuna-dashboard of the study's points, read-only; None before the study's first run."""
        with self._optuna_lock:
            if self._optuna_app is None and self._database.exists:
                from optuna_dashboard import wsgi  # the import takes a second and is rarely needed

                with suppress(KeyError), reaching(self._database):
                    storage = caching(self._database.to_read())
                    self._number = storage.get_study_id_from_name(self._database.name)
                    self._optuna_app = wsgi(storage)
            return self._optuna_app

    @cached_property
    def _script(self) -> bytes:
        return files("ebbline.analysis.dashboard").joinpath("live_page.js").read_bytes()

    @cached_property
    def _plotly(self) -> bytes:
        from plotly.offline import get_plotlyjs

        return str(get_plotlyjs()).encode()


def serving(view: StudyView, port: int) -> Server:
    """A server ready for `serve_forever`; port 0 uses any free port.

    Raises StudyError when the port is in use.
    """
    site = Site(view)
    try:
        server = make_server(HOST, port, site, Server, _Quiet)
    except OSError as error:
        raise StudyError(
            f"the page cannot be served at {HOST}:{port}: {error.strerror}. Choose another "
            "port with --port, or --port 0 for any free port"
        ) from error
    return server


def show(view: StudyView, port: int, browser: bool) -> None:
    """Serves the page until Ctrl-C; with `browser`, opens it in the default browser."""
    with serving(view, port) as server:
        print(
            f"{view.study.study}: {server.url}  (Ctrl-C ends only the page)",
            flush=True,
        )
        if browser:
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        with suppress(KeyboardInterrupt):
            server.serve_forever()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *values: object) -> None:
        _log.debug(format, *values)


def _host_name(environ: "WSGIEnvironment") -> str:
    """The host name of the request, without its port (a tunnel may have another port)."""
    return re.sub(r":\d*$", "", str(environ.get("HTTP_HOST", ""))).lower()


def _query(path: str, text: str) -> dict[str, str]:
    """The parameter of a page, as PARAMETERS have it. Raises ValueError for another text."""
    if path not in PARAMETERS:
        return {}
    name, default, form = PARAMETERS[path]
    found = [value for given, value in parse_qsl(text, keep_blank_values=True) if given == name]
    values = found or [default]
    if len(text) > LONGEST_QUERY or len(values) != 1 or form.fullmatch(values[0]) is None:
        raise ValueError(f"The parameter {name!r} of this page is malformed.")
    return {name: values[0]}


def _text(text: str, status: HTTPStatus) -> Answer:
    return status, "text/plain; charset=utf-8", text.encode()


def _as_json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return status, "application/json", json.dumps(value, allow_nan=False).encode()


def _send(
    environ: "WSGIEnvironment", start_response: "StartResponse", answer: Answer
) -> Iterable[bytes]:
    """Sends an answer, compressed if the browser accepts gzip, or 304 if it has not changed.

    In a redirection `kind` is the address.
    """
    status, kind, body = answer
    headers = dict(HEADERS)
    if status == HTTPStatus.FOUND:
        headers["Location"] = kind
    else:
        headers |= {"Content-Type": kind, "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}
    if status == HTTPStatus.OK and environ.get("HTTP_IF_NONE_MATCH") == headers["ETag"]:
        status, body = HTTPStatus.NOT_MODIFIED, b""
    if len(body) > 10_000 and "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
        headers["Content-Encoding"], body = "gzip", gzip.compress(body, 5)
    headers["Content-Length"] = str(len(body))
    start_response(f"{status.value} {status.phrase}", list(headers.items()))
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _guarded(start_response: "StartResponse") -> "StartResponse":
    """Adds HEADERS to an answer; headers that it already has are kept."""

    def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
        there = {name.lower() for name, _ in headers}
        return start_response(
            status,
            [
                *headers,
                *((name, value) for name, value in HEADERS.items() if name.lower() not in there),
            ],
            *more,
        )

    return start
