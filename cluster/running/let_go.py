"""The stages that a runner has let go, so that its memory does not grow with a study.

A stage is let go once it is done and no open stage and no point in flight needs it. Its artifact is
read from the store when somebody asks for it again.
"""

from collections.abc import Iterator

import numpy as np

from ebbline.cluster.running.nodes import Node
from ebbline.cluster.schedule.digest_set import PACK_AT, DigestSet, digests_of, place_of, whole


class LetGo:
    """Keeps 96 bytes of each stage: its lineage, its key, and its key again if this run made it.

    What came last is in a dictionary and a set, and the rest in arrays.
    """

    def __init__(self) -> None:
        self._recent: dict[bytes, bytes] = {}  # lineage -> key
        self._lineages = self._keys = digests_of(())  # the keys are in the order of the lineages
        self._taken: set[bytes] = set()  # lineages in `_lineages` that do not count any more
        self._made = DigestSet()

    def __contains__(self, lineage: str) -> bool:
        return self.key(lineage) is not None

    def add(self, node: Node) -> None:
        key = self._recent[bytes.fromhex(node.stage.lineage)] = bytes.fromhex(node.key)
        if not node.reused:
            self._made.add(key)
        if len(self._recent) >= PACK_AT:
            self._pack()

    def key(self, lineage: str) -> str | None:
        """The key of a stage; None if it was not let go."""
        name = bytes.fromhex(lineage)
        found = self._recent.get(name)
        if found is None and name not in self._taken:
            place = place_of(self._lineages, name)
            found = None if place is None else whole(self._keys[place])
        return None if found is None else found.hex()

    def take(self, lineage: str) -> str | None:
        """The key of a stage that is needed again."""
        found, name = self.key(lineage), bytes.fromhex(lineage)
        if found is not None:
            self._recent.pop(name, None)
            if place_of(self._lineages, name) is not None:
                self._taken.add(name)
        return found

    def reused(self, key: str) -> bool:
        """Whether no stage with this key was made by this run and let go since."""
        return bytes.fromhex(key) not in self._made

    def keys(self) -> Iterator[tuple[str, bool]]:
        """Key and whether it was reused, of each stage."""
        return ((key.hex(), key not in self._made) for _, key in self._items())

    def _items(self) -> Iterator[tuple[bytes, bytes]]:
        for lineage, key in zip(self._lineages, self._keys, strict=True):
            if whole(lineage) not in self._taken:
                yield whole(lineage), whole(key)
        yield from self._recent.items()

    def _pack(self) -> None:
        kept = np.array([whole(each) not in self._taken for each in self._lineages], dtype=bool)
        lineages = np.concatenate([self._lineages[kept], digests_of(self._recent)])
        keys = np.concatenate([self._keys[kept], digests_of(self._recent.values())])
        order = np.argsort(lineages)
        self._lineages, self._keys = lineages[order], keys[order]
        self._recent, self._taken = {}, set()
