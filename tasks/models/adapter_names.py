"""The names of an adapter's tensors, in the naming of the model that it goes onto.

The same layer has several names. torch.compile, DDP and FSDP add a component to it, and the text
part of a multimodal model moved in transformers 4.52:

    text model      model.layers.0     lm_head
    before 4.52     language_model.model.layers.0    language_model.lm_head
    since 4.52      model.language_model.layers.0    lm_head

A name is mapped only where exactly one tensor can be meant, and all names of a file must use one
naming. Two halves under different prefixes are an error: one half may belong to another model.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

PEFT_PREFIX = "base_model.model."
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_TEXT_PARTS = ("language_model", "text_model")
_TEXT, _BEFORE, _SINCE = "text model", "before 4.52", "since 4.52"


def canonical(name: str) -> str:
    """A tensor's or module's name without PEFT's prefix, wrappers and the name of a text part."""
    parts = unwrapped(name).split(".")
    for part in _TEXT_PARTS:
        if part in parts[:2] and (parts[0] == part or parts[0] == "model"):
            parts.remove(part)
    return ".".join(parts)


def unwrapped(name: str) -> str:
    """A name without the components that wrappers add, and without PEFT's prefix."""
    bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return bare.removeprefix(PEFT_PREFIX)


def matched(
    names: Iterable[str], expected: Collection[str], others: Collection[str] = ()
) -> dict[str, str]:
    """Name in the file -> the one name of `expected` (or else of `others`) that it means.

    Names that mean none, or more than one, are left out, and so are names that mean a tensor which
    another name means too. With two namings in one file, only names that no naming changes are
    kept.
    """
    found: dict[str, str] = {}
    for known in (expected, others):
        by_canonical = defaultdict(set)
        for name in known:
            by_canonical[canonical(name)].add(name)
        for name in names:
            if name in found:
                continue
            if name in known:
                found[name] = name
            elif len(meant := by_canonical.get(canonical(name), set())) == 1:
                found[name] = next(iter(meant))
    if not set.intersection(*map(_namings, found), {_TEXT, _BEFORE, _SINCE}) and any(
        unwrapped(name) != unwrapped(meant) for name, meant in found.items()
    ):
        found = {
            name: meant for name, meant in found.items() if unwrapped(name) == unwrapped(meant)
        }
    times = Counter(found.values())
    return {name: meant for name, meant in found.items() if times[meant] == 1}


def _namings(name: str) -> set[str]:
    """The namings in which a layer may have this name."""
    parts = unwrapped(name).split(".")
    if parts[0] in _TEXT_PARTS:
        return {_BEFORE}
    if parts[0] == "model" and parts[1:2] and parts[1] in _TEXT_PARTS:
        return {_SINCE}
    return {_TEXT, _SINCE} if parts[0] == "lm_head" else {_TEXT}
