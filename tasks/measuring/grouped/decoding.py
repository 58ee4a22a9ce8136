"""Greedy decoding of many batches at once, of different adapters on one model.

The prompts of a few batches are read together, then all rows of all batches take their steps
together: a step of a small model costs little more for 100 rows than for 32. Rows that have ended
are left out. Each adapter has a multiple of the rows of one batch, filled up with copies.

Invariant: a row gets the tokens that it gets alone. The first time that a number of rows occurs,
one batch of them is run alone too, and its logits are compared bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ebbline.tasks.measuring.grouped.layers import ManyAdapters, NotAlike

LENGTHS = 64  # tokens
COMPACT_AT = 0.75  # rows are moved together once this share of them is left
READ_TOKENS = 1024  # of prompts that are read together; more do not fit in a processor's cache


@dataclass(frozen=True)
class Block:
    """A batch of one adapter: `ids` and `mask` (rows, width) as it runs alone, of which the first
    `real` rows are no fillers.
    """

    adapter: int
    ids: torch.Tensor
    mask: torch.Tensor
    real: int
    new_tokens: int


class _Room(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, with room for all tokens: a step copies nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, used: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._all_keys, self._all_values, self._used = keys, values, used
        self._show()

    def _show(self) -> None:
        self.keys = self._all_keys[:, :, : self._used]
        self.values = self._all_values[:, :, : self._used]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self._used + key_states.shape[2]
        self._all_keys[:, :, self._used : end] = key_states
        self._all_values[:, :, self._used : end] = value_states
        self._used = end
        self._show()
        return self.keys, self.values

    def chosen(self, rows: torch.Tensor) -> "_Room":
        return _Room(*_with_room(self.keys, self.values, rows, self._all_keys.shape[2]), self._used)


def _with_room(
    keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, room: int
) -> tuple[torch.Tensor, torch.Tensor]:
    fresh = []
    for old in (keys, values):
        new = old.new_empty(len(rows), old.shape[1], room, old.shape[3])
        new[:, :, : old.shape[2]] = old[rows]
        fresh.append(new)
    return fresh[0], fresh[1]


@dataclass
class _Row:
    """A real row's new tokens so far."""

    limit: int
    tokens: list[int] = field(default_factory=list)
    done: bool = False

    def add(self, token: int, ends: frozenset[int]) -> None:
        self.tokens.append(token)
        self.done = token in ends or len(self.tokens) >= self.limit


@dataclass
class _Step:
    """The rows of the next step, sorted by adapter. `places` has each row's place among all real
    rows, None for a filler.
    """

    places: list[int | None]
    adapters: list[int]
    tokens: torch.Tensor
    mask: torch.Tensor
    layers: list[_Room]

    def chosen(self, rows: Sequence[int], fillers: frozenset[int] = frozenset()) -> "_Step":
        """These rows, in order; the positions of `fillers` are copies of the row before."""
        index = torch.tensor(rows, device=self.tokens.device)
        return _Step(
            [None if place in fillers else self.places[row] for place, row in enumerate(rows)],
            [self.adapters[row] for row in rows],
            self.tokens[index],
            self.mask[index],
            [layer.chosen(index) for layer in self.layers],
        )


class Decoder:
    """Decodes blocks of equal rows and width on a model with adapters. `proven` remembers the
    numbers of rows whose steps were compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        many: ManyAdapters,
        adapters: int,
        ends: Sequence[int],
        proven: set[object],
        progress: Callable[[], None],
    ) -> None:
        self._model, self._many, self._adapters = model, many, adapters
        self._ends, self._proven, self._progress = frozenset(ends), proven, progress

    def decode(self, blocks: Sequence[Block]) -> list[list[list[int]]]:
        """The new tokens of each block's real rows, up to and with the first end token. Blocks are
        sorted by adapter. Raises NotAlike.
        """
        usual = len(blocks[0].ids)
        found = [[_Row(block.new_tokens) for _ in range(block.real)] for block in blocks]
        rows = [row for of_block in found for row in of_block]
        step = self._read(blocks, rows, usual)
        while not all(row.done for row in rows):
            step = self._compacted(step, rows, usual)
            logits = self._stepped(step, usual)
            self._take(step, rows, logits)
            self._progress()
        return [[row.tokens for row in of_block] for of_block in found]

    def _read(self, blocks: Sequence[Block], rows: Sequence[_Row], usual: int) -> _Step:
        """Read the prompts of all blocks."""
        width = blocks[0].ids.shape[1]
        room = width + max(block.new_tokens for block in blocks)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        logits, at_once = [], max(1, READ_TOKENS // (usual * width))
        for first in range(0, len(blocks), at_once):
            together = blocks[first : first + at_once]
            cache = DynamicCache(config=self._model.config)
            logits.append(self._read_together(together, cache, usual))
            for place, layer in enumerate(cache.layers):
                if not first:
                    size = usual * len(blocks), layer.keys.shape[1], room
                    keys.append(layer.keys.new_empty(*size, layer.keys.shape[3]))
                    values.append(layer.values.new_empty(*size, layer.values.shape[3]))
                own = slice(first * usual, (first + len(together)) * usual)
                keys[place][own, :, :width] = layer.keys
                values[place][own, :, :width] = layer.values
            self._progress()
        real = iter(range(len(rows)))
        step = _Step(
            [next(real) if row < block.real else None for block in blocks for row in range(usual)],
            [block.adapter for block in blocks for _ in range(usual)],
            blocks[0].ids[:, -1:].new_empty(usual * len(blocks), 1),
            torch.cat([block.mask for block in blocks]),
            [_Room(*both, width) for both in zip(keys, values, strict=True)],
        )
        self._take(step, rows, torch.cat(logits))
        return step

    def _read_together(
        self, blocks: Sequence[Block], cache: DynamicCache, usual: int
    ) -> torch.Tensor:
        """The logits after the prompts of the blocks, in one forward pass."""
        ids, mask = (
            torch.cat([block.ids for block in blocks]),
            torch.cat([block.mask for block in blocks]),
        )

        def alone() -> torch.Tensor:
            self._set_rows([blocks[-1].adapter] * usual)
            empty = DynamicCache(config=self._model.config)
            return self._forward(blocks[-1].ids, blocks[-1].mask, empty)

        def together() -> torch.Tensor:
            self._set_rows([each.adapter for each in blocks for _ in range(usual)], usual)
            return self._forward(ids, mask, cache)

        return self._proved(together, alone, usual, (len(ids), ids.shape[1]), ids.shape[1])

    def _take(self, step: _Step, rows: Sequence[_Row], logits: torch.Tensor) -> None:
        """Add the most likely token to each open row, and to the next step's input."""
        step.tokens = logits.float().argmax(-1, keepdim=True)
        step.mask = torch.cat([step.mask, step.mask.new_ones(len(step.mask), 1)], dim=-1)
        for place, token in zip(step.places, step.tokens[:, 0].tolist(), strict=True):
            if place is not None and not rows[place].done:
                rows[place].add(token, self._ends)

    def _compacted(self, step: _Step, rows: Sequence[_Row], usual: int) -> _Step:
        """The step without ended rows, if that makes it smaller by enough."""
        chosen: list[int] = []
        fillers: set[int] = set()
        for adapter in range(self._adapters):
            left = [
                row
                for row, (own, place) in enumerate(zip(step.adapters, step.places, strict=True))
                if own == adapter and place is not None and not rows[place].done
            ]
            missing = -len(left) % usual
            fillers |= set(range(len(chosen) + len(left), len(chosen) + len(left) + missing))
            chosen += [*left, *left[:1] * missing]
        if len(chosen) > COMPACT_AT * len(step.places):
            return step
        return step.chosen(chosen, frozenset(fillers))

    def _stepped(self, step: _Step, usual: int) -> torch.Tensor:
        """The logits of a step."""
        size = len(step.places)

        def alone() -> torch.Tensor:
            # The last rows, as many as a batch has, are of one adapter
            few = step.chosen(range(size - usual, size))
            self._set_rows(few.adapters)
            return self._forward(few.tokens, few.mask, self._cache(few.layers))

        def together() -> torch.Tensor:
            self._set_rows(step.adapters, usual)
            return self._forward(step.tokens, step.mask, self._cache(step.layers))

        return self._proved(together, alone, usual, (size, 1), step.mask.shape[1])

    def _proved(
        self,
        together: Callable[[], torch.Tensor],
        alone: Callable[[], torch.Tensor],
        usual: int,
        shape: tuple[int, int],
        length: int,
    ) -> torch.Tensor:
        """The result of `together`, of `shape` (rows, tokens), which attends over `length` tokens.
        Raises NotAlike if its last rows differ from `alone`.
        """
        # A kernel of attention may follow from the length too: compared again every LENGTHS
        block = -(-length // LENGTHS)
        known = shape, block, usual, self._model.device, torch.get_num_threads()
        if shape[0] == usual or known in self._proven:
            return together()
        expected = alone()
        result = together()
        if not torch.equal(expected, result[-usual:]):
            raise NotAlike
        self._proven.add(known)
        return result

    def _set_rows(self, adapters: Sequence[int], usual: int = 0) -> None:
        self._many.rows([adapters.count(adapter) for adapter in range(self._adapters)], usual)

    def _cache(self, layers: Sequence[_Room]) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        cache.layers = list(layers)
        return cache

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """The logits after the last of `ids`; `mask` has the columns of the cache too."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits: torch.Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]
