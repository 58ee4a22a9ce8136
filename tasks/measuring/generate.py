"""The stage `generate`: one greedy completion for each prompt of a set.

Scoring is a stage of its own, so scorers may change or be compared without the model. Adapters of
one base that are measured in one batch share the loaded weights and the tokenised prompts.

Output: completions.sensitive.jsonl and prompts.json. The first leaves the store only when a person
requests it by name. The second describes the set in numbers (format, rows, prompts used), without
text.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ebbline.tasks.data.batches import encode_prompts, in_batches, require_room
from ebbline.tasks.data.prompts import PromptSet, read_prompts
from ebbline.tasks.errors import DataError
from ebbline.tasks.identity import content_digest
from ebbline.tasks.measuring.completions import Completion, write_completions
from ebbline.tasks.models.adapters import with_adapter
from ebbline.tasks.specs import Block, GenerateSpec
from ebbline.tasks.stage import Context


def run(spec: GenerateSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    whole = read_prompts(inputs["prompts"], spec.format, spec.label, spec.limit, spec.needs_answer)
    chosen = in_block(whole, spec.block)
    completions = _completions(spec, inputs, [prompt.text for prompt in chosen.prompts], ctx)
    rows = [
        Completion(
            prompt.id,
            prompt.category,
            prompt.source,
            prompt.label,
            prompt.text,
            prompt.answer,
            text,
            tokens,
            ended,
        )
        for prompt, (text, tokens, ended) in zip(chosen.prompts, completions, strict=True)
    ]
    write_completions(out, rows)
    (out / spec.PROMPTS).write_text(
        json.dumps(described(chosen, whole, inputs["prompts"]), indent=1)
    )


def _completions(
    spec: GenerateSpec, inputs: Mapping[str, Path], prompts: Sequence[str], ctx: Context
) -> list[tuple[str, int, bool]]:
    if spec.backend == "vllm":
        # vLLM is an optional dependency.
        from ebbline.tasks.measuring.vllm_backend import complete_with_vllm

        return complete_with_vllm(spec, inputs["model"], inputs.get("adapter"), prompts, ctx)
    resident, tokenizer = ctx.residents.model(
        inputs["model"], spec.quantisation, spec.dtype, ctx.device
    )
    resident.eval()
    with with_adapter(resident, inputs.get("adapter")) as model:
        return complete(model, tokenizer, prompts, spec.max_new_tokens, spec.max_tokens, ctx)


def in_block(whole: PromptSet, block: Block | None) -> PromptSet:
    """The prompts of one block, in a fixed random order. Raises DataError for a block beyond the
    end.
    """
    if block is None:
        return whole
    order = random.Random(0).sample(range(len(whole.prompts)), len(whole.prompts))
    chosen = order[block.index * block.size : (block.index + 1) * block.size]
    if not chosen:
        raise DataError(
            f"the set has {len(whole.prompts)} prompts, so it has no block {block.index} "
            f"of {block.size}; lower `limit`"
        )
    return replace(whole, prompts=tuple(whole.prompts[index] for index in chosen))


def described(chosen: PromptSet, whole: PromptSet, path: Path) -> dict[str, Any]:
    """A prompt set in numbers: `asked` prompts were used, `of` those that all blocks hold together,
    and the file has `rows` rows.
    """
    numbers = {"rows": chosen.rows, "asked": len(chosen.prompts), "of": len(whole.prompts)}
    return {"format": chosen.format, **numbers, "sha256": content_digest(path)}


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    max_tokens: int,
    ctx: Context,
) -> list[tuple[str, int, bool]]:
    """(greedy completion, its tokens, whether it ended), in the order of `prompts`.

    Decoding uses the KV cache and stops at an end token. `ebbline.tasks.data.batches` forms the
    batches.
    """
    encoded = ctx.residents.remembered(
        ("chat", tuple(prompts)), lambda: encode_prompts(tokenizer, prompts)
    )
    require_room(encoded, max_new_tokens, max_tokens)
    ends = _end_tokens(model, tokenizer)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        use_cache=True,
    )

    def complete_batch(batch: Any) -> list[tuple[str, int, bool]]:
        answers = []
        for tokens in model.generate(**batch, generation_config=settings)[
            :, batch["input_ids"].shape[1] :
        ].tolist():
            length = next(
                (place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens)
            )
            ended = bool(tokens) and tokens[length - 1] in ends
            answers.append(
                (tokenizer.decode(tokens[:length], skip_special_tokens=True), length, ended)
            )
        return answers

    return in_batches(complete_batch, tokenizer, encoded, "completions", ctx)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    declared = model.generation_config.eos_token_id
    tokens = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])}
    return sorted(token for token in tokens if token is not None)
