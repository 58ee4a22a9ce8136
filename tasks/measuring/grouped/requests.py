"""Which requests of a batch form a group: generations that are measured at once, over one model.
The measuring itself is `ebbline.tasks.measuring.grouped.generations`. Imports no torch.

Invariant: a group changes no key. Each member is committed as a stage of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ebbline.tasks.identity import digest
from ebbline.tasks.specs import GenerateSpec
from ebbline.tasks.stage import Request

# Settings that must be equal: they decide the loaded model, its tokenizer and the batches' rows.
COMMON = ("backend", "quantisation", "dtype", "chat", "batch_size", "decoding")


def group_name(request: Request) -> str:
    """A name that is equal for requests that may form a group; empty for one that may not."""
    spec = request.spec
    if (
        request.kind != GenerateSpec.KIND
        or request.alone
        or "model" not in request.inputs
        or request.gpus > 1
        or spec.get("tokenizer", "model") != "model"
        or spec.get("quantisation") == "int8"  # there one row changes the result of another
    ):
        return ""
    common = {name: spec.get(name) for name in COMMON}
    place = [request.inputs["model"], request.device, request.threads, request.gpus]
    return digest({"generate": common, "place": place})


def in_groups(more: Callable[[], Iterable[list[Request]]]) -> Iterator[list[Request]]:
    """The packs of a batch, in order, with the generations of one group as one list.

    A group is run where its first member would. Stages without a GPU that a member reads from
    (`apply`) run before it, stages that read from a member (`score`) after it. `more` takes the
    packs that wait. It is called again after each list, because running a request may add others;
    these come first.
    """
    waiting: list[list[Request]] = []
    while waiting := [*more(), *waiting]:
        first = waiting[0]
        name = group_name(first[0]) if len(first) == 1 else ""
        members, before = _members(name, waiting) if name else ([], [])
        if not members:
            yield waiting.pop(0)
            continue
        yield from ([request] for request in before)
        yield members
        run = {request.key for request in [*before, *members]}
        waiting = [pack for pack in waiting if pack[0].key not in run]


def _members(name: str, waiting: Sequence[list[Request]]) -> tuple[list[Request], list[Request]]:
    """(members of the first group, the requests that have to run before it, in order)."""
    by_out = {request.out.rstrip("/"): request for pack in waiting for request in pack}
    single = {pack[0].key for pack in waiting if len(pack) == 1}
    members: list[Request] = []
    before: set[str] = set()
    for pack in waiting:
        request = pack[0]
        if len(pack) > 1 or group_name(request) != name:
            continue
        needed = _producers(request, by_out)
        # With a producer that is a member itself, in a pack or on a GPU, it is for a later group
        if all(
            each.gpus == 0 and key in single and not group_name(each)
            for key, each in needed.items()
        ):
            members.append(request)
            before |= needed.keys()
    return members, [pack[0] for pack in waiting if pack[0].key in before]


def _producers(request: Request, by_out: Mapping[str, Request]) -> dict[str, Request]:
    """The waiting requests whose output this one reads, and those that they read, by key."""
    found: dict[str, Request] = {}
    readers = [request]
    while readers:
        for location in readers.pop().inputs.values():
            for folder in _folders(location):
                each = by_out.get(folder)
                if each is not None and each.key not in found and each is not request:
                    found[each.key] = each
                    readers.append(each)
    return found


def _folders(location: str) -> Iterator[str]:
    """A location and the folders that it is in."""
    yield location.rstrip("/")
    for place, letter in enumerate(location):
        if letter == "/":
            yield location[:place]
