"""The stages that a runner has let go, so that its memory does not grow with a study.

A stage is let go once it is done and no open stage and no point in flight needs it. Its artifact is
read from the store when somebody asks for it again.
"""

from collections.abc import Iterator

from ebbline.cluster.running.nodes import Node


class LetGo:
    """Keeps 64 bytes of each stage, its lineage and its key, and which keys this run has made."""

    def __init__(self) -> None:
        self._keys: dict[bytes, bytes] = {}  # by lineage
        self._made: set[bytes] = set()

    def __contains__(self, lineage: str) -> bool:
        return bytes.fromhex(lineage) in self._keys

    def add(self, node: Node) -> None:
        key = self._keys[bytes.fromhex(node.stage.lineage)] = bytes.fromhex(node.key)
        if not node.reused:
            self._made.add(key)

    def key(self, lineage: str) -> str | None:
        """The key of a stage; None if it was not let go."""
        key = self._keys.get(bytes.fromhex(lineage))
        return None if key is None else key.hex()

    def take(self, lineage: str) -> str | None:
        """The key of a stage that is needed again."""
        key = self._keys.pop(bytes.fromhex(lineage), None)
        return None if key is None else key.hex()

    def reused(self, key: str) -> bool:
        """Whether no stage with this key was made by this run and let go since."""
        return bytes.fromhex(key) not in self._made

    def keys(self) -> Iterator[tuple[str, bool]]:
        """Key and whether it was reused, of each stage."""
        return ((key.hex(), key not in self._made) for key in self._keys.values())
