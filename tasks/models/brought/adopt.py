"""The stage `adapter` takes in an adapter that another tool trained. It is checked tensor by tensor
against the model that it is measured on, and written under the names of that model's layers.

Later stages read it as they read an adapter that ebbline trained.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from ebbline.tasks.chat.tokenizers import read_tokenizer, unused_beside
from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ebbline.tasks.models.adapter_file import plain_lora, read_adapter_file
from ebbline.tasks.models.brought.fitted import fitted
from ebbline.tasks.models.brought.folder import TOKENIZER_FILES
from ebbline.tasks.models.weights import Checkpoint
from ebbline.tasks.specs import AdapterSpec, TokenizerOf
from ebbline.tasks.stage import Context

# Tools set a padding token where the model has none. It changes no answer.
_HARMLESS = ("pad token",)


def run(spec: AdapterSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    source, model = inputs["source"], inputs["model"]
    file = read_adapter_file(source)
    plain_lora(file)  # says what another kind of adapter is, before a tensor is looked for
    adapter = fitted(file, Checkpoint(model))
    require_tokenizer(source, model, spec.tokenizer)
    folder = out / spec.ADAPTER
    folder.mkdir()
    save_file(dict(adapter.tensors), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(source / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    for name in TOKENIZER_FILES if spec.tokenizer == "adapter" else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def require_tokenizer(adapter: Path, model: Path, chosen: TokenizerOf | None) -> None:
    """Raise ModelError if the tokenizer beside an adapter renders prompts otherwise than the
    model's, and none is chosen. Also raise it if the chosen one is not there.
    """
    if chosen == "adapter":
        read_tokenizer(model, adapter)
    elif chosen is None:
        found = unused_beside(adapter, model, read_tokenizer(model))
        different = [name for name in found if name not in _HARMLESS]
        if different:
            raise ModelError(
                f"{adapter} holds a tokenizer that differs from the model's in "
                f"{' and '.join(different)}. Add `tokenizer: adapter` to use it, as its training "
                "did, or `tokenizer: model` to use the model's"
            )
