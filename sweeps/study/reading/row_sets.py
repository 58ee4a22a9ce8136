"""The sets of rows that a study names, and what is in those on this machine.

Reading a set here finds every fault that a stage would find in it without a model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ebbline.sweeps.study.axes import Range
from ebbline.sweeps.study.reading.field_faults import unknown
from ebbline.sweeps.study.references import Data, DataRef, Hub
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import MultipleChoiceSuite, Suite, prompts_of, whole
from ebbline.tasks.data.conversations import read_conversations
from ebbline.tasks.data.formats.chats import chat_format, columns_read
from ebbline.tasks.data.formats.folders import read_set
from ebbline.tasks.data.rows import LANGUAGE_ROWS, LANGUAGE_TASKS
from ebbline.tasks.errors import DataError
from ebbline.tasks.specs import Split

PRETRAINING = "pretrain.jsonl"
_FILES = {*LANGUAGE_ROWS, PRETRAINING}


@dataclass(frozen=True)
class RowFacts:
    """What a set holds: all its `rows`, and how many of them are `used`. `fields` are the columns
    that are read. `repeats` rows have the prompt of an earlier row.
    """

    rows: int
    used: int
    format: str
    fields: tuple[str, ...]
    repeats: int = 0


@dataclass(frozen=True)
class RowSet:
    """A set and its place in the study file. Training data has no `measure`; `split` is the side of
    it that is asked.

    `needed` is the number of conversations that the largest training takes from the set, in an
    order for each of `seeds`. The data of a tuned model has its `model` and `max_tokens`.
    """

    where: str
    reference: DataRef
    measure: Suite | None = None
    split: Split | None = None
    needed: int = 0
    seeds: tuple[int, ...] = ()
    model: str = ""
    max_tokens: int = 0

    def require_in_language(self) -> None:
        """Raise DataError for a file or a task that the invented language does not have."""
        name, suite = self.reference.language, self.measure
        if name is None:
            return
        if name not in _FILES:
            raise DataError(f"the invented language has no such file: {unknown(name, _FILES)}")
        if isinstance(suite, MultipleChoiceSuite) and LANGUAGE_TASKS.get(name) != suite.task:
            tasks = f"the task {LANGUAGE_TASKS[name]!r}" if name in LANGUAGE_TASKS else "no task"
            raise DataError(f"`measure.task` is {suite.task!r}, and {name} has {tasks}")

    def require_enough(self, facts: RowFacts, path: Path) -> None:
        """Raise DataError for fewer conversations than a training takes."""
        if facts.rows < self.needed:
            raise DataError(
                f"{path} holds {facts.rows} conversations, and data.size asks for {self.needed} of "
                "them; lower data.size or add data"
            )

    def read(self, path: Path) -> RowFacts:
        """What is in the set. Raises DataError or EvaluationError for a fault that a stage would
        find.
        """
        if self.measure is None:
            rows = len(read_conversations(path))
            return RowFacts(rows, min(rows, self.needed), *_training_format(path))
        if isinstance(self.measure, MultipleChoiceSuite):
            return RowFacts(0, 0, "lm-eval", ())  # its tasks are read where lm-eval is imported
        found = prompts_of(self.measure, path, self.split)
        columns = ("category", "label", "answer")
        held = [name for name in columns if any(getattr(each, name) for each in found.prompts)]
        columns_read = ("prompt", *held)
        return RowFacts(
            found.rows, len(found.prompts), found.format, columns_read, len(found.repeats)
        )


def row_sets(study: Study) -> Iterator[RowSet]:
    """Every set that the study names, training data first."""
    if study.data is not None:
        sizes, shares = (
            _values(study, study.data, axis) for axis in ("data.size", "data.mix_share")
        )
        for each in _of_data("data", study.data, sizes, shares):
            yield replace(each, seeds=study.seeds)
    for name, model in study.models.items():
        for role, reference in (("aligned", model.aligned), ("unaligned", model.unaligned)):
            if reference is not None and reference.tuned is not None:
                data, most = reference.tuned.data, reference.tuned.train.max_tokens
                own = {data.settings.size}, {data.settings.mix_share}
                for each in _of_data(f"models.{name}.{role}.tuned.data", data, *own):
                    seeds = (data.settings.seed,)
                    yield replace(each, seeds=seeds, model=name, max_tokens=most)
    for name, entry in study.suites.items():
        where, split = f"suites.{name}.prompts", study.split_of(name)
        yield RowSet(where, entry.prompts, entry.measure, split)
    for name, fresh in () if study.confirm is None else study.confirm.suites.items():
        entry = study.suites[name]
        rows, where = fresh.set_of(entry.prompts), f"confirm.suites.{name}"
        yield RowSet(where, rows, whole(entry.measure), fresh.split)


def located(reference: DataRef) -> Path | None:
    """Where a set is on this machine; None for one that is not here. Raises PinError for a path
    that leads nowhere.
    """
    if reference.path is not None:
        return reference.path.located()
    hub = reference.hub
    return None if hub is None or hub.file is None else _in_cache(hub)


def _in_cache(hub: Hub) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # only studies with hub data need it

    if hub.commit is None or hub.file is None:
        return None
    found = try_to_load_from_cache(hub.id, hub.file, revision=hub.commit, repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


def _of_data(
    where: str, data: Data, sizes: Iterable[float], shares: Iterable[float]
) -> Iterator[RowSet]:
    whole = [int(size) for size in sizes for _ in shares]
    mixed = [int(size * share + 1e-9) for size in sizes for share in shares]
    pool = max(size - mix for size, mix in zip(whole, mixed, strict=True))
    yield RowSet(f"{where}.pool", data.pool, needed=pool)
    if data.mix is not None and max(mixed) > 0:
        yield RowSet(f"{where}.mix", data.mix, needed=max(mixed))


def _values(study: Study, data: Data, axis: str) -> set[float]:
    """The values of a setting of the data over all points: of a range, its edges."""
    fixed = getattr(data.settings, axis.partition(".")[2])
    found: set[float] = set()
    for model in study.models:
        values = study.axes_of(model).get(axis, (fixed,))
        found |= {float(str(v)) for v in (values.edges if isinstance(values, Range) else values)}
    return found


def _training_format(path: Path) -> tuple[str, tuple[str, ...]]:
    """(format, columns) of training data, by the columns of its first row."""
    row = next(iter(read_set(path, "train"))).values
    return chat_format(row).partition(" (")[0], columns_read(row)
