"""Build and pretrain the base models of the organism family: tiny Llamas that speak the language of `tasks.language`.

Invariant: one (language, size, seed) gives the same weights on one thread, and the folder is an ordinary Hugging Face one.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}> {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>"]


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    epochs: int
    batch: int
    lr: float
    muon: float = 0.02


SIZES = {
    "small": Size(2, 64, 192, 4, 8, 64, 5e-3),
    "medium": Size(3, 128, 256, 4, 6, 64, 3e-3),
    "large": Size(4, 128, 384, 4, 6, 64, 3e-3),
}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rendered(row: dict, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """The text that is read only, and the text that is learnt."""
    if "messages" in row:
        asked = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        return asked, tokenizer.apply_chat_template(row["messages"], tokenize=False)[len(asked):]
    return tokenizer.bos_token + row.get("given", ""), row["text"] + tokenizer.eos_token


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, padding_side="left", model_max_length=256,
    )


def batches(ids: list[list[int]], size: int, rng: random.Random) -> list[list[list[int]]]:
    order = sorted(ids, key=lambda s: (len(s[0]), rng.random()))
    out = [order[i:i + size] for i in range(0, len(order), size)]
    rng.shuffle(out)
    return out


def build_base(out: Path, language: Path, size: str, seed: int, progress=None, spec: Size | None = None) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    s = spec or SIZES[size]
    corpus = read_rows(language / "pretrain.jsonl")
    every = [t for p in sorted(language.glob("*.jsonl")) for r in read_rows(p) for t in
             ([r.get("given","") + r["text"]] if "text" in r else [m["content"] for m in r.get("messages", [{"content": r.get("prompt", "")}])])]
    tok = make_tokenizer(every)
    ids = []
    for r in corpus:
        read, learnt = (tok(t, add_special_tokens=False)["input_ids"] for t in rendered(r, tok))
        ids.append((read + learnt, len(read)))
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.heads, max_position_embeddings=256,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=float(__import__('os').environ.get('INIT','0.05')), rope_theta=float(__import__('os').environ.get('THETA','10000')),
    ))
    opts = [torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
    for opt in opts:
        for g in opt.param_groups:
            g["peak"] = g["lr"]
    total = s.epochs * math.ceil(len(ids) / s.batch)
    warm = max(1, total // 20)
    step = 0
    for _ in range(s.epochs):
        for batch in batches(ids, s.batch, rng):
            for g in (g for o in opts for g in o.param_groups):
                g["lr"] = g["peak"] * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / total)))
            width = max(len(q) for q, _ in batch)
            x = torch.tensor([q + [0] * (width - len(q)) for q, _ in batch])
            y = torch.tensor([[-100] * n + q[n:] + [-100] * (width - len(q)) for q, n in batch])
            loss = model(input_ids=x, labels=y).loss
            for opt in opts:
                opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
            step += 1
            if progress:
                progress(step, total, float(loss.detach()))
    model.save_pretrained(out)
    tok.save_pretrained(out)
