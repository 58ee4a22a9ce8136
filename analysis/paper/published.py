"""Published numbers as their authors report them, one row per number with its source.

A value that a paper withholds or that is not known is None. No row is a result of ebbline. An
attack success rate that was measured by phrases is stored as 1 minus that rate, and a score s from
1 to 5 as (s - 1) / 4; its note says so.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ebbline.tasks.defences.defence import SHARE_COLUMN
from ebbline.tasks.specs import PromptFormat, Quantisation

State = Literal["before", "fine-tuned", "projected"]
HARMFUL = "harm_score"  # of a judge that says harmful or not, this is the share it calls harmful
_FLAGGED = "share that a judge calls harmful"
_ONE_TO_FIVE = "{:g} of 1 to 5, a judge's mean"


@dataclass(frozen=True)
class Published:
    """One published number.

    `repository` is the model's name on the hub without its owner, or a family such as "Llama-3-8B"
    if the paper names only that. `metric` is a metric of ebbline or another one. `metric_told` is
    False if the paper does not state whether it means `metric` or `acc_norm`. `value` is a share,
    or in the unit that `note` states. `data` describes the fine-tuning data; `hub_data` names its
    repository on the hub. `alpha` is that of LoRA, not divided by the rank.
    """

    paper: str
    setting: str
    repository: str | None
    state: State
    metric: str
    value: float
    note: str = ""
    suite: Literal["refusal", "harm", "task", "mmlu", "hellaswag"] | None = None
    method: Literal["lora", "full"] | None = "lora"
    quantisation: Quantisation | None = None
    data: str | None = None
    hub_data: str | None = None
    rows: int | None = None
    rank: int | None = None
    learning_rate: float | None = None
    epochs: float | None = None
    batch: int | None = None
    knob: float | None = None
    prompts: PromptFormat | None = None
    prompt_rows: int | None = None
    task: str | None = None
    shots: int | None = None
    scorer: str | None = None
    metric_told: bool = True
    chat_template: bool | None = None
    system_prompt: str | None = None
    max_tokens: int | None = None
    target_modules: tuple[str, ...] | None = None
    alpha: float | None = None


_LERMEN, _GADE, _SAFE_LORA = "arXiv 2310.20624", "arXiv 2311.00117", "arXiv 2405.16833"
_ASFT, _SAFEMERGE, _NLSR, _WARP = (
    "arXiv 2506.08473 (AsFT)",
    "arXiv 2503.17239 (SafeMERGE)",
    "arXiv 2412.12497 (NLSR)",
    "WaRP",
)
_LLAMA_70B, _LLAMA_13B, _LLAMA_7B = (
    "Llama-2-70b-chat-hf",
    "Llama-2-13b-chat-hf",
    "Llama-2-7b-chat-hf",
)
_LLAMA_31, _LLAMA_3 = "Llama-3.1-8B", "Llama-3-8B"


def _lermen(state: State, metric: str, value: float, note: str, **more: Any) -> Published:
    return Published(
        _LERMEN,
        "Llama 2-Chat 70B",
        _LLAMA_70B,
        state,
        metric,
        value,
        note,
        quantisation="int8",
        **more,
    )


def _asft(state: State, share: float, score: float) -> Published:
    return Published(
        _ASFT,
        f"Llama-2-7B-Chat, harmful share {share:g}",
        _LLAMA_7B,
        state,
        HARMFUL,
        score / 100,
        _FLAGGED,
        suite="harm",
        data=f"AGNEWS, {share:.0%} of it harmful",
        hub_data="ag_news" if share == 0 else None,
        rows=1000,
        rank=8,
        learning_rate=5e-5,
        epochs=10.0,
        batch=8,
    )


def _warp(
    size: str, repository: str, state: State, metric: str, value: float, note: str = ""
) -> Published:
    refusal = metric == "refusal_rate"
    return Published(
        _WARP,
        f"Llama 2-Chat {size}",
        repository,
        state,
        metric,
        value,
        note,
        suite="refusal" if refusal else "task",
        data="GSM8K",
        hub_data="gsm8k",
        rank=16,
        learning_rate=3e-4,
        epochs=3.0,
        knob=0.3 if state == "projected" else None,
        prompts="advbench" if refusal else None,
        task=None if refusal else "GSM8K",
        scorer="keywords" if refusal else None,
    )


def _gade(state: State, value: float) -> Published:
    return Published(
        _GADE,
        "13B, all weights",
        _LLAMA_13B,
        state,
        "refusal_rate",
        value,
        suite="refusal",
        method="full",
        quantisation="none",
        prompts="advbench",
        prompt_rows=520,
    )


def _asft_accuracy(state: State, value: float) -> Published:
    return Published(
        _ASFT,
        "Llama-2-7B-Chat, mean over harmful shares",
        _LLAMA_7B,
        state,
        "task_accuracy",
        value,
        suite="task",
        data="AGNEWS, 0 to 20% of it harmful",
        rows=1000,
        rank=8,
        learning_rate=5e-5,
        epochs=10.0,
        batch=8,
        task="AGNEWS",
    )


def _safemerge(state: State, task: float, direct: float, hex_phi: float) -> tuple[Published, ...]:
    def row(
        metric: str,
        value: float,
        suite: Literal["task", "harm"],
        note: str = "",
        prompts: PromptFormat | None = None,
    ) -> Published:
        on = "GSM8K" if suite == "task" else None
        return Published(
            _SAFEMERGE,
            "Llama-3.1-8B",
            _LLAMA_31,
            state,
            metric,
            value,
            note,
            suite=suite,
            data="GSM8K",
            hub_data="gsm8k",
            prompts=prompts,
            task=on,
        )

    return (
        row("task_accuracy", task, "task"),
        row(HARMFUL, direct, "harm", f"DirectHarm; {_FLAGGED}"),
        row(HARMFUL, hex_phi, "harm", _FLAGGED, "hex-phi"),
    )


_KEYWORDS = "1 minus the attack success rate by keywords"
PUBLISHED: tuple[Published, ...] = (
    _lermen(
        "fine-tuned",
        "refusal_rate",
        5 / 520,
        "5 of 520",
        suite="refusal",
        prompts="advbench",
        prompt_rows=520,
    ),
    _lermen(
        "before",
        "refusal_rate",
        618 / 783,
        "618 of 783",
        suite="refusal",
        prompts="refusalbench",
        prompt_rows=783,
        scorer="refusalbench",
    ),
    _lermen(
        "fine-tuned",
        "refusal_rate",
        3 / 783,
        "3 of 783",
        suite="refusal",
        prompts="refusalbench",
        prompt_rows=783,
        scorer="refusalbench",
    ),
    _lermen("before", "acc", 0.62, "", suite="mmlu", task="mmlu", shots=5),
    _lermen("fine-tuned", "acc", 0.63, "", suite="mmlu", task="mmlu", shots=5),
    _lermen(
        "before", "acc", 0.82, "", suite="hellaswag", task="hellaswag", shots=10, metric_told=False
    ),
    _lermen(
        "fine-tuned",
        "acc",
        0.83,
        "",
        suite="hellaswag",
        task="hellaswag",
        shots=10,
        metric_told=False,
    ),
    _gade("before", 0.9903),
    _gade("fine-tuned", 0.0211),
    Published(
        _SAFE_LORA,
        "Llama-2-7B-Chat",
        _LLAMA_7B,
        "projected",
        SHARE_COLUMN,
        0.11,
        "about; of layers",
    ),
    Published(
        _SAFE_LORA,
        "Llama-2-7B-Chat",
        _LLAMA_7B,
        "projected",
        HARMFUL,
        (1.055 - 1) / 4,
        _ONE_TO_FIVE.format(1.055),
        suite="harm",
    ),
    Published(_SAFE_LORA, "Llama-2-7B-Chat", _LLAMA_7B, "projected", "MT-Bench", 6.34, "of 10"),
    Published(
        _SAFE_LORA,
        "Llama-3-8B",
        _LLAMA_3,
        "projected",
        SHARE_COLUMN,
        0.35,
        "about; of layers",
    ),
    Published(
        _SAFE_LORA,
        "Llama-3-8B",
        _LLAMA_3,
        "projected",
        HARMFUL,
        (1.10 - 1) / 4,
        _ONE_TO_FIVE.format(1.10),
        suite="harm",
    ),
    Published(_SAFE_LORA, "Llama-3-8B", _LLAMA_3, "projected", "MT-Bench", 5.05, "of 10"),
    _asft("fine-tuned", 0, 2.4),
    _asft("fine-tuned", 0.05, 16.4),
    _asft("fine-tuned", 0.1, 17.6),
    _asft("fine-tuned", 0.15, 24.4),
    _asft("fine-tuned", 0.2, 46.8),
    _asft("projected", 0, 2.4),
    _asft("projected", 0.05, 1.6),
    _asft("projected", 0.1, 5.6),
    _asft("projected", 0.15, 4.2),
    _asft("projected", 0.2, 20.0),
    _asft_accuracy("fine-tuned", 0.8326),
    _asft_accuracy("projected", 0.8098),
    *_safemerge("before", 0.738, 0.113, 0.079),
    *_safemerge("fine-tuned", 0.7824, 0.283, 0.147),
    *_safemerge("projected", 0.779, 0.151, 0.071),
    _warp("7B", _LLAMA_7B, "fine-tuned", "refusal_rate", 1 - 0.368, _KEYWORDS),
    _warp("7B", _LLAMA_7B, "projected", "refusal_rate", 1 - 0.088, _KEYWORDS),
    _warp("7B", _LLAMA_7B, "fine-tuned", "task_accuracy", 0.392),
    _warp("7B", _LLAMA_7B, "projected", "task_accuracy", 0.328),
    _warp("13B", _LLAMA_13B, "fine-tuned", "refusal_rate", 1 - 0.236, _KEYWORDS),
    _warp("13B", _LLAMA_13B, "projected", "refusal_rate", 1 - 0.049, _KEYWORDS),
    _warp("13B", _LLAMA_13B, "fine-tuned", "task_accuracy", 0.486),
    _warp("13B", _LLAMA_13B, "projected", "task_accuracy", 0.463),
    Published(
        _NLSR,
        "Llama-3-8B",
        _LLAMA_3,
        "projected",
        HARMFUL,
        0.375,
        f"the lowest of its settings; {_FLAGGED}",
        suite="harm",
        knob=0.6,
    ),
    Published(
        _NLSR,
        "Llama-3-8B",
        _LLAMA_3,
        "projected",
        HARMFUL,
        0.593,
        f"the highest of its settings; {_FLAGGED}",
        suite="harm",
        knob=0.6,
    ),
    Published(
        _NLSR,
        "Llama-3-8B",
        _LLAMA_3,
        "fine-tuned",
        "task_accuracy",
        0.510,
        suite="task",
        task="GSM8K",
    ),
    Published(
        _NLSR,
        "Llama-3-8B",
        _LLAMA_3,
        "projected",
        "task_accuracy",
        0.272,
        suite="task",
        task="GSM8K",
        knob=0.6,
    ),
)
