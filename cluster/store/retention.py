"""Lists, verifies and cleans a store.

Invariants: files that a study needs are not removable. A record is removed before its files, so
that no reader sees part of an artifact. Recently written files are not removable, because a run may
be about to use them.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ebbline.cluster.store.artifacts import DROPPED, QUARANTINE, RECORD, Artifact, Store
from ebbline.cluster.store.places import StoredFile
from ebbline.cluster.store.sources import SOURCES, listed
from ebbline.tasks.errors import StoreError
from ebbline.tasks.kinds import STAGE_KINDS

OnProgress = Callable[[int, int, str], None]  # (done, total, name)
What = Literal["cut-off attempt", "checkpoint", "source", "artifact", "adapter"]
TENSORS = ".safetensors"
OWNERS = "homes"  # the folder with the names of the homes that use the store


@dataclass(frozen=True)
class Needed:
    """The keys and sources (by content) that studies refer to, with all their inputs.

    `adapters` are the keys of the points' trainings and projected adapters. `kept` are the ones
    whose tensors must stay.
    """

    keys: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    adapters: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    def __or__(self, other: "Needed") -> "Needed":
        return Needed(
            self.keys | other.keys,
            self.sources | other.sources,
            self.adapters | other.adapters,
            self.kept | other.kept,
        )


@dataclass(frozen=True)
class Removal:
    """Files that may be removed, and what they are. For an adapter the record stays; anything else
    is removed whole.
    """

    what: What
    kind: str
    key: str
    names: tuple[str, ...] = field(repr=False)
    bytes: int


@dataclass(frozen=True)
class Damage:
    """A damaged file or record, with its `problem`. It `spreads` if a stage may have read it so."""

    kind: str
    key: str
    file: str
    problem: str
    spreads: bool = True


class Survey:
    """A listing of a store: `records` by kind and key, and the files of each key, checkpoint and
    source.
    """

    def __init__(
        self, store: Store, on_progress: OnProgress = lambda done, total, name: None
    ) -> None:
        self.store = store
        self.files: dict[tuple[str, str], list[StoredFile]] = defaultdict(list)
        for entry in store.place.entries():
            top, _, rest = entry.name.partition("/")
            self.files[top, rest.partition("/")[0].removesuffix(".json")].append(entry)
        self.records: dict[tuple[str, str], Artifact] = {}
        self.damaged: list[Damage] = []
        held = {where: entries for where, entries in self.files.items() if where[0] in STAGE_KINDS}
        recorded = [
            where
            for where, entries in held.items()
            if any(_below(entry, where) == RECORD for entry in entries)
        ]
        for number, (kind, key) in enumerate(sorted(recorded)):
            on_progress(number, len(recorded), kind)
            try:
                self.records[kind, key] = store.open(kind, key)
            except StoreError as error:
                self.damaged.append(Damage(kind, key, RECORD, str(error)))

    @property
    def owners(self) -> set[str]:
        """The homes that have run studies with this store."""
        return {name for top, name in self.files if top == OWNERS and not _is_half_created(name)}

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Name -> (count, bytes): artifacts by kind, cut-off attempts, checkpoints, sources, and
        what is in quarantine.
        """
        found: dict[str, list[int]] = defaultdict(list)
        for (top, name), entries in sorted(self.files.items()):
            if top not in STAGE_KINDS:
                if top != OWNERS:
                    found[{"scratch": "checkpoints", QUARANTINE: "set aside"}.get(top, top)].append(
                        _bytes(entries)
                    )
                continue
            attempts = self._attempts(top, name)
            found["cut-off attempts"] += [_bytes(files) for files in attempts.values()]
            if (top, name) in self.records:
                found[top].append(_bytes(entries) - sum(map(_bytes, attempts.values())))
        order = [*STAGE_KINDS, "cut-off attempts", "checkpoints", "sources", "set aside"]
        return {
            what: (len(found[what]), sum(found[what]))
            for what in [*order, *sorted(set(found) - set(order))]
            if found.get(what)
        }

    def of(self, keys: frozenset[str]) -> int:
        """The bytes of the artifacts with these keys."""
        return sum(_bytes(self.files[where]) for where in self.records if where[1] in keys)

    def removable(self, needed: Needed | None, before: float) -> Iterator[Removal]:
        """Removable files that were not written since `before` (seconds since the epoch).

        `needed` is None when the store has unknown users. Then only cut-off attempts and the
        checkpoints of done stages are removable, because no study can need them.
        """
        done = {key for _, key in self.records}
        for (top, name), entries in sorted(self.files.items()):
            old = max(entry.modified for entry in entries) < before
            if top in STAGE_KINDS:
                for files in self._attempts(top, name).values():
                    if max(entry.modified for entry in files) < before:
                        yield _removal("cut-off attempt", top, name, files)
                if (
                    needed is not None
                    and (top, name) in self.records
                    and old
                    and name not in needed.keys
                ):
                    attempts = {
                        entry.name
                        for files in self._attempts(top, name).values()
                        for entry in files
                    }
                    yield _removal(
                        "artifact",
                        top,
                        name,
                        [entry for entry in entries if entry.name not in attempts],
                    )
            elif (
                top == "scratch"
                and old
                and (name in done or (needed is not None and name not in needed.keys))
            ):
                yield _removal("checkpoint", top, name, entries)
            elif top == OWNERS and old and _is_half_created(name):
                yield _removal("cut-off attempt", top, name, entries)
            elif top == "sources" and old and needed is not None and name not in needed.sources:
                yield _removal("source", top, name, entries)

    def adapters(self, needed: Needed, before: float) -> Iterator[Removal]:
        """The tensors of adapters that need not be kept. Their records stay, and a rerun restores
        them.

        Adapters from packs are not removable: a rerun outside the pack may differ in the last bit.
        """
        for (kind, key), artifact in sorted(self.records.items()):
            if key in needed.adapters - needed.kept and artifact.provenance.get("packed") is None:
                folder = f"{kind}/{key}/{artifact.folder.name}/payload/"
                files = [
                    entry
                    for entry in self.files[kind, key]
                    if entry.name.startswith(folder) and entry.name.endswith(TENSORS)
                ]
                if files and max(entry.modified for entry in files) < before:
                    yield _removal("adapter", kind, key, files)

    def _attempts(self, kind: str, key: str) -> Mapping[str, list[StoredFile]]:
        """The attempts at a key that its record does not name."""
        artifact = self.records.get((kind, key))
        attempts: dict[str, list[StoredFile]] = defaultdict(list)
        for entry in self.files[kind, key]:
            name = _below(entry, (kind, key)).partition("/")[0]
            if name not in (RECORD, DROPPED) and (artifact is None or name != artifact.folder.name):
                attempts[name].append(entry)
        return attempts


def remove(
    store: Store,
    removals: Iterable[Removal],
    on_progress: OnProgress = lambda done, total, name: None,
) -> int:
    """Remove these files and return the freed bytes."""
    freed, listed = 0, list(removals)
    for number, removal in enumerate(listed):
        on_progress(number, len(listed), f"{removal.what} {removal.kind} {removal.key[:12]}")
        if removal.what == "adapter":
            artifact = store.open(removal.kind, removal.key)
            prefix = f"{removal.kind}/{removal.key}/{artifact.folder.name}/payload/"
            store.drop(artifact, frozenset(name.removeprefix(prefix) for name in removal.names))
        else:
            store.place.delete(removal.names)
            for attempt in {
                name.split("/")[2]
                for name in removal.names
                if name.count("/") > 2 and removal.kind in STAGE_KINDS
            }:
                store.discard(store.root / removal.kind / removal.key / attempt)
        freed += removal.bytes
    return freed


def damages(
    survey: Survey, on_progress: OnProgress = lambda done, total, name: None
) -> Iterator[Damage]:
    """Read every file of every payload and compare it with its record."""
    yield from survey.damaged
    store, total, done = (
        survey.store,
        sum(len(artifact.files) for artifact in survey.records.values()),
        0,
    )
    for (kind, key), artifact in sorted(survey.records.items()):
        try:
            dropped = store.dropped(artifact)
        except StoreError as error:
            dropped = frozenset(artifact.files)
            yield Damage(kind, key, DROPPED, str(error), spreads=False)
        payload = f"{kind}/{key}/{artifact.folder.name}/payload/"
        present = {
            entry.name.removeprefix(payload)
            for entry in survey.files[kind, key]
            if entry.name.startswith(payload)
        }
        for name in sorted(present - artifact.files.keys()):
            yield Damage(kind, key, name, "the record does not name it")
        for name, sha in artifact.files.items():
            on_progress(done, total, kind)
            done += 1
            found = store.place.sha256(f"{payload}{name}")
            if found is None and name not in dropped:
                # No stage can have been made from tensors that were missing.
                spreads = not name.endswith(TENSORS)
                yield Damage(kind, key, name, "it is missing and was not dropped", spreads)
            elif found not in (None, sha):
                yield Damage(
                    kind,
                    key,
                    name,
                    f"its sha256 is {found[:12] if found else found}, the record says {sha[:12]}",
                )


def source_damages(survey: Survey) -> Iterator[Damage]:
    """Read every uploaded source of a bucket and compare it with its content digest."""
    for (top, content), entries in sorted(survey.files.items()):
        if top != SOURCES:
            continue
        folder = f"{SOURCES}/{content}/"
        text = survey.store.place.read(f"{SOURCES}/{content}.json")
        names = [entry.name.removeprefix(folder) for entry in entries if "/" in entry.name[8:]]
        try:
            files = dict.fromkeys(names, content) if text is None else listed(content, text)
        except StoreError as error:
            yield Damage(SOURCES, content, f"{content}.json", str(error))
            continue
        for name, sha in files.items():
            found = survey.store.place.sha256(f"{folder}{name}")
            if found != sha:
                problem = "it is missing" if found is None else f"its sha256 is {found[:12]}"
                yield Damage(SOURCES, content, name, f"{problem}, not {sha[:12]}")


def made_from(survey: Survey, damages: Iterable[Damage]) -> dict[tuple[str, str], str]:
    """The artifacts that were made from damaged files, directly or through others: (kind, key) ->
    the artifact that it read.

    A record has the content digest of each input. The readers of an artifact without a record are
    found by the requests of their attempts.
    """
    readers: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for where, artifact in survey.records.items():
        for content in dict(artifact.hashed.get("inputs", {})).values():
            readers[content].append(where)
    spreading = [damage for damage in damages if damage.spreads]
    damaged = {(damage.kind, damage.key) for damage in spreading}
    # Also damaged ones: all files of an artifact that was made from damage are suspect.
    seen: set[tuple[str, str]] = set()
    found: dict[tuple[str, str], str] = {}
    waiting: list[tuple[tuple[str, str], tuple[str, ...]]] = [
        ((each.kind, each.key), (each.file,)) for each in spreading
    ]
    while waiting:
        above, names = waiting.pop()
        if above in survey.records:
            contents = _contents_with(survey.records[above], names)
            below = [where for content in contents for where in readers.get(content, ())]
        else:
            below = readers.get(above[1], []) + _named_by_requests(survey, above)
        for where in below:
            if where not in seen:
                seen.add(where)
                if where not in damaged:
                    found[where] = "/".join(above)
                waiting.append((where, tuple(survey.records[where].files)))
    return found


def _contents_with(artifact: Artifact, names: Iterable[str]) -> set[str]:
    """The digests that an input has which reads one of these files: of the artifact, of the file,
    and of each folder around it.
    """
    found = {artifact.content}
    for name in names:
        parts = name.split("/")
        for count in range(1, len(parts) + 1):
            part = "/".join(parts[:count])
            if artifact.below(part):
                found.add(artifact.content_of(part))
    return found


def _named_by_requests(survey: Survey, above: tuple[str, str]) -> list[tuple[str, str]]:
    """The artifacts whose attempt was asked to read this one."""
    inside = f"/{above[0]}/{above[1]}/"
    found = []
    for where, artifact in survey.records.items():
        text = survey.store.log(artifact.folder, "request.json")
        try:
            inputs = {} if text is None else dict(json.loads(text)["inputs"])
        except (ValueError, KeyError, TypeError):
            continue
        if any(inside in str(location) for location in inputs.values()):
            found.append(where)
    return found


def _is_half_created(name: str) -> bool:
    """Whether obstore's `put` in a folder was killed before it gave the file its name."""
    return name.rpartition("#")[2].isdecimal() and "#" in name


def _below(entry: StoredFile, where: tuple[str, str]) -> str:
    return entry.name.removeprefix(f"{where[0]}/{where[1]}/")


def _bytes(entries: Iterable[StoredFile]) -> int:
    return sum(entry.size for entry in entries)


def _removal(what: What, kind: str, key: str, entries: Iterable[StoredFile]) -> Removal:
    entries = list(entries)
    # The record, or a source's listing, is removed first: part of it must never look whole.
    names = sorted(
        (entry.name for entry in entries),
        key=lambda name: not name.endswith((f"{key}/{RECORD}", f"{key}.json")),
    )
    return Removal(what, kind, key, tuple(names), _bytes(entries))
