"""The stages that a runner has let go, so that its memory does not grow with a study.

A stage is let go once it is done and no open stage and no point in flight needs it. Its artifact is
read from the store when somebody asks for it again.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ebbline.cluster.running.nodes import Node

PACK_AT = 4096  # digests in Python's own containers, which take three times the memory of an array
_SIZE = 32  # bytes of a sha256
Digests = NDArray[np.bytes_]
"""Sorted digests. numpy drops trailing zeros of a single one; `_whole` adds them again."""


class LetGo:
    """Keeps 96 bytes of each stage: its lineage, its key, and its key again if this run made it.

    What came last is in a dictionary and a set, and the rest in arrays.
    """

    def __init__(self) -> None:
        self._recent: dict[bytes, bytes] = {}  # lineage -> key
        self._lineages = self._keys = _digests(())  # the keys are in the order of the lineages
        self._taken: set[bytes] = set()  # lineages in `_lineages` that do not count any more
        self._recent_made: set[bytes] = set()
        self._made = _digests(())

    def __contains__(self, lineage: str) -> bool:
        return self.key(lineage) is not None

    def add(self, node: Node) -> None:
        key = self._recent[bytes.fromhex(node.stage.lineage)] = bytes.fromhex(node.key)
        if not node.reused:
            self._recent_made.add(key)
        if len(self._recent) >= PACK_AT or len(self._recent_made) >= PACK_AT:
            self._pack()

    def key(self, lineage: str) -> str | None:
        """The key of a stage; None if it was not let go."""
        name = bytes.fromhex(lineage)
        found = self._recent.get(name)
        if found is None and name not in self._taken:
            place = _place(self._lineages, name)
            found = None if place is None else _whole(self._keys[place])
        return None if found is None else found.hex()

    def take(self, lineage: str) -> str | None:
        """The key of a stage that is needed again."""
        found, name = self.key(lineage), bytes.fromhex(lineage)
        if found is not None:
            self._recent.pop(name, None)
            if _place(self._lineages, name) is not None:
                self._taken.add(name)
        return found

    def reused(self, key: str) -> bool:
        """Whether no stage with this key was made by this run and let go since."""
        return not self._was_made(bytes.fromhex(key))

    def keys(self) -> Iterator[tuple[str, bool]]:
        """Key and whether it was reused, of each stage."""
        return ((key.hex(), not self._was_made(key)) for _, key in self._items())

    def _was_made(self, key: bytes) -> bool:
        return key in self._recent_made or _place(self._made, key) is not None

    def _items(self) -> Iterator[tuple[bytes, bytes]]:
        for lineage, key in zip(self._lineages, self._keys, strict=True):
            if _whole(lineage) not in self._taken:
                yield _whole(lineage), _whole(key)
        yield from self._recent.items()

    def _pack(self) -> None:
        kept = np.array([_whole(each) not in self._taken for each in self._lineages], dtype=bool)
        lineages = np.concatenate([self._lineages[kept], _digests(self._recent)])
        keys = np.concatenate([self._keys[kept], _digests(self._recent.values())])
        order = np.argsort(lineages)
        self._lineages, self._keys = lineages[order], keys[order]
        self._made = np.union1d(self._made, _digests(self._recent_made))
        self._recent, self._taken, self._recent_made = {}, set(), set()


def _digests(found: Iterable[bytes]) -> Digests:
    return np.array(list(found), dtype=f"S{_SIZE}")


def _whole(found: bytes) -> bytes:
    return bytes(found).ljust(_SIZE, b"\0")


def _place(sorted_digests: Digests, digest: bytes) -> int | None:
    place = int(np.searchsorted(sorted_digests, np.bytes_(digest)))
    found = place < len(sorted_digests) and _whole(sorted_digests[place]) == digest
    return place if found else None
