"""What the checks of a study found, as data: for the screen, for scripts, and between processes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ebbline.analysis.results.wording import count_label


@dataclass
class SetFound:
    """A set of rows. `longest` is its longest row in tokens, `limit` the most that a stage
    takes. Both are None if no tokenizer of the study is on this machine. `cut` rows are longer.
    """

    where: str
    path: str
    rows: int
    used: int
    format: str
    fields: list[str]
    longest: int | None = None
    limit: int | None = None
    cut: int = 0


@dataclass
class ModelFound:
    """A model, its size, and how that is known. A size that is not `exact` was not counted."""

    where: str
    path: str
    architecture: str
    parameters: int
    known_from: str
    exact: bool


@dataclass
class TokenLengths:
    """The tokens of a set's rows with one model's tokenizer."""

    where: str
    longest: int
    limit: int
    cut: int = 0


@dataclass
class Found:
    """`faults` stop a run; `notes` do not. Each begins with the field in the study file."""

    sets: list[SetFound] = field(default_factory=list)
    models: list[ModelFound] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, lengths: TokenLengths) -> None:
        """Record a set's lengths. Of several models, that with the longest row counts."""
        for each in self.sets:
            if each.where == lengths.where and lengths.longest >= (each.longest or 0):
                each.longest, each.limit = lengths.longest, lengths.limit
                each.cut = lengths.cut

    def lines(self) -> Iterator[str]:
        """A line for each set and model, then the notes."""
        rows = [(each.where, each.path, _of_set(each)) for each in self.sets]
        rows += [(each.where, each.path, _of_model(each)) for each in self.models]
        wheres = max((len(row[0]) for row in rows), default=0)
        paths = max((len(row[1]) for row in rows), default=0)
        for where, path, text in rows:
            yield f"{where:{wheres}}  {path:{paths}}  {text}"
        for note in self.notes:
            yield f"note: {note}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _of_set(each: SetFound) -> str:
    what = f"{each.rows} rows"
    if each.used != each.rows:
        what += f", {each.used} used"
    fields = f" ({', '.join(each.fields)})" if each.fields else ""
    text = f"{what}; {each.format}{fields}"
    if each.longest is None:
        return text
    text += f"; longest {each.longest} tokens of {each.limit}"
    return text + (f", {each.cut} are cut" if each.cut else "")


def _of_model(each: ModelFound) -> str:
    about = "" if each.exact else "about "
    known = {"a guess": "a guess: neither its files nor its name give its size"}
    return (
        f"{each.architecture}, {about}{count_label(each.parameters)} parameters, by "
        f"{known.get(each.known_from, each.known_from)}"
    )
