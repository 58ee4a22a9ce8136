"""A set of sha256 digests that only grows, in about 35 bytes each: Python's own set takes 110."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

PACK_AT = 4096  # digests in Python's own containers before they go to an array
_SIZE = 32  # bytes of a sha256
Digests = NDArray[np.bytes_]
"""Sorted digests. numpy drops trailing zeros of a single one; `whole` adds them again."""


class DigestSet:
    """What came last is in a set, and the rest in a sorted array."""

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._packed = digests_of(())

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._recent or place_of(self._packed, digest) is not None

    def __len__(self) -> int:
        return len(self._recent) + len(self._packed)

    def add(self, digest: bytes) -> None:
        if digest not in self:
            self._recent.add(digest)
            if len(self._recent) >= PACK_AT:
                self._packed = np.union1d(self._packed, digests_of(self._recent))
                self._recent = set()


def digests_of(found: Iterable[bytes]) -> Digests:
    return np.array(list(found), dtype=f"S{_SIZE}")


def whole(found: bytes) -> bytes:
    return bytes(found).ljust(_SIZE, b"\0")


def place_of(sorted_digests: Digests, digest: bytes) -> int | None:
    place = int(np.searchsorted(sorted_digests, np.bytes_(digest)))
    found = place < len(sorted_digests) and whole(sorted_digests[place]) == digest
    return place if found else None
