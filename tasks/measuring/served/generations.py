"""Generations at a server: the prompts of all adapters and settings of one model in one stream.

Members are asked in the order of their adapters, so few adapters are in use at once. A member is
written as soon as its last completion is there. One that cannot be asked is left out, and the
worker runs it alone, so that the error is its own.

The model alone is never asked beside an adapter. On a CPU vLLM 0.32 gives rows without an adapter
that of its last slot: their index is -1 (vllm/lora/ops/torch_ops/lora_ops.py).

Invariant: a completion that does not arrive is an error, never an empty text.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from ebbline.tasks.chat.probes import probe
from ebbline.tasks.chat.thoughts import completion_text
from ebbline.tasks.errors import DataError, EbblineError, ModelError
from ebbline.tasks.measuring import generate
from ebbline.tasks.measuring.grouped.generations import Member, prepared, require_prepared
from ebbline.tasks.measuring.served.client import Completed, greedy
from ebbline.tasks.measuring.served.server import Server, server_for
from ebbline.tasks.measuring.served.stream import streamed
from ebbline.tasks.measuring.served.wanted import Wanted, longest
from ebbline.tasks.models.decoding import end_tokens, settings_not_used, shipped
from ebbline.tasks.specs import GenerateSpec
from ebbline.tasks.stage import Context


def run(members: Sequence[Member]) -> Iterator[Member]:
    """Measure the members; yields each when its files are written. Members that are not yielded
    have to run alone. Raises EndpointDown for a server that does not answer.
    """
    first, began = members[0], time.monotonic()
    tokenizer = first.ctx.residents.tokenizer(first.inputs["model"], first.spec.chat)
    joining = [member for member in members if _can_join(member, tokenizer)]
    if not joining:
        return
    adapters = list(dict.fromkeys(member.adapter for member in joining))
    joining.sort(key=lambda member: (member.adapter is not None, adapters.index(member.adapter)))
    stream = _Stream(joining, tokenizer)
    for member, answers in stream.run():
        _write(member, answers, stream, tokenizer)
        # Answers of several members arrive mixed: each has the time since the one before it
        member.seconds, began = time.monotonic() - began, time.monotonic()
        yield member


def run_alone(spec: GenerateSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    """Measure one generation. Raises EbblineError if it cannot be measured."""
    member = Member(spec, inputs, out, ctx)
    tokenizer = ctx.residents.tokenizer(
        inputs["model"], spec.chat, adapter=generate.tokenizer_beside(spec, inputs)
    )
    require_prepared(member, tokenizer)
    _require_length(member)
    stream = _Stream([member], tokenizer)
    for _, answers in stream.run():
        _write(member, answers, stream, tokenizer)
    if stream.failures:
        raise stream.failures[member]


def _write(
    member: Member, answers: Sequence[tuple[str, int, bool]], stream: "_Stream", tokenizer: Any
) -> None:
    assert member.asked is not None
    decoded = stream.record(member)
    generate.write(
        member.spec, member.inputs, member.out, member.asked, answers, decoded, tokenizer
    )


def _can_join(member: Member, tokenizer: Any) -> bool:
    if not prepared(member, tokenizer):
        return False
    try:
        _require_length(member)
        Wanted.by(member.spec, member.inputs["model"], 1, _adapters([member]))
    except EbblineError:
        return False
    return True


def _require_length(member: Member) -> None:
    most = longest(member.inputs["model"])
    if most is not None and _tokens(member) > most:
        raise DataError(
            f"a prompt with its completion takes {_tokens(member)} tokens, and a server gives "
            f"this model at most {most}; lower max_new_tokens, or shorten the prompt"
        )


def _tokens(member: Member) -> int:
    return max(map(len, member.encoded)) + member.spec.max_new_tokens


def _adapters(members: Sequence[Member]) -> list[Path]:
    found = dict.fromkeys(member.adapter for member in members)
    return [adapter for adapter in found if adapter is not None]


def _may_meet(one: tuple[Member, int], other: tuple[Member, int]) -> bool:
    """Whether two prompts may be decoded together: both of the model alone, or both of adapters."""
    return (one[0].adapter is None) == (other[0].adapter is None)


class _Stream:
    """The requests of members of one model to one server. `failures` has the members whose adapter
    the server did not load.
    """

    def __init__(self, members: Sequence[Member], tokenizer: Any) -> None:
        first = members[0]
        self._members, self._tokenizer, self._ctx = members, tokenizer, first.ctx
        self.failures: dict[Member, ModelError] = {}
        model = first.inputs["model"]
        wanted = Wanted.by(first.spec, model, max(map(_tokens, members)), _adapters(members))
        self._server: Server = server_for(wanted, first.ctx)
        self._own = shipped(model)
        self._ends = end_tokens(self._own, tokenizer)

    def record(self, member: Member) -> dict[str, Any]:
        """What a generation records of its decoding, beside its Spec."""
        return {
            "end_tokens": self._ends,
            "not_used": settings_not_used(self._own, member.spec.decoding),
            "server": self._server.record(),
        }

    def run(self) -> Iterator[tuple[Member, list[tuple[str, int, bool]]]]:
        """Each member with its completions, once it has all. Raises EndpointDown and Leaving."""
        answers: dict[Member, dict[int, Completed]] = {member: {} for member in self._members}
        asked = streamed(
            [(member, n) for member in self._members for n in range(len(member.encoded))],
            self._request,
            self._server.at_once,
            self._ctx.leaving,
            _may_meet,
        )
        with closing(asked):
            for (member, prompt), answer in asked:
                answers[member][prompt] = answer
                count, of = len(answers[member]), len(member.encoded)
                member.ctx.progress(count, of, "completions")
                if count == of:
                    yield member, [self._text(answers[member].pop(n)) for n in range(of)]

    def _request(self, item: tuple[Member, int]) -> Callable[[], Completed] | None:
        """The request for a member's prompt; None for a member whose adapter is not loaded."""
        member, prompt = item
        if member in self.failures:
            return None
        try:
            name = self._server.name_of(member.adapter)
        except ModelError as error:
            self.failures[member] = error
            return None
        settings = greedy(member.spec.decoding, member.spec.max_new_tokens, self._ends)
        return partial(self._server.client.complete, name, member.encoded[prompt], settings)

    def _text(self, answer: Completed) -> tuple[str, int, bool]:
        """(text, number of tokens, whether it ended), as transformers' completions are written."""
        tokens: Sequence[int] | None = answer.tokens
        if tokens is None:  # the text has the special tokens' names, which are read back
            tokens = self._tokenizer.encode(answer.text, add_special_tokens=False)
        opened = probe(self._tokenizer).opens
        return completion_text(self._tokenizer, opened, tokens), answer.count, answer.ended
