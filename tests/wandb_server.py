"""A server on the loopback that speaks the part of W&B's API that ebbline's ways to W&B call; it
keeps and records what it is sent.

Made from the requests that the installed client sends (wandb 0.31, wandb-workspaces 0.4): GraphQL
for runs, files and views, the file stream for history and summary, PUT for files. What W&B's
servers do beyond that is not here, so it shows what is sent, and not how W&B shows it.
"""

import base64
import gzip
import json
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

ENTITY = "me"
SLOW_S = 3.0
# An HTTP status, or what happens to the connection
Fault = int | Literal["dropped", "slow body"]
_STREAM = re.compile(r"/files/(?P<entity>[^/]+)/(?P<project>[^/]+)/(?P<run>[^/]+)/file_stream")


class Run:
    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.history: dict[int, dict[str, Any]] = {}  # by line
        self.summary: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.exit_code: int | None = None
        self.alerts: list[dict[str, Any]] = []


class WandbServer(ThreadingHTTPServer):
    """`slow_s` is how long each file stream request takes; all wait until `together` were under way
    at once. `faults` are the next answers to POST requests in place of those they would get, and
    `always` is the answer to each after these.
    """

    daemon_threads = True

    def __init__(self, slow_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.slow_s = slow_s
        self.together = 0
        self.lock = threading.Lock()
        self.more = threading.Condition(self.lock)
        self.runs: dict[str, Run] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.bodies: list[bytes] = []
        self.faults: deque[Fault] = deque()
        self.faulty: list[Fault] = []  # those that were given
        self.always: Fault | None = None  # the answer to every POST, until it is None again
        self.clock_s = 0.0  # how far the clock of its answers is off
        self.at_work = self.most_at_work = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error here."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What sends W&B's client here."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_ERROR_REPORTING": "false",
        }

    def run_of(self, id: str) -> Run:
        return self.runs.setdefault(id, Run())


@contextmanager
def serving(slow_s: float = 0.0) -> Iterator[WandbServer]:
    with WandbServer(slow_s) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: object) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string((timestamp or time.time()) + self.server.clock_s)

    def do_GET(self) -> None:
        self._answer({})

    def _given_fault(self) -> bool:
        """Answer with the next fault; False if there is none."""
        with self.server.lock:
            fault = self.server.faults.popleft() if self.server.faults else self.server.always
        if fault is None:
            return False
        self.server.faulty.append(fault)
        if fault == "dropped":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return True
        if fault == "slow body":
            time.sleep(SLOW_S)
            return False
        self.send_response(fault)
        if fault == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True

    def do_POST(self) -> None:
        body = self._body()
        if self._given_fault():
            return
        stream = _STREAM.match(urlsplit(self.path).path)
        if stream is not None:
            self._answer(self._stream(unquote(stream["run"]), json.loads(body)))
        elif self.path.startswith("/graphql"):
            asked = json.loads(body)
            self._answer({"data": self._graphql(asked["query"], asked.get("variables") or {})})
        else:
            self.server.unknown.append(self.path)
            self._answer({})

    def do_PUT(self) -> None:
        _, _, run, name = self.path.split("/", 3)
        with self.server.lock:
            self.server.run_of(unquote(run)).files[unquote(name)] = self._body()
        self._answer({})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            body = self.rfile.read(int(length))
        else:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.server.bodies.append(body)
        return body

    def _answer(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _stream(self, id: str, sent: dict[str, Any]) -> dict[str, Any]:
        with self.server.lock:
            self.server.at_work += 1
            self.server.most_at_work = max(self.server.most_at_work, self.server.at_work)
            self.server.more.notify_all()
            self.server.more.wait_for(lambda: self.server.most_at_work >= self.server.together, 120)
            run = self.server.run_of(id)
            for name, part in (sent.get("files") or {}).items():
                lines = (
                    [json.loads(line) for line in part["content"]]
                    if name.endswith((".jsonl", "summary.json"))
                    else []
                )
                if name == "wandb-history.jsonl":
                    run.history |= {
                        part["offset"] + index: line for index, line in enumerate(lines)
                    }
                if name == "wandb-summary.json":
                    run.summary = lines[-1]
            run.exit_code = sent.get("exitcode", run.exit_code)
        time.sleep(self.server.slow_s)
        with self.server.lock:
            self.server.at_work -= 1
        return {"exitcode": sent.get("exitcode"), "limits": {}}

    def _graphql(self, query: str, given: dict[str, Any]) -> Any:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found is not None else query
        with self.server.lock:
            self.server.operations.append(name)
            answer = getattr(self, f"_on_{name}", None)
            if answer is None:
                self.server.unknown.append(name)
                return {}
            return answer(given)

    def _on_ServerFeaturesQuery(self, given: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _on_Viewer(self, given: dict[str, Any]) -> Any:
        return {
            "viewer": {
                "id": "1",
                "entity": ENTITY,
                "username": ENTITY,
                "email": "",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }

    _on_GetDefaultEntity = _on_Viewer

    def _on_RunResumeStatus(self, given: dict[str, Any]) -> Any:
        run = self.server.runs.get(given["name"])
        bucket = None if run is None else self._bucket(given["name"], run)
        return {
            "model": {
                "id": "p",
                "name": given["project"],
                "entity": {"id": "e", "name": ENTITY},
                "bucket": bucket,
            }
        }

    def _on_UpsertBucket(self, given: dict[str, Any]) -> Any:
        inserted = given["name"] not in self.server.runs
        run = self.server.run_of(given["name"])
        run.fields |= {key: value for key, value in given.items() if value is not None}
        run.config |= json.loads(given["config"]) if given.get("config") else {}
        return {"upsertBucket": {"bucket": self._bucket(given["name"], run), "inserted": inserted}}

    def _bucket(self, id: str, run: Run) -> dict[str, Any]:
        lines = [run.history[line] for line in sorted(run.history)]
        return {
            "id": id,
            "name": id,
            "displayName": run.fields.get("displayName"),
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": {
                "id": "p",
                "name": run.fields.get("project"),
                "entity": {"id": "e", "name": ENTITY},
            },
            "historyLineCount": len(lines),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(run.summary),
            "tags": [],
            "notes": run.fields.get("notes"),
            "wandbConfig": json.dumps({"t": 1}),
        }

    def _on_CreateRunFiles(self, given: dict[str, Any]) -> Any:
        files = [
            {"name": name, "uploadUrl": f"{self.server.url}/put/{given['run']}/{name}"}
            for name in given["files"]
        ]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _on_MarkRunFilesUploaded(self, given: dict[str, Any]) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    def _on_NotifyScriptableRunAlert(self, given: dict[str, Any]) -> Any:
        self.server.run_of(given["runName"]).alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _view(self, given: dict[str, Any]) -> Any:
        id = (
            given.get("id")
            or base64.b64encode(f"View:{1000 + len(self.server.views)}".encode()).decode()
        )
        self.server.views[id] = {**given, "id": id, "spec": json.loads(given["spec"])}
        project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        shown = {
            "id": id,
            "name": given["name"],
            "displayName": given["displayName"],
            "description": given["description"],
        }
        view = {
            **shown,
            "type": given["type"],
            "project": project,
            "spec": given["spec"],
            "updatedAt": None,
        }
        return {"upsertView": {"view": view, "inserted": "id" not in given}}

    _on_UpsertView2 = _on_upsertView = _view

    def _on_GetProjects(self, given: dict[str, Any]) -> Any:
        names = {run.fields.get("project") for run in self.server.runs.values()}
        node = {
            "__typename": "Project",
            "id": "p",
            "entityName": ENTITY,
            "isBenchmark": False,
            "user": None,
        }
        node["createdAt"] = "2026-01-01T00:00:00"
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {
            "models": {
                "pageInfo": page,
                "edges": [{"node": {**node, "name": name}} for name in names],
            }
        }

    def _on_ProjectInternalId(self, given: dict[str, Any]) -> Any:
        """None for a project without a run, as W&B answers."""
        known = given["projectName"] in {
            run.fields.get("project") for run in self.server.runs.values()
        }
        return {"project": {"id": "p", "internalId": "p1"} if known else None}

    def _on_View(self, given: dict[str, Any]) -> Any:
        found = [view for view in self.server.views.values() if view["name"] == given["viewName"]]
        shown = [{"node": {**view, "spec": json.dumps(view["spec"])}} for view in found]
        return {"project": {"allViews": {"edges": shown}}}

    def _on_SpecificReport(self, given: dict[str, Any]) -> Any:
        view = self.server.views[given["reportId"]]
        project = {"id": "p", "name": view["projectName"], "entityName": view["entityName"]}
        return {"view": {**view, "project": project, "spec": json.dumps(view["spec"])}}
