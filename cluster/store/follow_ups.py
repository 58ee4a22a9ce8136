"""The requests of a batch that read the output of another request of it. A worker makes them when
that output is committed, since their keys hash its content.
"""

from collections.abc import Iterator
from dataclasses import replace

from ebbline.cluster.store.artifacts import Artifact
from ebbline.cluster.store.workplace import request_out
from ebbline.tasks.identity import digest
from ebbline.tasks.kinds import request_payload
from ebbline.tasks.stage import FollowUp, Request


def requests_after(request: Request, made: Artifact) -> list[Request]:
    """The follow-ups of a request with the artifact `made` that are not in its store."""
    return list(_requests_after(request, made))


def _requests_after(request: Request, made: Artifact) -> Iterator[Request]:
    store = made.store
    for follow_up in request.follow_ups:
        unfinished = _request_of(follow_up, request, made)
        key = digest(request_payload(unfinished))
        if store.find(follow_up.kind, key) is not None:
            continue
        attempt = store.begin(follow_up.kind, key, follow_up.attempt)
        complete = replace(
            unfinished,
            key=key,
            out=request_out(store, attempt),
            log=store.url(attempt / "log"),
            scratch=store.url(store.scratch(key)),
        )
        store.note(attempt, "request.json", complete.to_json().encode())
        yield complete


def _request_of(follow_up: FollowUp, request: Request, made: Artifact) -> Request:
    """The request of a follow-up, without its key and its places."""
    read = {
        name: made.content_of(part) if part else made.content
        for name, part in follow_up.reads.items()
    }
    where = {
        name: made.store.url(made.folder, "payload", *([part] if part else []))
        for name, part in follow_up.reads.items()
    }
    return Request(
        key="",
        kind=follow_up.kind,
        spec=follow_up.spec,
        inputs={**follow_up.inputs, **where},
        contents={**follow_up.contents, **read},
        out="",
        log="",
        scratch="",
        threads=request.threads,
        checkpoint_every_s=request.checkpoint_every_s,
        cache_gb=request.cache_gb,
        load=follow_up.load,
    )
