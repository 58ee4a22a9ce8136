"""A study without pins, for a plan: stand-ins take the place of commits and digests.

Invariant: a stand-in equals no real digest, so no stage of such a plan is found in a store. Nothing
but a plan accepts it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ebbline.sweeps.study.pins import unpinned
from ebbline.sweeps.study.references import Hub, Local
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.data.rows import ROW_TOKENS, ROWS
from ebbline.tasks.errors import PinError
from ebbline.tasks.identity import digest
from ebbline.tasks.models.sizes import TASK_ITEMS
from ebbline.tasks.specs import Frozen

Reference = Local | Hub


def plannable(view: StudyView) -> tuple[StudyView, tuple[str, ...]]:
    """The study as a plan reads it, and what the plan assumes because of missing pins. A pinned
    study, and one that this home has run, stay as they are.
    """
    missing = unpinned(view.study)
    if not missing or view.home.has_run(view.study.study):
        return view, ()
    found = {where: _stand_in(where, ref) for where, ref in missing}
    study = _replaced(view.study, found)
    home, name, source = view.home, view.name, view.source
    return StudyView(study, home, name=name, source=source, located=False), _assumed(missing)


def _stand_in(where: str, reference: Reference) -> Reference:
    name = digest({"a plan's stand-in for the pin of": where, "is": reference.model_dump()})
    if isinstance(reference, Hub):
        commit = reference.commit or name[:40]
        return reference.model_copy(update={"commit": commit, "sha256": name})
    try:
        path = str(reference.located().resolve())  # a folder that is here gives its size
    except PinError:
        path = f"absent:{reference.path}"  # no file of the present folder is taken for it
    return reference.model_copy(update={"path": path, "package": None, "sha256": name})


def _replaced(study: Study, found: Mapping[str, Reference]) -> Study:
    def walk(value: Any, where: str) -> Any:
        if where in found:
            return found[where]
        if isinstance(value, Frozen):
            fields = dict(_fields(value, where))
            changed = {name: new for name, (old, new) in fields.items() if new is not old}
            return value.model_copy(update=changed) if changed else value
        if isinstance(value, dict):
            new = {name: walk(item, f"{where}.{name}") for name, item in value.items()}
            return new if any(new[name] is not value[name] for name in value) else value
        return value

    def _fields(value: Frozen, where: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
        for name in type(value).model_fields:
            old = getattr(value, name)
            yield name, (old, walk(old, f"{where}.{name}" if where else name))

    replaced: Study = walk(study, "")
    return replaced


def _assumed(missing: list[tuple[str, Reference]]) -> tuple[str, ...]:
    """What a plan assumes of content without a pin, a sentence each."""
    absent = sorted(
        {ref.path for _, ref in missing if isinstance(ref, Local) and not _is_here(ref)}
    )
    lines = [
        f"{len(missing)} models and files have no pin, so every stage is counted as new, and `run` "
        "needs the pins (`ebbline pin`)"
    ]
    hubs = sorted({ref.id for _, ref in missing if isinstance(ref, Hub)})
    if hubs:
        lines.append(f"the sizes of {', '.join(hubs)} are taken from their names")
    if absent:
        lines.append(
            f"{', '.join(absent)} are not here: a set has {ROWS} rows of {ROW_TOKENS} tokens, and "
            f"{' and '.join(TASK_ITEMS)} have their published numbers of items"
        )
    return tuple(lines)


def _is_here(reference: Local) -> bool:
    try:
        return reference.located().exists()
    except PinError:
        return False
