"""Generation by vLLM, for a GPU with enough memory: `pip install ebbline[vllm]`, `backend: vllm`.

It returns the same results as ebbline.tasks.measuring.generate. One engine serves all adapters of a
base as LoRA modules, with at most LORAS of them on the GPU at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebbline.tasks.chat.probes import probe
from ebbline.tasks.data.batches import encode_prompts, require_room
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.specs import GenerateSpec
from ebbline.tasks.stage import Context

LORAS = 8
LARGEST_RANK = 256


def complete_with_vllm(
    spec: GenerateSpec, model: Path, adapter: Path | None, prompts: Sequence[str], ctx: Context
) -> list[tuple[str, int, bool]]:
    """(greedy completion, its tokens, whether it ended), in the order of `prompts`."""
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise EvaluationError(
            "`backend: vllm` needs vLLM, which is not installed: pip install 'ebbline[vllm]'"
        ) from error

    def start() -> Any:
        ctx.residents.clear()  # vLLM reserves most of the GPU's memory
        return LLM(
            model=str(model),
            dtype=spec.dtype,
            max_model_len=spec.max_tokens,
            seed=0,
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
        ("vllm", model, spec.quantisation, spec.dtype, spec.max_tokens), start
    )
    tokenizer = ctx.residents.tokenizer(model, spec.chat, adapter=beside)
    numbers: dict[Path, int] = ctx.residents.remembered(("vllm adapters", model), dict)
    encoded = encode_prompts(tokenizer, prompts)
    require_room(encoded, spec.max_new_tokens, spec.max_tokens)
    lora = (
        None
        if adapter is None
        else LoRARequest(str(adapter), numbers.setdefault(adapter, len(numbers) + 1), str(adapter))
    )
    answers = engine.generate(
        [{"prompt_token_ids": ids} for ids in encoded],
        SamplingParams(
            temperature=0.0,
            max_tokens=spec.max_new_tokens,
            stop_token_ids=[token for token in [probe(tokenizer).end_of_turn] if token is not None],
        ),
        lora_request=lora,
        use_tqdm=False,
    )
    ctx.progress(len(answers), len(answers), "completions")
    return [
        (
            answer.outputs[0].text,
            len(answer.outputs[0].token_ids),
            answer.outputs[0].finish_reason == "stop",
        )
        for answer in answers
    ]
