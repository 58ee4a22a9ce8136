"""Generations of several settings of one model, measured together.

Members are taken in the order of their adapters, a few at once: as many as fill the rows of a wide
step. Each is written as soon as its completions are there. A member that cannot be measured this
way is left out, and the worker runs it alone.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ebbline.tasks.chat.template import encode_prompts
from ebbline.tasks.data.batch_shape import BatchShape
from ebbline.tasks.data.batches import (
    even_threads,
    filled_batch,
    lacks_memory,
    require_room,
    rows_meet,
)
from ebbline.tasks.errors import EbblineError, Leaving
from ebbline.tasks.measuring import generate
from ebbline.tasks.measuring.grouped.decoding import Block, Decoder
from ebbline.tasks.measuring.grouped.layers import (
    AdapterReader,
    Loras,
    ManyAdapters,
    NotAlike,
    nearest_order,
)
from ebbline.tasks.models.decoding import end_tokens, has_plain_cache
from ebbline.tasks.specs import GenerateSpec
from ebbline.tasks.stage import Context

WIDE_ROWS = 512  # more gain nothing on a CPU: the tensors of a step leave its cache
WIDE_BYTES = 1 << 30  # of keys and values in a wide step


@dataclass(eq=False)
class Member:
    """One generation of a group; `seconds` is its share of the time."""

    spec: GenerateSpec
    inputs: Mapping[str, Path]
    out: Path
    ctx: Context
    seconds: float = 0.0
    asked: generate.Asked | None = None
    texts: tuple[str, ...] = ()
    encoded: Sequence[list[int]] = ()
    tokens: dict[int, list[int]] = field(default_factory=dict)

    @property
    def adapter(self) -> Path | None:
        return self.inputs.get("adapter")


def run(members: Sequence[Member]) -> Iterator[Member]:
    """Measure the members; yields each when its files are written. Members that are not yielded
    have to run alone. Raises Leaving once the machine is about to go.
    """
    first, began = members[0], time.monotonic()
    residents = first.ctx.residents
    try:
        model, tokenizer = residents.model(
            first.inputs["model"],
            first.spec.quantisation,
            first.spec.dtype,
            first.ctx.device,
            first.spec.chat,
        )
    except EbblineError:
        return  # each member fails with an error of its own
    model.eval()
    not_alike: set[str] = residents.remembered("not alike", set)
    if not_alike or rows_meet(model) or not has_plain_cache(model):
        return
    joining = [member for member in members if prepared(member, tokenizer)]
    group = _Group(model, tokenizer, residents, first.spec)
    if joining and not group.is_wider(joining):
        return  # there would be nothing to gain, and nothing to compare the bits with
    for chosen, loras in group.portions(joining):
        try:
            group.decode(chosen, loras)
        except NotAlike:
            not_alike.add(first.spec.dtype)  # the next groups need not try
            return
        for member in chosen:
            _write(member, model, tokenizer)
            # What one member took of the time since the last portion
            member.seconds = (time.monotonic() - began) / len(chosen)
        yield from chosen
        began = time.monotonic()


def prepared(member: Member, tokenizer: Any) -> bool:
    """Read and tokenise the member's prompts. False for a member that fails; alone it will say
    why.
    """
    try:
        require_prepared(member, tokenizer)
    except EbblineError:
        return False
    return True


def require_prepared(member: Member, tokenizer: Any) -> None:
    """Read and tokenise the member's prompts. Raises EbblineError for prompts that cannot be
    measured.
    """
    residents = member.ctx.residents
    spec, prompts = member.spec, member.inputs["prompts"]
    member.asked = residents.remembered(
        ("asked", prompts, spec.model_dump_json(exclude={"max_new_tokens"})),
        lambda: generate.asked(spec, prompts),
    )
    texts = member.texts = tuple(prompt.text for prompt in member.asked.chosen.prompts)
    member.encoded = residents.remembered(
        ("chat", tokenizer, texts), lambda: encode_prompts(tokenizer, texts)
    )
    require_room(member.encoded, spec.max_new_tokens, spec.max_tokens)


def _write(member: Member, model: PreTrainedModel, tokenizer: Any) -> None:
    assert member.asked is not None
    tokens = [member.tokens[index] for index in range(len(member.encoded))]
    ends = end_tokens(model.generation_config, tokenizer)
    completions = generate.texts_of(tokenizer, [(row, len(row), row[-1] in ends) for row in tokens])
    decoded = generate.decoded_by(member.spec, model.generation_config, tokenizer)
    generate.write(
        member.spec, member.inputs, member.out, member.asked, completions, decoded, tokenizer
    )


class _Group:
    """The model that the members share."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, residents: Any, spec: GenerateSpec
    ) -> None:
        self._model, self._tokenizer, self._residents = model, tokenizer, residents
        self._batch_size = spec.batch_size
        self._proven = residents.remembered("proven", set)
        self._token_bytes = _cache_bytes(model)

    def portions(
        self, members: Sequence[Member]
    ) -> Iterator[tuple[list[Member], dict[Path | None, Loras]]]:
        """Members to measure at once, with their adapters: enough to fill a wide step."""
        reader = AdapterReader(self._model)
        of_adapter: dict[Path | None, list[Member]] = defaultdict(list)
        for member in members:
            of_adapter[member.adapter].append(member)
        chosen, loras, rows = list[Member](), dict[Path | None, Loras](), 0
        for adapter, own in of_adapter.items():
            try:
                found = reader.read(adapter)
            except EbblineError:
                continue
            if found is None:
                continue
            loras[adapter] = found
            chosen += own
            rows += sum(len(member.encoded) for member in own)
            if rows >= self._most_rows(own):
                yield chosen, loras
                chosen, loras, rows = [], {}, 0
        if chosen:
            yield chosen, loras

    def is_wider(self, members: Sequence[Member]) -> bool:
        """Whether two batches of the longest rows fit into one step."""
        return self._most_rows(members) >= 2 * self._batch_size

    def _most_rows(self, members: Sequence[Member]) -> int:
        longest = max(
            2 * len(row) + member.spec.max_new_tokens
            for member in members
            for row in member.encoded
        )
        return max(1, min(WIDE_ROWS, WIDE_BYTES // (self._token_bytes * longest)))

    def decode(self, members: Sequence[Member], loras: Mapping[Path | None, Loras]) -> None:
        """The tokens of each member's rows."""
        paths = list(loras)
        paths = [paths[place] for place in nearest_order(list(loras.values()))]
        many = ManyAdapters(self._model, [loras[path] for path in paths], self._residents)
        ends = end_tokens(self._model.generation_config, self._tokenizer)
        alike: dict[tuple[int, int], list[tuple[Member, list[int], Block]]] = defaultdict(list)
        for place, path in enumerate(paths):
            for member in members:
                if member.adapter == path:
                    for (rows, width), chosen, block in self._blocks(member, place):
                        alike[rows, width].append((member, chosen, block))

        def progress() -> None:
            if members[0].ctx.leaving():
                raise Leaving("the machine is about to go; this stage had not ended")
            for member in members:
                if len(member.tokens) < len(member.encoded):
                    member.ctx.progress(len(member.tokens), len(member.encoded), "completions")

        with many.on(), torch.inference_mode(), even_threads():
            decoder = Decoder(self._model, many, len(paths), ends, self._proven, progress)
            for (rows, width), blocks in sorted(alike.items(), reverse=True, key=itemgetter(0)):
                most = max(1, WIDE_ROWS // rows)
                room = width + max(block.new_tokens for _, _, block in blocks)
                most = max(1, min(most, WIDE_BYTES // (self._token_bytes * rows * room)))
                self._decode_alike(decoder, blocks, most)
        for member in members:
            member.ctx.progress(len(member.tokens), len(member.encoded), "completions")

    def _decode_alike(
        self,
        decoder: Decoder,
        blocks: Sequence[tuple[Member, list[int], Block]],
        most: int,
    ) -> None:
        """Decode blocks of one shape, at most `most` at once: half as many if memory lacks."""
        done = 0
        while done < len(blocks):
            chosen = blocks[done : done + most]
            try:
                found = decoder.decode([block for _, _, block in chosen])
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if most == 1 or not lacks_memory(error):
                    raise
                most //= 2
                continue
            for (member, indices, _), rows in zip(chosen, found, strict=True):
                member.tokens.update(zip(indices, rows, strict=True))
            done += len(chosen)

    def _blocks(
        self, member: Member, adapter: int
    ) -> Iterator[tuple[tuple[int, int], list[int], Block]]:
        """((rows, width), indices of the prompts, block) of each batch of the member alone."""
        shape = BatchShape(member.spec.max_new_tokens, self._batch_size)

        def padded() -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
            found = []
            for width, chosen in shape.batches(member.encoded):
                batch = filled_batch(
                    self._tokenizer,
                    member.encoded,
                    chosen,
                    shape.rows(width),
                    width,
                    member.ctx.device,
                )
                found.append((chosen, batch["input_ids"], batch["attention_mask"]))
            return found

        key = "batches", self._tokenizer, shape, member.texts
        for chosen, ids, mask in self._residents.remembered(key, padded):
            block = Block(adapter, ids, mask, len(chosen), member.spec.max_new_tokens)
            yield (ids.shape[0], ids.shape[1]), chosen, block


def _cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values, at most."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)
