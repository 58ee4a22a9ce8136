"""Log-likelihoods of continuations: a prefix shared by several requests runs once, and the rest of
each request on top of the prefix's key-value cache. Imports no lm-eval: the lm-eval model is
ebbline.tasks.measuring.lm_tasks.prefix_model.

Most tokens of MMLU and HellaSwag are in shared prefixes: the shots before a subject's questions,
and the context before an item's endings. Each request shares at most one prefix, the one that saves
most tokens. The language-model head is applied only to scored positions.

Invariant: results equal those of lm-eval's HFLM up to rounding, and their bits follow from the
requests and the batch size of the Spec alone. Models whose cache is not plain attention run as in
HFLM.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ebbline.tasks.data.batch_shape import rows_together
from ebbline.tasks.data.batches import even_threads, whole_batches
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.models.decoding import has_plain_cache

# A prefix that saves a smaller share of its rows' tokens does not get a forward pass of its own.
SMALLEST_SAVING = 0.1
# lm-eval's form: (strings or None, context tokens, continuation tokens).
Encoded = tuple[Any, list[int], list[int]]
Tokens = np.ndarray[Any, np.dtype[np.int32]]


@dataclass
class RequestRow:
    """One sequence to run, and the requests that it answers, each as (index, continuation).

    The one-token choices of a question (A, B, C, D) share a row.
    """

    tokens: Tokens
    requests: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def scored(self) -> int:
        """The number of scored positions, which are the last ones."""
        return max(len(continuation) for _, continuation in self.requests)

    @property
    def sharable(self) -> Tokens:
        """The tokens that may be part of a shared prefix."""
        return self.tokens[: len(self.tokens) - self.scored]


@dataclass(frozen=True)
class PrefixGroup:
    """Rows that begin with `prefix`. Each row's `tokens` are those after it; no position of the
    prefix is scored.
    """

    prefix: Tokens
    rows: list[RequestRow]


@dataclass(frozen=True)
class Plan:
    """The groups to run, planned once for a base model and run for each adapter.

    `tokens` counts the tokens to run, `full` those without shared prefixes.
    """

    groups: list[PrefixGroup]
    requests: int
    truncated: int
    tokens: int
    full: int


def plan(requests: Sequence[Encoded], max_length: int) -> Plan:
    """The grouping with the fewest tokens to run.

    A request longer than the model's `max_length` loses the beginning of its context, as in
    lm-eval. Raises EvaluationError for an empty context, an empty continuation or one that is too
    long.
    """
    rows: dict[bytes, RequestRow] = {}
    truncated = 0
    for index, (_, context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise EvaluationError(
                f"request {index} has {len(context)} tokens of context and {len(continuation)} of "
                f"continuation; both need at least 1, and the model takes at most {max_length}"
            )
        truncated += len(context) + len(continuation) > max_length + 1
        tokens = np.array((context + continuation)[-(max_length + 1) :][:-1], np.int32)
        rows.setdefault(tokens.tobytes(), RequestRow(tokens)).requests.append((index, continuation))
    # Sorted by bytes, rows with a common prefix are neighbours.
    ordered = sorted(rows.values(), key=lambda row: row.sharable.tobytes())
    runs = {
        start: (end, length)
        for start, end, length in shared_runs(
            [_common(a.sharable, b.sharable) for a, b in pairwise(ordered)]
        )
    }
    groups: list[PrefixGroup] = []
    place = 0
    while place < len(ordered):
        end, length = runs.get(place, (place + 1, 0))
        unshared = sum(len(row.tokens) for row in ordered[place:end])
        if length * (end - place - 1) < SMALLEST_SAVING * unshared:
            end, length = place + 1, 0
        rest = [RequestRow(row.tokens[length:].copy(), row.requests) for row in ordered[place:end]]
        groups.append(
            PrefixGroup(
                ordered[place].tokens[:length].copy(),
                sorted(rest, key=lambda row: -len(row.tokens)),
            )
        )
        place = end
    groups.sort(key=lambda group: (-len(group.prefix), -len(group.rows[0].tokens)))
    run = sum(len(group.prefix) + sum(len(row.tokens) for row in group.rows) for group in groups)
    return Plan(
        groups, len(requests), truncated, run, sum(len(row.tokens) for row in rows.values())
    )


def _common(a: Tokens, b: Tokens) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def shared_runs(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Disjoint runs of sequences, as (start, end, shared length), that save the most tokens.

    A run saves (end - start - 1) * length. `common[i]` is the length of the common prefix of
    sequences i and i + 1. Runs nest like the nodes of a prefix tree. Each run is kept whole or
    replaced by the runs inside it, whichever saves more. One pass with a stack of open runs.
    """
    # Each open run: length, start, tokens saved inside, runs inside.
    open_runs: list[tuple[int, int, int, list[tuple[int, int, int]]]] = [(0, 0, 0, [])]
    for place, length in enumerate([*common, 0]):
        start, saved, inside = place, 0, list[tuple[int, int, int]]()
        while open_runs[-1][0] > length:
            depth, start, saved, inside = open_runs.pop()
            if depth * (place - start) >= saved:
                saved, inside = depth * (place - start), [(start, place + 1, depth)]
            above = open_runs[-1]
            if above[0] >= length:
                open_runs[-1] = (above[0], above[1], above[2] + saved, above[3] + inside)
                saved, inside = 0, []
        if length > open_runs[-1][0]:
            open_runs.append((length, start, saved, inside))
    return open_runs[0][3]


class _Prefix(DynamicLayer):  # type: ignore[misc]
    """One layer of the cache of finished prefixes. Many rows read it; none changes it."""

    def __init__(self, done: DynamicLayer, prefix_of_row: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(done.keys, done.values)
        self.keys, self.values, self.prefix_of_row = done.keys, done.values, prefix_of_row

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys[self.prefix_of_row], self.values[self.prefix_of_row]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class PrefixScorer:
    """Scores requests on one model. A subclass has the attributes below; lm-eval's model has most
    of them as properties.
    """

    model: Any
    config: Any
    device: Any
    batch_size: Any  # rows of a batch; lm-eval may hold it as text
    softmax_dtype: torch.dtype | None

    @property
    def shares_prefixes(self) -> bool:
        """Whether the model has a plain attention cache in every layer and `logits_to_keep`."""
        return has_plain_cache(self.model)

    @torch.inference_mode()
    def score(
        self, work: Plan, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives this continuation) of every request.

        Raises EvaluationError for a batch that does not fit in memory.
        """
        answers: dict[int, tuple[float, bool]] = {}
        waiting, most = list(work.groups), int(self.batch_size)
        while waiting:
            longest = max(len(group.rows[0].tokens) for group in waiting[:most])
            size = rows_together(len(waiting[0].prefix) + longest, 0, most)
            chosen = _next_groups(waiting, size)
            with even_threads(), whole_batches(size):
                for batch_answers in self._answers(chosen, size):
                    answers.update(batch_answers)
                    progress(len(answers), work.requests)
            del waiting[: len(chosen)]
        return [answers[index] for index in range(work.requests)]

    def _answers(
        self, groups: Sequence[PrefixGroup], size: int
    ) -> Iterator[dict[int, tuple[float, bool]]]:
        rows = [(place, row) for place, group in enumerate(groups) for row in group.rows]
        lengths = [len(group.prefix) for group in groups]
        prefixes = None
        if lengths[0]:
            prefixes = DynamicCache(config=self.config)
            ids, prefix_mask = self._padded([group.prefix for group in groups])
            self._forward(ids, prefix_mask, prefix_mask.cumsum(-1) - 1, prefixes, 1)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            prefix_of_row = torch.tensor([place for place, _ in batch], device=self.device)
            ids, mask = self._padded([row.tokens for _, row in batch])
            positions = (
                mask.cumsum(-1)
                - 1
                + torch.tensor([[lengths[place]] for place, _ in batch], device=self.device)
            )
            cache = None
            if prefixes is not None:
                cache, mask = (
                    DynamicCache(config=self.config),
                    torch.cat([prefix_mask[prefix_of_row], mask], dim=-1),
                )
                cache.layers = [_Prefix(layer, prefix_of_row) for layer in prefixes.layers]
            logits = self._forward(ids, mask, positions, cache, max(row.scored for _, row in batch))
            yield _scored([row for _, row in batch], logits.to(self.softmax_dtype or logits.dtype))

    def _forward(
        self, ids: Any, mask: Any, positions: Any, cache: DynamicCache | None, keep: int
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        ).logits
        return logits

    def _padded(self, rows: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, both (rows, longest), padded on the left: scored positions are the last
        ones of every row.
        """
        ids = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, ids.shape[1] - len(row) :], mask[place, ids.shape[1] - len(row) :] = row, 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)


def _next_groups(waiting: Sequence[PrefixGroup], size: int) -> list[PrefixGroup]:
    """The next groups to run together, with at most `size` rows if there is more than one group.

    A prefix of less than half the first one's length is left for later: it would be mostly padding.
    So groups with and without a prefix never mix.
    """
    chosen, rows = [waiting[0]], len(waiting[0].rows)
    for group in waiting[1:size]:
        rows += len(group.rows)
        if rows > size or 2 * len(group.prefix) < len(chosen[0].prefix):
            break
        chosen.append(group)
    return chosen


def _scored(rows: Sequence[RequestRow], logits_BKV: torch.Tensor) -> dict[int, tuple[float, bool]]:
    """The answers to every request of these rows.

    Legend: B rows, K last positions, V vocabulary, R requests.
    """
    width = logits_BKV.shape[1]
    requests = [
        (place, index, continuation)
        for place, row in enumerate(rows)
        for index, continuation in row.requests
    ]
    row_R1 = torch.tensor([[place] for place, _, _ in requests], device=logits_BKV.device)
    word_RK = torch.tensor(
        [[-1] * (width - len(words)) + words for _, _, words in requests],
        device=logits_BKV.device,
    )
    counts_RK = word_RK >= 0
    picked_RK = logits_BKV[
        row_R1, torch.arange(width, device=logits_BKV.device), word_RK.clamp(min=0)
    ]
    logprob_RK = picked_RK - logits_BKV.logsumexp(-1)[row_R1[:, 0]]
    greedy_RK = logits_BKV.argmax(-1)[row_R1[:, 0]] == word_RK
    total_R = torch.where(counts_RK, logprob_RK, 0.0).sum(-1).tolist()
    is_greedy_R = (greedy_RK | ~counts_RK).all(-1).tolist()
    return {
        index: (total, is_greedy)
        for (_, index, _), total, is_greedy in zip(requests, total_R, is_greedy_R, strict=True)
    }
