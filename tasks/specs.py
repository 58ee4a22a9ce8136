"""The typed parameters of the stage kinds: all that can change a stage's output, and nothing else.
They are in one file as code below a kind's own reads them: memory is predicted from a TrainSpec.

A Spec is hashed whole, defaults included, so a field added here re-keys its kind: raise VERSION
when the meaning of a kind changes, and say "re-keys: KIND" in the change log. What does not change
the output (devices, micro-batch, world size, ZeRO stage) lives in `ebbline.tasks.stage.Context`.
"""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _number_from_yaml(value: object) -> object:
    # YAML 1.1 reads 1e-4 (no dot) as text. The declared type decides, so only here, and only for
    # text that is a number.
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


Number = Annotated[float, BeforeValidator(_number_from_yaml), Field(allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
Positive = Annotated[Number, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]

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
JudgeTemplate = Literal["harmbench", "llama-guard", "yes-no", "classifier"]
Quantisation = Literal["none", "int8", "nf4"]
Dtype = Literal["float32", "bfloat16"]


class Frozen(BaseModel):
    """Strict and immutable: an unknown key, a wrong type or a value out of range is an error with
    its path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Spec(Frozen):
    """One stage kind's parameters. A kind's other class constants name the files and folders it
    writes.
    """

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1


class LanguageSpec(Spec):
    """The invented language's data files. No inputs."""

    KIND: ClassVar[str] = "language"
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
    """The first `size` rows of a pool in the order that `seed` gives, a share of them from a second
    set. Nested in `size`.

    Inputs: pool, and mix when mix_share > 0.
    """

    KIND: ClassVar[str] = "data"
    ROWS: ClassVar[str] = "data.jsonl"
    size: Count
    seed: Seed = 0
    mix_share: Share = 0.0


class TrainSpec(Spec):
    """One fine-tuning: a LoRA adapter, or all weights. `steps`, when given, is its length in place
    of epochs.

    Inputs: model, data.
    """

    KIND: ClassVar[str] = "train"
    ADAPTER: ClassVar[str] = "adapter"
    MODEL: ClassVar[str] = "model"
    CURVE: ClassVar[str] = "curve.csv"
    method: Literal["lora", "full"] = "lora"
    rank: Count = 8
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
    learning_rate: Positive = 2e-4
    weight_decay: Annotated[Number, Field(ge=0.0)] = 0.0
    warmup_share: Share = 0.05
    gradient_norm: Positive = 1.0
    epochs: Positive = 1.0
    steps: Count | None = None
    global_batch: Count = 16
    max_tokens: Count = 512
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


class SubspaceSpec(Spec):
    """The exact projector's basis of every target module, holding `energy` of ||aligned -
    base||_F^2. Inputs: base, aligned.
    """

    KIND: ClassVar[str] = "subspace"
    INDEX: ClassVar[str] = "subspace.json"
    energy: Annotated[Number, Field(gt=0.0, lt=1.0)]
    target_modules: tuple[str, ...]


class ProjectSpec(Spec):
    """Safe LoRA's C.B and cosine for every module, before any threshold.

    Inputs: adapter; base and aligned for the approximate projector, subspace for the exact one.
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
                "the exact projector needs `energy` (the share of V's energy its columns "
                "keep, e.g. 0.9), the approximate one has none"
            )
        return self


class ApplySpec(Spec):
    """Which modules take C.B: those with cosine <= threshold, or the n lowest; neither leaves the
    adapter as it is.

    Inputs: adapter, projection.
    """

    KIND: ClassVar[str] = "apply"
    CHOSEN: ClassVar[str] = "projected_modules.json"
    threshold: Annotated[Number, Field(ge=-1.0, le=1.0)] | None = None
    modules: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.threshold is not None and self.modules is not None:
            raise ValueError("give `threshold` or `modules`, not both")
        return self


class Block(Frozen):
    """Rows `index` x `size` onwards of a set, in a random order that is the same for every
    model.
    """

    index: Annotated[int, Field(ge=0)]
    size: Count


class GenerateSpec(Spec):
    """Greedy completions of a prompt set, one a prompt. Inputs: model, prompts, and adapter if
    there is one.

    `label` keeps the rows of a set that are so labelled (XSTest has both); a set without labels is
    kept whole. With `needs_answer` a row without a reference answer is an error now, not after the
    generation. The backend is identity: its kernels round otherwise.
    """

    KIND: ClassVar[str] = "generate"
    COMPLETIONS: ClassVar[str] = "completions.sensitive.jsonl"
    PROMPTS: ClassVar[str] = "prompts.json"
    format: PromptFormat = "auto"
    label: Literal["harmful", "harmless"] | None = None
    needs_answer: bool = False
    limit: Count | None = None
    block: Block | None = None
    max_new_tokens: Count = 64
    max_tokens: Count = 2048
    quantisation: Quantisation = "none"
    dtype: Dtype = "bfloat16"
    backend: Literal["transformers", "vllm"] = "transformers"

    @model_validator(mode="after")
    def _vllm_has_its_own_quantisation(self) -> Self:
        if self.backend == "vllm" and self.quantisation == "int8":
            raise ValueError(
                "the backend vllm loads bitsandbytes weights as nf4 only; measure int8 "
                "with transformers"
            )
        return self


class JudgeSpec(Spec):
    """What a judge says of each completion. Inputs: generation, and model unless the judge is an
    endpoint.

    `endpoint` is the URL of an OpenAI-compatible API and `model` what it calls the judge there;
    both are identity, but what an endpoint answers may change without notice. `refused` is the
    label of a classifier that means a refusal.
    """

    KIND: ClassVar[str] = "judge"
    VERDICTS: ClassVar[str] = "verdicts.jsonl"
    template: JudgeTemplate
    refused: str | None = None
    endpoint: str | None = None
    model: str | None = None
    max_new_tokens: Count = 16
    max_tokens: Count = 2048
    quantisation: Quantisation = "none"
    dtype: Dtype = "bfloat16"

    @model_validator(mode="after")
    def _an_endpoint_names_its_model(self) -> Self:
        if (self.endpoint is None) != (self.model is None):
            raise ValueError(
                "give `endpoint` and `model` together: the URL, and what the endpoint "
                "calls the judge"
            )
        if (self.template == "classifier") != (self.refused is not None):
            raise ValueError(
                "`refused` names the label that means a refusal; the template 'classifier' "
                "needs it, and no other has it"
            )
        if self.template == "classifier" and self.endpoint is not None:
            raise ValueError("a classifier has no endpoint; give its model")
        return self


class ScoreSpec(Spec):
    """A verdict on each completion, and the metrics over them. Inputs: generation, and `judge_NAME`
    for each judge among the scorers.

    `scorer` gives the metric; those in `also` score the same completions beside it, and agreement
    says how far they concur.
    """

    KIND: ClassVar[str] = "score"
    AGREEMENT: ClassVar[str] = "agreement.json"
    measure: Literal["refusal", "over_refusal", "task"]
    scorer: str
    also: tuple[str, ...] = ()


class EvaluateSpec(Spec):
    """An lm-eval task on one model, with an adapter or without. Inputs: model, prompts (the task's
    data), and adapter if there is one.
    """

    KIND: ClassVar[str] = "evaluate"
    VERSION: ClassVar[int] = 2
    task: str
    shots: Annotated[int, Field(ge=0)] = 0
    chat_template: bool = False
    limit: Count | None = None
    quantisation: Quantisation = "none"
    dtype: Dtype = "bfloat16"
