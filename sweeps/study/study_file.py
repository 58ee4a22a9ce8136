"""Study files as text: YAML read strictly into a Study, a Study written as YAML, and pins put into
a copy that is else as it was.

The only file that knows YAML; it reads the profiles of clusters too. Loading twice gives equal
studies; an error names the path of each fault and what is allowed.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ebbline.cluster.profile import Profile
from ebbline.sweeps.study.study import Study, faults, unknown
from ebbline.tasks.errors import StudyError
from ebbline.tasks.specs import Frozen

M = TypeVar("M", bound=Frozen)


def shipped() -> dict[str, Path]:
    """The study files that come with ebbline, by name."""
    folder = Path(str(resources.files("ebbline.sweeps") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(name: str) -> Study:
    """The study in a YAML file, or one that ships, by its name. Raises StudyError with the path of
    each fault.
    """
    return parse(source_of(name))


def source_of(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise StudyError(
                f"there is no study file at {path}; the studies that ship are {sorted(shipped())}"
            )
        return path
    if name not in shipped():
        raise StudyError(
            f"no study {name!r} ships: {unknown(name, set(shipped()))}; a file of your own "
            "ends in .yaml"
        )
    return shipped()[name]


def parse(path: Path, text: str | None = None) -> Study:
    """The study in a file; or in `text`, as if that were the file."""
    return _read(path, Study, "a valid study", text)


def read_profile(path: Path) -> Profile:
    """The profile in a YAML file; all defaults when there is none."""
    return _read(path, Profile, "a valid cluster profile") if path.exists() else Profile()


def _read(path: Path, model: type[M], what: str, text: str | None = None) -> M:
    try:
        raw = yaml.load(path.read_text("utf-8") if text is None else text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise StudyError(f"{path} must be a mapping with the keys {sorted(model.model_fields)}")
    try:
        return model.model_validate(_tuples(raw), context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise StudyError(f"{path} is not {what}:\n" + "\n".join(faults(error))) from None


class _UniqueKeys(yaml.SafeLoader):
    """safe_load, except that a key given twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _tuples(value: Any) -> Any:
    # YAML has lists, frozen models have tuples.
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {
            str(key) if isinstance(key, int | float) else key: _tuples(item)
            for key, item in value.items()
        }
    return value


def as_yaml(study: Study) -> str:
    """A study as the text of a study file: every setting written out, so that no default that
    changes later changes it.
    """
    dump = study.model_dump(mode="json")
    points = {
        name: dump["search"][name] for name in ("first", "list")
    }  # their axes may be null, which is a value
    written = {**_given(dump), "search": {**_given(dump["search"]), **points}}
    return yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=120)


def _given(value: Any) -> Any:
    """Without the fields that are null: they are not there."""
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return value


def with_pins(text: str, pins: Mapping[str, Mapping[str, str]]) -> str:
    """The YAML text with `pins` filled in: path of a reference (`models.7b.base.hub`) -> field ->
    value.

    Edits the text where the fields stand, so comments, order and anchors stay. A reference that is
    reached through an alias is written once, at its anchor.
    """
    edits: dict[int, tuple[int, str]] = {}
    for where, fields in pins.items():
        node = _node_at(yaml.compose(text, Loader=yaml.SafeLoader), where)
        standing = {key.value: value for key, value in node.value}
        missing = {name: value for name, value in fields.items() if name not in standing}
        for name, value in fields.items():
            if name in standing:
                edits[standing[name].start_mark.index] = (
                    standing[name].end_mark.index,
                    f'"{value}"',
                )
        if missing:
            first = node.value[0][0].start_mark
            separator = ", " if node.flow_style else "\n" + " " * first.column
            edits[first.index] = (
                first.index,
                "".join(f'{name}: "{value}"{separator}' for name, value in missing.items()),
            )
    for start in sorted(edits, reverse=True):
        end, value = edits[start]
        text = text[:start] + value + text[end:]
    return text


def _node_at(node: Any, where: str) -> Any:
    rest = where
    while rest:
        # A model's name may hold dots, so the longest key that fits comes first.
        found = next(
            (
                (key.value, value)
                for key, value in sorted(node.value, key=lambda pair: -len(pair[0].value))
                if rest == key.value or rest.startswith(f"{key.value}.")
            ),
            None,
        )
        if found is None:
            raise StudyError(f"the study file has no {where}")
        rest, node = rest[len(found[0]) + 1 :], found[1]
    return node
