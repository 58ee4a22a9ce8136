"""Generation by vLLM, for a GPU with enough memory: `pip install ebbline[vllm]`, `backend: vllm`.

It returns the same results as ebbline.tasks.measuring.generate. One engine serves all adapters of a
base as LoRA modules, with at most LORAS of them on the GPU at once.

Every sampling parameter is stated, and the engine ignores the model's generation_config
(`generation_config="vllm"`), whose end tokens are passed as stop tokens. Its batch-invariant mode
makes a completion independent of the requests beside it; prefixes are not shared between requests.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebbline.tasks.chat.probes import probe
from ebbline.tasks.chat.template import encode_prompts
from ebbline.tasks.chat.thoughts import completion_text
from ebbline.tasks.data.batches import require_room
from ebbline.tasks.errors import EvaluationError, ModelError
from ebbline.tasks.models.adapter_file import read_adapter_file
from ebbline.tasks.models.brought.fitted import fitted
from ebbline.tasks.models.decoding import end_tokens, settings_not_used, shipped
from ebbline.tasks.models.weights import require_model_folder
from ebbline.tasks.specs import GenerateSpec
from ebbline.tasks.stage import Context

LORAS = 8
LARGEST_RANK = 256


def complete_with_vllm(
    spec: GenerateSpec, model: Path, adapter: Path | None, prompts: Sequence[str], ctx: Context
) -> tuple[list[tuple[str, int, bool]], dict[str, Any]]:
    """(greedy completion, its tokens, whether it ended), in the order of `prompts`; and the record
    of the decoding.
    """
    # vLLM reads it when it is imported. A GPU without this mode is an error of vLLM's.
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise EvaluationError(
            "`backend: vllm` needs vLLM, which is not installed: pip install 'ebbline[vllm]'"
        ) from error

    def start() -> Any:
        require_model_folder(model)
        ctx.residents.clear()  # vLLM reserves most of the GPU's memory
        return LLM(
            model=str(model),
            dtype=spec.dtype,
            max_model_len=spec.max_tokens,
            seed=0,
            generation_config="vllm",
            enable_prefix_caching=False,
            max_num_seqs=spec.batch_size,
            trust_remote_code=False,
            quantization="bitsandbytes" if spec.quantisation == "nf4" else None,
            enable_lora=True,
            max_loras=LORAS,
            max_lora_rank=LARGEST_RANK,
            disable_log_stats=True,
        )

    # Checked before the engine starts, which takes minutes.
    beside = adapter if spec.tokenizer == "adapter" else None
    ctx.residents.tokenizer(model, spec.chat, adapter=beside)
    engine = ctx.residents.remembered(
        ("vllm", model, spec.quantisation, spec.dtype, spec.max_tokens, spec.batch_size), start
    )
    tokenizer = ctx.residents.tokenizer(model, spec.chat, adapter=beside)
    numbers: dict[Path, int] = ctx.residents.remembered(("vllm adapters", model), dict)
    if adapter is not None:
        require_served(adapter, model)
    encoded = encode_prompts(tokenizer, prompts)
    require_room(encoded, spec.max_new_tokens, spec.max_tokens)
    own = shipped(model)
    ends = end_tokens(own, tokenizer)
    lora = (
        None
        if adapter is None
        else LoRARequest(str(adapter), numbers.setdefault(adapter, len(numbers) + 1), str(adapter))
    )
    answers = engine.generate(
        [{"prompt_token_ids": ids} for ids in encoded],
        SamplingParams(**greedy(spec, ends)),
        lora_request=lora,
        use_tqdm=False,
    )
    ctx.progress(len(answers), len(answers), "completions")
    opened = probe(tokenizer).opens
    completions = [
        (
            completion_text(tokenizer, opened, answer.outputs[0].token_ids),
            len(answer.outputs[0].token_ids),
            answer.outputs[0].finish_reason == "stop",
        )
        for answer in answers
    ]
    decoded = {"end_tokens": ends, "not_used": settings_not_used(own, spec.decoding)}
    return completions, decoded


def greedy(spec: GenerateSpec, ends: Sequence[int]) -> dict[str, Any]:
    """vLLM's names for the decoding that the Spec states."""
    return {
        "n": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": spec.decoding.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": None,
        "bad_words": None,
        "min_tokens": spec.decoding.min_length,
        "max_tokens": spec.max_new_tokens,
        "stop": None,
        "stop_token_ids": list(ends),
        "ignore_eos": False,
        "skip_special_tokens": True,
    }


def require_served(adapter: Path, model: Path) -> None:
    """Raises ModelError for an adapter that does not fit the model, or that vLLM would read only in
    part: it takes plain LoRA under the model's own names.
    """
    file = read_adapter_file(adapter)
    plain = fitted(file, require_model_folder(model))
    rank = max(plain.tensors[lora.lora_A].shape[0] for lora in plain.modules.values())
    if plain.carried or plain.tensors.keys() != file.tensors.keys() or rank > LARGEST_RANK:
        raise ModelError(
            f"vLLM does not read all of {file.weights} (names of another model class, copies of "
            f"embeddings, or a rank above {LARGEST_RANK}); use the backend transformers"
        )
