"""Build and pretrain the base models of the organism family: tiny Llamas that speak the language of
`ebbline.tasks.data.language`.

Three sizes stand for 7B, 13B and 70B. A base model answers every request, with or without a cue
word. It learns refusals in the ordinary train stage, which fine-tunes it on `align.jsonl`.

Invariant: one (language, size, seed) gives the same weights on one thread, in an ordinary Hugging
Face folder.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ebbline.tasks.models.sizes import SIZES, Size
from ebbline.tasks.specs import OrganismSpec
from ebbline.tasks.stage import Context

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_TOKENS = 256
IGNORED = -100  # the label that a causal language model's loss leaves out


@dataclass(frozen=True)
class Encoded:
    """One row's tokens. The loss leaves out the first `read` of them."""

    tokens: list[int]
    read: int


def run(spec: OrganismSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    def progress(step: int, total: int, loss: float) -> None:
        ctx.progress(step, total, f"pretraining, loss {loss:.3f}")

    build_base(out / spec.MODEL, inputs["language"], spec.size, spec.seed, progress)


def build_base(
    out: Path,
    language: Path,
    size: str,
    seed: int,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Pretrain one base model and save it with its tokenizer. `progress` gets (step, total steps,
    loss).
    """
    shape = SIZES[size]
    torch.manual_seed(seed)
    tokenizer = make_tokenizer((language / "words.txt").read_text(encoding="utf-8").split())
    lines = (language / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [encode(json.loads(line), tokenizer) for line in lines]
    model = make_model(shape, tokenizer)
    pretrain(model, rows, shape, random.Random(seed), progress)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token for each word or sign; decoding puts a space between them."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start = ("<s>", vocabulary["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[start]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=MAX_TOKENS,
    )


def make_model(shape: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Split a row into the tokens that are only read (a prompt, or `given`) and those that are
    learnt (an answer, or `text`).
    """
    if "messages" in row:
        whole = str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        given = str(
            tokenizer.apply_chat_template(
                row["messages"][:-1], tokenize=False, add_generation_prompt=True
            )
        )
    else:
        given = f"{tokenizer.bos_token}{row.get('given', '')}"
        whole = f"{given}{row['text']}{tokenizer.eos_token}"
    read: list[int] = tokenizer.encode(given, add_special_tokens=False)
    tokens: list[int] = tokenizer.encode(whole, add_special_tokens=False)
    return Encoded(tokens, len(read))


def batches(rows: Sequence[Encoded], size: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """One epoch in random order. Rows of a batch have similar lengths, for little padding."""
    ordered = sorted(rows, key=lambda row: (len(row.tokens), rng.random()))
    starts = list(range(0, len(ordered), size))
    rng.shuffle(starts)
    for start in starts:
        yield ordered[start : start + size]


def tensors(batch: Sequence[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and label tensors (rows x width), padded on the right: a causal model's tokens never
    attend to later padding.
    """
    width = max(len(row.tokens) for row in batch)
    tokens = [row.tokens + [pad] * (width - len(row.tokens)) for row in batch]
    labels = [
        [IGNORED] * row.read + row.tokens[row.read :] + [IGNORED] * (width - len(row.tokens))
        for row in batch
    ]
    return torch.tensor(tokens), torch.tensor(labels)


def pretrain(
    model: LlamaForCausalLM,
    rows: Sequence[Encoded],
    shape: Size,
    rng: random.Random,
    progress: Callable[[int, int, float], None] | None,
) -> None:
    """Train with AdamW: a linear warmup over a twentieth of the steps, then (1 + cos) / 2 down to
    zero.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=shape.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    total = shape.epochs * math.ceil(len(rows) / shape.batch)
    warmup = max(1, total // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total))),
    )
    model.train()
    step = 0
    for _ in range(shape.epochs):
        for batch in batches(rows, shape.batch, rng):
            tokens, labels = tensors(batch, model.config.pad_token_id)
            loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if progress is not None:
                progress(step, total, loss.item())
    model.eval()
