"""The answer of a completion that may begin with a thought.

A reasoning model writes a thought and then its answer. Only the answer is judged. The marks of a
thought differ between models:

    <think>...</think>, <thinking>, <thought>, <reasoning>, <seed:think>    tags
    [THINK]...[/THINK]                                                      Magistral
    <|begin_of_thought|>...<|end_of_thought|>, <|START_THINKING|>           special tokens
    \u25c1think\u25b7...\u25c1/think\u25b7                                                  Kimi
    <|channel|>analysis<|message|>...<|channel|>final<|message|>            gpt-oss (harmony)
    <|channel>thought ...<channel|>, <unused94>thought ...<unused95>        Gemma

A chat template may write the opening mark itself; then the completion has the closing one only.

Invariant: a thought without an end, or without an answer after it, has no answer. No text of a
thought is ever judged as the answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Lack = Literal["empty", "thought: cut off", "thought: no answer"]

_NAME = (
    r"(?:[a-z]+[:_])?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|analysis"
    r"|inner_?monologue|inner_?thoughts?|chain_?of_?thought|cot|scratch_pad)(?:_(?:fast|slow|process|content))?"
)
_BAR = r"[|\uff5c]"
_TOKEN = (
    rf"(?:(?!{_BAR}>)[^\s<>]){{0,40}}?(?:think|thought|reasoning)(?:(?!{_BAR}>)[^\s<>]){{0,40}}?"
)
_ENDS = r"(?:end|stop|close|/)"
_CLOSE = (
    rf"<\s*/\s*{_NAME}\s*>|\[/\s*{_NAME}\]|\u25c1/\s*{_NAME}\u25b7|<channel{_BAR}>|<unused95>"
    rf"|<{_BAR}(?={_ENDS}){_TOKEN}{_BAR}>|<{_BAR}{_TOKEN}[_\u2581-]{_ENDS}{_BAR}>"
    rf"|<{_BAR}inner_suffix{_BAR}>"
)
_OPEN = (
    rf"<\s*{_NAME}(?:\s[^<>]*)?>|\[{_NAME}\]|\u25c1{_NAME}\u25b7|<{_BAR}channel>(?:thought\b)?"
    rf"|<unused94>(?:thought\b)?|<{_BAR}{_TOKEN}{_BAR}>|<{_BAR}inner_prefix{_BAR}>"
)
_MARK = re.compile(rf"(?P<empty><\s*{_NAME}\s*/>)|(?P<close>{_CLOSE})|(?P<open>{_OPEN})", re.I)
_OPEN_AT_THE_END = re.compile(
    rf"(?:{_OPEN}|<\|channel\|>\s*(?:analysis|commentary)\s*<\|message\|>)\s*\Z", re.I
)

# Harmony: every message has a channel, and the answer's is "final". Decoded without its special
# tokens it reads "analysisThe user ...assistantfinalThe answer".
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>", re.I)
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start)\|>", re.I)
_BARE_ANALYSIS = re.compile(r"\s*(?:analysis|commentary)(?=[A-Z\"'\u2018\u201c])")
_BARE_CHANNEL = re.compile(r"\s*(?:assistant\s*)?(?:analysis|commentary)")
_BARE_FINAL = re.compile(r"assistant\s*final(?:\s*json)?")
# The answer's own wrapper.
_WRAPPER = re.compile(
    r"</?\s*(?:answer|final_?answer|final|response|solution|output)\s*>"
    r"|<\|(?:begin|end|start)_(?:of_)?(?:solution|answer|response|text)\|>"
    r"|\[/?(?:answer|response)\]",
    re.I,
)


@dataclass(frozen=True)
class Answer:
    """The part of a completion that answers, or the code of what it lacks."""

    text: str
    lacks: Lack | None = None


def answer_of(completion: str) -> Answer:
    """What a completion says after its thoughts, without the tags around an answer."""
    if not completion.strip():
        return Answer("", "empty")
    answer, thought = _outside_thoughts(completion)
    if answer is None:
        return Answer("", "thought: cut off")
    text = _WRAPPER.sub(" ", answer).strip()
    return Answer(text, None if text else "thought: no answer" if thought else "empty")


def _outside_thoughts(completion: str) -> tuple[str | None, bool]:
    """(the text outside thoughts, or None for a thought without an end; whether there is one)."""
    channels = list(_CHANNEL.finditer(completion))
    if channels:
        final = next((each for each in reversed(channels) if each[1].lower() == "final"), None)
        if final is None:
            return None, True
        return _CHANNEL_END.split(completion[final.end() :], maxsplit=1)[0], True
    parts = _BARE_FINAL.split(completion)
    if len(parts) > 1 and (not parts[0].strip() or _BARE_CHANNEL.match(completion)):
        return parts[-1], True
    if _BARE_ANALYSIS.match(completion):
        return None, True
    if "<|channel|>" in completion:
        return None, True
    outside, start, depth, thought = "", 0, 0, False
    for mark in _MARK.finditer(completion):
        between, thought = completion[start : mark.start()], True
        if mark["close"]:
            # A close without an open ends a thought that the chat template opened.
            outside = outside if depth else ""
            depth = max(0, depth - 1)
        else:
            outside += "" if depth else between
            # A model may repeat the mark that its chat template wrote.
            depth += not (mark["empty"] or (depth and not between.strip()))
        start = mark.end()
    return (None if depth else outside + completion[start:]), thought


def opened_thought(prompt: str) -> str:
    """The mark of a thought that a rendered prompt leaves open at its end, else nothing."""
    found = _OPEN_AT_THE_END.search(prompt[-200:])
    return "" if found is None else found[0]


def completion_text(tokenizer: Any, opened: str, tokens: Sequence[int]) -> str:
    """The text of generated tokens, without special tokens but with every mark of a thought.

    Some tokenizers hold these marks as special tokens, which decoding drops. `opened` is the mark
    that the chat template writes before an answer. It begins the text, so that a thought without an
    end is seen.
    """
    added = tokenizer.added_tokens_decoder
    special = {token for token in set(tokens) if token in added and added[token].special}
    marks = {token for token in special if _TOKEN_KEPT.fullmatch(added[token].content)}
    if not marks:
        return opened + str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    kept = [token for token in tokens if token in marks or token not in special]
    return opened + str(tokenizer.decode(kept, skip_special_tokens=False))


_TOKEN_KEPT = re.compile(
    rf"{_MARK.pattern}|{_WRAPPER.pattern}|<\|(?:channel|message|start|end|return|call|constrain)\|>",
    re.I,
)
