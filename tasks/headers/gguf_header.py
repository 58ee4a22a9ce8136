"""The header of a GGUF file: its architecture, its settings, and the shapes of its tensors.

The library `gguf` reads it. It would also read each word of the vocabulary, which takes seconds; of
long lists only the length is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ebbline.tasks.errors import ModelError

MAGIC = b"GGUF"
TEMPLATE = "tokenizer.chat_template"
SHORT = 1024  # the longest list whose values are kept


@dataclass(frozen=True)
class GgufHeader:
    """`settings` are the file's key-value pairs without long lists. `shapes` has each tensor's
    shape, with the outputs first as in safetensors.
    """

    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        return str(self.settings["general.architecture"])

    def setting(self, name: str) -> Any:
        """A setting of the architecture, such as `block_count`; None if the file has none."""
        return self.settings.get(f"{self.architecture}.{name}")

    @property
    def chat_template(self) -> str | None:
        found = self.settings.get(TEMPLATE)
        return None if found is None else str(found)


def is_gguf(path: Path) -> bool:
    """Whether a file begins with the letters GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file. Raises ModelError for another file, and for a file that is cut."""
    if not path.is_file():
        raise ModelError(f"there is no GGUF file at {path}")
    if not is_gguf(path):
        raise ModelError(f"{path} does not begin with the letters GGUF; it is not a GGUF model")
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _read(path: Path, changed_ns: int, size: int) -> GgufHeader:
    """`changed_ns` and `size` are only keys of the cache."""
    import gguf  # takes half a second, and only studies with a GGUF file need it
    import numpy as np

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # gguf is untyped
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """As the library's, but a list longer than SHORT is passed over."""
            if gguf.GGUFValueType(raw_type) != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            of, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            count, place = int(length[0]), orig_offs + 12
            scalar = self.gguf_scalar_to_np.get(gguf.GGUFValueType(of[0]))
            is_text = gguf.GGUFValueType(of[0]) == gguf.GGUFValueType.STRING
            if count <= SHORT or not (is_text or scalar):
                return super()._get_field_parts(orig_offs, raw_type)
            if scalar:
                place += count * np.dtype(scalar).itemsize
            else:
                is_little = self.endianess == gguf.GGUFEndian.LITTLE
                order: Literal["little", "big"] = "little" if is_little else "big"
                view = memoryview(self.data)
                for _ in range(count):
                    place += 8 + int.from_bytes(view[place : place + 8], order)
            if place > self.data.size:
                raise ValueError("a list is cut off")
            types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(of[0])]
            return place - orig_offs, [of, length], [], types

    try:
        reader = Reader(path)
        settings = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.data or field.types[0] != gguf.GGUFValueType.ARRAY
        }
        shapes = {
            tensor.name: tuple(int(size) for size in reversed(tensor.shape))
            for tensor in reader.tensors
        }
    # What the library raises for a damaged header: it checks little itself.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ModelError(
            f"the header of {path} cannot be read ({type(error).__name__}); is the download "
            "complete?"
        ) from None
    if "general.architecture" not in settings:
        raise ModelError(f"the header of {path} names no architecture; is it a language model?")
    return GgufHeader(settings, shapes)
