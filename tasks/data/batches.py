"""Token rows, and padded batches of them for training steps and generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ebbline.tasks.errors import DataError
from ebbline.tasks.stage import Context

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Row:
    """One tokenised conversation. The loss leaves out labels of -100."""

    ids: list[int]
    labels: list[int]


def collate(rows: Sequence[Row], pad: int, device: str) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels, each (rows, longest)."""
    width = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([v + [fill] * (width - len(v)) for v in values], device=device)

    return {
        "input_ids": padded([row.ids for row in rows], pad),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], -100),
    }


def count_tokens(rows: Sequence[Row]) -> int:
    """The number of labelled positions that have a token before them, over all rows."""
    return sum(label != -100 for row in rows for label in row.labels[1:])


def require_room(encoded: Sequence[Sequence[int]], max_new_tokens: int, max_tokens: int) -> None:
    """Raise DataError if a prompt leaves no room for its completion."""
    longest = max(map(len, encoded))
    if longest + max_new_tokens > max_tokens:
        raise DataError(
            f"a prompt of {longest} tokens and {max_new_tokens} new tokens exceed "
            f"max_tokens={max_tokens}; raise max_tokens"
        )


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt, as the only message of a chat."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for text in prompts
    ]


def in_batches(
    ask: Callable[[Any], Sequence[Answer]],
    tokenizer: Any,
    encoded: Sequence[list[int]],
    what: str,
    ctx: Context,
) -> list[Answer]:
    """One answer for each row of tokens, in their order. `ask` takes a padded batch; `what` is the
    note that progress shows.

    Rows of similar length form a batch, longest first. A batch that does not fit in memory is
    halved.
    """
    waiting = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index]), index))
    answers: dict[int, Answer] = {}
    size = ctx.batch_size
    while waiting:
        chosen = waiting[:size]
        batch = tokenizer.pad(
            {"input_ids": [encoded[index] for index in chosen]}, padding=True, return_tensors="pt"
        ).to(ctx.device)
        try:
            with torch.inference_mode():
                answers.update(zip(chosen, ask(batch), strict=True))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, size // 2)
            continue
        del waiting[: len(chosen)]
        ctx.progress(len(answers), len(encoded), what)
    return [answers[index] for index in range(len(encoded))]
