"""Token rows, and padded batches of them for training steps and generation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ebbline.tasks.data.batch_shape import BatchShape
from ebbline.tasks.errors import DataError, EvaluationError
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


def in_batches(
    ask: Callable[[Any], Sequence[Answer]],
    tokenizer: Any,
    encoded: Sequence[list[int]],
    shape: BatchShape,
    what: str,
    ctx: Context,
) -> list[Answer]:
    """One answer for each row of tokens, in their order. `ask` takes a padded batch; `what` is the
    note that progress shows.

    Batches have the shapes of `ebbline.tasks.data.batch_shape`. Raises EvaluationError for one that
    does not fit in memory: a smaller one would give other answers.
    """
    answers: dict[int, Answer] = {}
    for width, chosen in shape.batches(encoded):
        rows = shape.rows(width)
        batch = filled_batch(tokenizer, encoded, chosen, rows, width, ctx.device)
        with torch.inference_mode(), even_threads(), whole_batches(rows):
            answers.update(zip(chosen, ask(batch)[: len(chosen)], strict=True))
        ctx.progress(len(answers), len(encoded), what)
    return [answers[index] for index in range(len(encoded))]


def filled_batch(
    tokenizer: Any,
    encoded: Sequence[list[int]],
    chosen: Sequence[int],
    rows: int,
    width: int,
    device: str,
) -> Any:
    """The chosen rows, padded to `width` and filled up to `rows` rows with copies of the first."""
    filled = [*chosen, *[chosen[0]] * (rows - len(chosen))]
    return tokenizer.pad(
        {"input_ids": [encoded[index] for index in filled]},
        padding="max_length",
        max_length=width,
        return_tensors="pt",
    ).to(device)


def rows_meet(model: Any) -> bool:
    """Whether one row of a batch changes another's result: int8 searches the whole batch for
    outlier columns, and an expert of a mixture adds up the tokens that reach it from all rows.
    """
    experts = (
        value
        for name, value in model.config.get_text_config().to_dict().items()
        if name.endswith("experts") and isinstance(value, int)
    )
    return bool(getattr(model, "is_loaded_in_8bit", False)) or any(value > 1 for value in experts)


@contextmanager
def even_threads() -> Iterator[None]:
    """A power of two of threads: three threads would split 32 rows unevenly, and the kernel of a
    row would depend on its place.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 << (threads.bit_length() - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def lacks_memory(error: BaseException) -> bool:
    """Whether a forward pass failed because a device or the host has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def whole_batches(rows: int) -> Iterator[None]:
    """Turn a lack of memory into an EvaluationError that names what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        smaller = f"set `batch_size: {rows // 2}`, " if rows > 1 else ""
        raise EvaluationError(
            f"a batch of {rows} rows does not fit in memory. It is not halved, because that would "
            f"change the results; {smaller}quantise the model (`quantisation: nf4`) or use a GPU "
            "with more memory"
        ) from error
