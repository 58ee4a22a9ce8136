"""A judge at an OpenAI-compatible endpoint: one request for each completion, several in flight.
Each verdict is stored at once.

Invariant: no failure becomes a verdict. A completion without an answer is undecided, with a code.
When no request is answered, the stage fails.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_result,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential,
)

from ebbline.tasks.errors import EndpointDown, EvaluationError
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.scorers import Score
from ebbline.tasks.specs import JudgeSpec
from ebbline.tasks.stage import Context

Chat = Sequence[Mapping[str, Any]]  # messages, each with a role and a content

KEYS = ("EBBLINE_JUDGE_KEY", "OPENAI_API_KEY")
RECEIVED = "verdicts-received.jsonl"
AT_ONCE = 8
ATTEMPTS = 5
TIMEOUT_S = 120.0
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
GIVE_UP_AFTER = 16
# Failures of the endpoint itself, not of one request. After GIVE_UP_AFTER of these, with no success
# and no other failure, the remaining requests are not sent.
_OUTAGE = re.compile(r"endpoint: (timeout|connection|HTTP (401|404|429|5\d\d))")


def ask_endpoint(
    spec: JudgeSpec,
    questions: Sequence[tuple[str, Chat]],
    parsed: Callable[[str, bool], Score],
    ctx: Context,
) -> list[Score]:
    """A verdict for each question (an id and a chat), in order; a failed request is undecided.

    `parsed` reads the verdict in an answer that has ended or was cut off. Raises EndpointDown when
    no request was answered and there is no stored verdict, or when all requests failed because of
    the endpoint.
    """
    url = _address(spec)
    bodies = [_body(spec, messages) for _, messages in questions]
    names = [
        f"{identifier} {digest({'url': url, 'body': body})}"
        for (identifier, _), body in zip(questions, bodies, strict=True)
    ]
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    received = _received(ctx.scratch / RECEIVED)
    scores = {index: received[name] for index, name in enumerate(names) if name in received}
    stored, answered, failures = len(scores), 0, list[str]()
    stop, writing = threading.Event(), threading.Lock()

    def is_down() -> bool:
        return all(_OUTAGE.fullmatch(failure) for failure in failures)

    with (
        httpx.Client(timeout=TIMEOUT_S, headers=_headers()) as client,
        _appending(ctx.scratch / RECEIVED) as log,
    ):

        def judged(index: int) -> tuple[Score, bool]:
            answer = _ask(client, url, bodies[index], stop)
            if answer.failure is not None:
                return Score("undecided", answer.failure), False
            score = parsed(answer.content, answer.ended)
            with writing:
                log.write(json.dumps({"name": names[index], **asdict(score)}) + "\n")
                log.flush()
            return score, True

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            futures = {
                pool.submit(judged, index): index
                for index in range(len(questions))
                if index not in scores
            }
            for done in as_completed(futures):
                score, succeeded = done.result()
                scores[futures[done]] = score
                answered += succeeded
                if not succeeded:
                    failures.append(score.reason)
                ctx.progress(len(scores), len(questions), "verdicts")
                if len(failures) >= GIVE_UP_AFTER and answered == 0 and is_down():
                    break
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    if failures and answered == 0 and (stored == 0 or is_down()):
        raise EndpointDown(
            f"{spec.endpoint} answered none of {len(failures)} requests to judge; the last "
            f"one: {failures[-1]}."
            f" Check its URL, the model's name and the key in {KEYS[0]}; the same "
            "command continues"
        )
    return [scores[index] for index in range(len(questions))]


def _address(spec: JudgeSpec) -> str:
    return f"{str(spec.endpoint).rstrip('/')}/chat/completions"


def _headers() -> dict[str, str]:
    name, key = next(
        ((name, key) for name in KEYS if (key := os.environ.get(name, "").strip())), ("", "")
    )
    if not (key.isascii() and key.isprintable()):
        raise EvaluationError(f"the environment variable {name} holds characters that no key has")
    return {
        "Content-Type": "application/json",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }


def _body(spec: JudgeSpec, messages: Chat) -> str:
    # Encoded here and as ASCII: an encoding error of the client would quote the text.
    return json.dumps(
        {
            "model": spec.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": spec.max_new_tokens,
        },
        sort_keys=True,
    )


@dataclass(frozen=True)
class _Reply:
    """The result of one request: its content, or the code of its failure. `ended` is false for an
    answer that the endpoint cut off.

    `may_retry` says whether another attempt may succeed; `retry_after_s` is the endpoint's
    Retry-After header.
    """

    content: str = ""
    ended: bool = True
    failure: str | None = None
    may_retry: bool = False
    retry_after_s: float | None = None


def _ask(client: httpx.Client, url: str, body: str, stop: threading.Event) -> _Reply:
    """The first answer that needs no retry, or that of the last attempt."""
    latest = _Reply(failure="endpoint: not asked")

    def attempt() -> _Reply:
        nonlocal latest
        if not stop.is_set():
            latest = _post(client, url, body)
        return latest

    retrying = Retrying(
        retry=retry_if_result(lambda answer: answer.may_retry),
        stop=stop_after_attempt(ATTEMPTS) | stop_when_event_set(stop),
        wait=_wait_s,
        sleep=sleep_using_event(stop),
        retry_error_callback=lambda state: latest,
    )
    return retrying(attempt)


def _wait_s(state: RetryCallState) -> float:
    """The endpoint's Retry-After, else a wait that doubles with each attempt; at most
    LONGEST_WAIT_S.
    """
    assert state.outcome is not None
    retry_after_s: float | None = state.outcome.result().retry_after_s
    if retry_after_s is not None:
        return min(retry_after_s, LONGEST_WAIT_S)
    return wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)(state)


def _post(client: httpx.Client, url: str, body: str) -> _Reply:
    try:
        response = client.post(url, content=body.encode("ascii"))
    except httpx.TimeoutException:
        return _Reply(failure="endpoint: timeout", may_retry=True)
    except httpx.RequestError:
        return _Reply(failure="endpoint: connection", may_retry=True)
    if response.status_code == httpx.codes.OK:
        return _content(response)
    may_retry = response.status_code in (408, 409, 425, 429) or response.status_code >= 500
    retry_after = response.headers.get("Retry-After", "")
    return _Reply(
        failure=f"endpoint: HTTP {response.status_code}",
        may_retry=may_retry,
        retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
    )


def _content(response: httpx.Response) -> _Reply:
    try:
        body = response.json()
    except ValueError:
        return _Reply(failure="endpoint: not JSON")
    try:
        choice = body["choices"][0]
        content, ended = choice["message"]["content"], choice.get("finish_reason") != "length"
    except (KeyError, IndexError, TypeError, AttributeError):
        content, ended = None, False
    if not isinstance(content, str):
        return _Reply(failure="endpoint: no choice")
    return _Reply(content, ended)


def _received(path: Path) -> dict[str, Score]:
    """The stored verdicts of an earlier attempt, by id and digest of the request. Incomplete lines
    are skipped.
    """
    found: dict[str, Score] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            name = row.pop("name")
            found[name] = Score(**row)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def _appending(path: Path) -> Any:
    """The file, open for appending at the start of a line."""
    incomplete = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    handle = path.open("a", encoding="utf-8")
    handle.write("\n" if incomplete else "")
    return handle
