"""Study files: strict reading of YAML into a Study, writing a Study as YAML, and adding pins to a
file's text.

Cluster profiles are read here too; yaml_text reads the YAML of both. Loading a file twice gives
equal studies. An error names the path of each fault and the allowed values.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ebbline.cluster.profile import Profile
from ebbline.sweeps.study.changes import differences
from ebbline.sweeps.study.reading.field_faults import faults, lines_of, unknown, with_lines
from ebbline.sweeps.study.reading.yaml_text import nodes_in, text_of, values_in
from ebbline.sweeps.study.references import Local, Tuned
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError
from ebbline.tasks.judges.facts import JUDGES
from ebbline.tasks.specs import Frozen, Spec

M = TypeVar("M", bound=Frozen)
LORA_ONLY = ("rank", "alpha_over_rank", "dropout", "target_modules")
UNUSED_BY_JUDGE = {
    "endpoint": ("max_tokens", "quantisation", "dtype"),
    "classifier": ("max_new_tokens",),
    "strongreject": ("max_new_tokens",),
    "shieldgemma": ("max_new_tokens",),
}


def shipped() -> dict[str, Path]:
    """The study files that come with ebbline, by name."""
    folder = Path(str(resources.files("ebbline.sweeps") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(name: str) -> Study:
    """The study in a YAML file, or a shipped study by name. Raises StudyError with the path of each
    fault.
    """
    return parse(source_of(name))


def source_of(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise StudyError(
                f"there is no study file at {path}; ebbline ships the studies {sorted(shipped())}"
            )
        return path
    if name not in shipped():
        raise StudyError(
            f"ebbline ships no study {name!r}: {unknown(name, set(shipped()))}; the name of "
            "your own file must end in .yaml, and `ebbline ls` lists the studies of the home"
        )
    return shipped()[name]


def parse(path: Path, text: str | None = None, named: Path | None = None) -> Study:
    """The study in a file, or in `text` with paths relative to that file. `named` is the file that
    messages name; default: `path`.

    Raises StudyError also for a setting that is written in the file and that no stage would use.
    Studies that are stored in a home hold every setting, so they are not checked for this.
    """
    named = named or path
    study = _read(path, Study, "a valid study", text, named)
    unused = list(_unused(study))
    if unused:
        written = text_of(path) if text is None else text
        unused = [f"  {line}" for line in with_lines(unused, values_in(written, named), written)]
        raise StudyError(f"{named} has settings that would be ignored:\n" + "\n".join(unused))
    return study


def _unused(study: Study) -> Iterator[str]:
    """A line for each written setting that another one replaces, or that its method ignores."""
    seeds = "`seeds` gives the seed of the data and of the training; delete this setting"
    if study.data is not None and "seed" in study.data.settings.model_fields_set:
        yield f"data.settings.seed: {seeds}"
    if study.train is not None and "seed" in study.train.model_fields_set:
        yield f"train.seed: {seeds}"
    for name, model in study.models.items():
        if "seed" in model.train:
            yield f"models.{name}.train.seed: {seeds}"
        for field in ("quantisation", "dtype"):
            written, own = getattr(study.train, field, None), getattr(model, field)
            if study.train and field in study.train.model_fields_set and written != own:
                yield (
                    f"train.{field}: {written!r}, but {own!r} of models.{name}.{field} replaces it;"
                    f" delete this setting, and give models.{name}.{field} if it is to differ"
                )
        for role in ("aligned", "unaligned"):
            reference = getattr(model, role)
            if reference is not None and reference.tuned is not None:
                yield from _unused_of_tuned(reference.tuned, f"models.{name}.{role}.tuned")
    varied = any("data.mix_share" in study.axes_of(name) for name in study.models)
    data = study.data
    if data is not None and data.mix is not None and data.settings.mix_share == 0 and not varied:
        yield _without_share("data")
    for name, judge in study.judges.items():
        place = "endpoint" if judge.settings.endpoint else judge.settings.template
        facts = JUDGES[judge.settings.template]
        lengths = {"max_new_tokens": facts.new_tokens, "max_tokens": facts.max_tokens}
        for field in _changed(judge.settings, UNUSED_BY_JUDGE.get(place, ()), lengths):
            yield f"judges.{name}.settings.{field}: a judge of this kind ({place}) ignores it"


def _unused_of_tuned(tuned: Tuned, where: str) -> Iterator[str]:
    for field in _changed(tuned.train, LORA_ONLY):
        yield f"{where}.train.{field}: only method 'lora' has it, and a tuned model is 'full'"
    if tuned.data.mix is not None and tuned.data.settings.mix_share == 0:
        yield _without_share(f"{where}.data")


def _without_share(where: str) -> str:
    return (
        f"{where}.mix: `mix_share` is 0, so no row of this set is used; "
        f"give {where}.settings.mix_share"
    )


def _changed(
    spec: Spec, fields: Iterable[str], own: Mapping[str, object] = MappingProxyType({})
) -> Iterator[str]:
    """Those of `fields` that do not have their defaults: as_yaml writes defaults too. `own` are
    defaults that depend on other settings.
    """
    defaults = {name: field.default for name, field in type(spec).model_fields.items()} | dict(own)
    return (name for name in fields if getattr(spec, name) != defaults[name])


def read_profile(path: Path) -> Profile:
    """The cluster profile in a YAML file; all defaults when the file does not exist."""
    there = path.exists() or path.is_symlink()
    return _read(path, Profile, "a valid cluster profile") if there else Profile()


def _read(
    path: Path, model: type[M], what: str, text: str | None = None, named: Path | None = None
) -> M:
    named = named or path
    written = text_of(path) if text is None else text
    raw = _raw(named, written)
    if not isinstance(raw, dict):
        raise StudyError(f"{named} must be a mapping with the keys {sorted(model.model_fields)}")
    folder = path.resolve().parent
    return checked(model, _tuples(raw), f"{named} is not {what}", folder, written)


def checked(
    model: type[M],
    raw: object,
    fault: str,
    folder: Path | None = None,
    written: str = "",
) -> M:
    """The model of raw values. Raises StudyError that begins with `fault` and names each field,
    with its line in the YAML `written`, if any.
    """
    try:
        return model.model_validate(raw, context={"folder": folder})
    except ValidationError as error:
        lines = faults(error, model, raw, lines_of(written))
        raise StudyError(f"{fault}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _raw(path: Path, text: str | None = None) -> Any:
    return values_in(text_of(path) if text is None else text, path)


def _tuples(value: Any) -> Any:
    # Frozen models accept tuples only.
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {
            str(key) if isinstance(key, int | float) else key: _tuples(item)
            for key, item in value.items()
        }
    return value


def as_yaml(study: Study) -> str:
    """A study as the text of a study file, with every setting that is used, so that a later change
    of a default does not change it.
    """
    dump = study.model_dump(mode="json")
    for settings in (dump["data"] and dump["data"]["settings"], dump["train"]):
        if settings:
            del settings["seed"]
    for field in ("quantisation", "dtype") if dump["train"] else ():
        if any(getattr(model, field) != dump["train"][field] for model in study.models.values()):
            del dump["train"][field]
    points = {
        name: dump["search"][name] for name in ("first", "list")
    }  # null is a value of an axis here
    written = {**_without_nulls(dump), "search": {**_without_nulls(dump["search"]), **points}}
    return yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=120)


def _without_nulls(value: Any) -> Any:
    """The value without its null fields."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def with_absolute_paths(study: Study, file: Path) -> Study:
    """The study of a file, with each relative path of its content written from the root."""
    folder = file.resolve().parent

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(absolute(item) for item in value)
        if not isinstance(value, dict):
            return value
        found = {key: absolute(item) for key, item in value.items()}
        if set(value) == set(Local.model_fields) and value["package"] is None:
            found["path"] = str(folder / Path(value["path"]).expanduser())
        return found

    return Study.model_validate(absolute(study.model_dump(mode="json")))


def with_name(text: str, name: str) -> str:
    """The YAML text of a study with another name; comments and order stay."""
    root = nodes_in(text)
    (value,) = (value for key, value in root.value if key.value == "study")
    plain = yaml.safe_load(name) == name  # 1e5 and `on` are other values without quotes
    return (
        f"{text[: value.start_mark.index]}{name if plain else json.dumps(name)}"
        f"{text[value.end_mark.index :]}"
    )


def differences_but_pins(first: Path, second: Path) -> list[str]:
    """What two study files say differently, a line each; pins do not count."""
    return list(differences(*(_without_pins(_raw(path)) for path in (first, second))))


def _without_pins(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_pins(v) for k, v in value.items() if k not in ("sha256", "commit")}
    return [_without_pins(item) for item in value] if isinstance(value, list) else value


def with_pins(text: str, pins: Mapping[str, Mapping[str, str]]) -> str:
    """The YAML text with `pins` added: path of a reference (`models.7b.base.hub`) -> field ->
    value.

    Edits the text in place, so comments, order and anchors stay. A reference through an alias is
    written once, at its anchor.
    """
    edits: dict[int, tuple[int, str]] = {}
    for where, fields in pins.items():
        node = _node_at(nodes_in(text), where)
        present = {key.value: value for key, value in node.value}
        missing = {name: value for name, value in fields.items() if name not in present}
        for name, value in fields.items():
            if name in present:
                edits[present[name].start_mark.index] = (
                    present[name].end_mark.index,
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
        # A model's name may contain dots, so try the longest key first.
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
