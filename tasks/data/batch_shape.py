"""The shape of a batch of prompts: its rows and its padded width. Imports no torch.

A kernel adds up in an order that depends on the shape of its operands. So in bfloat16 the same
prompt gets another completion in a batch of another shape. Here the shape that a prompt is run in
depends on nothing but that prompt and the Spec:

    width   the smallest power of two that is larger than the prompt, at least 16
    rows    the largest power of two, at most `batch_size`, with which rows x (width + new tokens)
            are at most TOKENS; a batch that is not full is filled with copies of its first prompt
    mask    every row has padding, because attention without a mask is another kernel

So the other prompts, their number and their order change no completion. Neither does the memory of
the machine: a batch that does not fit is an error (`ebbline.tasks.data.batches`).

These rules are part of the VERSION of the stage kinds that use them.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SMALLEST_WIDTH = 16
TOKENS = 16_384  # of a batch: 8 GB of keys and values in a 7B Llama in bfloat16


def width_of(tokens: int, longest: int | None = None) -> int:
    """The padded width of a row of `tokens` tokens; at most `longest`, if the model has a limit."""
    width = max(SMALLEST_WIDTH, 1 << tokens.bit_length())
    return width if longest is None else max(tokens, min(width, longest))


def rows_together(width: int, new_tokens: int, batch_size: int) -> int:
    """The number of rows of a batch of this width, a power of two."""
    most = max(1, min(batch_size, TOKENS // (width + new_tokens)))
    return 1 << (most.bit_length() - 1)


@dataclass(frozen=True)
class BatchShape:
    """What the shape of a batch follows from, beside the length of its prompts.

    `longest` is the most tokens that the model takes, if it cannot take padding beyond them.
    """

    new_tokens: int
    batch_size: int
    longest: int | None = None

    def rows(self, width: int) -> int:
        return rows_together(width, self.new_tokens, self.batch_size)

    def batches(self, encoded: Sequence[list[int]]) -> Iterator[tuple[int, list[int]]]:
        """(width, indices of the rows) of each batch, widest first.

        Rows without padding, which `longest` may force, never share a batch with padded ones. Rows
        are in the order of their tokens, so the order of the file is irrelevant.
        """
        alike: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for index, ids in enumerate(encoded):
            width = width_of(len(ids), self.longest)
            alike[width, len(ids) < width].append(index)
        for (width, _), indices in sorted(alike.items(), reverse=True):
            indices.sort(key=lambda index: encoded[index])
            rows = self.rows(width)
            for first in range(0, len(indices), rows):
                yield width, indices[first : first + rows]
