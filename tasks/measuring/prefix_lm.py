"""lm-eval's model on our own terms: what several requests begin with is run once, the rest of each
on top of its cache.

The five shots before a subject's questions and the context before an item's endings are most of the
tokens of MMLU and HellaSwag. The language-model head is applied only where something is scored.
Results equal those of lm-eval's own HFLM up to rounding. One prefix a request is shared, the one
that saves most; models whose cache is not plain attention go HFLM's own way.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ebbline.tasks.errors import EvaluationError

# A prefix that saves a smaller share of its rows' tokens is not worth a forward pass of its own
WORTH = 0.1
NEEDED = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
Encoded = tuple[
    Any, list[int], list[int]
]  # lm-eval's: (strings or None, context tokens, continuation tokens)
Tokens = np.ndarray[Any, np.dtype[np.int32]]


@dataclass
class RequestRow:
    """One sequence to run, with every request that it answers: (index, continuation). One-letter
    answers share a row.
    """

    tokens: Tokens
    asked: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def scored(self) -> int:
        return max(len(continuation) for _, continuation in self.asked)

    @property
    def sharable(self) -> Tokens:
        return self.tokens[: len(self.tokens) - self.scored]


@dataclass(frozen=True)
class Group:
    """Rows with the same first tokens; `tokens` of each row are what follows `prefix` (none of them
    is scored).
    """

    prefix: Tokens
    rows: list[RequestRow]


@dataclass(frozen=True)
class Plan:
    """What to run, made once for a base model and run for each adapter. `tokens` are run, of `full`
    without sharing.
    """

    groups: list[Group]
    requests: int
    truncated: int
    tokens: int
    full: int


def plan(requests: Sequence[Encoded], max_length: int) -> Plan:
    """The cheapest grouping by tokens. Too long a context loses its beginning, as in lm-eval.
    Raises EvaluationError.
    """
    rows: dict[bytes, RequestRow] = {}
    truncated = 0
    for index, (_, context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise EvaluationError(
                f"request {index}: {len(context)} and {len(continuation)} tokens, the "
                f"model takes {max_length}"
            )
        truncated += len(context) + len(continuation) > max_length + 1
        tokens = np.array((context + continuation)[-(max_length + 1) :][:-1], np.int32)
        rows.setdefault(tokens.tobytes(), RequestRow(tokens)).asked.append((index, continuation))
    # In the order of their bytes, rows with a common beginning stand together.
    ordered = sorted(rows.values(), key=lambda row: row.sharable.tobytes())
    runs = {
        start: (end, length)
        for start, end, length in shared_runs(
            [_common(a.sharable, b.sharable) for a, b in pairwise(ordered)]
        )
    }
    groups: list[Group] = []
    place = 0
    while place < len(ordered):
        end, length = runs.get(place, (place + 1, 0))
        if length * (end - place - 1) < WORTH * sum(len(row.tokens) for row in ordered[place:end]):
            end, length = place + 1, 0
        rest = [RequestRow(row.tokens[length:].copy(), row.asked) for row in ordered[place:end]]
        groups.append(
            Group(
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
    """Disjoint runs of sequences (start, end, shared length) that save most: (end - start - 1) *
    length, summed.

    `common[i]` is what sequences i and i + 1 have in common. Runs nest like intervals of a prefix
    tree, so each is kept whole or split into the runs inside it, whichever saves more; one pass
    with a stack of the open ones.
    """
    open_runs: list[tuple[int, int, int, list[tuple[int, int, int]]]] = [
        (0, 0, 0, [])
    ]  # length, start, saved inside, runs inside
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
    """One layer of finished prefixes: read by many rows, changed by none of them."""

    def __init__(self, done: DynamicLayer, prefix_of_row: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(done.keys, done.values)
        self.keys, self.values, self.prefix_of_row = done.keys, done.values, prefix_of_row

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys[self.prefix_of_row], self.values[self.prefix_of_row]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class PrefixLM(HFLM):  # type: ignore[misc]
    @property
    def shares_prefixes(self) -> bool:
        """Whether this model has a plain attention cache in every layer and a head that can be told
        where to look.
        """
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        layers = DynamicCache(config=self.config).layers
        return bool(
            inspect.signature(base.forward).parameters.keys() >= NEEDED
            and layers
            and {type(x) for x in layers} == {DynamicLayer}
        )

    def encode(self, context: str, continuation: str) -> Encoded:
        """The tokens that lm-eval scores for this pair."""
        if context:
            return ((context, continuation), *self._encode_pair(context, continuation))
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        split = (
            ([self.prefix_token_id], tokens)
            if tokens[:1] != [self.prefix_token_id]
            else (tokens[:1], tokens[1:])
        )
        return ((context, continuation), *split)

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not self.shares_prefixes:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm, override_bs
            )
            return found
        return self.score(plan(requests, self.max_length))

    @torch.inference_mode()
    def score(
        self, work: Plan, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would say it) of every request; batches are
        halved when memory runs out.
        """
        answers: dict[int, tuple[float, bool]] = {}
        waiting, size = list(work.groups), int(self.batch_size)
        while waiting:
            pack = _together(waiting, size)
            try:
                for found in self._answers(pack, size):
                    answers.update(found)
                    progress(len(answers), work.requests)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                continue
            del waiting[: len(pack)]
        return [answers[index] for index in range(work.requests)]

    def _answers(self, pack: Sequence[Group], size: int) -> Iterator[dict[int, tuple[float, bool]]]:
        rows = [(place, row) for place, group in enumerate(pack) for row in group.rows]
        before = [len(group.prefix) for group in pack]
        held = None
        if before[0]:
            held = DynamicCache(config=self.config)
            ids, attended = self._padded([group.prefix for group in pack])
            self._forward(ids, attended, attended.cumsum(-1) - 1, held, 1)
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            prefix_of_row = torch.tensor([place for place, _ in some], device=self.device)
            ids, mask = self._padded([row.tokens for _, row in some])
            positions = (
                mask.cumsum(-1)
                - 1
                + torch.tensor([[before[place]] for place, _ in some], device=self.device)
            )
            cache = None
            if held is not None:
                cache, mask = (
                    DynamicCache(config=self.config),
                    torch.cat([attended[prefix_of_row], mask], dim=-1),
                )
                cache.layers = [_Prefix(layer, prefix_of_row) for layer in held.layers]
            logits = self._forward(ids, mask, positions, cache, max(row.scored for _, row in some))
            yield _scored([row for _, row in some], logits.to(self.softmax_dtype or logits.dtype))

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
        """Ids and mask, (rows, longest), padded on the left, so that what is scored lies at the end
        of every row.
        """
        ids = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, ids.shape[1] - len(row) :], mask[place, ids.shape[1] - len(row) :] = row, 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)


def _together(waiting: Sequence[Group], size: int) -> list[Group]:
    """The next groups, up to `size` rows: those without a prefix apart, and none whose prefix would
    be mostly padding.
    """
    pack, rows = [waiting[0]], len(waiting[0].rows)
    for group in waiting[1:size]:
        rows += len(group.rows)
        if rows > size or 2 * len(group.prefix) < len(pack[0].prefix):
            break
        pack.append(group)
    return pack


def _scored(rows: Sequence[RequestRow], logits_BKV: torch.Tensor) -> dict[int, tuple[float, bool]]:
    """The answers to every request of these rows. B rows, their last K positions, V words; R
    requests.
    """
    width = logits_BKV.shape[1]
    asked = [
        (place, index, continuation)
        for place, row in enumerate(rows)
        for index, continuation in row.asked
    ]
    row_R1 = torch.tensor([[place] for place, _, _ in asked], device=logits_BKV.device)
    word_RK = torch.tensor(
        [[-1] * (width - len(words)) + words for _, _, words in asked], device=logits_BKV.device
    )
    counts_RK = word_RK >= 0
    picked_RK = logits_BKV[
        row_R1, torch.arange(width, device=logits_BKV.device), word_RK.clamp(min=0)
    ]
    logprob_RK = picked_RK - logits_BKV.logsumexp(-1)[row_R1[:, 0]]
    greedy_RK = logits_BKV.argmax(-1)[row_R1[:, 0]] == word_RK
    total_R = torch.where(counts_RK, logprob_RK, 0.0).sum(-1).tolist()
    says_R = (greedy_RK | ~counts_RK).all(-1).tolist()
    return {
        index: (total, says)
        for (_, index, _), total, says in zip(asked, total_R, says_R, strict=True)
    }
