"""The stage `generate` by transformers: one greedy completion for each prompt of a set.

Scoring is a stage of its own, so scorers may change or be compared without the model. Adapters of
one base that are measured in one batch share the loaded weights and the tokenised prompts.

A completion depends on its prompt, the model and the Spec alone: it is decoded with the settings of
the Spec (`ebbline.tasks.models.decoding`), in a batch whose shape follows from the prompt
(`ebbline.tasks.data.batch_shape`).

Output: completions.sensitive.jsonl, prompts.json and decoding.json. The first leaves the store only
when a person requests it by name. The second describes the set in numbers (format, rows, prompts
used), the third the decoding: the end tokens, and the settings that the model ships and that were
not used. Both hold no text.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ebbline.tasks.chat.probes import probe
from ebbline.tasks.chat.template import encode_prompts
from ebbline.tasks.chat.thoughts import completion_text
from ebbline.tasks.chat.tokenizers import unused_beside
from ebbline.tasks.data.batch_shape import BatchShape
from ebbline.tasks.data.batches import in_batches, require_room, rows_meet
from ebbline.tasks.data.prompts import PromptSet, read_prompts
from ebbline.tasks.errors import DataError, ModelError
from ebbline.tasks.identity import content_digest
from ebbline.tasks.measuring.completions import CHANGES_NOTHING, Completion, write_completions
from ebbline.tasks.models.adapter_file import read_adapter_file
from ebbline.tasks.models.adapters import with_adapter
from ebbline.tasks.models.decoding import end_tokens, only, settings_not_used
from ebbline.tasks.scoring.answers import TASK_SCORERS
from ebbline.tasks.specs import Block, EvaluateSpec, GenerateSpec
from ebbline.tasks.stage import Context


@dataclass(frozen=True)
class Asked:
    """The prompts of a file, and those of them that a generation completes."""

    whole: PromptSet
    chosen: PromptSet


def run(spec: GenerateSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    prompts = asked(spec, inputs["prompts"])
    texts = [prompt.text for prompt in prompts.chosen.prompts]
    completions, decoded = _completions(spec, inputs, texts, ctx)
    tokenizer = ctx.residents.tokenizer(
        inputs["model"], spec.chat, adapter=tokenizer_beside(spec, inputs)
    )
    write(spec, inputs, out, prompts, completions, decoded, tokenizer)


def asked(spec: GenerateSpec, path: Path) -> Asked:
    """The prompts of a generation. Raises DataError for a set that cannot be measured."""
    whole = read_prompts(path, spec.format, spec.label, spec.limit, spec.needs_answer, spec.split)
    if spec.compared_by is not None:
        scorer = TASK_SCORERS[spec.compared_by]
        for prompt in whole.prompts:
            scorer.require(prompt.answer, prompt.text, prompt.where)
    return Asked(whole, in_block(whole, spec.block))


def write(
    spec: GenerateSpec,
    inputs: Mapping[str, Path],
    out: Path,
    prompts: Asked,
    completions: Sequence[tuple[str, int, bool]],
    decoded: Mapping[str, Any],
    tokenizer: Any,
) -> None:
    """Write the artifact: a completion for each chosen prompt, and how they were made."""
    chat = chat_record(spec, inputs, tokenizer)
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
        for prompt, (text, tokens, ended) in zip(prompts.chosen.prompts, completions, strict=True)
    ]
    write_completions(out, rows)
    record = prompts_record(prompts.chosen, prompts.whole, inputs["prompts"])
    record |= adapter_record(inputs)
    (out / spec.PROMPTS).write_text(json.dumps({**record, "chat": chat}, indent=1))
    (out / spec.DECODING).write_text(json.dumps(decoded, indent=1))


def _completions(
    spec: GenerateSpec, inputs: Mapping[str, Path], prompts: Sequence[str], ctx: Context
) -> tuple[list[tuple[str, int, bool]], dict[str, Any]]:
    """The completions of the prompts, and how they were decoded."""
    resident, tokenizer = ctx.residents.model(
        inputs["model"],
        spec.quantisation,
        spec.dtype,
        ctx.device,
        spec.chat,
        adapter=tokenizer_beside(spec, inputs),
    )
    resident.eval()
    decoded = decoded_by(spec, resident.generation_config, tokenizer)
    with with_adapter(resident, inputs.get("adapter")) as model:
        return complete(model, tokenizer, prompts, spec, ctx), decoded


def decoded_by(spec: GenerateSpec, own: GenerationConfig, tokenizer: Any) -> dict[str, Any]:
    """What a generation records of its decoding, beside its Spec."""
    return {
        "end_tokens": end_tokens(own, tokenizer),
        "not_used": settings_not_used(own, spec.decoding),
    }


def tokenizer_beside(spec: GenerateSpec | EvaluateSpec, inputs: Mapping[str, Path]) -> Path | None:
    """The adapter whose tokenizer is used; None for the model's own. Raises ModelError if there is
    no adapter.
    """
    if spec.tokenizer == "model":
        return None
    if "adapter" not in inputs:
        raise ModelError("`tokenizer: adapter` needs an adapter; use `tokenizer: model`")
    return inputs["adapter"]


def chat_record(spec: GenerateSpec, inputs: Mapping[str, Path], tokenizer: Any) -> dict[str, Any]:
    """The chat template of a measurement in facts, without text of prompts."""
    return {
        **probe(tokenizer).record(),
        "date": spec.chat.date,
        **tokenizer_record(spec, inputs, tokenizer),
    }


def tokenizer_record(
    spec: GenerateSpec | EvaluateSpec, inputs: Mapping[str, Path], tokenizer: Any
) -> dict[str, Any]:
    """Whose tokenizer a measurement uses, and what differs in one that was saved beside the adapter
    and is not used.
    """
    unused = None if tokenizer_beside(spec, inputs) else inputs.get("adapter")
    return {
        "tokenizer": spec.tokenizer,
        "unused_beside_adapter": unused_beside(unused, inputs["model"], tokenizer),
    }


def adapter_record(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """That the adapter of a measurement changes nothing, if so."""
    adapter = inputs.get("adapter")
    silent = adapter is not None and read_adapter_file(adapter).changes_nothing
    return {CHANGES_NOTHING: True} if silent else {}


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


def prompts_record(chosen: PromptSet, whole: PromptSet, path: Path) -> dict[str, Any]:
    """A prompt set in numbers: `asked` prompts were used, `of` those that all blocks hold together,
    and the file has `rows` rows. `repeats` counts the rows that repeat an earlier prompt, if any.
    """
    numbers = {"rows": chosen.rows, "asked": len(chosen.prompts), "of": len(whole.prompts)}
    if whole.repeats:
        numbers["repeats"] = len(whole.repeats)
    return {"format": chosen.format, **numbers, "sha256": content_digest(path)}


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], spec: GenerateSpec, ctx: Context
) -> list[tuple[str, int, bool]]:
    """(greedy completion, its tokens, whether it ended), in the order of `prompts`."""
    encoded = ctx.residents.remembered(
        ("chat", tokenizer, tuple(prompts)), lambda: encode_prompts(tokenizer, prompts)
    )
    require_room(encoded, spec.max_new_tokens, spec.max_tokens)
    ends = end_tokens(model.generation_config, tokenizer)
    shape = BatchShape(spec.max_new_tokens, 1 if rows_meet(model) else spec.batch_size)

    def complete_batch(batch: Any) -> list[tuple[list[int], int, bool]]:
        answers = []
        for tokens in model.generate(**batch, generation_config=settings)[
            :, batch["input_ids"].shape[1] :
        ].tolist():
            length = next(
                (place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens)
            )
            ended = bool(tokens) and tokens[length - 1] in ends
            answers.append((tokens[:length], length, ended))
        return answers

    with only(
        model,
        spec.decoding,
        ends,
        tokenizer.pad_token_id,
        max_new_tokens=spec.max_new_tokens,
    ) as settings:
        completed = in_batches(complete_batch, tokenizer, encoded, shape, "completions", ctx)
    return texts_of(tokenizer, completed)


def texts_of(
    tokenizer: Any, completed: Sequence[tuple[list[int], int, bool]]
) -> list[tuple[str, int, bool]]:
    """(tokens, their number, whether they ended), with text in place of the tokens."""
    opened = probe(tokenizer).opens
    return [
        (completion_text(tokenizer, opened, tokens), length, ended)
        for tokens, length, ended in completed
    ]
