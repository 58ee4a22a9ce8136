"""What differs between two values of JSON, leaf by leaf."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """One line for each leaf that differs: `train.rank: 4 -> 8`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted({*before, *after}):
            path = f"{where}.{key}" if where else str(key)
            if key not in before or key not in after:
                yield f"{path}: {'added' if key in after else 'removed'}"
            else:
                yield from differences(before[key], after[key], path)
    elif before != after:
        yield f"{where}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
