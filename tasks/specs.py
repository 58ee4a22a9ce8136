"""The typed settings of each stage kind: everything that can change a stage's output, and nothing
else. They share one file because other code reads them too: memory is predicted from a TrainSpec.

A Spec is hashed whole, defaults included, so a new field re-keys its kind. The exception is a field
with `exclude_if`: it is in a key only where it differs from its default, which must never change.
Raise VERSION when the meaning of a kind changes, and write "re-keys: KIND" in the change log.
Settings that do not change the output (device, micro-batch, world size, ZeRO stage) are in
`ebbline.tasks.stage.Context`.
"""

import re
from datetime import date
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from ebbline.tasks.judges.facts import JUDGES, JudgeTemplate, facts_of

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _number_from_yaml(value: object) -> object:
    # YAML 1.1 reads 1e-4 (no dot) as text. Only fields declared as numbers convert it.
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


Number = Annotated[float, BeforeValidator(_number_from_yaml), Field(allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Positive = Annotated[Number, Field(gt=0.0)]
One = Annotated[Number, Field(ge=1.0, le=1.0)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Rank = Annotated[int, Field(ge=1, le=100_000)]
BatchRows = Annotated[int, Field(ge=1, le=1_000_000)]
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]
Rate = Annotated[Number, Field(gt=0.0, le=1e30)]  # a larger one soon overflows float32
# Powers of two: kernels that split a batch evenly treat each row alike
BatchSize = Literal[1, 2, 4, 8, 16, 32, 64, 128, 256]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the limit of numpy's seeds

PromptFormat = Literal[
    "auto",
    "plain",
    "advbench",
    "harmbench",
    "strongreject",
    "xstest",
    "sorry-bench",
    "hex-phi",
    "refusalbench",
    "jailbreakbench",
]
TaskScorerName = Literal["exact", "choice", "number", "rouge_l"]
Quantisation = Literal["none", "int8", "nf4"]
Dtype = Literal["float32", "bfloat16"]
# What a training adds to its loss: the part of the update outside of alignment (AsFT), or its norm
PenaltyName = Literal["none", "asft", "norm"]
TRANSFORMERS = "transformers"
SERVED = re.compile(r"[a-z0-9][a-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+_-]*")


def _backend(value: str) -> str:
    if value != TRANSFORMERS and not SERVED.fullmatch(value):
        raise ValueError(
            f"{value!r} must be {TRANSFORMERS}, or a server with its version, such as vllm==0.32.0"
        )
    return value


# What computes completions: this process, or a server (NAME==VERSION). Where the server lies is the
# profile's, and is never hashed.
Backend = Annotated[str, AfterValidator(_backend)]
# Whose tokenizer and chat template a measurement of an adapter uses
TokenizerOf = Literal["model", "adapter"]


class Frozen(BaseModel):
    """Strict and immutable: an unknown key, a wrong type or a value out of range is an error that
    names its path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _iso_date(value: object) -> object:
    # YAML reads an unquoted date as a date. As text it must be a day of the calendar.
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, str):
        date.fromisoformat(value)
    return value


class Chat(Frozen):
    """How conversations are rendered with the model's chat template.

    `date` is the date that the template writes, if it writes one. `template` is the name of one of
    several templates; None is the default one. `text` is a template that replaces the model's own;
    without one it is no part of a key. `thinking` sets the template's switch for thoughts; None
    leaves the template's own default.
    """

    date: Annotated[str, BeforeValidator(_iso_date), Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = (
        "2024-07-26"  # the date that Llama 3.1's template writes by itself
    )
    template: str | None = None
    text: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, exclude_if=lambda text: text is None
    )
    thinking: bool | None = None

    @model_validator(mode="after")
    def _one_template(self) -> Self:
        if self.template is not None and self.text is not None:
            raise ValueError(
                "`template` names a template of the model's own, and `text` replaces them; give one"
            )
        return self


DEFAULT_CHAT = Chat()


class Spec(Frozen):
    """The settings of one stage kind. A kind's other class constants name the files and folders
    that it writes.
    """

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1


class LanguageSpec(Spec):
    """The invented language's data files. No inputs."""

    KIND: ClassVar[str] = "language"
    VERSION: ClassVar[int] = 3
    seed: Seed = 0


class OrganismSpec(Spec):
    """A tiny Llama pretrained on the invented language. Input: language."""

    KIND: ClassVar[str] = "organism"
    MODEL: ClassVar[str] = "model"
    size: Literal["small", "medium", "large"]
    seed: Seed = 0


class ConvertSpec(Spec):
    """A GGUF file turned into an ordinary Hugging Face folder in `dtype`. Input: source."""

    KIND: ClassVar[str] = "convert"
    MODEL: ClassVar[str] = "model"
    dtype: Dtype = "float32"


class DataSpec(Spec):
    """The first `size` rows of a pool in the order that `seed` gives, with a share of rows from a
    second set. A smaller set is the beginning of a larger one.

    Inputs: pool, and mix when mix_share > 0.
    """

    KIND: ClassVar[str] = "data"
    VERSION: ClassVar[int] = 3
    ROWS: ClassVar[str] = "data.jsonl"
    size: Count
    seed: Seed = 0
    mix_share: Share = 0.0


class TrainSpec(Spec):
    """One fine-tuning, of a LoRA adapter or of all weights. `steps`, if given, sets its length
    instead of `epochs`. `dtype` is that of the base, or of the passes; what is trained is float32.

    `penalty` with `penalty_weight` is added to the loss of a step
    (`ebbline.tasks.training.anchoring`). With `ema_decay` d, the result is the exponential moving
    average e <- d e + (1 - d) w of the weights instead of the last ones. Where they are off, they
    are no part of a key.

    Inputs: model, data; and base, aligned for the penalty asft.
    """

    KIND: ClassVar[str] = "train"
    VERSION: ClassVar[int] = 2
    ADAPTER: ClassVar[str] = "adapter"
    MODEL: ClassVar[str] = "model"
    CURVE: ClassVar[str] = "curve.csv"
    method: Literal["lora", "full"] = "lora"
    rank: Rank = 8
    alpha_over_rank: Positive = 2.0
    dropout: Share = 0.0
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    quantisation: Quantisation = "none"
    dtype: Dtype = "bfloat16"
    chat: Chat = DEFAULT_CHAT
    learning_rate: Rate = 2e-4
    weight_decay: Annotated[Number, Field(ge=0.0)] = 0.0
    warmup_share: Share = 0.05
    gradient_norm: Positive = 1.0
    penalty: PenaltyName = Field(default="none", exclude_if=lambda penalty: penalty == "none")
    penalty_weight: Annotated[Number, Field(ge=0.0)] = Field(
        default=1.0, exclude_if=lambda weight: weight == 1.0
    )
    ema_decay: Annotated[Number, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, exclude_if=lambda decay: decay == 0.0
    )
    epochs: Positive = 1.0
    steps: Count | None = None
    global_batch: BatchRows = 16
    max_tokens: Tokens = 512
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs != 1.0:
            raise ValueError(f"give `epochs` ({self.epochs}) or `steps` ({self.steps}), not both")
        return self

    @model_validator(mode="after")
    def _full_weights_are_not_quantised(self) -> Self:
        if self.method == "full" and self.quantisation != "none":
            raise ValueError(
                "method 'full' trains all weights and cannot be quantised to "
                f"{self.quantisation!r}; use 'none'"
            )
        return self

    @model_validator(mode="after")
    def _full_weights_are_not_anchored(self) -> Self:
        if self.method == "full" and (self.penalty != "none" or self.ema_decay):
            raise ValueError(
                "`penalty` and `ema_decay` act on the matrices of an adapter; method 'full' has "
                "none. Leave them out"
            )
        return self

    def length(self, rows: int) -> int:
        """The number of optimiser steps of a training on that many rows."""
        return self.steps or max(1, round(self.epochs * rows / self.global_batch))

    @property
    def penalised(self) -> bool:
        """Whether a penalty acts: a weight of 0 turns it off."""
        return self.penalty != "none" and self.penalty_weight > 0

    @property
    def reads_alignment(self) -> bool:
        """Whether the training reads the two models whose difference is alignment."""
        return self.penalised and self.penalty == "asft"

    def without_idle_settings(self) -> Self:
        """These settings, written in one way only where no penalty acts: equal trainings then have
        equal keys.
        """
        if self.penalised:
            return self
        return self.model_copy(update={"penalty": "none", "penalty_weight": 1.0})


class LoxSpec(Spec):
    """LoX, before a fine-tuning: the aligned model plus `factor` times the `directions` leading
    directions of V = aligned - base. A factor of 0 is off.

    Inputs: model (the aligned one), base.
    """

    KIND: ClassVar[str] = "lox"
    MODEL: ClassVar[str] = "model"
    factor: Annotated[Number, Field(ge=0.0)] = 0.0
    directions: Count = 6


class AdapterSpec(Spec):
    """An adapter that another tool trained, checked against its model. Inputs: source, model.

    `tokenizer: adapter` keeps the tokenizer and chat template beside it. Without a choice, a
    difference between the two tokenizers is an error.
    """

    KIND: ClassVar[str] = "adapter"
    ADAPTER: ClassVar[str] = "adapter"
    tokenizer: TokenizerOf | None = None


class SubspaceSpec(Spec):
    """The exact projector's basis for every target module. It keeps the share `energy` of ||aligned
    - base||_F^2. Inputs: base, aligned.
    """

    KIND: ClassVar[str] = "subspace"
    INDEX: ClassVar[str] = "subspace.json"
    energy: Annotated[Number, Field(gt=0.0, lt=1.0)]
    target_modules: tuple[str, ...]


class ProjectSpec(Spec):
    """Safe LoRA's C.B and cosine for every module, before any threshold.

    Inputs: adapter; base and aligned for the approximate projector, subspace for the exact one.
    With neither, no module has a cosine, and none can be projected.
    """

    KIND: ClassVar[str] = "project"
    VERSION: ClassVar[int] = 2
    PROJECTED: ClassVar[str] = "projected.safetensors"
    COSINES: ClassVar[str] = "cosines.json"
    projector: Literal["approximate", "exact"] = "approximate"
    energy: Annotated[Number, Field(gt=0.0, lt=1.0)] | None = None

    @model_validator(mode="after")
    def _exact_states_its_energy(self) -> Self:
        if (self.projector == "exact") != (self.energy is not None):
            raise ValueError(
                "the exact projector needs `energy` (the share of V's energy that its "
                "columns keep, e.g. 0.9); the approximate one has none"
            )
        return self


class ApplySpec(Spec):
    """Which modules get C.B: those with cosine <= threshold, or the n with the lowest cosines.
    Without either setting the adapter stays as it is.

    Inputs: adapter, projection.
    """

    KIND: ClassVar[str] = "apply"
    CHOSEN: ClassVar[str] = "projected_modules.json"
    threshold: Annotated[Number, Field(ge=-1.0, le=1.0)] | None = None
    modules: Annotated[int, Field(ge=0, le=10**9)] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.threshold is not None and self.modules is not None:
            raise ValueError("give `threshold` or `modules`, not both")
        return self


KnobValue = None | bool | int | float | str


class MeasureSpec(Spec):
    """What a defence keeps of the two models' weights for one adapter, at all its settings.

    `knobs` are the values that the measurement depends on. `draws` is the number of rotated
    projections for the control `random_subspace`. Inputs: adapter, base and aligned; also subspace
    for the exact projector. `ebbline.tasks.defences.methods` has the methods.
    """

    KIND: ClassVar[str] = "measure"
    COSINES: ClassVar[str] = "cosines.json"
    KEPT: ClassVar[str] = "kept.json"
    method: str
    knobs: dict[str, KnobValue] = {}
    draws: Annotated[int, Field(ge=0)] = 0


class DefendSpec(Spec):
    """A defence's adapter at one setting, or one draw of one of its controls at that setting.

    The folder `adapter` has the same bytes for equal adapters, whatever the defence. Inputs:
    adapter; measurement, a stage of the kind `project` or `measure`; safety for a defence that
    merges with a safety adapter.
    """

    KIND: ClassVar[str] = "defend"
    ADAPTER: ClassVar[str] = "adapter"
    EFFECTS: ClassVar[str] = "effects.json"
    CHOSEN: ClassVar[str] = ApplySpec.CHOSEN
    method: str
    knobs: dict[str, KnobValue] = {}
    control: str | None = None
    draw: Annotated[int, Field(ge=0)] | None = None


class Decoding(Frozen):
    """Greedy decoding, setting by setting: the most likely token, of logits that nothing changes,
    until an end token.

    The names are those of transformers. Each has one value: another value would not be greedy. They
    are stated so that none can come from the files of a model.
    """

    do_sample: Literal[False] = False
    num_beams: Literal[1] = 1
    num_return_sequences: Literal[1] = 1
    min_length: Literal[0] = 0
    min_new_tokens: None = None
    max_time: None = None
    stop_strings: None = None
    repetition_penalty: One = 1.0
    no_repeat_ngram_size: Literal[0] = 0
    exponential_decay_length_penalty: None = None
    bad_words_ids: None = None
    sequence_bias: None = None
    suppress_tokens: None = None
    begin_suppress_tokens: None = None
    forced_bos_token_id: None = None
    forced_eos_token_id: None = None
    remove_invalid_values: Literal[False] = False
    renormalize_logits: Literal[False] = False
    token_healing: Literal[False] = False
    guidance_scale: None = None
    watermarking_config: None = None
    prompt_lookup_num_tokens: None = None
    use_mtp: Literal[False] = False
    use_cache: Literal[True] = True
    cache_implementation: Literal["dynamic"] = "dynamic"
    prefill_chunk_size: None = None


def require_servable(backend: str, quantisation: str) -> None:
    """Raise ValueError for a quantisation that a server does not load."""
    if backend != TRANSFORMERS and quantisation == "int8":
        raise ValueError(
            f"the backend {backend} loads weights whole or as nf4; use the backend {TRANSFORMERS} "
            "for int8"
        )


class Block(Frozen):
    """The `size` rows of a set that begin at row `index` x `size`, in a random order that is the
    same for every model.
    """

    index: Annotated[int, Field(ge=0, le=10**9)]
    size: Count


HeldOutShare = Annotated[Number, Field(gt=0.0, lt=1.0)]


class Split(Frozen):
    """One side of a prompt set that is split by its texts: `confirm` is the share `hold_out`, and
    `search` is the rest (`ebbline.tasks.data.splits.held_out`).
    """

    hold_out: HeldOutShare
    side: Literal["search", "confirm"]


class GenerateSpec(Spec):
    """Greedy completions, one for each prompt of a set. Inputs: model, prompts, and optionally
    adapter.

    `label` keeps only the rows with that label (XSTest has both); a set without labels is kept
    whole. `split` keeps one side of the set, before `label` and `limit`; without one it is no part
    of a key. With `needs_answer`, a row without a reference answer is an error before it starts.
    With `compared_by`, so is a reference answer that this task scorer cannot compare with.
    The backend is part of the identity with its version, because its kernels round differently; so
    is `batch_size` (`ebbline.tasks.data.batch_shape`). `tokenizer: adapter` uses the tokenizer and
    chat template beside the adapter.
    """

    KIND: ClassVar[str] = "generate"
    VERSION: ClassVar[int] = 2
    COMPLETIONS: ClassVar[str] = "completions.sensitive.jsonl"
    PROMPTS: ClassVar[str] = "prompts.json"
    DECODING: ClassVar[str] = "decoding.json"
    format: PromptFormat = "auto"
    label: Literal["harmful", "harmless"] | None = None
    split: Split | None = Field(default=None, exclude_if=lambda split: split is None)
    needs_answer: bool = False
    compared_by: TaskScorerName | None = None
    limit: Count | None = None
    block: Block | None = None
    max_new_tokens: Tokens = 64
    max_tokens: Tokens = 2048
    quantisation: Quantisation = "none"
    dtype: Dtype = "bfloat16"
    chat: Chat = DEFAULT_CHAT
    tokenizer: TokenizerOf = "model"
    backend: Backend = TRANSFORMERS
    batch_size: BatchSize = 32
    decoding: Decoding = Decoding()

    @model_validator(mode="after")
    def _a_server_loads_no_int8(self) -> Self:
        require_servable(self.backend, self.quantisation)
        return self


def _endpoint(url: str) -> str:
    """The URL of an endpoint. Raises ValueError for one with a user name, a key or a query: a
    study file, a record and a key would hold it.
    """
    try:
        parts = urlsplit(url)
        host, secret = parts.hostname, bool(parts.username or parts.password or parts.query)
    except ValueError:
        host, secret = None, False
        parts = urlsplit("")
    if secret or "@" in url or "?" in url or "#" in url:
        raise ValueError(
            f"the URL of the judge's endpoint at {host} holds a user name, a password, a key or a "
            "query; write the URL without it, and put the key into EBBLINE_JUDGE_KEY"
        )
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise ValueError(
            f"the judge's endpoint {url!r} is no http(s) URL; give the part before "
            "/chat/completions"
        )
    return url


class JudgeSpec(Spec):
    """A judge's verdict on each completion. Inputs: generation, and model unless the judge is an
    endpoint; optionally adapter, for a judge that is published as one.

    `max_new_tokens` and `max_tokens` are by default those of the judge. `endpoint` is the URL of an
    OpenAI-compatible API and `model` the judge's name there. Both are part of the identity, but an
    endpoint's answers may change without notice. `refused` is the label of a classifier that means
    a refusal.
    """

    KIND: ClassVar[str] = "judge"
    VERSION: ClassVar[int] = 2
    VERDICTS: ClassVar[str] = "verdicts.jsonl"
    template: JudgeTemplate
    refused: str | None = None
    endpoint: Annotated[str, AfterValidator(_endpoint)] | None = None
    model: str | None = None
    max_new_tokens: Tokens = 16
    max_tokens: Tokens = 2048
    quantisation: Quantisation = "none"
    dtype: Dtype = "bfloat16"
    batch_size: BatchSize = 32
    decoding: Decoding = Decoding()
    chat: Chat = DEFAULT_CHAT

    @model_validator(mode="before")
    @classmethod
    def _lengths_of_the_judge(cls, given: Any) -> Any:
        facts = facts_of(given.get("template")) if isinstance(given, dict) else None
        if facts is None:
            return given
        return {"max_new_tokens": facts.new_tokens, "max_tokens": facts.max_tokens, **given}

    @model_validator(mode="after")
    def _an_endpoint_names_its_model(self) -> Self:
        if (self.endpoint is None) != (self.model is None):
            raise ValueError(
                "give `endpoint` and `model` together: the URL, and the judge's name at "
                "that endpoint"
            )
        if (self.template == "classifier") != (self.refused is not None):
            raise ValueError(
                "`refused` names the label that means a refusal; only the template "
                "'classifier' has it, and needs it"
            )
        if self.endpoint is not None and not JUDGES[self.template].at_endpoint:
            raise ValueError(
                f"the judge {self.template!r} is read from probabilities, which an endpoint does "
                "not give; give its model"
            )
        return self


class ScoreSpec(Spec):
    """A verdict on each completion, and the metrics over all verdicts. Inputs: generation, and
    `judge_NAME` for each judge among the scorers.

    `scorer` gives the metric. The scorers in `also` score the same completions, and the agreement
    file compares their verdicts.
    """

    KIND: ClassVar[str] = "score"
    VERSION: ClassVar[int] = 2
    AGREEMENT: ClassVar[str] = "agreement.json"
    measure: Literal["refusal", "over_refusal", "harm", "task"]
    scorer: str
    also: tuple[str, ...] = ()


class EvaluateSpec(Spec):
    """An lm-eval task on one model, with or without an adapter. Inputs: model, prompts (the task's
    data), and optionally adapter. `chat`, `tokenizer` and `backend` are as in GenerateSpec.
    """

    KIND: ClassVar[str] = "evaluate"
    VERSION: ClassVar[int] = 3
    task: str
    shots: Annotated[int, Field(ge=0, le=10_000)] = 0
    chat_template: bool = False
    limit: Count | None = None
    quantisation: Quantisation = "none"
    dtype: Dtype = "bfloat16"
    batch_size: BatchSize = 32
    decoding: Decoding = Decoding()
    chat: Chat = DEFAULT_CHAT
    tokenizer: TokenizerOf = "model"
    backend: Backend = Field(
        default=TRANSFORMERS, exclude_if=lambda backend: backend == TRANSFORMERS
    )

    @model_validator(mode="after")
    def _a_server_loads_no_int8(self) -> Self:
        require_servable(self.backend, self.quantisation)
        return self
