"""Random draws that are equal on every platform and in every version. Imports no torch.

The generator is Philox 4x64 (NumPy's `Philox`, whose raw stream NumPy guarantees). Its key is the
sha256 of GENERATOR, what is drawn, the draw's number and the module. Normal numbers come from raw
64-bit integers by the Box-Muller formula, so they are equal up to the rounding of log and cos.
Orders come from sha256 alone.
"""

import hashlib
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

GENERATOR = "ebbline-philox-1"


def _digest(what: str, draw: int, name: str) -> bytes:
    return hashlib.sha256(f"{GENERATOR}\n{what}\n{draw}\n{name}".encode()).digest()


def normals(what: str, draw: int, module: str, rows: int, columns: int) -> NDArray[np.float64]:
    """A (rows, columns) matrix of independent standard normal numbers."""
    key = np.frombuffer(_digest(what, draw, module)[:16], dtype="<u8")
    count = rows * columns
    raw = np.random.Philox(key=key).random_raw(2 * count)
    # 53 bits: from 0 to below 1. One minus the first is above 0, so its logarithm is finite.
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log1p(-uniform[:count])), 2.0 * np.pi * uniform[count:]
    drawn: NDArray[np.float64] = (radius * np.cos(angle)).reshape(rows, columns)
    return drawn


def order(what: str, draw: int, names: Collection[str]) -> list[str]:
    """The names in a random order, which depends on the draw and the names alone."""
    return sorted(names, key=lambda name: _digest(what, draw, name))


def module_type(module: str) -> str:
    """The last part of a module's name, such as q_proj: the same layer in every block."""
    return module.rpartition(".")[2]
