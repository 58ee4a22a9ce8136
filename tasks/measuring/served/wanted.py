"""What a server must be to measure a model, and which adapters it reads as PEFT does."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.version import InvalidVersion, Version

from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.files import CONFIG, read_json
from ebbline.tasks.models.adapter_file import (
    REBUILDS_BASE,
    Adapter,
    AdapterFile,
    read_adapter_file,
)
from ebbline.tasks.models.brought.fitted import fitted
from ebbline.tasks.models.weights import is_embedding_or_head, require_model_folder
from ebbline.tasks.specs import TRANSFORMERS, Dtype, EvaluateSpec, GenerateSpec, Quantisation

TOKENS = 2048  # of the longest prompt with its completion, at least
# The ranks that vLLM makes room for; an adapter takes the next larger one
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
READS_PATTERNS = "0.32"  # ranks and alphas of single modules; read in its source


@dataclass(frozen=True)
class Wanted:
    """What a server must be: the backend, the model and how it is loaded. `tokens` is the longest
    prompt with its completion, and `rows` are decoded at once. There are `adapters` adapters, of
    at most this `rank`, on the layers with these last `names`.
    """

    backend: str
    model: Path
    quantisation: Quantisation
    dtype: Dtype
    rows: int
    tokens: int
    adapters: int = 0
    rank: int = 0
    names: frozenset[str] = frozenset()

    @staticmethod
    def by(
        spec: GenerateSpec | EvaluateSpec, model: Path, tokens: int, adapters: Iterable[Path]
    ) -> "Wanted":
        """What a Spec asks for, with room for some more tokens than these. Raises ModelError for an
        adapter that a server would read otherwise than PEFT.
        """
        room = max(tokens, TOKENS)
        read = [require_served(spec.backend, adapter, model) for adapter in adapters]
        return Wanted(
            spec.backend,
            model,
            spec.quantisation,
            spec.dtype,
            spec.batch_size,
            min(room, longest(model) or room),
            len(read),
            max((rank for rank, _ in read), default=0),
            frozenset().union(*(names for _, names in read)),
        )

    @property
    def loaded(self) -> tuple[object, ...]:
        """What a running server cannot change."""
        return self.backend, self.model, self.quantisation, self.dtype, self.rows

    def fits_in(self, started: "Wanted") -> bool:
        """Whether a server that was started for `started` can measure this. vLLM silently leaves
        out the layers of an adapter whose names it was not started with.
        """
        return (
            started.tokens >= self.tokens
            and started.rank >= self.rank
            and started.names >= self.names
        )

    def and_also(self, other: "Wanted") -> "Wanted":
        """What can measure both, if one server can load both."""
        if self.loaded != other.loaded:
            return self
        return replace(
            self,
            tokens=max(self.tokens, other.tokens),
            adapters=max(self.adapters, other.adapters),
            rank=max(self.rank, other.rank),
            names=self.names | other.names,
        )

    def with_room_for(self, adapters: Iterable[Path]) -> "Wanted":
        """This, for adapters that come later too. One that a server cannot read gets no room: it is
        an error of its own when its turn comes.
        """
        found = self
        for adapter in adapters:
            with suppress(ModelError):
                rank, names = require_served(self.backend, adapter, self.model)
                found = found.and_also(replace(self, rank=rank, names=names))
        return found


def longest(model: Path) -> int | None:
    """The most tokens that the model is made for; None if its config.json does not say so."""
    config = read_json(model / CONFIG)
    text = config.get("text_config")
    found = {**config, **(text if isinstance(text, dict) else {})}.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def require_served(backend: str, adapter: Path, model: Path) -> tuple[int, frozenset[str]]:
    """(the rank that a server needs for an adapter, the last names of its layers).

    Raises ModelError for an adapter that does not fit the model, or that the server would read
    otherwise than PEFT: it takes plain LoRA under the model's own names.
    """
    file = read_adapter_file(adapter)
    other = _read_otherwise(backend, file)
    if not other:
        plain = fitted(file, require_model_folder(model))
        other = _not_in_layers(file, plain)
    if other:
        raise ModelError(
            f"a server does not read all of the adapter {adapter} ({other}); measure it with the "
            f"backend {TRANSFORMERS}"
        )
    rank = max(plain.tensors[lora.lora_A].shape[0] for lora in plain.modules.values())
    names = frozenset(layer.rpartition(".")[2] for layer in plain.modules)
    return next(room for room in RANKS if room >= rank), names


def _read_otherwise(backend: str, file: AdapterFile) -> str:
    """A setting that a server would not read as PEFT does; empty if there is none."""
    if file.config.get("use_dora") or file.start in REBUILDS_BASE:
        return "it is no plain LoRA"
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if file.config.get(key)]
    if patterns and not _reads_patterns(backend):
        return f"`{patterns[0]}`, which only vLLM {READS_PATTERNS} and later are known to read"
    return ""


def _reads_patterns(backend: str) -> bool:
    name, _, version = backend.partition("==")
    try:
        return name == "vllm" and Version(version) >= Version(READS_PATTERNS)
    except InvalidVersion:  # of a build of somebody's own
        return False


def _not_in_layers(file: AdapterFile, plain: Adapter) -> str:
    """What an adapter holds beside A and B of layers that a server adapts; empty if nothing."""
    if any(is_embedding_or_head(layer) for layer in plain.modules):
        return "an adapted embedding or head"
    if plain.carried or plain.tensors.keys() != file.tensors.keys():
        return "names of another model class, or copies of embeddings"
    rank = max(plain.tensors[lora.lora_A].shape[0] for lora in plain.modules.values())
    return f"a rank above {RANKS[-1]}" if rank > RANKS[-1] else ""
