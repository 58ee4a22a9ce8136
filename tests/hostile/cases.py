"""What a case of the corpus is, and the valid inputs that the cases break."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

STUDY = """\
study: mine
question: Does it hold?
models:
  7b:
    base: {organism: {size: small}}
    aligned:
      tuned:
        data: {pool: {language: align.jsonl}, settings: {size: 3050}}
        train: {method: full, dtype: float32, learning_rate: 2e-3, epochs: 3}
    quantisation: nf4
    dtype: float32
data:
  pool: {language: benign.jsonl}
  settings: {size: 1024}
train: {learning_rate: 5e-3, steps: 200, global_batch: 16, max_tokens: 96}
axes:
  train.rank: [8]
  apply.threshold: [null, 0.3]
suites:
  refusal: {prompts: {language: refusal.jsonl}, measure: {kind: refusal, scorer: organism}}
  task: {prompts: {language: task.jsonl}, measure: {kind: task}}
objectives: [refusal_rate, task_accuracy]
"""
Make = Callable[[Path], None]
Content = str | bytes


@dataclass(frozen=True)
class Case:
    """`command` runs in a folder that `make` has filled. Its exit code is `code`, and its output
    holds `phrase`. Nothing in the folder changes but what `writes` names. With `has_home`, the
    folder holds a home that has run the study `tiny`.
    """

    name: str
    command: str
    phrase: str
    make: Make
    code: int = 1
    writes: tuple[str, ...] = ()
    has_home: bool = False


def files(**content: Content) -> Make:
    """A maker of files, by name; `__` in a name stands for a dot, and `___` for a slash."""
    named = {name.replace("___", "/").replace("__", "."): text for name, text in content.items()}
    return written(named)


def written(content: Mapping[str, Content]) -> Make:
    """A maker of files: relative path -> text or bytes."""

    def make(folder: Path) -> None:
        for name, text in content.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))

    return make


def both(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for each in makes:
            each(folder)

    return make


def study(**lines: str) -> str:
    """STUDY with whole top-level entries replaced, or added, as YAML."""
    kept: dict[str, list[str]] = {}
    name = ""
    for line in STUDY.splitlines():
        if not line.startswith(" "):
            name = line.partition(":")[0]
        kept.setdefault(name, []).append(line)
    for key, text in lines.items():
        kept[key] = [f"{key}: {text}" if text else ""]
    return "\n".join(line for each in kept.values() for line in each) + "\n"


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
