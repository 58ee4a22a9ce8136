"""A tiny chat model pair and its data: random untrained weights, real formats, made in a second."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ebbline.tasks.identity import digest
from ebbline.tasks.models.loading import Residents
from ebbline.tasks.specs import Spec
from ebbline.tasks.stage import Context, Request, key_payload

torch.set_num_threads(1)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>"]
WORDS = [f"word{i}" for i in range(40)] + ["A", "B", "C", "D", "Answer", ":", "."]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Pair:
    base: Path
    aligned: Path


def word_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL)
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )


def build_pair(folder: Path) -> Pair:
    """Base: seeded random weights. Aligned: the base plus a seeded change to every weight."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for name in ("base", "aligned"):
        if name == "aligned":
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name, safe_serialization=True)
        tokenizer.save_pretrained(folder / name)
    return Pair(folder / "base", folder / "aligned")


def conversations(n: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Single-turn chats of 3 to 8 words each way."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(f"word{rng.randrange(40)}" for _ in range(rng.randint(3, 8)))

    return [
        [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        for _ in range(n)
    ]


def write_chats(path: Path, n: int, seed: int = 0) -> Path:
    path.write_text(
        "".join(json.dumps({"messages": turns}) + "\n" for turns in conversations(n, seed))
    )
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def context(folder: Path, **changes: Any) -> Context:
    """A Context whose log and scratch lie under `folder`."""
    (folder / "log").mkdir(parents=True, exist_ok=True)
    return Context(
        **{
            "log": folder / "log",
            "scratch": folder / "scratch",
            "residents": Residents(),
            **changes,
        }
    )


def fresh(folder: Path) -> Path:
    """A new empty folder for a stage's output."""
    folder.mkdir(parents=True)
    return folder


def request(spec: Spec, inputs: Mapping[str, Path], folder: Path, **changes: Any) -> Request:
    """A Request as the runner would write it, outside any store."""
    contents = {name: digest(str(path)) for name, path in inputs.items()}
    for name in ("payload", "log"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Request(
        key=digest(key_payload(spec, contents)),
        kind=spec.KIND,
        spec=spec.model_dump(mode="json"),
        inputs={name: str(path) for name, path in inputs.items()},
        contents=contents,
        out=str(folder / "payload"),
        log=str(folder / "log"),
        scratch=str(folder / "scratch"),
        **changes,
    )
