"""The reference to an adapter in a study file."""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from ebbline.sweeps.study.policies import Name
from ebbline.sweeps.study.references import Hub, Local
from ebbline.tasks.identity import digest_files, file_digest
from ebbline.tasks.models.brought.folder import adapter_digest, adapter_files
from ebbline.tasks.specs import Frozen, TokenizerOf


class AdapterFolder(Local):
    """A PEFT adapter's folder on this machine. Its digest covers only the files that are read."""

    def content(self, cache: Path | None = None) -> str:
        return adapter_digest(self.located(), cache)

    def content_now(self) -> str:
        files = adapter_files(self.located())
        return digest_files({name: file_digest(path) for name, path in files.items()})


class AdapterRef(Frozen):
    """An adapter that another tool trained on the aligned model of the size `model`.

    `model` may be left out in a study of one size. `tokenizer` chooses between the tokenizer beside
    the adapter and the model's; it is needed only if these differ.
    """

    model: Name | None = None
    path: AdapterFolder | None = None
    hub: Hub | None = None
    tokenizer: TokenizerOf | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` or `hub`")
        if self.hub is not None and self.hub.file is not None:
            raise ValueError("hub.file: an adapter is a whole repository; leave `file` out")
        return self
